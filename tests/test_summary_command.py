"""The command around `vit_jax.models.summary`, whose own tests are in tests/models."""

import numpy as np
import pytest

import vit_jax
from vit_jax.checkpoints.adapt import expected_shapes
from vit_jax.errors import UserError
from vit_jax.models.summary import format_summary, summarize
from vit_jax.summary import main

TINY = dict(patch_size=4, hidden_size=16, mlp_dim=24, num_heads=2, num_layers=2)


@pytest.fixture
def checkpoint(tmp_path):
    """Random parameters for images of 12 x 12 pixels and 7 classes."""
    model = vit_jax.create_model("B/16", num_classes=7, **TINY)
    np.savez(tmp_path / "a.npz", **{
        name: np.ones(shape, np.float32)
        for name, shape in expected_shapes(model, (12, 12), 3).items()})
    return tmp_path / "a.npz"


def test_other_channels(checkpoint, tmp_path, capsys):
    """Of which the patch embedding, and only it, has others."""
    with np.load(checkpoint) as saved:
        params = dict(saved)
    params["embedding/kernel"] = params["embedding/kernel"][:, :, :1]
    np.savez(tmp_path / "grey.npz", **params)
    model = vit_jax.create_model("B/16", num_classes=7, **TINY)
    grey = format_summary(summarize(model, (12, 12), channels=1))
    assert printed(capsys, tmp_path / "grey.npz") == grey
    parameters = sum(tensor.size for tensor in params.values())
    assert f"Parameters: {parameters:,}" in grey


def printed(capsys, *arguments):
    main([*map(str, arguments)])
    return capsys.readouterr().out.rstrip("\n")


def table(name, size, *, depth=2, **options):
    model = vit_jax.create_model(name, **(dict(num_classes=1000) | options))
    return format_summary(summarize(model, size), depth)


def test_variants(capsys):
    assert "Parameters: 5,717,416" in printed(capsys, "Ti/16")
    assert printed(capsys, "vit_tiny_patch16_224", "--image_size=64,96", "--num_classes=0",
                   "--depth=4") == table("Ti/16", (64, 96), num_classes=0, depth=4)


def test_overrides(capsys):
    text = printed(capsys, "Ti/16", "--config.model.classifier=gap", "--config.model.num_layers=2")
    assert text == table("Ti/16", (224, 224), classifier="gap", num_layers=2)


def test_checkpoints(checkpoint, capsys):
    assert printed(capsys, checkpoint) == table("B/16", (12, 12), **TINY, num_classes=7)
    assert printed(capsys, checkpoint, "--num_classes=3", "--image_size=8") == table(
        "B/16", (8, 8), **TINY, num_classes=3)


@pytest.mark.parametrize("arguments, message", [
    ([], "NAME_OR_CHECKPOINT"),
    (["B/15"], "did you mean 'B/16'"),
    (["no/such/file"], "Nor is it the path of a checkpoint."),
    (["B/16", "--image_size=100"], "nearest size that is: 96x96"),
    (["B/16", "--image_size=x"], "--image_size=x is neither"),
    (["B/16", "--depth=0"], "--depth=0 must be at least 1."),
    (["B/16", "--num_classes=-1"], "--num_classes=-1 must be at least 0."),
    (["B/16", "--config.batch_size=3"], "--config.batch_size has no effect here; only"),
    (["B/16", "--config.model.patch_sise=3"], "did you mean 'model.patch_size'?"),
    (["R50x1", "--config.model.num_heads=3"], "has no option 'num_heads'"),
    (["{file}", "--config.model.num_heads=3"], "--config.model.num_heads has no effect on a check"),
    (["B/16", "--dept=3"], "did you mean --depth?"),
], ids=" ".join)
def test_mistakes(checkpoint, arguments, message):
    with pytest.raises(UserError) as error:
        main([argument.format(file=checkpoint) for argument in arguments])
    assert message in str(error.value)


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "NAME_OR_CHECKPOINT" in capsys.readouterr().out
