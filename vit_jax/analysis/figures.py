"""The figures of `python -m vit_jax.visualize`, from arrays alone; nothing here knows a model."""

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image

_FONT = "DejaVu Sans"  # comes with matplotlib
_LONGEST_NAME = 18  # characters
_WIDTH = 7.5  # inches, what fits on a page
_MOST_MAPS = 16  # beside each other, for position embeddings
_MAP_COLORS = "magma"
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9,
         "figure.dpi": 200, "font.size": 9, "font.family": _FONT}


def style():
    """The context in which the figures are drawn and saved."""
    return matplotlib.rc_context(STYLE)


def rollout(images: np.ndarray, maps: np.ndarray, names: list[str]) -> Figure:
    """Images beside their attention rollout (the paper's Figure 6).

    Args:
      images: uint8 [n, H, W, 3].
      maps: [n, height, width] of patches.
      names: [n].
    """
    pairs = min(2, len(images))  # of image and rollout, side by side
    rows = -(-len(images) // pairs)
    aspect = images.shape[1] / images.shape[2]
    side = (_WIDTH - 0.5) / (3 * pairs)
    figure = Figure(figsize=(_WIDTH, rows * (side * aspect + 0.24) + 0.75), layout="constrained")
    figure.suptitle("Attention rollout: the image, the image times its weights, the weights",
                    fontsize=10)
    panels = figure.subplots(rows, 3 * pairs, squeeze=False)
    for axes in panels.flat:
        axes.axis("off")
    brightest = _brightest(maps)
    for image, weights, top, name, (left, middle, right) in zip(
            images, maps, brightest, names, panels.reshape(-1, 3), strict=False):
        top = top.item()
        left.imshow(image)
        _name(left, name)
        middle.imshow(_masked(image, weights / top))
        drawn = right.imshow(np.minimum(weights / top, 1), cmap=_MAP_COLORS, vmin=0, vmax=1)
        right.set_title(f"{top:.2%}")
    figure.colorbar(drawn, ax=panels, location="bottom", shrink=0.5, aspect=40, ticks=(),
                    label="weight, from 0 to its 98th percentile, which stands above the map")
    return figure


def heads(image: np.ndarray, maps: np.ndarray, name: str, title: str) -> Figure:
    """Attention maps of the token that the classifier reads, for every layer and head.

    Args:
      image: uint8 [H, W, 3].
      maps: [L, heads, height, width] of patches.
      name: of the image.
      title: whose attention it is.
    """
    layers, count, height, width = maps.shape
    cell = min((_WIDTH - 2.4) / count, 9.0 / layers * width / height, 1.5)
    grid = (cell * count, cell * layers * height / width)
    figure = Figure(figsize=(max(4.0, grid[0] + 2.4), max(3.0, grid[1] + 1.0)),
                    layout="constrained")
    figure.suptitle(title, fontsize=10)
    left, right = figure.subplots(1, 2, width_ratios=(1.7, grid[0]))
    left.imshow(image)
    left.axis("off")
    left.set_anchor("N")
    right.set_anchor("NW")
    _name(left, name)
    shown = _mosaic(np.minimum(maps / _brightest(maps), 1))
    drawn = right.imshow(shown, cmap=_MAP_COLORS, vmin=0, vmax=1, interpolation="nearest")
    _number(right.xaxis, np.arange(count), width + 1)
    _number(right.yaxis, np.arange(layers), height + 1)
    right.set(xlabel="head", ylabel="layer")
    right.spines[:].set_visible(False)
    right.tick_params(length=0)
    unit = width / height  # of the image's height, so that the bar is as high below any image
    figure.colorbar(drawn, cax=left.inset_axes((0, -0.2 * unit, 1, 0.06 * unit)),
                    orientation="horizontal", ticks=(0, 0.5, 1),
                    label="weight, of the map's\n98th percentile")
    return figure


def distances(values: np.ndarray, uniform: float, images: int) -> Figure:
    """Mean attention distance by depth (the paper's Figures 7 right and 11).

    Args:
      values: [L, heads], in pixels.
      uniform: that of a head with uniform attention.
      images: how many they are averaged over.
    """
    layers, count = values.shape
    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    axes = figure.subplots()
    depth = np.arange(1, layers + 1)
    axes.plot(np.repeat(depth, count), values.ravel(), "o", markersize=4, alpha=0.6,
              markeredgewidth=0, label=f"a head ({count} per layer)")
    axes.plot(depth, values.mean(axis=1), color="black", linewidth=1, label="mean of the heads")
    axes.axhline(uniform, color="gray", linestyle="--", linewidth=1, label="uniform attention")
    axes.set(title=f"Mean attention distance over {_count(images, 'image')}", ylim=(0, None),
             xlabel="layer", ylabel="mean attention distance (pixels)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    figure.legend(frameon=False, loc="outside lower center", ncols=3)
    return figure


def positions(similarity: np.ndarray) -> Figure:
    """Similarity of position embeddings (the paper's Figures 7 centre and 10).

    Args:
      similarity: [height, width, height, width], cosines. Of a large grid, only every second (or
        third, ...) row and column has room for its map.
    """
    height, width = similarity.shape[:2]
    every = -(-max(height, width) // _MOST_MAPS)
    rows, columns = (np.arange((size - 1) % every // 2, size, every) for size in (height, width))
    aspect = len(rows) * height / (len(columns) * width)
    side = min(_WIDTH - 1.5, 9.0 / aspect)
    figure = Figure(figsize=(max(5.0, side + 1.5), side * aspect + 0.8), layout="constrained")
    axes = figure.subplots()
    shown = _mosaic(similarity[np.ix_(rows, columns)])
    drawn = axes.imshow(shown, vmin=-1, vmax=1, interpolation="nearest")
    _number(axes.xaxis, columns, width + 1)
    _number(axes.yaxis, rows, height + 1)
    axes.set(title="Position embeddings: similarity of one patch with all",
             xlabel="patch column", ylabel="patch row")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    figure.colorbar(drawn, ax=axes, label="cosine similarity", aspect=40, shrink=0.8)
    return figure


def filters(components: np.ndarray, shares: np.ndarray) -> Figure:
    """Principal components of the patch-embedding filters (the paper's Figure 7 left).

    Args:
      components: [n, p, p, 3].
      shares: [n], of the variance.
    """
    columns = min(7, len(components))
    rows = -(-len(components) // columns)
    figure = Figure(figsize=(max(4.5, columns * 0.95), rows * 1.15 + 0.5), layout="constrained")
    figure.suptitle(f"Patch-embedding filters, first {len(components)} principal components\n"
                    "with their shares of the variance", fontsize=10)
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.axis("off")
    for number, (component, share, axes) in enumerate(
            zip(components, shares, panels.flat, strict=False), start=1):
        # Gray is zero in every component, and the largest entry reaches the end of the scale.
        axes.imshow(0.5 + component / (2 * np.abs(component).max()), interpolation="nearest")
        axes.set_title(f"{number}: {share:.1%}", fontsize=7, pad=2)
    return figure


def similarity(values: np.ndarray, examples: int, images: int) -> Figure:
    """CKA of all pairs of layers.

    Args:
      values: [L + 1, L + 1], the first for what goes into the first block.
      examples: patches that were compared.
      images: that they are from.
    """
    count = len(values)
    figure = Figure(figsize=(5.2, 4.4), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(values, vmin=0, vmax=1, cmap=_MAP_COLORS)
    ticks = range(0, count, 1 if count <= 13 else 2 if count <= 26 else 4)
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    axes.set(title=f"Similarity of layers: {examples:,} patches of {_count(images, 'image')}",
             xlabel="layer (0: patch and position embedding)", ylabel="layer")
    figure.colorbar(drawn, ax=axes, label="linear CKA")
    if count <= 13:
        for (row, column), value in np.ndenumerate(values):
            axes.text(column, row, f"{value:.2f}".removeprefix("0"), ha="center", va="center",
                      fontsize=6, color="white" if value < 0.6 else "black")
    return figure


def _brightest(maps):
    """The value of [..., h, w] at the top of the colour scale, [..., 1, 1]: the 98th percentile,
    since a few background patches often get most of the weight (arXiv 2309.16588) and would hide
    the rest."""
    values = np.quantile(maps, 0.98, axis=(-2, -1), keepdims=True)
    values = np.where(values > 0, values, maps.max(axis=(-2, -1), keepdims=True))
    return np.maximum(values, np.finfo(np.float32).tiny)


def _masked(image, weights):
    """The image times weights in [0, 1], enlarged to its size."""
    mask = Image.fromarray(np.float32(np.minimum(weights, 1)))
    mask = mask.resize(image.shape[1::-1], Image.Resampling.BICUBIC)
    return np.uint8(image * np.clip(np.asarray(mask), 0, 1)[..., None])


def _mosaic(maps):
    """[rows, columns, h, w] to one picture of them, with gaps of a pixel, which stay white."""
    rows, columns, height, width = maps.shape
    picture = np.full((rows, height + 1, columns, width + 1), np.nan)
    picture[:, :height, :, :width] = maps.transpose(0, 2, 1, 3)
    return picture.reshape(rows * (height + 1), columns * (width + 1))[:-1, :-1]


def _number(axis, numbers, step):
    """Ticks, the numbers (from 0) counted from 1, in the middle of maps that begin every `step`
    pixels."""
    every = 1 if len(numbers) <= 16 else 2 if len(numbers) <= 32 else 4
    axis.set_ticks((np.arange(0, len(numbers), every) + 0.5) * step - 1, numbers[::every] + 1)


def _name(axes, name):
    """A file's name as a title, as far as there is room and the font has letters for it."""
    glyphs = font_manager.get_font(font_manager.findfont(_FONT)).get_charmap()
    name = "".join(letter if ord(letter) in glyphs else "?" for letter in name)
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME - 8]}…{name[-7:]}"
    axes.set_title(name, fontsize=8, parse_math=False)


def _count(number, noun):
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
