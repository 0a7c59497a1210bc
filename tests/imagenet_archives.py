"""ILSVRC 2012 as it is distributed, with three classes and six validation images."""

import io
import tarfile

import numpy as np
import scipy.io
from image_files import encode, photo

WNIDS = ("n00000002", "n00000007", "n00000005")  # by ILSVRC2012_ID, which is not their order
TRUTH = (3, 1, 2, 2, 1, 3)  # ILSVRC2012_ID of every validation image
SORTED = sorted(WNIDS)


def write_imagenet(folder, images_per_class=4):
    """Writes the three archives; a training image's seed is 100 * class + number, by sorted id."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tar(folder / "ILSVRC2012_img_train.tar", {
        f"{wnid}.tar": tar({f"{wnid}_{number}.JPEG": image(100 * label + number)
                            for number in range(images_per_class)})
        for label, wnid in enumerate(SORTED)})
    write_tar(folder / "ILSVRC2012_img_val.tar", {
        f"ILSVRC2012_val_{number:08d}.JPEG": image(1000 + number)
        for number in (6, 2, 3, 4, 5, 1)})
    synsets = np.array(
        [(number, wnid, f"words of {wnid}", 0) for number, wnid in enumerate(WNIDS, start=1)]
        + [(4, "n00000001", "an inner node", 3)],
        [(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "num_children")])
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": synsets})
    truth = "".join(f"{number}\n" for number in TRUTH).encode()
    write_tar(folder / "ILSVRC2012_devkit_t12.tar.gz", {
        "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": truth,
        "ILSVRC2012_devkit_t12/readme.txt": b"hello",
    }, mode="w:gz")
    return folder


def image(seed):
    return encode(photo(20 + seed % 7, 30, seed))


def tar(files, format=tarfile.GNU_FORMAT):
    """The bytes of an archive of {name: content}."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        add(archive, files)
    return file.getvalue()


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        add(archive, files)


def add(archive, files):
    for name, content in files.items():
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
