"""The figures that a run leaves in `report/`: curves, class distribution, confusion matrix."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure

from vit_jax.evaluate import Evaluation, Scores
from vit_jax.training.metrics import read_metrics

_FONT = "DejaVu Sans"  # comes with matplotlib
_MAX_NAMED_CLASSES = 40  # more names than this cannot be read
_MAX_CONFUSION = 1000  # classes; more take gigabytes to draw, and are smaller than a pixel
_MAX_NAME = 24  # characters; longer names would leave no room for the figure


def write_report(
    workdir: Path,
    evaluation: Scores,
    class_names: tuple[str, ...],
    train_labels: np.ndarray | None,
) -> Path:
    """Writes `curves.png`, and for a classifier `classes.png` and, up to 1,000 classes,
    `confusion.png`.

    Args:
      workdir: holds metrics.jsonl; the figures go to its `report/`.
      evaluation: of the final model.
      class_names: K names.
      train_labels: int [N], or None where counting them would mean reading a large data set.

    Returns:
      The folder.
    """
    folder = workdir / "report"
    folder.mkdir(exist_ok=True)
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False,
                                "figure.dpi": 150, "font.size": 9, "font.family": _FONT}):
        figures = {"curves": _curves(read_metrics(workdir / "metrics.jsonl"))}
        if isinstance(evaluation, Evaluation):
            figures["classes"] = _classes(evaluation, class_names, train_labels)
            if len(class_names) <= _MAX_CONFUSION:
                figures["confusion"] = _confusion(evaluation, class_names)
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png")
    return folder


def _curves(entries) -> Figure:
    panels = (
        ("Loss", (("train/loss", "training"), ("eval/loss", "evaluation"))),
        ("Accuracy", (("eval/accuracy", "evaluation"),)),
        ("Learning rate", (("train/learning_rate", None),)),
    )
    figure = Figure(figsize=(10, 3), layout="constrained")
    for axes, (title, series) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for key, label in series:
            points = [(entry["step"], entry[key]) for entry in entries if key in entry]
            marker = "o" if key.startswith("eval") else None
            if points:
                axes.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=3)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if len(series) > 1 and axes.lines:
            axes.legend(frameon=False)
    return figure


def _classes(evaluation, class_names, train_labels) -> Figure:
    count = len(class_names)
    splits = [("evaluation", evaluation.labels)]
    if train_labels is not None:
        splits.insert(0, ("training", train_labels))
    crowded = count * max(map(len, _shown(class_names))) > 60
    height = 2 * len(splits) + (1.5 if crowded else 0.5)
    figure = Figure(figsize=(min(12, 4 + 0.25 * count), height), layout="constrained")
    panels = figure.subplots(len(splits), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (title, labels) in zip(panels, splits, strict=True):
        counts = np.bincount(labels, minlength=count)
        if count <= _MAX_CONFUSION:
            axes.bar(range(count), counts, width=0.8)
        else:  # thousands of bars take a minute
            axes.stairs(counts, np.arange(count + 1) - 0.5, fill=True)
        axes.set(title=f"{title}: {len(labels):,} images", ylabel="images")
        axes.set_xlim(-0.6, count - 0.4)
    _name_classes(panels[-1].xaxis, class_names, rotation=90 if crowded else 0)
    return figure


def _confusion(evaluation, class_names) -> Figure:
    count = len(class_names)
    matrix = np.zeros((count, count), np.int64)
    np.add.at(matrix, (evaluation.labels, evaluation.predictions), 1)
    share = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
    side = min(12, 3.5 + 0.2 * count)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    axes.set(title=f"{evaluation.images:,} images, accuracy {evaluation.accuracy:.2%}",
             xlabel="predicted", ylabel="true")
    _name_classes(axes.xaxis, class_names, rotation=90)
    _name_classes(axes.yaxis, class_names, rotation=0)
    if count <= 20:
        for (row, column), number in np.ndenumerate(matrix):
            if number:
                axes.text(column, row, number, ha="center", va="center", fontsize=7,
                          color="white" if share[row, column] > 0.5 else "black")
    return figure


def _name_classes(axis, class_names, rotation):
    if len(class_names) <= _MAX_NAMED_CLASSES:
        # Literally: $x_1$ is a name here, not a formula.
        axis.set_ticks(range(len(class_names)), _shown(class_names), rotation=rotation,
                       parse_math=False)
    else:
        axis.set_label_text(f"{axis.get_label_text()} class index".strip())


def _shown(class_names) -> list[str]:
    """The class names, shortened to fit; those that the font cannot draw as "class INDEX"."""
    glyphs = font_manager.get_font(font_manager.findfont(_FONT)).get_charmap()
    short = [name if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME - 1]}…" for name in class_names]
    return [name if all(ord(letter) in glyphs for letter in name) else f"class {index}"
            for index, name in enumerate(short)]
