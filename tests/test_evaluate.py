"""Evaluation counts every image once, on any number of devices, in batches of any size."""

import jax
import numpy as np
import pytest

from vit_jax.checkpoints.adapt import flatten
from vit_jax.config import image_size, validate
from vit_jax.data.decode import decode_image
from vit_jax.data.pipeline import BadImages
from vit_jax.data.sources import open_eval
from vit_jax.errors import UserError
from vit_jax.evaluate import evaluate_checkpoint, make_evaluator
from vit_jax.models.shapes import params_shapes
from vit_jax.training import partition
from vit_jax.training.state import build_model
from vit_jax.training.step import normalize

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def source():
    return open_eval("digits", dir=None, eval_split=None, image_size=(8, 8))


def random_params(model, size):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32),
                        params_shapes(model, size))


def evaluate(config, source, devices=1, bad_images=None):
    config = validate(config)
    size = image_size(config)
    model = build_model(config, len(source.class_names), size)
    mesh = partition.make_mesh(config, jax.devices()[:devices])
    evaluator = make_evaluator(model, config, mesh, source, bad_images or BadImages("error"))
    return evaluator(jax.device_put(random_params(model, size), partition.replicated(mesh)))


def test_against_one_image_at_a_time(tiny_config, source):
    config = validate(tiny_config)
    model = build_model(config, 10, (8, 8))
    params = random_params(model, (8, 8))
    apply = jax.jit(lambda image: model.apply({"params": params}, image, train=False))
    hits = top5 = loss = 0
    for i in range(len(source)):
        record = source[i]
        image = normalize(decode_image(record.image, max_pixels=100)[None])
        logits = np.asarray(apply(image), np.float64)[0]
        order = np.argsort(-logits, kind="stable")
        hits += order[0] == record.label
        top5 += record.label in order[:5]
        loss += np.log(np.exp(logits).sum()) - logits[record.label]
    scalars = evaluate(tiny_config, source).scalars()
    assert scalars["eval/images"] == 360
    assert scalars["eval/accuracy"] == hits / 360
    assert scalars["eval/top5_accuracy"] == top5 / 360
    assert scalars["eval/loss"] == pytest.approx(loss / 360, rel=1e-5)
    assert 0 < hits < 360


@pytest.mark.parametrize(("batch_size", "devices"), [(1, 1), (7, 1), (512, 1), (7, 8), (64, 8)])
def test_same_numbers_for_any_batch_and_device_count(tiny_config, source, batch_size, devices):
    reference = evaluate(tiny_config, source)
    tiny_config.eval_batch_size = batch_size
    ours = evaluate(tiny_config, source, devices)
    np.testing.assert_array_equal(ours.labels, reference.labels)
    np.testing.assert_array_equal(ours.predictions, reference.predictions)
    np.testing.assert_allclose(ours.losses, reference.losses, rtol=1e-4, atol=1e-5)
    assert ours.final_line() == reference.final_line()


def test_no_top5_for_five_classes(tiny_config, source):
    evaluation = evaluate(tiny_config, source)
    few = type(evaluation)(**(vars(evaluation) | {"num_classes": 5}))
    assert "eval/top5_accuracy" not in few.scalars()


def test_skipped_images_do_not_count(tiny_config, source):
    class Damaged(type(source)):
        def __getitem__(self, index):
            record = super().__getitem__(index)
            return record._replace(image=b"broken") if index in (5, 200) else record

    damaged = object.__new__(Damaged)
    damaged.__dict__.update(source.__dict__)
    bad_images = BadImages("skip")
    evaluation = evaluate(tiny_config, damaged, bad_images=bad_images)
    reference = evaluate(tiny_config, source)
    assert evaluation.images == 358 and bad_images.count == 2
    kept = np.delete(np.arange(360), [5, 200])
    np.testing.assert_array_equal(evaluation.predictions, reference.predictions[kept])


def test_an_empty_split_is_an_error(tiny_config, source):
    class Empty(type(source)):
        def __getitem__(self, index):
            return super().__getitem__(index)._replace(image=b"broken")

    empty = object.__new__(Empty)
    empty.__dict__.update(source.__dict__)
    tiny_config.data.worker_kind = "thread"  # no other process can have a class of this function
    with pytest.raises(UserError, match="no image that can be evaluated"):
        evaluate(tiny_config, empty, bad_images=BadImages("skip"))


def test_a_checkpoint_without_a_head(tiny_config, tmp_path):
    """Whoever trained it, not only masked patch prediction."""
    config = validate(tiny_config)
    np.savez(tmp_path / "features.npz",
             **flatten(random_params(build_model(config, 0, (8, 8)), (8, 8))))
    with pytest.raises(UserError, match="features.npz has no classes to evaluate; probe its fea"):
        evaluate_checkpoint(config, tmp_path / "features.npz")


def test_blocks_in_few_arrays_evaluate_as_by_themselves(tiny_config, tmp_path, monkeypatch):
    """As on GPUs."""
    config = validate(tiny_config)
    model = build_model(config, 10, (8, 8))
    path = tmp_path / "a.npz"
    np.savez(path, **flatten(random_params(model, (8, 8))))
    alone = evaluate_checkpoint(config, path)
    seen = []

    def group(model, config, mesh):
        seen.append(model.clone(scan_layers=True, scan_unroll=True))
        return seen[-1]

    monkeypatch.setattr("vit_jax.evaluate.group_blocks", group)
    grouped = evaluate_checkpoint(config, path)
    assert len(seen) == 1
    assert grouped.scalars() == pytest.approx(alone.scalars(), rel=1e-5)


@pytest.mark.parametrize("fields", [
    {"activation": "gelu"}, {"classifier": "gap", "position_embedding": "sincos_2d"}], ids=str)
def test_a_file_is_evaluated_as_what_its_tensors_cannot_show(tiny_config, source, tmp_path, fields):
    tiny_config.model.update(fields)
    tiny_config.model.num_heads = 2
    expected = evaluate(tiny_config, source)
    model = build_model(validate(tiny_config), 10, (8, 8))
    np.savez(tmp_path / "a.npz", **flatten(random_params(model, (8, 8))))
    told = evaluate_checkpoint(validate(tiny_config), tmp_path / "a.npz")
    other = {"activation": "gelu_tanh", "position_embedding": "none"}
    tiny_config.model.update({key: value for key, value in other.items() if key in fields})
    otherwise = evaluate_checkpoint(validate(tiny_config), tmp_path / "a.npz")
    error, difference = (np.abs(x.losses - expected.losses).max() for x in (told, otherwise))
    assert error < 0.1 * difference  # of rounding; both GELUs differ by little
