"""CIFAR-10 (JPEG q75) as a prepared TFDS directory, where the archive lies beside the checkout."""

import pathlib
import tarfile

import pytest

ARCHIVE = pathlib.Path(__file__).parents[2] / "shared" / "data" / "cifar10_tfds.tgz"


@pytest.fixture(scope="session")
def cifar10_dir(tmp_path_factory) -> str:
    """What `config.data.dir` is set to; skips where there is no archive."""
    if not ARCHIVE.exists():
        pytest.skip("CIFAR-10 is not here: no ../shared/data/cifar10_tfds.tgz beside the checkout")
    folder = tmp_path_factory.mktemp("cifar10")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return str(folder)
