import pytest
from imagenet_archives import SORTED, TRUTH, WNIDS, image, tar, write_imagenet, write_tar

from vit_jax.data.imagenet import class_names
from vit_jax.data.preparing.imagenet import DEVKIT, TRAIN, VALIDATION, open_imagenet
from vit_jax.errors import UserError


def test_labels_and_images(tmp_path):
    source = open_imagenet(str(write_imagenet(tmp_path)))
    assert source.class_names == tuple(SORTED)
    assert source.splits == {"train": 12, "validation": 6}
    for index in range(12):
        item = source.read("train", index)
        label, number = divmod(index, 4)
        assert (item.image, item.label) == (image(100 * label + number), label)
        assert item.origin == f"{TRAIN}: {SORTED[label]}_{number}.JPEG"
    for number in range(1, 7):
        item = source.read("validation", number - 1)
        assert item.image == image(1000 + number)
        assert SORTED[item.label] == WNIDS[TRUTH[number - 1] - 1]
        assert item.example.features.feature["file_name"].bytes_list.value[0] == (
            f"ILSVRC2012_val_{number:08d}.JPEG".encode())


def test_one_archive_alone(tmp_path):
    write_imagenet(tmp_path)
    (tmp_path / VALIDATION).rename(tmp_path / "aside.tar")
    (tmp_path / DEVKIT).rename(tmp_path / "aside.tar.gz")
    assert open_imagenet(str(tmp_path)).splits == {"train": 12}
    (tmp_path / "aside.tar").rename(tmp_path / VALIDATION)
    with pytest.raises(UserError, match="devkit_t12.tar.gz is missing: it holds the labels"):
        open_imagenet(str(tmp_path))
    (tmp_path / "aside.tar.gz").rename(tmp_path / DEVKIT)
    (tmp_path / TRAIN).unlink()
    source = open_imagenet(str(tmp_path))
    assert source.splits == {"validation": 6} and source.class_names == tuple(SORTED)


def test_a_thousand_classes_have_english_names(tmp_path):
    write_tar(tmp_path / TRAIN, {
        f"n{number:08d}.tar": tar({"x.JPEG": b"x"}) for number in range(1000)})
    names = open_imagenet(str(tmp_path)).class_names
    assert names == class_names()


def test_archives_that_do_not_fit(tmp_path):
    write_imagenet(tmp_path)
    write_tar(tmp_path / VALIDATION, {"ILSVRC2012_val_00000001.JPEG": image(1)})
    with pytest.raises(UserError, match="holds 1 images, but the development kit has labels of 6"):
        open_imagenet(str(tmp_path))
    write_tar(tmp_path / VALIDATION, {
        f"ILSVRC2012_val_{number:08d}.JPEG": image(1) for number in range(2, 8)})
    with pytest.raises(UserError, match="not numbered from 1 to 6"):
        open_imagenet(str(tmp_path))
    write_imagenet(tmp_path)
    write_tar(tmp_path / TRAIN, {f"{wnid}.tar": tar({"x.JPEG": b"x"}) for wnid in SORTED[:2]})
    with pytest.raises(UserError, match="the 2 classes of ILSVRC2012_img_train.tar are not the 3"):
        open_imagenet(str(tmp_path))
    for damaged in (b"garbage", (tmp_path / DEVKIT).read_bytes()[:200], tar({"a": b"b"})):
        (tmp_path / DEVKIT).write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged or not a development kit"):
            open_imagenet(str(tmp_path))
