"""`load_model` on runs of our own, and what it can change about any checkpoint."""

import contextlib
import functools
import http.server
import io
import json
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_makers import apply, flat, google_npz, pixels, random_params, tiny
from tiny import __file__ as tiny_file

import vit_jax
from vit_jax.checkpoints.adapt import adapt
from vit_jax.checkpoints.export import export_model
from vit_jax.checkpoints.load import load_masked_model
from vit_jax.checkpoints.report import LoadReport
from vit_jax.checkpoints.resize import POSITION_MODES, resize_position_embedding
from vit_jax.errors import UserError
from vit_jax.main import main
from vit_jax.training.checkpoint import Checkpoints

pytestmark = pytest.mark.core
POSITIONS = "Transformer/posembed_input/pos_embedding"


# ---- A workdir -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run whose best checkpoint is not its last: the learning rate is far too high."""
    workdir = tmp_path_factory.mktemp("run")
    with contextlib.redirect_stdout(io.StringIO()):
        main([f"--config={tiny_file}", f"--workdir={workdir}", "--config.checkpoint_every=0",
              "--config.total_steps=2", "--config.eval_every=1",
              "--config.optimizer.learning_rate=1.5",
              "--config.loss.name=sigmoid", "--config.model.scan_layers=true",
              "--config.data.eval_crop=center_crop", "--config.data.eval_resize=10",
              "--config.data.antialias=false", "--config.data.mean=0.4",
              "--config.data.std=0.2,0.3,0.4"])
    return workdir


@pytest.mark.parametrize("which", ["last", "best"])
def test_workdir(workdir, which):
    loaded = vit_jax.load_model(workdir, checkpoint=which)
    checkpoints = Checkpoints(workdir / "checkpoints", writable=False)
    step = getattr(checkpoints, f"{which}_step")
    expected = flat(checkpoints.restore_arrays(step)["params"])
    checkpoints.close()
    assert set(flat(loaded.params)) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(flat(loaded.params)[name], tensor)
    assert loaded.metadata == {
        "preprocessing": dict(image_size=[8, 8], crop="center_crop", resize=10,
                              interpolation="bilinear", antialias=False, mean=0.4,
                              std=[0.2, 0.3, 0.4]),
        "class_names": tuple("0123456789"), "position_resize": None, "dialect": "vit_jax",
        "loss": "sigmoid"}
    assert loaded.model.num_heads == 2 and not loaded.model.scan_layers
    assert step == {"last": 2, "best": 1}[which]
    assert str(loaded.report) == f"{workdir} step {step}: 40 parameters from vit_jax names"


def test_a_run_on_a_gpu_loads_anywhere(workdir, tmp_path):
    """Its kernel does not exist here; the weights do not depend on it."""
    copy = shutil.copytree(workdir, tmp_path / "copy")
    (meta,) = copy.glob("checkpoints/2/meta/metadata")
    before = '"attention_implementation": "auto"'
    assert before in meta.read_text()
    meta.write_text(meta.read_text().replace(before, before.replace("auto", "cudnn")))
    images = pixels(8, 8)
    there, here = (
        apply(loaded.model, loaded.params, images)
        for loaded in (vit_jax.load_model(copy), vit_jax.load_model(workdir)))
    np.testing.assert_array_equal(there, here)


def test_best_of_something_else(workdir, tmp_path):
    with pytest.raises(UserError, match="'bset' is neither 'last' nor 'best'"):
        vit_jax.load_model(workdir, checkpoint="bset")
    path = google_npz(tmp_path / "a.npz", random_params(tiny(), 8, 8))
    with pytest.raises(UserError, match="only a run's workdir has a best one"):
        vit_jax.load_model(path, checkpoint="best")


def test_workdir_at_another_size(workdir):
    loaded = vit_jax.load_model(workdir, image_size=(16, 24), num_classes=3)
    assert loaded.metadata["preprocessing"]["resize"] == 20
    assert loaded.metadata["class_names"] is None  # of the head that was replaced
    assert flat(loaded.params)[POSITIONS].shape == (1, 25, 16)


@pytest.mark.parametrize("file", [
    "state/_METADATA", "state/_sharding", "state/manifest.ocdbt", "metrics/metrics"])
@pytest.mark.parametrize("which", ["last", "best"])
def test_workdir_that_was_not_copied_whole(workdir, tmp_path, which, file):
    copy = shutil.copytree(workdir, tmp_path / "copy")
    for path in copy.glob(f"checkpoints/*/{file}"):
        path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match="(cannot be read|is damaged or incomplete) .*copy it aga"):
        vit_jax.load_model(copy, checkpoint=which)


def test_workdir_without_the_state(workdir, tmp_path):
    copy = shutil.copytree(workdir, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints/2/state")
    with pytest.raises(UserError, match="The checkpoint of step 2 .*cannot be read .*state"):
        vit_jax.load_model(copy)


def test_workdir_without_a_checkpoint(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        vit_jax.load_model(tmp_path)


# ---- Changes -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def params():
    return random_params(tiny(representation_size=12), 16, 16)


@pytest.fixture(scope="module")
def path(tmp_path_factory, params):
    return google_npz(tmp_path_factory.mktemp("google") / "a.npz", params, classic=True)


def account(loaded, path):
    renamed, dropped = ({entry[0] for entry in entries}
                        for entries in (loaded.report.renamed, loaded.report.dropped))
    with np.load(path) as file:
        assert renamed | dropped == set(file.files) and not renamed & dropped
    ours = [entry[1] for entry in loaded.report.renamed]
    ours += [entry[0] for entry in loaded.report.reset]
    assert sorted(ours) == sorted(flat(loaded.params))


@pytest.mark.parametrize("mode", POSITION_MODES)
@pytest.mark.parametrize("size", [(24, 24), (8, 8), (8, 20), 28])
def test_image_size(path, params, mode, size):
    loaded = vit_jax.load_model(path, image_size=size, position_resize=mode)
    size = (size, size) if isinstance(size, int) else size
    old = flat(params)[POSITIONS]
    expected = resize_position_embedding(
        old, old_grid=(4, 4), new_grid=(size[0] // 4, size[1] // 4), prefix=1, mode=mode)
    np.testing.assert_array_equal(flat(loaded.params)[POSITIONS], expected)
    assert loaded.metadata["position_resize"] == mode
    assert loaded.metadata["preprocessing"]["image_size"] == list(size)
    assert loaded.report.resized == [
        (POSITIONS, old.shape, expected.shape, f"position embedding, {mode}")]
    account(loaded, path)


def test_image_size_with_positions_in_every_layer():
    """The table of every block is resized by itself."""
    model = tiny(position_embedding_at="every_layer")
    params = flat(random_params(model, 16, 16))
    report = LoadReport("", "vit_jax")
    fitted = adapt(params, model, (24, 8), old_grid=(4, 4), report=report)
    names = [f"Transformer/encoderblock_{i}/posembed_input/pos_embedding" for i in range(2)]
    for name in names:
        np.testing.assert_array_equal(fitted[name], resize_position_embedding(
            params[name], old_grid=(4, 4), new_grid=(6, 2), prefix=1, mode="corner_aligned"))
    assert [entry[0] for entry in report.resized] == names


def test_a_rectangular_grid_is_resized_in_one_call(tmp_path):
    """Its shape has to be told, and then it is resized as any."""
    model = tiny()
    wide = google_npz(tmp_path / "a.npz", random_params(model, 12, 28))
    with pytest.raises(UserError, match="its 21 position embeddings do not form a square grid; .* "
                                        "as image_size, or as trained_size if image_size differs"):
        vit_jax.load_model(wide)
    as_it_is = vit_jax.load_model(wide, image_size=(12, 28))
    assert as_it_is.metadata["position_resize"] is None
    square = vit_jax.load_model(wide, trained_size=(12, 28), image_size=16)
    np.testing.assert_array_equal(
        flat(square.params)[POSITIONS], resize_position_embedding(
            flat(as_it_is.params)[POSITIONS], old_grid=(3, 7), new_grid=(4, 4), prefix=1,
            mode="corner_aligned"))
    assert square.metadata["preprocessing"]["image_size"] == [16, 16]
    with pytest.raises(UserError, match="not form a square grid, nor one of 4x7; pass the"):
        vit_jax.load_model(wide, trained_size=(16, 28), image_size=16)
    plain = google_npz(tmp_path / "b.npz", random_params(model, 16, 16))
    with pytest.raises(UserError, match=r"trained_size=\(12, 28\), but .*b.npz is of 16x16; leave"):
        vit_jax.load_model(plain, trained_size=(12, 28))


@pytest.mark.parametrize("mode", POSITION_MODES)
def test_another_shape_of_as_many_patches(path, params, mode, tmp_path):
    """16 patches as 2 x 8 are not the 4 x 4 of before."""
    loaded = vit_jax.load_model(path, image_size=(8, 32), position_resize=mode)
    old = flat(params)[POSITIONS]
    np.testing.assert_array_equal(flat(loaded.params)[POSITIONS], resize_position_embedding(
        old, old_grid=(4, 4), new_grid=(2, 8), prefix=1, mode=mode))
    assert loaded.report.resized == [
        (POSITIONS, old.shape, old.shape, f"position embedding, {mode}")]
    assert loaded.metadata["position_resize"] == mode
    assert "a square grid of 4x4 patches" in loaded.report.assumptions
    account(loaded, path)
    # As it is, where that was said, and back.
    told = vit_jax.load_model(path, trained_size=(8, 32))
    np.testing.assert_array_equal(flat(told.params)[POSITIONS], old)
    square = vit_jax.load_model(path, trained_size=(8, 32), image_size=16, position_resize=mode)
    np.testing.assert_array_equal(flat(square.params)[POSITIONS], resize_position_embedding(
        old, old_grid=(2, 8), new_grid=(4, 4), prefix=1, mode=mode))


def test_sizes_of_other_types(path):
    for size in (np.int64(8), [np.int32(8), 8]):
        loaded = vit_jax.load_model(path, image_size=size)
        assert loaded.metadata["preprocessing"]["image_size"] == [8, 8]
    for size in ("32", (32,), 32.0, (8, "8")):
        with pytest.raises(UserError, match="image_size=.* must be one whole number, or two"):
            vit_jax.load_model(path, image_size=size)
    with pytest.raises(UserError, match="trained_size='x' must be one whole number"):
        vit_jax.load_model(path, trained_size="x")


def test_head(path, params):
    loaded = vit_jax.load_model(path, num_classes=3)
    assert not loaded.params["head"]["kernel"].any() and not loaded.params["head"]["bias"].any()
    assert "  reset    head/kernel 12x3 (5 classes in the file, 3 in the model)" in str(
        loaded.report)
    assert "  dropped  head/kernel 12x5 (replaced by a new head)" in str(loaded.report)
    account(loaded, path)
    loaded = vit_jax.load_model(path, reset_head=True, head_bias_init=-10.0)
    assert (loaded.params["head"]["bias"] == -10).all() and loaded.params["head"]["bias"].size == 5
    assert "(asked for)" in str(loaded.report)
    assert not loaded.report.warnings
    kept = vit_jax.load_model(path, num_classes=5)
    np.testing.assert_array_equal(kept.params["head"]["kernel"], params["head"]["kernel"])
    assert not kept.report.reset


def test_features(path, params):
    loaded = vit_jax.load_model(path, num_classes=0)
    assert "head" not in loaded.params
    assert {entry[0] for entry in loaded.report.dropped} == {"head/kernel", "head/bias"}
    account(loaded, path)
    images = pixels(height=16, width=16)
    features = np.asarray(apply(loaded.model, loaded.params, images))
    head = params["head"]
    np.testing.assert_allclose(
        features @ head["kernel"] + head["bias"],
        apply(tiny(representation_size=12), params, images), atol=1e-5)


def test_representation_layer(path):
    loaded = vit_jax.load_model(path, representation_size=None, reset_head=True)
    assert "pre_logits" not in loaded.params
    assert "  dropped  pre_logits/kernel 16x12 (no representation layer" in str(loaded.report)
    account(loaded, path)
    # The head saw 12 features and would see 16: it cannot stay, and that is said.
    loaded = vit_jax.load_model(path, representation_size=None)
    assert loaded.params["head"]["kernel"].shape == (16, 5)
    assert "reset    head/kernel 16x5 (" in str(loaded.report)
    assert "5 classes in the file, 5 in the model" not in str(loaded.report)
    with pytest.raises(
            UserError, match=r"pre_logits/kernel has shape \[16, 12\], expected \[16, 8\]"):
        vit_jax.load_model(path, representation_size=8)
    with pytest.raises(UserError, match=r"missing pre_logits/kernel \[16, 7\]"):
        plain = google_npz(path.with_name("plain.npz"), random_params(tiny(), 8, 8))
        vit_jax.load_model(plain, representation_size=7)


def test_channels(path, params):
    kernel = params["embedding"]["kernel"]
    grey = vit_jax.load_model(path, channels=1)
    np.testing.assert_allclose(
        grey.params["embedding"]["kernel"], kernel.sum(2, keepdims=True), atol=1e-6)
    four = vit_jax.load_model(path, channels=4).params["embedding"]["kernel"]
    np.testing.assert_allclose(four, kernel[:, :, [0, 1, 2, 0]] * 0.75, atol=1e-6)
    image = pixels(height=16, width=16)[..., :1]
    np.testing.assert_allclose(
        apply(grey.model, grey.params, image),
        apply(grey.model, params, np.repeat(image, 3, axis=-1)), atol=1e-5)
    assert grey.report.resized[0][3] == "input channels"
    # The file's number is kept, unless another is asked for.
    again = google_npz(path.with_name("grey.npz"), grey.params)
    assert vit_jax.load_model(again).params["embedding"]["kernel"].shape == (4, 4, 1, 16)
    both = vit_jax.load_model(again, channels=3, patch_size=8, image_size=32)
    assert both.report.resized[0][3] == "input channels and patch kernel, pseudo-inverse"


def test_channels_of_a_standardised_convolution(tmp_path):
    model = vit_jax.create_model("R26+S/32", hidden_size=16, mlp_dim=24, num_heads=2, num_layers=1,
                                 resnet_stages=(1,), num_classes=3)
    path = google_npz(tmp_path / "a.npz", random_params(model, 16, 16))
    assert not vit_jax.load_model(path).report.warnings
    (warning,) = vit_jax.load_model(path, channels=1).report.warnings
    assert "the first convolution is standardised, so with other input channels" in warning


def test_relative_positions_are_of_one_grid():
    model = tiny(position_embedding="relative", classifier="gap")
    params = flat(random_params(model, 16, 16))
    same = adapt(params, model, (16, 16), old_grid=(4, 4), report=LoadReport("a", "vit_jax"))
    assert same.keys() == params.keys()
    with pytest.raises(UserError, match="relative position embeddings of 4x4 patches, which"):
        adapt(params, model, (8, 32), old_grid=(4, 4), report=LoadReport("a", "vit_jax"))


def test_positions_by_row_and_column_are_of_one_grid():
    model = tiny(position_embedding="learned_2d")
    params = flat(random_params(model, 16, 16))
    with pytest.raises(UserError, match="a has learned_2d position embeddings, which cannot be"):
        adapt(params, model, (8, 16), old_grid=(4, 4), report=LoadReport("a", "vit_jax"))


def test_a_path_that_cannot_be_looked_at():
    for load in (vit_jax.load_model, load_masked_model):
        with pytest.raises(UserError, match="x cannot be read: File name too long"):
            load("/tmp/" + 300 * "x")


def test_channels_of_mean_and_std(tmp_path):
    """They are averaged, so that exports have one each for one channel."""
    path = google_npz(tmp_path / "a.npz", random_params(tiny(), 16, 16))
    loaded = vit_jax.load_model(path, mean=[0.1, 0.2, 0.6], std=0.25)
    export_model(loaded, "timm", tmp_path / "timm", check=False)
    grey = vit_jax.load_model(tmp_path / "timm", channels=1)
    preprocessing = grey.metadata["preprocessing"]
    assert preprocessing["mean"] == pytest.approx([0.3]) and preprocessing["std"] == [0.25]
    assert "mean 0.3, the average over [0.1, 0.2, 0.6]" in grey.report.assumptions
    export_model(grey, "timm", tmp_path / "grey", check=False)
    back = vit_jax.load_model(tmp_path / "grey")
    assert back.metadata["preprocessing"] == preprocessing
    told = vit_jax.load_model(tmp_path / "timm", channels=1, mean=[0.5])
    assert told.metadata["preprocessing"]["mean"] == [0.5]
    config = json.loads((tmp_path / "grey" / "config.json").read_text())
    config["pretrained_cfg"] |= {"mean": [0.1, 0.2, 0.6]}  # as timm's default has three
    (tmp_path / "grey" / "config.json").write_text(json.dumps(config))
    assert vit_jax.load_model(tmp_path / "grey").metadata["preprocessing"] == preprocessing
    same = vit_jax.load_model(tmp_path / "timm", channels=3)
    assert same.metadata["preprocessing"]["mean"] == [0.1, 0.2, 0.6]


def test_patch_size(path):
    loaded = vit_jax.load_model(path, patch_size=2)
    assert loaded.params["embedding"]["kernel"].shape == (2, 2, 3, 16)
    assert flat(loaded.params)[POSITIONS].shape == (1, 65, 16)
    assert [entry[0] for entry in loaded.report.resized] == ["embedding/kernel", POSITIONS]
    account(loaded, path)


def test_other_fields(path, params):
    images = pixels(height=16, width=16)
    expected = apply(tiny(representation_size=12), params, images)
    stacked = vit_jax.load_model(path, scan_layers=True)
    assert stacked.params["Transformer"]["encoderblock"]["LayerNorm_0"]["scale"].shape == (2, 16)
    np.testing.assert_allclose(apply(stacked.model, stacked.params, images), expected, atol=1e-5)
    half = vit_jax.load_model(path, dtype="bfloat16")
    assert half.model.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(half.params)} == {np.dtype("float32")}
    exact = vit_jax.load_model(path, activation="gelu")
    assert exact.model.activation == "gelu"
    assert 1e-6 < abs(apply(exact.model, exact.params, images) - expected).max() < 0.1
    told = vit_jax.load_model(path, mean=[0.1, 0.2, 0.3], std=0.25, dropout_rate=0.1)
    assert told.metadata["preprocessing"]["mean"] == [0.1, 0.2, 0.3]
    assert told.metadata["preprocessing"]["std"] == 0.25 and told.model.dropout_rate == 0.1


def test_gap_in_place_of_the_class_token(path):
    """Asked for in so many words; both that go with it are accounted for."""
    loaded = vit_jax.load_model(path, classifier="gap")
    assert loaded.report.dropped == [("cls", (1, 1, 16), "the model has no class token")]
    assert loaded.report.resized == [
        (POSITIONS, (1, 17, 16), (1, 16, 16), "without the class token's slot")]
    assert loaded.metadata["position_resize"] is None
    with pytest.raises(UserError, match="missing cls"):
        gap = google_npz(path.with_name("gap.npz"), loaded.params)
        vit_jax.load_model(gap, classifier="token")


@pytest.mark.parametrize("options, message", [
    (dict(num_clases=3), "load_model has no option 'num_clases'; did you mean 'num_classes'?"),
    (dict(imagesize=3), "did you mean 'image_size'?"),
    (dict(position_resize="zoom"), "position_resize='zoom' is not one of corner_aligned, bil"),
    (dict(image_size=18), "Image size 18x18 is not divisible into patches of 4x4 pixels"),
    (dict(patch_size=5), "Image size 16x16 is not divisible into patches of 5x5 pixels"),
    (dict(dtype="float31"), "dtype='float31' is none of float32, bfloat16 and float16."),
    (dict(dtype="int8"), "dtype='int8' is none of"),
    (dict(activation="gelu_tan"), "activation='gelu_tan' is not one of gelu_tanh, gelu; did you"),
    (dict(classifier="tokens"), "did you mean 'token'?"),
    (dict(num_heads=3), "Hidden_size 16 is not divisible by num_heads 3"),
    (dict(num_heads=4), "query/bias has shape [2, 8], expected [4, 4]"),
    (dict(hidden_size=32), "MlpBlock_0/Dense_0/kernel has shape [16, 24], expected [32, 24]"),
    (dict(num_layers=1), "unexpected Transformer/encoderblock_1/LayerNorm_0/bias [16], nearest: "),
    (dict(num_layers=3), "missing Transformer/encoderblock_2/LayerNorm_0/bias [16]"),
    (dict(layer_scale=0.1), "missing Transformer/encoderblock_0/LayerScale_0/gamma [16]"),
    (dict(register_tokens=2), "missing register_tokens [1, 2, 16]"),
    (dict(channels=-1), "channels=-1 must be a whole number of at least 1."),
    (dict(channels=1.5), "channels=1.5 must be a whole number"),
    (dict(num_heads=0), "num_heads=0 must be a whole number"),
    (dict(patch_size=0), "patch_size=0 must be a whole number"),
], ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_changes_that_cannot_be(path, options, message):
    with pytest.raises(UserError) as error:
        vit_jax.load_model(path, **options)
    assert message in str(error.value)


# ---- By name -------------------------------------------------------------------------------------

def test_by_name(path, params, tmp_path, monkeypatch):
    """From a mirror on this machine, once; then from the cache, with the mirror gone."""
    mirror = tmp_path / "mirror"
    (mirror / "imagenet21k").mkdir(parents=True)
    (mirror / "imagenet21k" / "ViT-B_16.npz").write_bytes(path.read_bytes())
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {
        "log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(quiet, directory=str(mirror)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("VIT_JAX_MODELS_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
    try:
        first = vit_jax.load_model("imagenet21k:ViT-B_16")
    finally:
        server.shutdown()
        server.server_close()
    again = vit_jax.load_model("imagenet21k:B/16")
    for loaded in (first, again):
        jax.tree.map(np.testing.assert_array_equal, flat(loaded.params), flat(params))
