"""Exports to timm, Hugging Face, torchvision and npz: the same numbers there, or a refusal."""

import json
import math
import re
import warnings

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from checkpoint_makers import apply, flat, pixels, random_params
from exports import PREPROCESSING, REGISTERS, make, refusal
from PIL import Image

from vit_jax.checkpoints import card, export, targets, verify
from vit_jax.checkpoints.export import VerificationFailed, export_model
from vit_jax.checkpoints.load import Loaded, load_model
from vit_jax.checkpoints.report import LoadReport
from vit_jax.checkpoints.verify import HYBRID, PLAIN
from vit_jax.data.augment import center_crop
from vit_jax.errors import UserError
from vit_jax.models.variants import create_model


def as_the_card_says(folder, images, torch):
    """Runs the code of the model card, and its model on images [B, H, W, C]."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    names = {"torch": torch}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        exec(code.replace("DIR", str(folder)), names)
        output = names["model"](torch.tensor(images.transpose(0, 3, 1, 2).copy()))
    return output, names


def difference(a, b):
    assert a.shape == b.shape
    return abs(np.asarray(a) - np.asarray(b)).max() / max(1, np.asarray(b).std())


# Every target: the verification passes, and so does the test's own comparison.

@pytest.mark.parametrize("fields", [
    {},
    dict(size=(32, 48), activation="gelu"),
    dict(classifier="gap"),
    REGISTERS,
    REGISTERS | dict(classifier="gap", position_embedding="none"),
    dict(num_classes=0, scan_layers=True),
    dict(position_embedding="learned_2d", size=(24, 32), mlp_dim=97, num_heads=2),
    dict(position_embedding="sincos_2d", classifier="gap", num_classes=0),
    dict(variant="R+Ti/16", size=(64, 96), num_layers=1),
], ids=["token", "rectangle-exact-gelu", "gap", "registers", "gap-registers-no-positions",
        "features-scanned", "learned-2d-odd-sizes", "sincos-2d", "R+Ti"])
def test_timm(tmp_path, torch, fields):
    loaded = make(**fields)
    size = tuple(loaded.metadata["preprocessing"]["image_size"])
    report = export_model(loaded, "timm", tmp_path / "out")
    check = report.verification
    assert check.status == "PASS" and check.library.startswith("timm")
    assert check.tensors == (report.tensors, report.tensors)
    count = len(jax.tree.leaves(load_model(tmp_path / "out").params))
    images = pixels(3, *size, seed=7)
    model = loaded.model.clone(scan_layers=False)
    expected = apply(loaded.model, loaded.params, images)
    output, _ = as_the_card_says(tmp_path / "out", images, torch)
    tolerance = 1e-3 if model.resnet_stages is not None else PLAIN
    assert difference(output.numpy(), expected) < tolerance

    back = load_model(tmp_path / "out")
    assert count == len(flat(back.params))
    assert difference(apply(back.model, back.params, images), expected) < 1e-6
    assert (back.model.activation, back.model.num_heads, back.model.classifier) == (
        model.activation, model.num_heads, model.classifier)
    assert back.metadata["preprocessing"]["image_size"] == list(size)


@pytest.mark.parametrize("fields", [
    {},
    dict(size=(32, 48), activation="gelu"),
    dict(num_classes=0),
    dict(num_classes=0, representation_size=48),
    dict(position_embedding="none"),
], ids=["token", "rectangle-exact-gelu", "features", "pooler", "no-positions"])
def test_hf(tmp_path, torch, fields):
    pytest.importorskip("transformers", reason="it needs the extra 'parity'")
    loaded = make(**fields)
    size = tuple(loaded.metadata["preprocessing"]["image_size"])
    report = export_model(loaded, "hf", tmp_path / "out")
    assert report.verification.status == "PASS"
    images = pixels(3, *size, seed=7)
    expected = apply(loaded.model, loaded.params, images)
    output, names = as_the_card_says(tmp_path / "out", images, torch)
    output = (output.logits if loaded.model.num_classes else output.pooler_output
              if loaded.model.representation_size else output.last_hidden_state[:, 0])
    assert difference(output.numpy(), expected) < PLAIN
    assert names["processor"].size == {"height": size[0], "width": size[1]}
    back = load_model(tmp_path / "out")
    assert difference(apply(back.model, back.params, images), expected) < 1e-6
    assert back.model.activation == loaded.model.activation


@pytest.mark.parametrize("fields", [
    dict(activation="gelu"),
    dict(activation="gelu", representation_size=48),
    dict(activation="gelu", num_classes=0),
    dict(activation="gelu", num_classes=0, representation_size=48),
], ids=["token", "representation", "features", "representation-features"])
def test_torchvision(tmp_path, torch, fields):
    loaded = make(**fields)
    report = export_model(loaded, "torchvision", tmp_path / "out")
    assert report.verification.status == "PASS" and not report.effects
    images = pixels(3, 32, 32, seed=7)
    output, _ = as_the_card_says(tmp_path / "out", images, torch)
    assert difference(output.numpy(), apply(loaded.model, loaded.params, images)) < PLAIN
    back = load_model(tmp_path / "out")
    assert back.model == loaded.model
    assert flat(back.params).keys() == flat(loaded.params).keys()


@pytest.mark.parametrize("fields", [
    {}, dict(classifier="gap", num_classes=0), dict(variant="R+Ti/16", size=(64, 64), num_layers=1),
], ids=["token", "gap-features", "R+Ti"])
def test_npz_in_timms_own_loader(tmp_path, torch, fields):
    report = export_model(make(**fields), "npz", tmp_path / "out.npz")
    assert report.verification.status == "PASS"
    assert "npz loader" in report.verification.library


def test_match_eps(tmp_path, torch):
    loaded = make((32, 32), "R26+S/32")
    raw, matched = (export_model(loaded, "timm", tmp_path / str(match), match_eps=match)
                    for match in (False, True))
    assert matched.verification.status == raw.verification.status == "PASS"
    assert "29 standardised kernels" in matched.changes[0]
    assert matched.verification.max_difference < HYBRID and not matched.effects
    ((name, effect),) = raw.effects.items()  # measured in JAX alone
    assert "--match_eps" in name and name in (tmp_path / "False" / "README.md").read_text()
    images = verify.random_images((32, 32), 3)
    timm_output, _ = as_the_card_says(tmp_path / "False", images, torch)
    expected = verify.function(loaded.model, flat(loaded.params))(images)
    measured = abs(timm_output.numpy() - expected).max()
    assert measured > 3 * raw.verification.max_difference
    assert effect["max_difference"] == pytest.approx(measured, rel=0.3)
    kernels = [safetensors.numpy.load_file(tmp_path / str(match) / "model.safetensors")[
        "patch_embed.backbone.stem.conv.weight"] for match in (False, True)]
    np.testing.assert_array_equal(
        kernels[0], flat(loaded.params)["conv_root/kernel"].transpose(3, 2, 0, 1))
    for match in (False, True):  # loaded back, either is the model it was
        back = load_model(tmp_path / str(match))
        output = verify.function(back.model, flat(back.params))(images)
        # The rescaled kernels are rounded to float32 twice.
        np.testing.assert_allclose(output, expected, rtol=0, atol=HYBRID * match)
        assert ("rescaled for Google's again" in str(back.report)) == match
    assert (kernels[0] != kernels[1]).any()


def test_through_hugging_faces_timm_wrapper(tmp_path, torch):
    names = ("cat", "dog", "Äpfel", "x", "y")
    loaded = make(size=(32, 48), classifier="gap", class_names=names)
    export_model(loaded, "timm", tmp_path / "out", check=False)
    images = pixels(2, 32, 48)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers", reason="it needs the extra 'parity'")
        model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
        logits = model(torch.tensor(images.transpose(0, 3, 1, 2).copy())).logits
    assert type(model).__name__ == "TimmWrapperForImageClassification"
    assert type(processor).__name__ == "TimmWrapperImageProcessor"
    assert difference(logits.numpy(), apply(loaded.model, loaded.params, images)) < PLAIN
    assert tuple(model.config.id2label[i] for i in range(5)) == names


@pytest.mark.core
@pytest.mark.parametrize("fields", [
    {}, dict(num_classes=0), dict(size=(64, 64), variant="R+Ti/16", num_layers=1),
], ids=["token", "features", "R+Ti"])
def test_round_trip_is_bit_identical(tmp_path, fields):
    """npz -> JAX -> timm -> JAX -> npz."""
    paths = [tmp_path / name for name in ("a.npz", "timm", "b.npz")]
    export_model(make(**fields), "npz", paths[0], check=False)
    export_model(load_model(paths[0]), "timm", paths[1], check=False)
    export_model(load_model(paths[1]), "npz", paths[2], check=False)
    with np.load(paths[0]) as first, np.load(paths[2]) as last:
        assert set(first.files) == set(last.files)
        assert "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel" in first.files
        for name in first.files:
            assert first[name].tobytes() == last[name].tobytes(), name


@pytest.mark.core
@pytest.mark.parametrize("fields", [
    REGISTERS, dict(representation_size=48), dict(variant="R50x1", size=(64, 64)),
], ids=["registers", "representation", "ResNet"])
def test_npz_that_only_vit_jax_reads(tmp_path, fields):
    loaded = make(**fields) if "variant" not in fields else None
    if loaded is None:
        model = create_model("R50x1", num_classes=5, stages=(1, 1))
        loaded = Loaded(model, random_params(model, 64, 64),
                        {"preprocessing": PREPROCESSING | {"image_size": [64, 64]}},
                        LoadReport("made up", "google"))
    report = export_model(loaded, "npz", tmp_path / "out.npz")
    assert report.verification.status == "SKIPPED"
    assert "the outputs were not compared: " in report.verification.reason
    assert report.verification.tensors == (report.tensors, report.tensors)
    assert ("only vit_jax reads" in str(report)) == ("register_tokens" in fields)
    back = flat(load_model(tmp_path / "out.npz").params)
    assert back.keys() == flat(loaded.params).keys()
    for path, value in flat(loaded.params).items():
        np.testing.assert_array_equal(back[path], value)
    stored = json.loads((tmp_path / "out.npz.conversion_report.json").read_text())
    assert stored["target"] == "npz" and stored["preprocessing"]["mean"] == 0.5


@pytest.mark.core
@pytest.mark.parametrize("kind", ["none", "sincos_2d"])
@pytest.mark.parametrize("classifier", ["token", "gap"])
def test_npz_of_positions_without_parameters(tmp_path, kind, classifier):
    """As a table: without one, they could not be told apart."""
    loaded = make(position_embedding=kind, classifier=classifier)
    export_model(loaded, "npz", tmp_path / "out.npz", check=False)
    back = load_model(tmp_path / "out.npz")
    assert not any("position" in text for text in back.report.assumptions)
    np.testing.assert_allclose(apply(back.model, back.params, pixels(2, 32, 32)),
                               apply(loaded.model, loaded.params, pixels(2, 32, 32)), atol=1e-6)


# What is written beside the weights.


@pytest.mark.core
def test_every_file_has_the_usual_mode(tmp_path):
    export_model(make(), "timm", tmp_path / "out", check=False)
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1


@pytest.mark.core
def test_what_an_npz_cannot_hold(tmp_path):
    told = dict(mean=[0.1, 0.2, 0.3], std=[0.2, 0.3, 0.4])
    names = ("cat", "dog", "x", "y", "z")
    loaded = make((16, 64), preprocessing=told | {"interpolation": "bicubic"}, class_names=names)
    warned = export_model(loaded, "npz", tmp_path / "a.npz", check=False).warnings
    assert len(warned) == 4
    for what in ("trained_size=(16, 64)", "mean=[0.1, 0.2, 0.3], std=[0.2, 0.3, 0.4]",
                 "(interpolation=bicubic, where bilinear would be assumed; antialias=True, where "
                 "False",
                 "names of the 5 classes"):
        assert sum(what in text for text in warned) == 1, what
    back = load_model(tmp_path / "a.npz", trained_size=(16, 64), **told)  # as they say
    as_google = dict(antialias=False, interpolation="bilinear")
    assert back.metadata["preprocessing"] == loaded.metadata["preprocessing"] | as_google
    google = make(preprocessing=as_google)
    assert not export_model(google, "npz", tmp_path / "b.npz", check=False).warnings
    half = make(preprocessing=as_google | dict(mean=[0.5] * 3, std=[0.5] * 3))
    assert not export_model(half, "npz", tmp_path / "c.npz", check=False).warnings
    assert not export_model(loaded, "timm", tmp_path / "timm", check=False).warnings


@pytest.mark.core
def test_a_directory_and_its_account(tmp_path):
    names = ("cat", "dog", "Äpfel", "two\nlines", "y")
    report = export_model(make(class_names=names), "timm", tmp_path / "out", check=False)
    folder = tmp_path / "out"
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "class_names.json", "config.json", "conversion_report.json",
        "model.safetensors"]
    assert json.loads((folder / "class_names.json").read_text()) == list(names)
    config = json.loads((folder / "config.json").read_text())
    assert config["label_names"] == list(names)
    assert config["model_args"]["act_layer"] == "gelu_tanh"
    with safetensors.safe_open(folder / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        assert len(list(file.keys())) == report.tensors
    stored = json.loads((folder / "conversion_report.json").read_text())
    assert stored["parameters"] == len(flat(make().params))
    assert stored["verification"]["status"] == "SKIPPED"
    assert stored["source"] == "runs/made up"
    assert {"vit_jax", "jax", "safetensors"} <= stored["versions"].keys()
    text = (folder / "README.md").read_text()
    assert "library_name: timm" in text and "`made up`" in text and "SKIPPED" in text
    assert str(tmp_path) not in text + json.dumps(stored)
    assert load_model(folder).metadata["class_names"] == names


@pytest.mark.core
def test_names_that_are_no_text(tmp_path):
    """Folders and files named in Latin-1, as Python reads them."""
    names = ("caf\udce9", "b", "c", "d", "Äpfel")
    loaded = make(class_names=names)
    loaded.report.source = "caf\udce9.npz"
    export_model(loaded, "timm", tmp_path / "out", check=False)
    assert load_model(tmp_path / "out").metadata["class_names"] == names
    assert "`caf?.npz`" in (tmp_path / "out" / "README.md").read_text("utf-8")


SQUASH = dict(crop="squash", mean=[0.1, 0.2, 0.3], std=[0.2, 0.3, 0.4])
CENTER_CROP = dict(crop="center_crop", resize=37, interpolation="bicubic")


@pytest.mark.core
@pytest.mark.parametrize("target, size, preprocessing", [
    *((target, (32, 32), preprocessing) for target in ("timm", "hf", "torchvision")
      for preprocessing in (SQUASH, CENTER_CROP)),
    *((target, (32, 48), dict(crop="center_crop", resize=41)) for target in ("timm", "hf")),
])  # torchvision takes squares alone
def test_preprocessing_comes_back(tmp_path, target, size, preprocessing):
    loaded = make(size, activation="gelu", preprocessing=preprocessing)
    report = export_model(loaded, target, tmp_path / "out", check=False)
    back = load_model(tmp_path / "out").metadata["preprocessing"]
    per_channel = {key: list(np.broadcast_to(loaded.metadata["preprocessing"][key], 3))
                   for key in ("mean", "std")}
    assert back == loaded.metadata["preprocessing"] | per_channel
    assert ("is short relative to" in str(report)) == (
        target == "hf" and size[0] != size[1])


@pytest.mark.core
def test_every_crop_fraction_is_computed_back():
    for size in (7, 32, 224, 384, 518):
        for resize in range(size, 2 * size):
            told = targets.timm_preprocessing(
                (size, size), 3, PREPROCESSING | dict(crop="center_crop", resize=resize))
            assert math.floor(size / told["crop_pct"]) == resize
            assert told["crop_mode"] == "center"
    default = PREPROCESSING | dict(crop="center_crop")  # 8/7 of the size, as in training
    assert targets.resize_to((224, 224), default) == 256


@pytest.mark.parametrize("crop", [
    dict(crop="center_crop", resize=36, interpolation="bicubic"), dict(crop="squash")])
def test_timms_transform_is_ours(tmp_path, torch, crop):
    """With a low-pass filter, which timm always has: to half a grey level."""
    loaded = make(preprocessing=crop)
    export_model(loaded, "timm", tmp_path / "out", check=False)
    photo = np.random.default_rng(0).integers(0, 256, (90, 61, 3), dtype=np.uint8)
    _, names = as_the_card_says(tmp_path / "out", pixels(1, 32, 32), torch)
    theirs = names["transform"](Image.fromarray(photo)).numpy().transpose(1, 2, 0)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    ours = export.read_images([tmp_path / "photo.png"], loaded.metadata["preprocessing"])[0]
    assert abs(theirs - ours).max() < 0.5 / 127.5
    if crop["crop"] == "center_crop":
        cut = center_crop(photo, (32, 32), resize_to=36, antialias=True, interpolation="bicubic")
        np.testing.assert_allclose(ours, cut / 127.5 - 1, atol=1e-6)


# Refusals.


@pytest.mark.core
@pytest.mark.parametrize("target, options, reason", [
    ("npz", dict(dtype="bfloat16"), "--dtype=bfloat16"),
    ("npz", dict(match_eps=True), "--match_eps is for timm"),
    ("timm", dict(match_eps=True, dtype="float16"), "--match_eps cannot be used with"),
    ("timm", dict(dtype="int8"), "--dtype=int8 is not one of"),
    ("timm", dict(images=["nowhere.png"]), "nowhere.png cannot be read"),
])
def test_options_that_contradict(tmp_path, target, options, reason):
    assert reason in refusal(export_model, make(), target, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.core
def test_values_too_large_for_float16(tmp_path):
    loaded = make()
    loaded.params["head"]["bias"][0] = 1e6
    message = refusal(export_model, loaded, "timm", tmp_path / "out", dtype="float16")
    assert "head/bias" in message and "bfloat16" in message


# What changes the numbers is measured; what breaks them is caught.

def test_exact_gelu_in_place_of_tanh(tmp_path, torch):
    report = export_model(make(), "torchvision", tmp_path / "out", allow_gelu_change=True)
    assert report.verification.status == "PASS"  # against the exact GELU
    (effect,) = report.effects.values()
    assert 1e-5 < effect["max_difference"] < 1e-2
    assert effect["mean_difference"] < effect["max_difference"]
    assert "exact GELU instead of tanh: logits move by" in str(report)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype(tmp_path, torch, dtype):
    report = export_model(make(), "timm", tmp_path / "out", dtype=dtype)
    assert report.verification.status == "PASS"
    assert report.effects[f"rounding to {dtype}"]["max_difference"] > 1e-4
    stored = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert {str(x.dtype) for x in stored.values()} == {dtype}


def test_other_channels(tmp_path, torch):
    loaded = make()
    loaded.params["embedding"]["kernel"] = loaded.params["embedding"]["kernel"][:, :, :1]
    for target in ("timm", "hf", "npz"):
        assert export_model(loaded, target, tmp_path / target).verification.status == "PASS"
    assert "3 channels" in refusal(targets.check, "torchvision", loaded.model, (32, 32), 1)


@pytest.mark.core
@pytest.mark.parametrize("target", ["timm", "npz"])
def test_a_damaged_file_does_not_get_the_name(tmp_path, monkeypatch, target):
    def damage(target, path, *arguments, **options):
        file = path if target == "npz" else path / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        return verify.verify(target, path, *arguments, **options)

    monkeypatch.setattr(export, "verify", damage)
    with pytest.raises(VerificationFailed, match=r"It was saved as .*out\.failed") as error:
        export_model(make(), target, tmp_path / "out")
    assert error.value.report.verification.status == "FAIL"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == (["out.failed"] if target == "timm" else
                     ["out.failed", "out.failed.conversion_report.json"])
    with pytest.raises(VerificationFailed, match=r"out\.failed\.2"):  # keeps the first
        export_model(make(), target, tmp_path / "out")


# Nothing half-written, nothing overwritten.

@pytest.mark.core
@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt(), KeyError()])
@pytest.mark.parametrize("target", ["timm", "npz"])
def test_nothing_half_written(tmp_path, monkeypatch, error, target):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(*((card, "model_card") if target == "timm" else (export, "verify")), fail)
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)):
        export_model(make(), target, tmp_path / "out", check=target == "npz")
    assert not list(tmp_path.iterdir())


@pytest.mark.core
def test_what_lies_there_already(tmp_path):
    out = tmp_path / "out"
    out.mkdir()  # empty is as good as nothing
    write = dict(target="timm", out=out, check=False)
    export_model(make(), **write)
    assert "--overwrite" in refusal(export_model, make(seed=1), **write)
    before = (out / "model.safetensors").read_bytes()
    export_model(make(seed=1), **write, overwrite=True)
    assert (out / "model.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    write = dict(target="timm", check=False, overwrite=True)
    assert "is not an earlier export" in refusal(
        export_model, make(), out=tmp_path / "photos", **write)
    assert "is a file" in refusal(export_model, make(), out=tmp_path / "photos/cat.jpg", **write)
    assert "is not a directory" in refusal(export_model, make(), out=tmp_path / "a" / "b", **write)
    assert "is a directory" in refusal(
        export_model, make(), out=tmp_path / "photos", **write | {"target": "npz"})
    assert (tmp_path / "photos" / "cat.jpg").exists()

    file = tmp_path / "a.npz"
    export_model(make(), "npz", file, check=False)
    assert "exists" in refusal(export_model, make(), "npz", file)
    export_model(make(), "npz", file, check=False, overwrite=True)
    other = tmp_path / "notes.txt"
    other.write_text("thesis")
    assert "is not an earlier export" in refusal(
        export_model, make(), "npz", other, check=False, overwrite=True)
    assert other.read_text() == "thesis"


@pytest.mark.core
@pytest.mark.parametrize("target, length", [("npz", 240), ("timm", 300)])
def test_a_name_that_is_too_long(tmp_path, target, length):
    message = refusal(export_model, make(), target, tmp_path / ("x" * length), check=False)
    assert "File name too long" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.core
def test_names_of_classes_that_are_not_the_models(tmp_path):
    """Of a run whose head was taken off."""
    loaded = make(num_classes=0, class_names=("a", "b"))
    assert export_model(loaded, "hf", tmp_path / "out", check=False).class_names is None
