import pytest

from vit_jax.data.buckets import refuse_bucket
from vit_jax.data.sources import open_eval
from vit_jax.errors import UserError
from vit_jax.prepare import main as prepare

pytestmark = pytest.mark.core


def refusal(call, *arguments, **options):
    with pytest.raises(UserError) as error:
        call(*arguments, **options)
    return str(error.value)


@pytest.mark.parametrize("url", ["gs://bucket/data", "s3://bucket/data", "az://box/data", "gs:/b"])
def test_buckets_are_refused_wherever_data_are_named(url, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    rest = {"eval_split": None, "image_size": (8, 8)}
    monkeypatch.setenv("TFDS_DATA_DIR", url)
    for what, message in (
        ("config.data.dir", refusal(open_eval, "tfds:pets", dir=url, **rest)),
        ("$TFDS_DATA_DIR", refusal(open_eval, "tfds:pets", dir=None, **rest)),
        ("config.data.source", refusal(open_eval, f"folder:{url}", dir=None, **rest)),
        ("--from", refusal(prepare, [f"--from={url}", "--out=out"])),
        ("--out", refusal(prepare, ["--from=in", f"--out={url}"])),
    ):
        assert message.startswith(f"{what}={url} is in an object store, and data are read from")
    tool = {"gs": "gcsfuse", "s3": "mountpoint-s3"}.get(url.partition(":")[0], "mount it")
    assert tool in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["/mnt/gs/data", "a:b", "data", "~/x", "C:/data", "./gs://odd"])
def test_paths_are_not(path):
    refuse_bucket("path", path)
