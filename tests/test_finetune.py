"""A run that starts from a checkpoint: other data, resolution, head; frozen and decayed layers."""

import json
import shutil

import jax
import numpy as np
import optax
import pytest
from PIL import Image
from safetensors.numpy import save_file

import vit_jax
from vit_jax.checkpoints.adapt import flatten
from vit_jax.checkpoints.targets import library_tensors
from vit_jax.cli import load_config
from vit_jax.config import validate
from vit_jax.errors import UserError
from vit_jax.main import main
from vit_jax.training.optimizer import make_optimizer, make_schedule

TINY = "--config=tests/tiny.py"


@pytest.fixture(scope="module", autouse=True)
def in_the_repository(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(request.config.rootpath)
        yield


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, in_the_repository):
    workdir = tmp_path_factory.mktemp("pretrained")
    main([TINY, f"--workdir={workdir}", "--config.model.representation_size=12",
          "--config.model.activation=gelu", "--config.model.layer_scale=0.1",
          "--config.data.mean=0.4", "--config.data.std=0.2,0.3,0.4"])
    return workdir


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes that differ in colour."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name, colour in (("blue", (40, 60, 200)), ("red", (200, 60, 40))):
        (folder / name).mkdir()
        for i in range(20):
            noise = rng.integers(-30, 30, (16, 16, 3))
            Image.fromarray((colour + noise).clip(0, 255).astype(np.uint8)).save(
                folder / name / f"{i}.png")
    return folder


def test_other_classes_and_resolution(pretrained, photos, tmp_path, capsys):
    workdir = tmp_path / "run"
    arguments = [TINY, f"--workdir={workdir}", f"--config.init={pretrained}",
                 f"--config.data.source=folder:{photos}", "--config.data.image_size=16",
                 "--config.total_steps=20", "--config.log_every=10", "--config.eval_every=0"]
    main(arguments)
    out = capsys.readouterr().out
    assert "resized  Transformer/posembed_input/pos_embedding 1x5x16 -> 1x17x16" in out
    assert "reset    head/kernel" in out and "10 classes in the file, 2 in the model" in out
    assert "dropped  pre_logits/kernel" in out  # as asked: the config wants none
    assert out.splitlines()[-1] == "eval/accuracy=1.0000 eval/images=4"
    # What only the checkpoint knew is carried on, into the run's own checkpoints.
    loaded = vit_jax.load_model(workdir)
    assert loaded.model.activation == "gelu" and loaded.model.layer_scale == 0.1
    assert loaded.metadata["class_names"] == ("blue", "red")
    assert loaded.metadata["position_resize"] == "corner_aligned"
    assert loaded.metadata["preprocessing"]["mean"] == 0.4
    assert loaded.metadata["preprocessing"]["std"] == [0.2, 0.3, 0.4]
    # Continuing does not start from the checkpoint again.
    main([*arguments, "--config.total_steps=21"])
    assert "resized" not in capsys.readouterr().out


def test_without_a_step_the_model_is_the_checkpoint(pretrained, tmp_path, capsys):
    """Learning rate 0: evaluation equals that of the checkpoint, head and representation kept."""
    main(["--mode=evaluate", f"--workdir={pretrained}"])
    expected = capsys.readouterr().out.splitlines()[-2]
    for extra in ([], ["--config.model.scan_layers=true"]):
        main([TINY, f"--workdir={tmp_path / str(len(extra))}", f"--config.init={pretrained}",
              "--config.model.representation_size=12", "--config.optimizer.learning_rate=0",
              "--config.total_steps=1", *extra])
        out = capsys.readouterr().out.splitlines()
        assert [line for line in out if line.startswith("step 1/1  eval")][-1].endswith(expected)


def test_reset_head(pretrained, tmp_path, capsys):
    main([TINY, f"--workdir={tmp_path / 'run'}", f"--config.init={pretrained}",
          "--config.init_head=reset", "--config.total_steps=1",
          "--config.model.representation_size=12"])
    assert "reset    head/kernel 12x10 (asked for)" in capsys.readouterr().out


@pytest.mark.parametrize("names, line", [
    (list("9876543210"), "head/kernel 12x10 -> 12x10 (classes brought into the order of the data)"),
    (list("0123abcdef"), "head/kernel 12x10 (the file has other classes: class 4 is 'a' in the "
                         "file, '4' in the data)"),
    (list("0123456788"), "head/kernel 12x10 (the file has other classes: class 9 is '8' in the "),
])
def test_head_of_other_class_names(pretrained, tmp_path, capsys, names, line):
    """As many, so that nothing but their names tells."""
    renamed = shutil.copytree(pretrained, tmp_path / "renamed")
    for path in renamed.glob("checkpoints/*/meta/metadata"):
        meta = json.loads(path.read_text())
        path.write_text(json.dumps(meta | {"class_names": names}))
    main([TINY, f"--workdir={tmp_path / 'run'}", f"--config.init={renamed}",
          "--config.total_steps=1", "--config.optimizer.learning_rate=0",
          "--config.model.representation_size=12"])
    assert line in capsys.readouterr().out
    before, after = (vit_jax.load_model(path).params["head"]
                     for path in (pretrained, tmp_path / "run"))
    for name in ("kernel", "bias"):
        expected = before[name][..., ::-1] if "order" in line else np.zeros_like(before[name])
        np.testing.assert_array_equal(after[name], expected)
    with pytest.raises(UserError, match="digits.* has other classes than .*: class . is '.' in"):
        main(["--mode=evaluate", TINY, f"--config.init={renamed}"])


def test_heads_that_the_file_does_not_tell(pretrained, tmp_path, capsys):
    """The config does."""
    loaded = vit_jax.load_model(pretrained, representation_size=None, num_classes=10)
    path = tmp_path / "timm.safetensors"
    save_file(library_tensors("timm", flatten(loaded.params)), path)
    with pytest.raises(UserError, match="no convention exists for width 16"):
        vit_jax.load_model(path)
    main([TINY, f"--workdir={tmp_path / 'run'}", f"--config.init={path}", "--config.total_steps=1"])
    main(["--mode=evaluate", TINY, f"--config.init={path}"])
    assert capsys.readouterr().out.splitlines()[-1].endswith("eval/images=360")


def test_head_only(pretrained, tmp_path):
    workdir = tmp_path / "run"
    main([TINY, f"--workdir={workdir}", f"--config.init={pretrained}",
          "--config.optimizer.frozen=^(?!head/)", "--config.model.representation_size=12"])
    before, after = vit_jax.load_model(pretrained).params, vit_jax.load_model(workdir).params
    same = jax.tree.map(lambda a, b: bool((a == b).all()), before, after)
    assert not any(jax.tree.leaves(same.pop("head")))
    assert all(jax.tree.leaves(same))


def test_another_variant_is_refused(pretrained, tmp_path):
    with pytest.raises(UserError, match="hidden_size 16.*'S/16'"):
        main([TINY, f"--workdir={tmp_path / 'run'}", f"--config.init={pretrained}",
              "--config.model.variant=S/16", "--config.model.hidden_size=none",
              "--config.model.num_heads=none"])
    assert not (tmp_path / "run").exists()


def test_evaluate_a_checkpoint_without_a_run(pretrained, capsys):
    main(["--mode=evaluate", f"--workdir={pretrained}"])
    expected = capsys.readouterr().out.splitlines()[-1]
    main(["--mode=evaluate", TINY, f"--config.init={pretrained}"])
    assert capsys.readouterr().out.splitlines()[-1] == expected
    main(["--mode=evaluate", TINY, f"--config.init={pretrained}",
          "--config.data.eval_crop=center_crop", "--config.data.image_size=8,16"])
    assert capsys.readouterr().out.splitlines()[-1].endswith("eval/images=360")


@pytest.mark.parametrize("stacked", [False, True])
def test_layer_decay_against_the_formula(tiny_config, stacked):
    """One SGD step of gradient 1: the parameter moves by the rate of its layer."""
    tiny_config.optimizer.layer_decay = 0.5
    tiny_config.optimizer.momentum = 0.0
    config = validate(tiny_config)
    schedule = make_schedule(config, 10)
    kernel = np.ones((3, 2, 2)) if stacked else np.ones((2, 2))
    block = {"MlpBlock_0": {"Dense_0": {"kernel": kernel}}}
    blocks = {"encoderblock": block} if stacked else {
        f"encoderblock_{i}": block for i in range(3)}
    params = {"cls": np.ones(2), "embedding": {"bias": np.ones(2)}, "head": {"bias": np.ones(2)},
              "Transformer": blocks | {"encoder_norm": {"bias": np.ones(2)},
                                       "posembed_input": {"pos_embedding": np.ones(2)}}}
    optimizer = make_optimizer(config, schedule, params)
    updates, _ = optimizer.update(
        jax.tree.map(np.ones_like, params), optimizer.init(params), params)
    rate = -0.1  # three blocks: head 1, last block 1/2, first block 1/8, embedding 1/16
    np.testing.assert_allclose(updates["head"]["bias"], rate, rtol=1e-6)
    np.testing.assert_allclose(updates["Transformer"]["encoder_norm"]["bias"], rate, rtol=1e-6)
    for first in (updates["cls"], updates["embedding"]["bias"],
                  updates["Transformer"]["posembed_input"]["pos_embedding"]):
        np.testing.assert_allclose(first, rate / 16, rtol=1e-6)
    tree = updates["Transformer"]
    kernels = tree["encoderblock"]["MlpBlock_0"]["Dense_0"]["kernel"] if stacked else [
        tree[f"encoderblock_{i}"]["MlpBlock_0"]["Dense_0"]["kernel"] for i in range(3)]
    for kernel, scale in zip(kernels, (1 / 8, 1 / 4, 1 / 2), strict=True):
        np.testing.assert_allclose(kernel, rate * scale, rtol=1e-6)
    assert isinstance(optimizer, optax.GradientTransformation)


@pytest.mark.parametrize(("argument", "init", "size", "steps"), [
    ("B/16,cifar10", "augreg:B/16", 384, 10_000),
    ("ViT-L_16,imagenet2012", "augreg:L/16", 384, 20_000),
    ("H/14,pets", "imagenet21k:H/14", 378, 500),
    ("S/16,folder:/data/my, odd photos", "augreg:S/16", 384, 500),
    ("R50+L/32,vtab:dtd", "augreg:R50+L/32", 384, 2_500),
])
def test_recipes_of_table_4(argument, init, size, steps):
    config = validate(load_config(f"configs/finetune.py:{argument}"))
    assert (config.init, config.data.image_size, config.total_steps) == (init, size, steps)
    assert config.batch_size == 512 and config.optimizer.clip_norm == 1.0


@pytest.mark.parametrize("argument", ["B/16", "B/17,cifar10", "B/16,cifar11", ",cifar10"])
def test_recipe_arguments_that_cannot_be(argument):
    with pytest.raises(UserError):
        load_config(f"configs/finetune.py:{argument}")


def test_it_goes_on_without_the_checkpoint_it_began_from(pretrained, tmp_path, capsys):
    source, run = shutil.copytree(pretrained, tmp_path / "source"), tmp_path / "run"
    command = [TINY, "--config.eval_every=0", f"--workdir={run}", f"--config.init={source}",
               "--config.model.representation_size=12"]
    main([*command, "--config.total_steps=2"])
    shutil.rmtree(source)
    main([*command, "--config.total_steps=3"])
    assert "Continuing from step 2" in capsys.readouterr().out
    with pytest.raises(UserError, match="another config:\n  model.hidden_size: 16 -> 32"):
        main([*command, "--config.model.hidden_size=32"])
    model = vit_jax.load_model(run).model
    assert model.activation == "gelu" and model.layer_scale == 0.1
