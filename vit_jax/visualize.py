"""Look inside a model: python -m vit_jax.visualize --checkpoint=PATH --out=DIR IMAGE_OR_DIR ..."""

import dataclasses
import math
import sys
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure

from vit_jax import cli
from vit_jax.analysis import attention, features, figures
from vit_jax.analysis.page import Section, render
from vit_jax.analysis.record import attention_bytes, record
from vit_jax.checkpoints.load import Loaded, load_model
from vit_jax.data.folder import EXTENSIONS
from vit_jax.errors import UserError, did_you_mean
from vit_jax.images import Unreadable, batches_of, find_images
from vit_jax.models.vit import VisionTransformer
from vit_jax.training.step import Pixels, normalize

TITLES = {
    "rollout": "Attention rollout",
    "heads": "Attention of every head",
    "distance": "Mean attention distance",
    "positions": "Position embedding similarity",
    "filters": "Filters of the patch embedding",
    "similarity": "Similarity of the layers",
}
_OF_IMAGES = ("rollout", "heads", "distance", "similarity")
_DRAWN = 8  # images; the numbers are of all
_EXAMPLES = 1024  # patches whose features are compared
_BATCH_BYTES = 2**29  # of attention weights


@dataclasses.dataclass(frozen=True)
class View:
    """What a model does with n images, the first k of which are shown.

    Attributes:
      files: n paths.
      images: uint8 [k, H, W, 3], as the model sees them.
      rollout: [n, height, width]; see `attention.rollout_maps`.
      heads: [k, L, heads, height, width]; see `attention.attention_maps`.
      distances: [n, L, heads]; see `attention.mean_distances`.
      tokens: [L + 1, m, D], some patches of the images, of many images only of some.
      token_images: how many they are of.
    """

    files: list[str]
    images: np.ndarray
    rollout: np.ndarray
    heads: np.ndarray
    distances: np.ndarray
    tokens: np.ndarray
    token_images: int


def main(arguments: list[str]) -> None:
    """Runs the command; see `--help`."""
    parser = cli.ArgumentParser(
        prog="python -m vit_jax.visualize",
        description="Draws what a model looks at and what it has learned, as PNG with the numbers "
        "as npz, and a page (index.html) that gathers the figures.",
        epilog="figures: " + ", ".join(TITLES) + "\nA figure that does not apply to the model is "
        f"left out with the reason. The first {_DRAWN} images are drawn; numbers are of all.\n"
        "positions and filters need no images.",
    )
    cli.add_model_flags(parser)
    parser.add_argument("images", metavar="IMAGE_OR_DIR", nargs="*",
                        help=f"directories are searched for {', '.join(EXTENSIONS)}")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="for the results")
    parser.add_argument("--what", metavar="FIGURE,FIGURE", default="all",
                        help="which figures, for example rollout,heads (all)")
    flags = parser.parse(arguments)
    wanted = parse_what(flags.what)
    unreadable = Unreadable()
    paths = find_images(flags.images, unreadable) if flags.images else []
    loaded = load_model(flags.checkpoint, **cli.model_options(flags))
    print(loaded.report, file=sys.stderr)

    reasons = {name: reason for name in wanted if (reason := obstacle(name, loaded, paths))}
    wanted = [name for name in wanted if name not in reasons]
    if not wanted:
        unreadable.check(paths)
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise UserError(f"There is nothing to draw. {why}.")
    with cli.writing_to(flags.out):
        flags.out.mkdir(parents=True, exist_ok=True)

    view = None
    if any(name in _OF_IMAGES for name in wanted):
        view = look(loaded, paths, unreadable)
    with figures.style():
        sections = [save(flags.out, name, *draw(name, loaded, view)) for name in wanted]
    page = render(f"Inside {flags.checkpoint}", facts(loaded, view), sections,
                  {TITLES[name]: reason for name, reason in reasons.items()})
    with cli.writing_to(flags.out):
        (flags.out / "index.html").write_text(page, encoding="utf-8", errors="replace")
    for name, reason in reasons.items():
        print(f"left out {name}: {reason}")
    print(f"{', '.join(wanted)}: {flags.out / 'index.html'}")
    unreadable.check(paths)


def parse_what(text: str) -> list[str]:
    """'rollout,heads' or 'all' to names of figures, in the order of the page.

    Raises:
      UserError: an unknown figure.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in TITLES and name != "all":
            raise UserError(f"--what={name} is not a figure{did_you_mean(name, TITLES)} They are "
                            f"{', '.join(TITLES)}, and all.")
    return [name for name in TITLES if name in names or "all" in names]


def obstacle(name: str, loaded: Loaded, paths: list[str]) -> str:
    """Why a figure cannot be drawn; '' if it can."""
    model = loaded.model
    if not isinstance(model, VisionTransformer):
        return "a ResNet has neither attention nor patches"
    if name in _OF_IMAGES and not paths:
        return "it needs images"
    if name == "positions" and features.position_vectors(loaded.params, _grid(loaded)) is None:
        if model.position_embedding_at == "every_layer":
            return "every layer has a position embedding of its own"
        return f"position_embedding={model.position_embedding!r} gives patches no learned vector"
    if name == "filters" and model.resnet_stages is not None:
        return "the patches of a hybrid are cut from the features of its ResNet, not from pixels"
    if name == "similarity" and math.prod(_grid(loaded)) < 4:
        return "it needs images of at least four patches"
    return ""


def look(loaded: Loaded, paths: list[str], unreadable: Unreadable) -> View:
    """Shows the model all images that can be read.

    Raises:
      UserError: none can be read.
    """
    model, preprocessing = loaded.model, loaded.metadata["preprocessing"]
    size = tuple(preprocessing["image_size"])
    batch_size = max(1, min(32, _BATCH_BYTES // attention_bytes(model, size)))
    pixels = Pixels(preprocessing["mean"], preprocessing["std"])
    patches = math.prod(_grid(loaded))
    # Not fewer than four, with which layers can be compared: all other images may be unreadable.
    chosen = min(patches, max(4, math.ceil(_EXAMPLES / len(paths))))
    every = max(1, len(paths) * chosen // _EXAMPLES)  # which image's patches are kept

    @jax.jit
    def step(params, images, positions):
        _, recording = record(model, params, normalize(images, pixels))
        tokens = recording.tokens[:, :, -recording.num_patches :]
        return {
            "rollout": attention.rollout_maps(recording),
            "heads": attention.attention_maps(recording).swapaxes(0, 1),
            "distances": attention.mean_distances(recording).swapaxes(0, 1),
            "tokens": jax.numpy.take_along_axis(tokens, positions[None, :, :, None], axis=2)
            .swapaxes(0, 1),
        }

    rng = np.random.default_rng(0)
    params = jax.device_put(loaded.params)
    files, images, rows = [], [], {}
    for batch, readable in batches_of(paths, preprocessing, unreadable, batch_size):
        positions = np.argsort(rng.random((len(batch), patches)), axis=1)[:, :chosen]
        seen = jax.device_get(step(params, batch, positions))
        for row, path in readable:
            if len(files) < _DRAWN:
                images.append(batch[row])
                rows.setdefault("heads", []).append(seen["heads"][row])
            if len(files) % every == 0:
                rows.setdefault("tokens", []).append(seen["tokens"][row])
            for name in ("rollout", "distances"):
                rows.setdefault(name, []).append(seen[name][row])
            files.append(path)
    if not files:
        unreadable.check(paths)
    tokens = np.concatenate(rows.pop("tokens"), axis=1)
    count = tokens.shape[1]
    if count > _EXAMPLES:  # `chosen` is rounded up, and at least 4
        tokens = tokens[:, np.arange(_EXAMPLES) * count // _EXAMPLES]
    return View(files, np.stack(images), tokens=tokens, token_images=-(-len(files) // every),
                **{name: np.stack(values) for name, values in rows.items()})


def draw(
    name: str, loaded: Loaded, view: View | None
) -> tuple[str, list[Figure], dict[str, np.ndarray]]:
    """One kind of figure.

    Returns:
      (caption, figures, arrays).
    """
    model = loaded.model
    grid, stride = _grid(loaded), model.patch_pixels
    reader = "the class token" if "token" in model.classifier else "the mean of all patches"
    if name == "positions":
        cosines = features.position_similarity(features.position_vectors(loaded.params, grid))
        return (
            "Cosine similarity of the position embedding of a patch (its row and column number the "
            "small maps) with those of all patches; Figures 7 centre and 10 of the paper.",
            [figures.positions(cosines)], {"similarity": np.float32(cosines)})
    if name == "filters":
        components, shares = features.filter_components(
            np.asarray(loaded.params["embedding"]["kernel"]))
        return (
            f"Principal components of the {model.hidden_size} filters of {stride}x{stride} pixels, "
            "with their share of the variance. Gray is 0; each component has its own scale. Figure "
            "7 left of the paper.",
            [figures.filters(components, shares)],
            {"components": np.float32(components), "variance_shares": np.float32(shares)})

    assert view is not None
    titles = [Path(path).name for path in view.files]
    files = np.array(view.files, str)
    if name == "rollout":
        return (
            f"How much of each patch reaches {reader} of the last layer if every token is passed "
            "on by the mean attention of the heads, one half, and by the residual connection, the "
            "other half (Abnar & Zuidema 2020); Figures 6 and 14 of the paper. Bright is what "
            "reaches the 98th percentile of an image's weights.",
            [figures.rollout(view.images, view.rollout, titles)],
            {"rollout": view.rollout, "files": files})
    if name == "heads":
        title = "Attention of the class token" if "token" in model.classifier else (
            "Mean attention of all patches")
        return (
            f"Attention weights from {reader} to the patches. Each map is scaled to its own 98th "
            "percentile.",
            [figures.heads(*shown, title)
             for shown in zip(view.images, view.heads, titles, strict=False)],
            {"attention": view.heads, "files": files[: len(view.heads)]})
    if name == "distance":
        uniform = attention.uniform_distance(grid, stride)
        return (
            "Distance in pixels between a patch and the patches it attends to, weighted by "
            "attention and averaged over patches and images; Figures 7 right and 11 of the paper. "
            "The class token and registers are left out and the patches' weights add up to 1.",
            [figures.distances(view.distances.mean(axis=0), uniform, len(files))],
            {"distance": view.distances, "uniform": np.float32(uniform), "files": files})
    cka = features.layer_similarity(view.tokens)
    return (
        "Linear centred kernel alignment (Kornblith et al. 2019, unbiased estimate) of the "
        "features of patches: 1 for layers that are equal up to rotation and scale, about 0 for "
        "layers that have nothing in common.",
        [figures.similarity(cka, view.tokens.shape[1], view.token_images)],
        {"cka": np.float32(cka)})


def save(
    folder: Path, name: str, caption: str, drawn: list[Figure], arrays: dict[str, np.ndarray]
) -> Section:
    """Writes `NAME.png` (of several `NAME_1.png`, ...) and `NAME.npz`.

    Raises:
      UserError: they cannot be written.
    """
    images = [f"{name}.png"]
    if len(drawn) > 1:
        images = [f"{name}_{number}.png" for number in range(1, len(drawn) + 1)]
    with cli.writing_to(folder):
        for image, figure in zip(images, drawn, strict=True):
            figure.savefig(folder / image)
        np.savez_compressed(folder / f"{name}.npz", **arrays)
    return Section(TITLES[name], caption, tuple(images), f"{name}.npz")


def facts(loaded: Loaded, view: View | None) -> dict[str, str]:
    """What the page says of the model and the images."""
    model, (height, width) = loaded.model, loaded.metadata["preprocessing"]["image_size"]
    grid = _grid(loaded)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(loaded.params))
    told = {
        "model": f"{model.num_layers} layers of width {model.hidden_size}, {model.num_heads} heads,"
        f" {parameters:,} parameters",
        "input": f"{height}x{width} pixels, {grid[0]}x{grid[1]} patches of {height // grid[0]} "
        "pixels",
    }
    if view:
        told["images"] = f"{len(view.files):,}"
        told["drawn images"] = ", ".join(view.files[: len(view.images)])
    return told


def _grid(loaded):
    return loaded.model.patch_grid(loaded.metadata["preprocessing"]["image_size"])


if __name__ == "__main__":
    cli.run_command(main)
