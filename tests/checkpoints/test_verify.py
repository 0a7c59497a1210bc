"""The comparison of an export with what it was made of: what passes, and what must not."""

import json

import jax
import numpy as np
import pytest
from checkpoint_makers import flat, random_params, tiny
from exports import make
from PIL import Image

from vit_jax.checkpoints import libraries, targets, verify
from vit_jax.checkpoints.export import VerificationFailed, export_model
from vit_jax.checkpoints.verify import Verification


def check(path, monkeypatch, params, activation):
    """Of a model with tanh GELU, whose export computes with `activation`."""
    images = verify.random_images((8, 8), 3)
    theirs = dict(params)

    def set_head(kernel, bias):
        theirs.update({"head/kernel": kernel, "head/bias": bias})

    def load(*_):
        return libraries.Theirs(
            lambda batch: verify.function(tiny(activation=activation), theirs)(batch), None,
            set_head, "another library")

    monkeypatch.setitem(verify.LOADERS, "npz", load)
    np.savez(path, **params)
    return verify.verify("npz", path, params, tiny(), params, images)


@pytest.mark.core
@pytest.mark.parametrize("bias", [1, 30])  # beside a bias the rest of the logits is still small
def test_small_logits_hide_nothing(tmp_path, monkeypatch, bias):
    params = flat(random_params(tiny(), 8, 8))
    params["head/kernel"] *= np.float32(0.01)
    params["head/bias"] *= np.float32(bias)
    right = check(tmp_path / "a.npz", monkeypatch, params, "gelu_tanh")
    assert right.status == "PASS" and right.spread > 0.1
    assert "small" in str(right) and "all zeros" not in str(right)
    wrong = check(tmp_path / "b.npz", monkeypatch, params, "gelu")
    assert wrong.status == "FAIL" and "more than the tolerance" in wrong.reason


@pytest.mark.core
def test_a_head_of_natural_size_is_compared_itself(tmp_path, monkeypatch):
    params = flat(random_params(tiny(), 8, 8))
    result = check(tmp_path / "a.npz", monkeypatch, params, "gelu_tanh")
    assert result.status == "PASS" and not result.notes


def test_a_head_of_zeros_proves_nothing(tmp_path, torch):
    loaded = make()
    loaded.params["head"] = jax.tree.map(np.zeros_like, loaded.params["head"])
    report = export_model(loaded, "timm", tmp_path / "out")
    assert report.verification.status == "PASS" and report.verification.spread > 0.1
    assert "all zeros" in str(report.verification)


def test_given_images(tmp_path, torch):
    for i in range(3):
        photo = np.random.default_rng(i).integers(0, 256, (50, 40, 3), dtype=np.uint8)
        Image.fromarray(photo).save(tmp_path / f"{i}.png")
    report = export_model(
        make(), "timm", tmp_path / "out", images=[tmp_path, tmp_path / "0.png"])
    assert report.verification.images == (4, 4)
    assert report.verification.top1 == 8
    assert "8 of 8 agree" in str(report)


@pytest.mark.parametrize("what", ["numbers", "settings", "names"])
def test_what_the_library_would_get_wrong(tmp_path, monkeypatch, torch, what):
    tensors, config = targets.library_tensors, targets.config_files

    def wrong_tensors(*arguments):
        result = tensors(*arguments)
        name = "blocks.1.mlp.fc2.weight"
        result[name] = result[name] * np.float32(1.001)
        if what == "names":
            result["blocks.1.mlp.fc3.weight"] = result.pop(name)
        return result

    def wrong_config(*arguments):
        result = config(*arguments)
        del result["config.json"]["model_args"]["act_layer"]
        return result

    if what == "settings":
        monkeypatch.setattr(targets, "config_files", wrong_config)
    else:
        monkeypatch.setattr(targets, "library_tensors", wrong_tensors)
    reason = "cannot load it" if what == "names" else "more than the tolerance"
    with pytest.raises(VerificationFailed, match=reason):
        export_model(make(), "timm", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.failed"]
    stored = json.loads((tmp_path / "out.failed" / "conversion_report.json").read_text())
    assert stored["verification"]["status"] == "FAIL"


@pytest.mark.core
def test_a_library_that_cannot_be_imported(tmp_path, monkeypatch):
    def broken(name):
        raise RuntimeError("it was built for another machine\nand more")

    monkeypatch.setattr(libraries.importlib, "import_module", broken)
    report = export_model(make(), "hf", tmp_path / "out")
    assert report.verification.status == "SKIPPED"
    assert "built for another machine" in report.verification.reason
    assert "and more" not in report.verification.reason
    assert report.verification.tensors == (report.tensors, report.tensors)


@pytest.mark.core
def test_a_verification_in_words():
    text = str(Verification("FAIL", "too far", "timm 1", (3, 4), (4, 1), 1.0, 0.5, 2.0, 2e-5, 3))
    assert "3 of 4" in text and "tolerance 2.0e-05" in text and "3 of 5 agree" in text
    assert text.splitlines()[-1] == "  FAIL     too far"
