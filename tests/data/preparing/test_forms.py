import pytest
from image_files import encode, photo
from imagenet_archives import image, tar, write_imagenet, write_tar
from tfrecord_files import write_tfrecord

from vit_jax.data.preparing.folders import FolderInput
from vit_jax.data.preparing.forms import open_input
from vit_jax.data.preparing.tars import TarInput
from vit_jax.data.preparing.tfrecord import TfrecordInput
from vit_jax.errors import UserError


def write_folder(root):
    for name in ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/2.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode(photo(9, 9)))
    return root


def test_every_form(tmp_path):
    assert isinstance(open_input(str(write_folder(tmp_path / "folder"))), FolderInput)
    assert isinstance(open_input(str(write_tfrecord(tmp_path / "tfds"))), TfrecordInput)
    imagenet = open_input(str(write_imagenet(tmp_path / "imagenet")))
    assert isinstance(imagenet, TarInput) and set(imagenet.splits) == {"train", "validation"}
    (tmp_path / "tars").mkdir()
    for name in ("a", "b"):
        write_tar(tmp_path / "tars" / f"{name}.tar", {"1.jpg": image(1)})
    assert open_input(str(tmp_path / "tars")).splits == {"train": 2}
    write_tar(tmp_path / "whole.tar", {
        f"{name}.tar": tar({"1.jpg": image(1)}) for name in ("a", "b")})
    assert open_input(str(tmp_path / "whole.tar")).splits == {"train": 2}


def test_compressed_files_beside_folders_are_no_obstacle(tmp_path):
    (write_folder(tmp_path) / "all.zip").write_bytes(b"x")
    assert isinstance(open_input(str(tmp_path)), FolderInput)


def test_archives_beside_what_was_unpacked_are_left_out(tmp_path):
    """train.tar and val.tar are no classes."""
    for split in ("train", "val"):
        write_folder(tmp_path / split)
        write_tar(tmp_path / f"{split}.tar", {"cat/1.jpg": image(1)})
    source = open_input(str(tmp_path))
    assert source.class_names == ("cat", "dog") and source.splits == {"train": 4, "validation": 4}
    assert source.left_out == ("train.tar", "val.tar")
    for split in ("train", "val"):
        (tmp_path / split).rename(tmp_path.with_name(f"{tmp_path.name} {split}"))
    for name in (".cache", "__MACOSX"):
        (tmp_path / name).mkdir()
    assert open_input(str(tmp_path)).class_names == ("train", "val")
    (tmp_path / "__MACOSX").rename(tmp_path / "docs")
    with pytest.raises(UserError, match="only one class, 'docs'.* Archives such as train.tar are"):
        open_input(str(tmp_path))


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_may_not_be_read(tmp_path, monkeypatch, kind):
    def deny(path, *_, **__):
        raise PermissionError(13, "Permission denied", path)

    path = tmp_path if kind == "folder" else tmp_path / "a.tar"
    write_tar(tmp_path / "a.tar", {"1.jpg": image(1)})
    with monkeypatch.context() as patch:
        for function in ("os.listdir", "os.scandir", "builtins.open"):
            patch.setattr(function, deny)
        with pytest.raises(UserError, match=f"{path} cannot be read .Permission denied.; check"):
            open_input(str(path))


def test_refusals(tmp_path):
    def refusal(path):
        with pytest.raises(UserError) as error:
            open_input(str(path))
        return str(error.value)

    assert "does not exist" in refusal(tmp_path / "nowhere")
    (tmp_path / "21k").mkdir()
    (tmp_path / "21k" / "winter21_whole.tar.gz").write_bytes(b"x")
    for path in (tmp_path / "21k", tmp_path / "21k" / "winter21_whole.tar.gz"):
        assert "winter21_whole.tar.gz is compressed, so it cannot be read in place; unpack" in (
            refusal(path))
    (tmp_path / "notes.txt").write_text("hello")
    assert "is neither a folder nor a tar file" in refusal(tmp_path / "notes.txt")
    write_tar(tmp_path / "flat.tar", {"1.jpg": image(1)})
    assert "flat.tar holds 0 tar files; one is needed for each of" in refusal(tmp_path / "flat.tar")
    folder = write_tfrecord(tmp_path / "tfds")
    for above in folder.parents[:2]:
        assert f"holds prepared data sets; give one of {folder}." in refusal(above)
    (tmp_path / "empty").mkdir()
    assert "no classes" in refusal(tmp_path / "empty")
