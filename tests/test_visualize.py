"""The command that draws what is inside a model: its files, their numbers, and what it refuses."""

import contextlib
import io
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import __file__ as tiny_file

import vit_jax
from vit_jax.analysis import attention, features
from vit_jax.analysis.record import record
from vit_jax.checkpoints.adapt import expected_shapes
from vit_jax.errors import UserError
from vit_jax.images import Unreadable
from vit_jax.main import main as train
from vit_jax.visualize import TITLES, look, main, parse_what

TINY = dict(patch_size=4, hidden_size=16, mlp_dim=24, num_heads=2, num_layers=2)
MEAN, STD = (0.4, 0.3, 0.2), 0.2


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run whose blocks are scanned, with a preprocessing of its own."""
    folder = tmp_path_factory.mktemp("run")
    with contextlib.redirect_stdout(io.StringIO()):
        train([f"--config={tiny_file}", f"--workdir={folder}", "--config.eval_every=0",
               "--config.checkpoint_every=0", "--config.total_steps=2",
               "--config.model.scan_layers=true",
               "--config.data.mean=0.4,0.3,0.2", f"--config.data.std={STD}"])
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Ten images of 8 x 8, so that no resizing stands between them and the model."""
    folder = tmp_path_factory.mktemp("photos")
    for index in range(10):
        Image.fromarray(pixels_of(index)).save(folder / f"{index}.png")
    return folder


def pixels_of(index):
    return np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def google_file(path, model, size):
    """Random parameters."""
    generator = np.random.default_rng(0)
    np.savez(path, **{
        name: 0.3 * generator.standard_normal(shape, np.float32)
        for name, shape in expected_shapes(model, size, 3).items()})
    return path


def check_folder(folder, names, numbered=()):
    expected = {"index.html"} | {f"{name}.npz" for name in names}
    expected |= {f"{name}.png" for name in names if name not in numbered}
    expected |= {f"{name}_{i}.png" for name in numbered for i in range(1, 9)}
    assert {path.name for path in folder.iterdir()} == expected
    page = (folder / "index.html").read_text("utf-8")
    for name in expected - {"index.html"}:
        assert f'"{name}"' in page
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            image.load()
            assert min(image.size) > 300
    return page


def test_everything_of_a_run(workdir, photos, tmp_path, capsys):
    """The arrays are those of a forward pass without the command."""
    out = tmp_path / "new" / "folder"
    main([f"--checkpoint={workdir}", str(photos), f"--out={out}"])
    captured = capsys.readouterr()
    assert captured.out == f"{', '.join(TITLES)}: {out / 'index.html'}\n"
    page = check_folder(out, TITLES, numbered=["heads"])
    assert "2 layers of width 16, 2 heads" in page and "8x8 pixels, 2x2 patches" in page

    loaded = vit_jax.load_model(workdir)
    images = np.stack([pixels_of(index) for index in range(10)])
    images = ((images / 255 - MEAN) / STD).astype(np.float32)
    _, recording = jax.jit(
        lambda params: record(loaded.model, params, images))(loaded.params)
    saved = {name: dict(np.load(out / f"{name}.npz")) for name in TITLES}
    files = [str(photos / f"{index}.png") for index in range(10)]
    assert saved["rollout"]["files"].tolist() == saved["distance"]["files"].tolist() == files
    assert saved["heads"]["files"].tolist() == files[:8]
    np.testing.assert_allclose(
        saved["rollout"]["rollout"], attention.rollout_maps(recording), atol=1e-5)
    np.testing.assert_allclose(
        saved["heads"]["attention"],
        np.asarray(attention.attention_maps(recording)).swapaxes(0, 1)[:8], atol=1e-5)
    np.testing.assert_allclose(
        saved["distance"]["distance"],
        np.asarray(attention.mean_distances(recording)).swapaxes(0, 1), atol=1e-4)
    assert saved["distance"]["uniform"] == pytest.approx(4 * (2 + 2**0.5) / 4)
    tokens = np.asarray(recording.tokens)[:, :, 1:].reshape(3, 40, 16)  # all: they are few
    np.testing.assert_allclose(
        saved["similarity"]["cka"], features.layer_similarity(tokens), atol=1e-4)
    positions = loaded.params["Transformer"]["posembed_input"]["pos_embedding"][0, 1:]
    cosine = positions[1] @ positions[2] / (
        np.linalg.norm(positions[1]) * np.linalg.norm(positions[2]))
    assert saved["positions"]["similarity"].shape == (2, 2, 2, 2)
    assert saved["positions"]["similarity"][0, 1, 1, 0] == pytest.approx(cosine, abs=1e-5)
    assert saved["filters"]["components"].shape == (16, 4, 4, 3)


def test_a_choice_of_figures(workdir, photos, tmp_path, capsys):
    main([f"--checkpoint={workdir}", str(photos / "3.png"), f"--out={tmp_path}",
          "--what=similarity,distance", "--image_size=12,20", "--best"])
    page = check_folder(tmp_path, ["distance", "similarity"])
    assert "12x20 pixels, 3x5 patches of 4 pixels" in page
    assert page.index("Mean attention distance") < page.index("Similarity of the layers")
    with np.load(tmp_path / "distance.npz") as saved:
        assert saved["distance"].shape == (1, 2, 2)


def test_no_more_patches_are_compared_than_fit(workdir, photos, tmp_path, monkeypatch, capsys):
    """All four patches of every fifth image, where there are enough images."""
    monkeypatch.setattr("vit_jax.visualize._EXAMPLES", 8)
    loaded = vit_jax.load_model(workdir)
    files = [str(photos / f"{index}.png") for index in range(10)]
    view = look(loaded, files, Unreadable())
    assert view.tokens.shape == (3, 8, 16) and view.distances.shape == (10, 2, 2)
    assert view.token_images == 2
    images = np.stack([pixels_of(index) for index in (0, 5)])
    images = ((images / 255 - MEAN) / STD).astype(np.float32)
    _, recording = jax.jit(lambda params: record(loaded.model, params, images))(loaded.params)
    patches = np.asarray(recording.tokens[0])[:, 1:].reshape(8, 1, 16)
    distances = np.abs(patches - view.tokens[0]).max(-1)  # the patches of an image are in any order
    assert distances.min(0).max() < 1e-5 and distances.min(1).max() < 1e-5


def test_a_folder_in_the_home(workdir, tmp_path, monkeypatch, capsys):
    """bash does not expand --out=~/inside."""
    monkeypatch.setenv("HOME", str(tmp_path))
    main([f"--checkpoint={workdir}", "--out=~/inside", "--what=filters"])
    check_folder(tmp_path / "inside", ["filters"])


def test_without_images(workdir, tmp_path, capsys):
    main([f"--checkpoint={workdir}", f"--out={tmp_path}"])
    page = check_folder(tmp_path, ["positions", "filters"])
    assert "<li>Attention rollout: it needs images</li>" in page
    assert "left out rollout: it needs images\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="There is nothing to draw. heads: it needs images."):
        main([f"--checkpoint={workdir}", f"--out={tmp_path}", "--what=heads"])


@pytest.mark.parametrize("variant, options, size, left_out", [
    ("B/16", TINY | dict(classifier="gap", register_tokens=2), (8, 8), []),
    ("R+Ti/16", TINY | dict(patch_size=2), (16, 16), ["filters"]),
    ("B/16", TINY | dict(num_classes=0, layer_scale=0.1), (16, 16), []),
], ids=["gap with registers", "hybrid", "features"])
def test_any_model(variant, options, size, left_out, photos, tmp_path, capsys):
    model = vit_jax.create_model(variant, **(dict(num_classes=3) | options))
    path = google_file(tmp_path / "a.npz", model, size)
    out = tmp_path / "out"
    main([f"--checkpoint={path}", str(photos / "0.png"), f"--out={out}"])
    page = check_folder(out, [name for name in TITLES if name not in left_out])
    assert "the mean of all patches" in page if model.classifier == "gap" else "class token" in page
    captured = capsys.readouterr()
    assert captured.out.count("left out") == len(left_out)
    if left_out:
        assert "cut from the features of its ResNet, not from pixels" in captured.out


def test_a_model_without_position_embedding(tmp_path, photos, capsys):
    model = vit_jax.create_model("B/16", num_classes=3, position_embedding="none", **TINY)
    path = google_file(tmp_path / "a.npz", model, (8, 8))
    arguments = [f"--checkpoint={path}", f"--out={tmp_path / 'out'}", "--image_size=8"]
    main([*arguments, "--what=positions,filters"])
    check_folder(tmp_path / "out", ["filters"])
    assert "left out positions: position_embedding='none'" in capsys.readouterr().out


def test_a_resnet_has_nothing_to_show(tmp_path, photos):
    model = vit_jax.create_model("R50x1", num_classes=3, stages=(1,))
    path = google_file(tmp_path / "a.npz", model, (32, 32))
    with pytest.raises(UserError, match="nothing to draw. rollout: a ResNet has neither"):
        main([f"--checkpoint={path}", str(photos), f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_unreadable_images_are_left_out(workdir, photos, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes((photos / "0.png").read_bytes()[:60])
    arguments = [f"--checkpoint={workdir}", f"--out={tmp_path / 'out'}", "--what=distance"]
    with pytest.raises(UserError, match="^2 of 4 images could not be read.$"):
        main([*arguments, str(photos / "0.png"), str(broken), str(tmp_path / "no.png"),
              str(photos / "1.png")])
    with np.load(tmp_path / "out" / "distance.npz") as saved:
        assert saved["files"].tolist() == [str(photos / "0.png"), str(photos / "1.png")]
        assert saved["distance"].shape == (2, 2, 2)
    with pytest.raises(UserError, match="^1 of 1 images could not be read.$"):
        main([*arguments, str(broken)])


def test_layers_are_compared_though_most_images_are_unreadable(
        workdir, photos, tmp_path, monkeypatch):
    """One of its four patches would be too few."""
    monkeypatch.setattr("vit_jax.visualize._EXAMPLES", 5)
    for index in range(5):
        (tmp_path / f"{index}.jpg").write_bytes(b"broken")
    with pytest.raises(UserError, match="^5 of 6 images could not be read.$"):
        main([f"--checkpoint={workdir}", str(photos / "0.png"), str(tmp_path),
              f"--out={tmp_path / 'out'}", "--what=similarity"])
    check_folder(tmp_path / "out", ["similarity"])


def test_names_do_not_break_the_page(workdir, photos, tmp_path, capsys):
    path = tmp_path / '<b>"$x_1$"& 猫.png'
    path.write_bytes((photos / "0.png").read_bytes())
    main([f"--checkpoint={workdir}", str(path), f"--out={tmp_path / 'out'}", "--what=rollout"])
    page = (tmp_path / "out" / "index.html").read_text("utf-8")
    assert "&lt;b&gt;&quot;$x_1$&quot;&amp; 猫.png" in page and "<b>" not in page
    latin = os.fsencode(tmp_path) + b"/caf\xe9.png"  # no text at all
    path.rename(os.fsdecode(latin))
    main([f"--checkpoint={workdir}", os.fsdecode(latin), f"--out={tmp_path / 'out'}",
          "--what=rollout"])
    assert "caf?.png" in (tmp_path / "out" / "index.html").read_text("utf-8")


@pytest.mark.parametrize("arguments, message", [
    (["--out={tmp}"], "--checkpoint"),
    (["--checkpoint={run}", "{photos}"], "--out"),
    (["--checkpoint={run}", "--out={tmp}", "{tmp}"], "There are no images in {tmp}"),
    (["--checkpoint={tmp}/no", "--out={tmp}"], "no does not exist"),
    (["--checkpoint={run}", "--out={photos}/0.png/x"], "x cannot be written to: Not a directory"),
    (["--checkpoint={run}", "--out={tmp}", "--what=roll"], "did you mean 'rollout'?"),
    (["--checkpoint={run}", "--out={tmp}", "--image_size=9"], "not divisible into patches"),
], ids=lambda value: value[-1] if isinstance(value, list) else "")
def test_mistakes(workdir, photos, tmp_path, arguments, message):
    names = dict(run=workdir, photos=photos, tmp=tmp_path)
    with pytest.raises(UserError) as error:
        main([argument.format(**names) for argument in arguments])
    assert message.format(**names) in str(error.value)


def test_parse_what():
    assert parse_what("all") == parse_what("filters,all") == list(TITLES)
    assert parse_what("heads, rollout") == ["rollout", "heads"]
    with pytest.raises(UserError):
        parse_what("")


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "IMAGE_OR_DIR" in capsys.readouterr().out


def test_as_a_command(tmp_path):
    bad = subprocess.run(
        [sys.executable, "-m", "vit_jax.visualize", f"--checkpoint={tmp_path}/no",
         f"--out={tmp_path}"], capture_output=True, text=True)
    assert bad.returncode == 1 and bad.stderr.startswith("error: ") and bad.stdout == ""
