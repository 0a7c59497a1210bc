"""Addresses of buckets are refused by every command, before a folder "gs:" is made."""

import pytest
from tiny import __file__ as tiny_file

from vit_jax import load_model
from vit_jax.buckets import refuse_bucket
from vit_jax.data.sources import open_eval
from vit_jax.errors import UserError
from vit_jax.main import main as train
from vit_jax.predict import main as predict
from vit_jax.prepare import main as prepare

pytestmark = pytest.mark.core


def refusal(call, *arguments, **options):
    with pytest.raises(UserError) as error:
        call(*arguments, **options)
    return str(error.value)


@pytest.mark.parametrize("url", ["gs://bucket/data", "s3://bucket/data", "az://box/data"])
def test_buckets_are_refused_wherever_files_are_named(url, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    rest = {"eval_split": None, "image_size": (8, 8)}
    monkeypatch.setenv("TFDS_DATA_DIR", url)
    run = f"--config={tiny_file}"
    for what, message in (
        ("config.data.dir", refusal(open_eval, "tfds:pets", dir=url, **rest)),
        ("$TFDS_DATA_DIR", refusal(open_eval, "tfds:pets", dir=None, **rest)),
        ("config.data.source", refusal(open_eval, f"folder:{url}", dir=None, **rest)),
        ("--from", refusal(prepare, [f"--from={url}", "--out=out"])),
        ("--out", refusal(prepare, ["--from", "in", "--out", url])),
        ("--workdir", refusal(train, [run, f"--workdir={url}"])),
        ("--workdir", refusal(train, ["--mode=evaluate", f"--workdir={url}"])),
        ("checkpoint", refusal(load_model, url)),
        ("--checkpoint", refusal(predict, [f"--checkpoint={url}", "photo.jpg"])),
        ("IMAGE_OR_DIR", refusal(predict, ["--checkpoint=run", "photo.jpg", url])),
    ):
        assert message.startswith(f"{what}={url} is a URL, but only paths in the file system")
    assert not list(tmp_path.iterdir())


def test_an_initial_checkpoint_in_a_bucket(tmp_path):
    assert refusal(train, [f"--config={tiny_file}", f"--workdir={tmp_path / 'run'}",
                           "--config.init=gs://bucket/B_16.npz"]).startswith(
        "checkpoint=gs://bucket/B_16.npz is a URL")


def test_what_pathlib_leaves_of_an_address():
    assert "a=gs://b/c is" in refusal(refuse_bucket, "a", "gs:/b/c")


@pytest.mark.parametrize("path", [
    "/mnt/gs/data", "a:b", "data", "~/x", "C:/data", "./gs://odd", "folder.py:/data/photos",
    "augreg:B/16"])
def test_paths_and_names_are_not(path):
    refuse_bucket("path", path)
