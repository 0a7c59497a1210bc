"""The picture of a masked prediction, patch by patch."""

import jax
import numpy as np
import pytest

from vit_jax.analysis.masked import picture, reconstruct
from vit_jax.models.masked import MASK, masked_patch_model
from vit_jax.models.variants import create_model
from vit_jax.training.masked_patches import (
    class_colors,
    color_classes,
    predicted_colors,
    sample_corruption,
)
from vit_jax.training.step import Pixels, normalize

PIXELS = Pixels(0.4, 0.25)


@pytest.fixture(scope="module", params=["mean_color", "pixels"])
def setup(request):
    model = masked_patch_model(create_model(
        "B/16", num_classes=0, patch_size=4, hidden_size=16, mlp_dim=24, num_heads=2, num_layers=1,
    ), request.param)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 8, 12, 3)).astype(np.uint8)
    params = jax.jit(lambda: model.init(jax.random.key(0), normalize(images), train=False))()[
        "params"]
    head = params["patch_head"]
    head["kernel"] = rng.normal(size=head["kernel"].shape).astype(np.float32)
    return model, params, images


def test_every_patch(setup):
    model, params, images = setup
    result = reconstruct(model, params, images, seed=5, pixels=PIXELS)
    corrupted, sources = map(np.asarray, sample_corruption(
        jax.random.split(jax.random.key(5), 3), 6))
    np.testing.assert_array_equal(result.corrupted, corrupted)
    outputs = model.apply({"params": params}, normalize(images, PIXELS), sources, train=False)
    colors = np.asarray(predicted_colors(outputs, model.target, PIXELS))

    def patch(images, b, n):
        top, left = 4 * (n // 3), 4 * (n % 3)
        return images[b, top:top + 4, left:left + 4].astype(int)

    for b in range(3):
        for n in range(6):
            whole, seen = patch(images, b, n), patch(result.seen, b, n)
            if sources[b, n] == MASK:
                assert set(seen.ravel()) == {110, 150}
            else:
                np.testing.assert_array_equal(seen, patch(images, b, sources[b, n]))
            if not corrupted[b, n]:
                for drawn in (result.truth, result.predicted):
                    np.testing.assert_allclose(
                        patch(drawn, b, n), 255 - 0.35 * (255 - whole), atol=0.51)
                continue
            target = int(color_classes(whole.astype(np.uint8)))
            truth = np.asarray(class_colors(np.array(target)))
            for drawn, color in ((result.truth, truth), (result.predicted, colors[b, n])):
                np.testing.assert_allclose(
                    patch(drawn, b, n), np.broadcast_to(255 * color, (4, 4, 3)), atol=0.51)
            guessed = np.minimum(np.floor(8 * colors[b, n]), 7) @ [64, 8, 1]
            assert result.right[b, n] == (guessed == target)


def test_picture(setup, tmp_path):
    model, params, images = setup
    result = reconstruct(model, params, images, pixels=PIXELS)
    figure = picture(result)
    panels = figure.get_axes()
    assert len(panels) == 12
    assert [axes.get_title() for axes in panels[:4]] == [
        "image", "what the model sees", "mean colours, 3 bits", "predicted"]
    for axes, shown in zip(panels[4:8], result, strict=False):
        np.testing.assert_array_equal(axes.images[0].get_array(), shown[1])
    share = result.right[result.corrupted].mean()
    assert f"3 of 6 patches corrupted, {share:.0%}" in figure.get_suptitle()
    figure.savefig(tmp_path / "masked.png")
