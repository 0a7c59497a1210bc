"""`load_model` on Google's npz files, every dialect."""

import itertools

import jax
import ml_dtypes
import numpy as np
import pytest
from checkpoint_makers import apply, flat, google_npz, pixels, random_params, tiny

import vit_jax
from vit_jax.errors import UserError
from vit_jax.models.variants import create_model

pytestmark = pytest.mark.core
POSITIONS = "Transformer/posembed_input/pos_embedding"
PLACES = (POSITIONS, "Transformer/pos_embedding", "pos_embedding")
BESIDE = {
    "": {},
    "params/": {"opt/count": np.zeros((), np.int32)},
    "opt/target/": {"opt/state/step": np.array(7), "opt/state/param_states/head/momentum":
                    np.ones((16, 5), np.float32)},
    "params/img/": {"params/txt/Encoder_0/LayerNorm_0/scale": np.ones(4, np.float32),
                    "params/t": np.ones(1, np.float32)},
}


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def params(model):
    return random_params(model, 8, 8)


def assert_same(actual, expected):
    actual, expected = flat(actual), flat(expected)
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(actual[name], tensor, strict=True, err_msg=name)


def names_in(path):
    with np.load(path) as file:
        return set(file.files)


def account(loaded, path):
    """Every tensor of the file and of the model appears once in the report."""
    renamed, dropped = ({entry[0] for entry in entries}
                        for entries in (loaded.report.renamed, loaded.report.dropped))
    assert renamed | dropped == names_in(path) and not renamed & dropped
    ours = [entry[1] for entry in loaded.report.renamed]
    ours += [entry[0] for entry in loaded.report.reset]
    assert sorted(ours) == sorted(flat(loaded.params))
    assert not loaded.report.missing


@pytest.mark.parametrize("prefix", BESIDE)
@pytest.mark.parametrize("slot", [True, False])
def test_dialects(tmp_path, model, params, prefix, slot):
    """Both numberings, the three places of the position embedding, stacked and not. Only the first
    place always has a slot for the class token."""
    expected = jax.tree.map(np.copy, params)
    if not slot:
        expected["Transformer"]["posembed_input"]["pos_embedding"][:, 0] = 0
    logits = apply(model, expected, pixels())
    places = PLACES if slot else [place for place in PLACES if place != POSITIONS]
    for number, (classic, place) in enumerate(itertools.product([True, False], places)):
        stacked = bool((number + slot) % 2)  # with both values of `slot`, all combinations
        path = google_npz(tmp_path / f"{number}.npz", params, prefix=prefix, slot=slot,
                          classic=classic, place=place, stacked=stacked, beside=BESIDE[prefix])
        loaded = vit_jax.load_model(path)
        assert_same(loaded.params, expected)
        assert loaded.model == model
        np.testing.assert_array_equal(apply(loaded.model, loaded.params, pixels()), logits)
        account(loaded, path)
        assert {entry[0] for entry in loaded.report.dropped} == set(BESIDE[prefix])
        assert loaded.metadata["dialect"] == "google"
        assert loaded.metadata["position_resize"] is None


def test_metadata_and_report(tmp_path, params):
    loaded = vit_jax.load_model(google_npz(tmp_path / "a.npz", params))
    assert loaded.metadata == {
        "preprocessing": dict(image_size=[8, 8], crop="squash", resize=None,
                              interpolation="bilinear", antialias=False, mean=0.5, std=0.5),
        "class_names": None, "position_resize": None, "dialect": "google", "loss": None}
    assert loaded.report.assumptions == [
        "a square grid of 2x2 patches", "activation gelu_tanh, as Google has it",
        "mean 0.5 and std 0.5"]
    lines = str(loaded.report).splitlines()
    assert lines[0] == f"{tmp_path / 'a.npz'}: 40 parameters from google names"
    assert lines[1:] == [f"  assumed  {text}" for text in loaded.report.assumptions]
    np.testing.assert_array_equal(
        jax.tree.leaves(loaded.params)[0].dtype, np.float32)


def test_bfloat16_is_stored_without_a_meaning(tmp_path, params):
    loaded = vit_jax.load_model(google_npz(tmp_path / "a.npz", params, bfloat16=True))
    assert_same(loaded.params, jax.tree.map(
        lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), params))


@pytest.mark.parametrize("options", [
    dict(representation_size=12), dict(classifier="gap"), dict(num_classes=0),
    dict(representation_size=12, num_classes=0),
], ids=lambda options: "-".join(options))
def test_other_models(tmp_path, options):
    model = tiny(**options)
    params = random_params(model, 8, 8)
    path = google_npz(tmp_path / "a.npz", params, classic=True)
    loaded = vit_jax.load_model(path)
    assert loaded.model == model
    assert_same(loaded.params, params)
    account(loaded, path)


def test_big_visions_plain_vits(tmp_path):
    """Their sincos_2d has no parameters, so their files look as if they had no positions."""
    model = tiny(classifier="gap", position_embedding="sincos_2d", representation_size=16)
    params = random_params(model, 8, 8)
    path = google_npz(tmp_path / "a.npz", params, prefix="params/")
    loaded = vit_jax.load_model(path, image_size=8)
    assert loaded.model == model
    assert_same(loaded.params, params)
    assert "position_embedding='sincos_2d', which has no" in loaded.report.assumptions[0]
    assert "images of 224x224" in vit_jax.load_model(path).report.assumptions[0]
    told = vit_jax.load_model(path, image_size=8, position_embedding="none")
    assert told.model.position_embedding == "none"


@pytest.mark.parametrize("variant, options", [
    ("B/16", {}), ("R+Ti/16", dict(classifier="gap", patch_size=2)),
], ids=["class-token", "hybrid"])
def test_no_position_embedding(tmp_path, variant, options):
    model = create_model(variant, position_embedding="none", **dict(
        num_classes=5, hidden_size=16, mlp_dim=24, num_heads=2, num_layers=1, patch_size=4)
        | options)
    path = google_npz(tmp_path / "a.npz", random_params(model, 16, 16))
    loaded = vit_jax.load_model(path, image_size=16)
    assert loaded.model == model
    assert "position_embedding='none', as the file has no table" in loaded.report.assumptions[0]


def test_zero_head_is_pointed_out(tmp_path, params):
    """As in the ImageNet-21k files; one that is asked for is not worth a warning."""
    params = jax.tree.map(np.copy, params)
    params["head"]["kernel"][:] = 0
    loaded = vit_jax.load_model(google_npz(tmp_path / "a.npz", params))
    assert "all zeros" in loaded.report.warnings[0]
    assert "\n  warning: the head is all zeros" in str(loaded.report)


@pytest.mark.parametrize("axes", [1, 4])
@pytest.mark.parametrize("name, options, size", [
    ("R26+S/32", dict(resnet_stages=(1, 2), patch_size=1), (16, 24)),
    ("R+Ti/16", dict(patch_size=2), (16, 16)),
], ids=["R26", "R"])
def test_hybrids(tmp_path, axes, name, options, size):
    sizes = dict(num_classes=5, hidden_size=16, mlp_dim=24, num_heads=2, num_layers=1)
    model = create_model(name, **sizes, **options)
    params = random_params(model, *size)
    path = google_npz(tmp_path / "a.npz", params, classic=True, groupnorm_axes=axes)
    loaded = vit_jax.load_model(path, image_size=size)  # rectangular grids do not show
    assert loaded.model == model
    assert_same(loaded.params, params)
    account(loaded, path)
    assert loaded.metadata["preprocessing"]["image_size"] == list(size)


@pytest.mark.parametrize("axes", [1, 4])
def test_resnet(tmp_path, axes):
    model = create_model("R50x2", num_classes=5, stages=(1, 1))
    params = random_params(model, 32, 32)
    path = google_npz(tmp_path / "a.npz", params, groupnorm_axes=axes)
    loaded = vit_jax.load_model(path)
    assert loaded.model == model
    assert_same(loaded.params, params)
    account(loaded, path)
    assert flat(vit_jax.load_model(path, channels=1).params)["conv_root/kernel"].shape[2] == 1
    assert vit_jax.load_model(path, num_classes=3).model.num_classes == 3
    with pytest.raises(UserError, match="has no option 'num_heads'"):
        vit_jax.load_model(path, num_heads=3)


def test_rectangles(tmp_path):
    """7 x 3 patches are no square: the image size has to be told, with and without class slot."""
    model = tiny()
    params = random_params(model, 28, 12)
    for slot in (True, False):
        path = google_npz(tmp_path / "a.npz", params, slot=slot)
        with pytest.raises(UserError, match="position embeddings do not form a square grid; pass"):
            vit_jax.load_model(path)
        loaded = vit_jax.load_model(path, image_size=(28, 12))
        assert loaded.report.assumptions[0] == (
            "a grid of 7x3 patches, as of the image size asked for")
        told = vit_jax.load_model(path, trained_size=(28, 12))
        assert told.report.assumptions[0].startswith("activation")
        expected = flat(params)[POSITIONS]
        np.testing.assert_array_equal(flat(loaded.params)[POSITIONS][:, 1:], expected[:, 1:])


def test_a_rectangle_of_as_many_tokens_as_a_square_without_a_slot(tmp_path):
    """2 x 4 patches and a class token are 9, as 3 x 3 patches alone in big_vision's files."""
    params = random_params(tiny(), 8, 16)
    path = google_npz(tmp_path / "a.npz", params)
    with pytest.raises(
            UserError, match="its 8 position embeddings do not form a square grid; pass"):
        vit_jax.load_model(path)
    for options in (dict(image_size=(8, 16)), dict(trained_size=(8, 16))):
        assert_same(vit_jax.load_model(path, **options).params, params)
    path = google_npz(tmp_path / "b.npz", random_params(tiny(), 12, 12), place="pos_embedding",
                      slot=False)
    assert "a square grid of 3x3 patches" in vit_jax.load_model(path).report.assumptions


def test_resize_without_a_class_slot(tmp_path, params):
    """The size that is asked for is not taken for the size that it was trained at."""
    path = google_npz(tmp_path / "a.npz", params, place="pos_embedding", slot=False)
    loaded = vit_jax.load_model(path, image_size=12)
    assert flat(loaded.params)[POSITIONS].shape == (1, 10, 16)
    assert [entry[3] for entry in loaded.report.resized] == [
        "a slot of zeros for the class token", "position embedding, corner_aligned"]
    assert loaded.metadata["position_resize"] == "corner_aligned"


# ---- Files that are something else ---------------------------------------------------------------

def refusal(path, **options):
    with pytest.raises(UserError) as error:
        vit_jax.load_model(path, **options)
    return str(error.value)


def test_missing_and_surplus_name_the_nearest(tmp_path, params):
    tensors = flat(params)
    tensors["Transformer/encoderblock_0/LayerNorm_O/scale"] = tensors.pop(
        "Transformer/encoderblock_0/LayerNorm_0/scale")
    np.savez(tmp_path / "a.npz", **tensors)
    text = refusal(tmp_path / "a.npz")
    assert ("missing Transformer/encoderblock_0/LayerNorm_0/scale [16], nearest: "
            "Transformer/encoderblock_0/LayerNorm_O/scale") in text
    assert "unexpected Transformer/encoderblock_0/LayerNorm_O/scale [16], nearest: " in text


@pytest.mark.parametrize("change, message", [
    (lambda t: {k: v for k, v in t.items() if "encoderblock" not in k},
     "Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel does not exist"),
    (lambda t: {k: v for k, v in t.items() if "encoderblock_0" not in k},
     "_0/MlpBlock_0/Dense_0/kernel does not exist, nearest: Transformer/encoderblock_1/"),
    (lambda t: {"txt/embedding/kernel": np.ones((8, 4), np.float32)}, "does not exist"),
    (lambda t: t | {"embedding/kernel": np.ones((8, 4), np.float32)}, "embedding/kernel is [8, 4]"),
    (lambda t: t | {"embedding/kernel": np.float32(1)}, "embedding/kernel is []"),
    (lambda t: t | {"cls": np.ones((1, 1, 3), np.float32)},
     "cls has shape [1, 1, 3], expected [1, 1, 16]"),
    (lambda t: t | {"pos_embedding": t[POSITIONS]}, "are both"),
    (lambda t: t | {POSITIONS: np.ones(3, np.float32)}, "not a supported Vision Transformer"),
    (lambda t: t | {"head/kernel": np.float32(1)}, "not a supported Vision Transformer"),
    (lambda t: t | {"Transformer/encoderblock/x": np.float32(1)},
     "not a supported Vision Transformer"),
    (lambda t: t | {"MAPHead_0/probe": np.ones((1, 1, 16), np.float32)},
     "unexpected MAPHead_0/pro"),
    (lambda t: {"stem/kernel": t["embedding/kernel"]}, "its tensors are called stem/kernel, ..."),
    (lambda t: {"bert/word_embeddings": np.ones((4, 4), np.float32)},
     "does not contain a supported Vision Transformer;"),
], ids=range(13))
def test_files_that_are_something_else(tmp_path, params, change, message):
    np.savez(tmp_path / "a.npz", **change(flat(params)))
    text = refusal(tmp_path / "a.npz")
    assert message in text and str(tmp_path / "a.npz") in text


def test_truncated(tmp_path, params):
    path = google_npz(tmp_path / "a.npz", params)
    whole = path.read_bytes()
    for size in (0, 10, 1000, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:size])
        assert "\n" not in refusal(path)
