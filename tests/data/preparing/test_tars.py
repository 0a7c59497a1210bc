import io
import tarfile

import pytest
from imagenet_archives import add, image, tar, write_tar

from vit_jax.data.decode import BadImageError
from vit_jax.data.preparing.forms import open_input
from vit_jax.data.preparing.tars import Archive, members, open_class_tars
from vit_jax.errors import UserError


def items(source, split="train"):
    """{origin: (image, label)}"""
    read = [source.read(split, index) for index in range(source.splits[split])]
    return {item.origin: (item.image, item.label) for item in read}


def test_a_folder_of_archives(tmp_path):
    write_tar(tmp_path / "n02.tar", {"n02_1.JPEG": image(1), "n02_0.JPEG": image(2)})
    write_tar(tmp_path / "n01.tar", {"n01_7.JPEG": image(3), "list.txt": b"no image"})
    (tmp_path / "readme.txt").write_text("hello")
    source = open_class_tars(str(tmp_path))
    assert source.class_names == ("n01", "n02") and source.splits == {"train": 3}
    assert items(source) == {"n01.tar: n01_7.JPEG": (image(3), 0),
                             "n02.tar: n02_1.JPEG": (image(1), 1),
                             "n02.tar: n02_0.JPEG": (image(2), 1)}
    example = source.read("train", 0).example
    assert example.features.feature["file_name"].bytes_list.value[0] == b"n01_7.JPEG"


def test_an_archive_of_archives(tmp_path):
    """fall11_whole.tar of ImageNet-21k."""
    write_tar(tmp_path / "fall11_whole.tar", {
        "n02.tar": tar({"n02_1.JPEG": image(1)}), "n01.tar": tar({"n01_1.JPEG": image(2)})})
    source = open_class_tars(str(tmp_path / "fall11_whole.tar"))
    assert source.data_set == "fall11_whole" and source.class_names == ("n01", "n02")
    assert items(source) == {"fall11_whole.tar: n01_1.JPEG": (image(2), 0),
                             "fall11_whole.tar: n02_1.JPEG": (image(1), 1)}


@pytest.mark.parametrize("other", ["n3.tar.gz", "n3.TGZ", "n3.zip"])
def test_classes_that_would_be_missing_are_named(tmp_path, other):
    classes = {f"n{i}.tar": tar({f"{i}.JPEG": image(i)}) for i in (1, 2)}
    for name, content in (classes | {other: b"packed"}).items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"holds {other} beside the archives of other.*decompress"):
        open_input(str(tmp_path))
    write_tar(tmp_path / "whole", classes | {other: b"packed"})
    with pytest.raises(UserError, match=f"holds {other} beside the archives"):
        open_input(str(tmp_path / "whole"))
    (tmp_path / other).rename(tmp_path / "labels.txt.gz")  # which is no class
    (tmp_path / "n2.tar").rename(tmp_path / "n2.TAR")
    assert open_input(str(tmp_path)).class_names == ("n1", "n2")


def test_what_macos_adds_is_left_out(tmp_path):
    classes = {f"n{i}.tar": tar({f"n/{i}.JPEG": image(i), f"n/._{i}.JPEG": b"attributes"})
               for i in (1, 2)}
    write_tar(tmp_path / "whole.tar", {"._n1.tar": b"attributes"} | classes)
    source = open_input(str(tmp_path / "whole.tar"))
    assert source.class_names == ("n1", "n2") and source.splits == {"train": 2}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(tmp_path, form):
    path = tmp_path / "odd.tar"
    long = "" if form == tarfile.USTAR_FORMAT else "x" * 200
    with tarfile.open(path, "w", format=form) as archive:
        add(archive, {"plain.jpg": b"1" * 511, "empty.jpg": b"", f"{long}long.jpg": b"2" * 513,
                      "deep/" * 30 + "inside.jpg": b"3", "full.jpg": b"4" * 512})
        for kind, name in ((tarfile.DIRTYPE, "folder"), (tarfile.SYMTYPE, "link.txt")):
            member = tarfile.TarInfo(name)
            member.type = kind
            archive.addfile(member)
        if form != tarfile.USTAR_FORMAT:
            add(archive, {"Übung ☃.jpg": b"5"})
    with open(path, "rb", buffering=0) as file, tarfile.open(path) as archive:
        found = members(file, Archive(str(path)))
        expected = [member for member in archive if member.isreg()]
        assert [entry[1:] for entry in found] == [
            (member.offset, member.offset_data, member.size) for member in expected]


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_to_images_are_refused(tmp_path, kind):
    """As without them an image would be missing that the folder had."""
    for name in ("a", "b"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            add(archive, {"1.jpg": image(1)})
            link = tarfile.TarInfo("2.JPG")
            link.type, link.linkname = kind, "1.jpg"
            archive.addfile(link)
    with pytest.raises(UserError, match=r"a\.tar: 2\.JPG is a link, .* tar --dereference --hard-"):
        open_class_tars(str(tmp_path))


def test_odd_names_are_kept(tmp_path):
    long = "x" * 150 + " ☃.jpg"
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", {long: image(1), "plain.jpg": image(2)})
    assert items(open_class_tars(str(tmp_path)))[f"a.tar: {long}"] == (image(1), 0)


def test_damage(tmp_path):
    write_tar(tmp_path / "a.tar", {"1.jpg": image(1)})
    write_tar(tmp_path / "b.tar", {"1.jpg": image(2), "2.jpg": image(3)})
    whole = (tmp_path / "b.tar").read_bytes()
    source = open_class_tars(str(tmp_path))
    for damaged in (whole[:700], whole[:1024] + b"garbage" * 100, b"garbage" * 100, whole[:100]):
        (tmp_path / "b.tar").write_bytes(damaged)
        with pytest.raises(UserError, match="b.tar is not a tar file, or is damaged or incomplete"):
            open_class_tars(str(tmp_path))
        with pytest.raises(BadImageError, match="archive is damaged"):  # since it was listed
            source.read("train", 2)
    (tmp_path / "b.tar").write_bytes(tar({"list.txt": b"no image"}))
    with pytest.raises(UserError, match="class 'b' is empty"):
        open_class_tars(str(tmp_path))
    (tmp_path / "b.tar").unlink()
    with pytest.raises(UserError, match="holds 1 tar files"):
        open_class_tars(str(tmp_path))


def test_holes_cuts_and_flipped_bits(tmp_path):
    """Of downloads that broke off, also into space taken beforehand."""
    whole = tar({f"{number}.jpg": image(number) for number in range(4)})
    third = tarfile.open(fileobj=io.BytesIO(whole)).getmembers()[2].offset
    write_tar(tmp_path / "b.tar", {"1.jpg": image(2)})
    hole = whole[:third] + bytes(512) + whole[third + 512:]
    flipped = whole[:third + 3] + bytes([whole[third + 3] ^ 1]) + whole[third + 4:]
    empty = whole[:third] + bytes(2**22)
    for damaged in (hole, flipped, whole[:third], empty, b""):
        (tmp_path / "a.tar").write_bytes(damaged)
        with pytest.raises(UserError, match="a.tar is not a tar file, or is damaged or incomplete"):
            open_class_tars(str(tmp_path))
    # An inner archive ends where the outer one goes on.
    write_tar(tmp_path / "outer.tar", {"a.tar": whole[:third], "b.tar": whole})
    with pytest.raises(UserError, match="outer.tar is not a tar file, or is damaged or incomplete"):
        open_class_tars(str(tmp_path / "outer.tar"))


def test_ends_and_checksums_of_other_writers(tmp_path):
    """One block of zeros, longer ends, and checksums of bytes taken for signed."""
    content = {"ümlaut.jpg": image(1), "2.jpg": image(2)}
    whole = tar(content, tarfile.USTAR_FORMAT)
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    signed = b"%06o\0 " % (int(whole[148:154], 8) - 256 * sum(byte > 127 for byte in whole[:512]))
    write_tar(tmp_path / "b.tar", content)
    for other in (whole[:end + 512], whole[:end] + bytes(2**20),
                  whole[:148] + signed + whole[156:]):
        (tmp_path / "a.tar").write_bytes(other)
        assert open_class_tars(str(tmp_path)).splits == {"train": 4}


def test_the_digest_tells_other_data(tmp_path):
    def digest(**files):
        for name, content in files.items():
            write_tar(tmp_path / f"{name}.tar", content)
        return open_class_tars(str(tmp_path)).digest()

    first = digest(a={"1.jpg": bytes(600)}, b={"1.jpg": bytes(600)})
    assert digest() == first
    assert digest(b={"1.jpg": bytes(600), "2.jpg": bytes(1)}) != first
    assert digest(b={"1.jpg": bytes(600)}) == first
    assert digest(c={"1.jpg": bytes(600)}) != first


def test_reading_needs_no_more_than_the_member(tmp_path):
    """Members are found and read by seeking: of a gigabyte of zeros no byte is touched."""
    with open(tmp_path / "a.tar", "wb") as file:
        header = tarfile.TarInfo("big.bin")
        header.size = 2**30
        file.write(header.tobuf())
        file.seek(2**30, io.SEEK_CUR)
        file.write(tar({"1.jpg": image(1)}))
    write_tar(tmp_path / "b.tar", {"1.jpg": image(2)})
    assert (tmp_path / "a.tar").stat().st_blocks * 512 < 2**20
    assert items(open_class_tars(str(tmp_path)))["a.tar: 1.jpg"] == (image(1), 0)
