"""What a user can do wrong, end to end: each is answered with a sentence before time is spent."""

import contextlib
import io
import json
import signal
from unittest import mock

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import __file__ as tiny_file
from tiny import make_tiny_config

from vit_jax.config import to_json
from vit_jax.data.tfds import TfdsSplit
from vit_jax.errors import UserError
from vit_jax.main import main
from vit_jax.prepare import main as prepare
from vit_jax.training.checkpoint import Checkpoints
from vit_jax.training.metrics import read_metrics

TINY = f"--config={tiny_file}"
ONE_BLOCK = [TINY, "--config.model.num_layers=1", "--config.data.workers=0"]


def refusal(*arguments):
    with pytest.raises(UserError) as error:
        main([TINY, *arguments])
    return str(error.value)


def put(path, seed):
    """An image of 10x12 random pixels, in the format that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def make_photos(root, corrupt=()):
    """20 training and 10 validation images, PNG and JPEG; the files in `corrupt` end too early."""
    for split, count in (("train", 10), ("val", 5)):
        for label, name in enumerate(("grey cats", "Äpfel")):
            for i in range(count):
                put(root / split / name / f"{i}.{('png', 'JPG')[i % 2]}", 100 * label + i)
    for name in corrupt:
        path = root / name
        path.write_bytes(path.read_bytes()[:60])
    return root


@pytest.mark.parametrize("arguments, message", [
    (["--config.data.source=folder:{tmp}/nowhere"], "folder:{tmp}/nowhere does not exist; give "),
    (["--config.data.source=folder:"], "config.data.source='folder:' needs a path: folder:PATH."),
    (["--config.data.source=digit"], "config.data.source='digit' is not a data source; it must be"),
    (["--config.data.eval_split=tset"], "digits has no split 'tset', only 'train', 'test'; did yo"),
    (["--config.data.source=tfds:cifar10", "--config.data.dir={tmp}"],
     "tfds:cifar10 is not prepared: no {tmp}/cifar10/VERSION/dataset_info.json."),
    (["--config.data.source=tfds:cifar10", "--config.data.dir={tmp}/nowhere"],
     "tfds:cifar10: config.data.dir, {tmp}/nowhere, does not exist; set config.data.dir to where"),
    (["--config.data.image_size=10"], "config.model: image size 10x10 is not divisible into patc"),
    (["--config.data.image_size=8,10"], "config.model: image size 8x10 is not divisible into patc"),
    (["--config.model.num_heads=3"], "config.model: hidden_size 16 is not divisible by num_heads "),
    (["--config.model.variant=R50x1"], "config.model: R50x1 has no option 'hidden_size'; set config"
     ".model.hidden_size=none. Its options are head_bias_init, stages."),
    (["--config.data.source=tfds:cifar10", "--config.data.dir={tiny}"],
     "tfds:cifar10: config.data.dir, {tiny}, is not a folder; set config.data.dir to where"),
    (["--config.model.variant=B61"], "config.model.variant: Unknown model variant 'B61'"),
    (["--config.model.hidden_size=10", "--config.model.position_embedding=sincos_2d"],
     "config.model: sincos_2d needs a width divisible by 4 and at least 8, not 10."),
    (["--config.data.eval_crop=center_crop", "--config.data.eval_resize=7",
      "--config.data.image_size=8,16"],
     "config.data.eval_resize=7 is smaller than the image_size 8"),
    (["--config.batch_size=12"], "config.batch_size=12 is not divisible by 8 (8 devices x 1 accum"),
    (["--config.accumulation_steps=4"], "config.batch_size=16 is not divisible by 32 (8 devices x"),
    (["--config.mesh.fsdp=3"], "config.mesh with data=-1, fsdp=3, tensor=1 does not fit 8 devices"),
    (["--config.schedule.warmup_steps=6"],
     "config.schedule.warmup_steps=6 leaves no step of the 6 for"),
    (["--config.optimizer.frozen=nothing"], "config.optimizer.frozen: 'nothing' matches no param"),
], ids=lambda value: value[0].partition(".")[2] if isinstance(value, list) else "")
def test_settings_that_cannot_work(tmp_path, arguments, message):
    """Each names its key; none leaves a workdir behind, which the corrected run could not use."""
    workdir = tmp_path / "run"
    arguments = [argument.format(tmp=tmp_path, tiny=tiny_file) for argument in arguments]
    text = refusal(f"--workdir={workdir}", *arguments)
    assert text.startswith(message.format(tmp=tmp_path, tiny=tiny_file))
    assert not workdir.exists()


def test_an_empty_class(tmp_path):
    photos = make_photos(tmp_path / "photos")
    (photos / "train" / "dogs").mkdir()
    text = refusal(f"--workdir={tmp_path / 'run'}", f"--config.data.source=folder:{photos}")
    assert f"class 'dogs' is empty: {photos}/train/dogs holds no .jpg" in text
    assert not (tmp_path / "run").exists()


def test_a_class_that_is_not_trained(tmp_path):
    photos = make_photos(tmp_path / "photos")
    put(photos / "val" / "dogs" / "1.png", 0)
    text = refusal(f"--workdir={tmp_path / 'run'}", f"--config.data.source=folder:{photos}")
    assert f"class 'dogs' is in {photos}/val but not in {photos}/train" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", ["train", "evaluate"])
@pytest.mark.parametrize("below", ["", "/below"])
def test_a_workdir_that_is_a_file(tmp_path, mode, below):
    (tmp_path / "file").write_text("mine")
    text = refusal(f"--workdir={tmp_path / 'file'}{below}", f"--mode={mode}")
    assert text.startswith(f"The workdir {tmp_path / 'file'}{below} ")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("flag", ["--ema", "--checkpoint=best"])
def test_training_with_flags_of_evaluation(tmp_path, flag):
    text = refusal(f"--workdir={tmp_path / 'run'}", flag)
    assert text.startswith(f"{flag} only applies to --mode=evaluate")
    assert not (tmp_path / "run").exists()


def test_evaluating_two_checkpoints(tmp_path, monkeypatch):
    """--config.init is what a run began with; where it is that, a run's command can be repeated."""
    config = make_tiny_config()
    config.init = "began.npz"
    (tmp_path / "config.json").write_text(json.dumps(to_json(config)))
    monkeypatch.setattr("vit_jax.main.evaluate_checkpoint", mock.Mock())
    command = ["--mode=evaluate", f"--workdir={tmp_path}"]
    assert refusal(*command, "--config.init=other.npz").endswith(
        f"--workdir={tmp_path} or --config.init=other.npz; give one of them.")
    main([*command, "--config.init=began.npz"])


def test_an_evaluation_leaves_sigterm_to_the_system(tmp_path, monkeypatch):
    """Among several processes JAX catches it, and no loop asks about it here."""
    (tmp_path / "config.json").write_text(json.dumps(to_json(make_tiny_config())))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("vit_jax.main.evaluate_checkpoint", mock.Mock())
    old = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        main(["--mode=evaluate", f"--workdir={tmp_path}"])
    finally:
        left = signal.signal(signal.SIGTERM, old)
    assert left == signal.SIG_DFL


@pytest.mark.parametrize("arguments", [[], [TINY]])
def test_evaluating_nothing(tmp_path, arguments):
    """Neither with the workdir's own config nor with a recipe."""
    def evaluate(workdir):
        with pytest.raises(UserError) as error:
            main([*arguments, f"--workdir={workdir}", "--mode=evaluate"])
        return str(error.value)

    assert evaluate(tmp_path / "no") == (
        f"The workdir {tmp_path / 'no'} does not exist; give the --workdir of a run.")
    assert evaluate(tmp_path) == (
        f"The workdir {tmp_path} holds no run (no config.json); give the --workdir of a run.")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"seed": "x"}', '{"sead": 1}', '{"model": 3}'])
def test_a_config_json_that_is_not_ours(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert refusal(f"--workdir={tmp_path}").startswith(f"{tmp_path / 'config.json'}")
    assert (tmp_path / "config.json").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_evaluating_before_the_first_checkpoint(tmp_path):
    """As a run leaves it that was stopped in its first steps."""
    with pytest.raises(UserError, match="became (nan|inf)"):
        main([*ONE_BLOCK, f"--workdir={tmp_path / 'run'}", "--config.optimizer.learning_rate=1e30"])
    assert (tmp_path / "run" / "config.json").exists()  # the other tests look for this
    with pytest.raises(UserError, match="holds no complete checkpoint|has no checkpoints"):
        main([f"--workdir={tmp_path / 'run'}", "--mode=evaluate"])


@pytest.fixture(scope="module")
def photos_run(tmp_path_factory):
    """A finished run that skipped two corrupt images, one of each split.

    Returns (photos, workdir, its arguments but for on_bad_image, what it printed).
    """
    root = tmp_path_factory.mktemp("with blanks in it ")
    photos = make_photos(root / "my photos", corrupt=["train/Äpfel/3.JPG", "val/grey cats/2.png"])
    arguments = [*ONE_BLOCK, f"--workdir={root / 'run'}", "--config.eval_every=0",
                 f"--config.data.source=folder:{photos}"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main([*arguments, "--config.data.on_bad_image=skip"])
    return photos, root / "run", arguments, out.getvalue()


def test_skipped_images_do_not_count(photos_run):
    _, workdir, _, out = photos_run
    assert "2 images could not be decoded and were skipped." in out
    assert "20 images, 6 steps of 16" in out
    assert "Classes   2: grey cats, Äpfel" in out
    last = read_metrics(workdir / "metrics.jsonl")[-1]
    assert last["eval/images"] == 9
    assert last["eval/accuracy"] * 9 == pytest.approx(round(last["eval/accuracy"] * 9))
    assert out.splitlines()[-1] == f"eval/accuracy={last['eval/accuracy']:.4f} eval/images=9"


def test_a_checkpoint_knows_its_classes(photos_run):
    _, workdir, _, _ = photos_run
    checkpoints = Checkpoints(workdir / "checkpoints", writable=False)
    meta = checkpoints.meta(checkpoints.last_step)
    assert meta["class_names"] == ["grey cats", "Äpfel"]
    assert meta["train_images"] == 20
    assert meta["config"] == json.loads((workdir / "config.json").read_text())


def test_evaluating_the_best_checkpoint(photos_run, capsys, caplog):
    """Of a folder with a corrupt image: it is named once, counted, and left out."""
    photos, workdir, _, trained = photos_run
    main([f"--workdir={workdir}", "--mode=evaluate", "--checkpoint=best"])
    out = capsys.readouterr().out
    assert "1 images could not be decoded and were skipped." in out
    assert out.splitlines()[-1] == trained.splitlines()[-1]
    path = photos / "val/grey cats/2.png"
    assert [text.partition(": ")[0] for text in caplog.messages] == [f"skipped {path}"]


def test_a_corrupt_training_image_stops_the_run(photos_run, tmp_path):
    photos, _, arguments, _ = photos_run
    with pytest.raises(UserError) as error:
        main([*arguments, f"--workdir={tmp_path / 'run'}", "--config.data.eval_split=train"])
    assert str(error.value).startswith(f"{photos / 'train/Äpfel/3.JPG'} cannot be decoded: ")
    assert "--config.data.on_bad_image=skip" in str(error.value)


def test_evaluating_a_corrupt_image(photos_run):
    photos, workdir, _, _ = photos_run
    with pytest.raises(UserError) as error:
        main([f"--workdir={workdir}", "--mode=evaluate", "--config.data.on_bad_image=error"])
    assert str(error.value).startswith(f"{photos / 'val/grey cats/2.png'} cannot be decoded: ")


@pytest.mark.parametrize("arguments, message", [
    (["--config.model.num_layers=2"], "model.num_layers: 1 -> 2"),
    (["--config.model.variant=S/16"], "model.variant: 'Ti/16' -> 'S/16'"),
    (["--config.data.source=digits"], "digits split 'test' has other classes than "),
    (["--config.data.eval_split=test"], "has no split 'test', only 'train', 'val'"),
    (["--config.data.source=folder:/no/where"], "folder:/no/where does not exist"),
])
def test_evaluating_as_something_else(photos_run, arguments, message):
    """Another model's numbers, or another data set's, must not pass for this run's."""
    _, workdir, _, _ = photos_run
    before = sorted(path.name for path in workdir.iterdir())
    with pytest.raises(UserError) as error:
        main([f"--workdir={workdir}", "--mode=evaluate", *arguments])
    assert message in str(error.value)
    assert sorted(path.name for path in workdir.iterdir()) == before


def test_photos_that_changed_since_the_run_began(photos_run):
    photos, _, arguments, _ = photos_run
    put(photos / "train" / "grey cats" / "new.png", 7)
    more = [*arguments, "--config.data.on_bad_image=skip", "--config.total_steps=7"]
    with pytest.raises(UserError, match="number of training images was 20, now it is 21"):
        main(more)
    (photos / "train" / "grey cats" / "new.png").rename(photos / "new.png")
    cat = sorted((photos / "train" / "grey cats").iterdir())[0]
    other = cat.rename(photos / "train" / "Äpfel" / "cat.png")
    with pytest.raises(
            UserError, match="as many training images as before, but other images or other labels"):
        main(more)
    other.rename(cat)


def test_a_tfds_data_set_that_changed_since_the_run_began(tmp_path, monkeypatch, capsys):
    """Its name, version, sizes and classes did not, but the labels are swapped. Checkpoints of
    before had the name alone, and can be continued."""
    photos = make_photos(tmp_path / "photos")
    prepare([f"--from={photos}", f"--out={tmp_path / 'one'}"])
    cats, apples = photos / "train" / "grey cats", photos / "train" / "Äpfel"
    cats.rename(tmp_path / "cats")
    apples.rename(cats)
    (tmp_path / "cats").rename(apples)
    prepare([f"--from={photos}", f"--out={tmp_path / 'other'}"])

    def run(place, steps):
        main([*ONE_BLOCK, f"--workdir={tmp_path / 'run'}", "--config.eval_every=0",
              "--config.data.source=tfds:photos", f"--config.data.dir={tmp_path / place}",
              f"--config.total_steps={steps}"])

    with monkeypatch.context() as before:
        before.setattr(TfdsSplit, "identity", lambda split: split.name)
        run("one", 2)
    run("one", 4)
    assert "Continuing from step 2." in capsys.readouterr().out
    with pytest.raises(
            UserError, match="as many training images as before, but other images or other labels"):
        run("other", 6)
    (tmp_path / "one").rename(tmp_path / "moved")
    run("moved", 6)


def test_the_advice_about_a_bad_image_can_be_followed(tmp_path, capsys):
    """Also by a run that has begun; and where there is nothing but such images, it says so."""
    photos = make_photos(tmp_path / "photos", corrupt=["train/Äpfel/3.JPG"])
    arguments = [*ONE_BLOCK, f"--workdir={tmp_path / 'run'}", "--config.eval_every=0",
                 f"--config.data.source=folder:{photos}", "--config.checkpoint_every=1",
                 "--config.batch_size=8", "--config.seed=1"]
    with pytest.raises(UserError, match="on_bad_image=skip"):
        main(arguments)
    assert Checkpoints(tmp_path / "run" / "checkpoints", writable=False).last_step
    main([*arguments, "--config.data.on_bad_image=skip"])
    assert "Continuing from step" in capsys.readouterr().out

    for image in (photos / "train").rglob("*.*"):
        image.write_bytes(b"")
    with pytest.raises(UserError, match="none of the first .* the last .*the file is empty"):
        main([*arguments, "--config.data.on_bad_image=skip", f"--workdir={tmp_path / 'empty'}"])
