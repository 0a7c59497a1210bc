"""The figures of a finished run, whatever its classes are called."""

import json

import numpy as np
import pytest
from PIL import Image

from vit_jax import report
from vit_jax.evaluate import Evaluation
from vit_jax.report import write_report


def make_evaluation(num_classes, images=None):
    """Some images of every class, two of three of them right."""
    labels = np.arange(images or 3 * num_classes, dtype=np.int32) % num_classes
    predictions = np.where(np.arange(len(labels)) % 3 == 0, 0, labels).astype(np.int32)
    return Evaluation(labels, predictions, np.ones(len(labels)), labels >= 0, num_classes)


def write(workdir, class_names, train_labels=None, entries=None):
    """The figures' pixels; a warning is an error in this suite."""
    if entries is None:
        entries = [{"step": i, "train/loss": 1 / i, "train/learning_rate": 0.1} for i in (1, 2, 3)]
        entries.append({"step": 3, "eval/loss": 0.5, "eval/accuracy": 0.5, "eval/images": 9})
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    folder = write_report(workdir, make_evaluation(len(class_names)), tuple(class_names),
                          train_labels)
    assert folder == workdir / "report"
    figures = {path.name: read(path) for path in folder.iterdir()}
    assert set(figures) == {"curves.png", "classes.png", "confusion.png"}
    for pixels in figures.values():
        assert all(300 < side < 2500 for side in pixels.shape[:2])
        assert len(np.unique(pixels)) > 50  # something is drawn
    return figures


def read(path):
    with Image.open(path) as figure:
        return np.asarray(figure)


@pytest.mark.parametrize("count", [3, 10, 30, 200])
def test_figures(tmp_path, count):
    names = [f"class {i}" for i in range(count)]
    with_labels = write(tmp_path, names, np.arange(5 * count) % count)["classes.png"]
    without = report._classes(make_evaluation(count), names, None)
    without.draw_without_rendering()  # where labels are measured and warnings arise
    assert 300 < without.get_figheight() * 150 < len(with_labels) < 1000


def test_a_second_report_replaces_the_first(tmp_path):
    """A run that is started again after its end."""
    write(tmp_path, ["a", "b"], np.zeros(3, np.int32))
    high = len(read(tmp_path / "report" / "classes.png"))
    assert len(write(tmp_path, ["a", "b"])["classes.png"]) < high  # one panel instead of two


@pytest.mark.parametrize("names", [
    ["$x_1$", r"$\frac$", "a$b", "100%", "under_score", "^{", "#"],
    ["naïve", "Größe", "кошка", "猫", "कुत्ता", "كلب", "🐈"],
    ["a\nb", "a\tb", "", " ", "_hidden", "\udcff"],  # the last as in a file name that is not UTF-8
    [letter * 200 for letter in "abcdefgh"],
    ["W" * 30] * 40,
], ids=["mathtext", "letters", "control", "long", "long and many"])
def test_odd_class_names(tmp_path, names):
    write(tmp_path, names, np.zeros(3, np.int32))


def labels_of(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_names_are_shown_as_they_are():
    names = ("$x_1$", "猫", "x" * 30, "cat")
    figure = report._confusion(make_evaluation(4), names)
    shown = ["$x_1$", "class 1", "x" * 23 + "…", "cat"]  # DejaVu Sans has no 猫
    axes = figure.axes[0]
    assert labels_of(axes.xaxis) == labels_of(axes.yaxis) == shown
    assert not any(label.get_parse_math() for label in axes.get_xticklabels())


def test_what_the_class_figure_says():
    train_labels = np.array([0, 0, 0, 2])
    figure = report._classes(make_evaluation(3, images=7), ("a", "b", "c"), train_labels)
    training, evaluation = figure.axes
    assert [bar.get_height() for bar in training.patches] == [3, 0, 1]
    assert [bar.get_height() for bar in evaluation.patches] == [3, 2, 2]
    assert training.get_title() == "training: 4 images"
    assert evaluation.get_title() == "evaluation: 7 images"
    assert labels_of(evaluation.xaxis) == ["a", "b", "c"]


@pytest.mark.parametrize("names, rotation", [
    ("0123456789", 0),
    ("airplane automobile bird cat deer dog frog horse ship truck".split(), 90),
])
def test_names_do_not_overlap(names, rotation):
    axes = report._classes(make_evaluation(10), names, None).axes[0]
    assert {label.get_rotation() for label in axes.get_xticklabels()} == {rotation}


def test_what_the_confusion_matrix_says():
    """Rows are the true classes; colours are shares of a row, numbers are images."""
    evaluation = Evaluation(np.array([0, 0, 0, 0, 1]), np.array([0, 0, 0, 2, 1]), np.ones(5),
                            np.ones(5, bool), 3)
    axes = report._confusion(evaluation, ("a", "b", "c")).axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(),
                               [[0.75, 0, 0.25], [0, 1, 0], [0, 0, 0]])
    numbers = {tuple(text.get_position()): text.get_text() for text in axes.texts}
    assert numbers == {(0, 0): "3", (2, 0): "1", (1, 1): "1"}  # (predicted, true)
    assert axes.get_title() == "5 images, accuracy 80.00%"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")


def test_many_classes_are_numbered():
    figure = report._confusion(make_evaluation(200), tuple(map(str, range(200))))
    axes = figure.axes[0]
    assert axes.get_xlabel() == "predicted class index" and len(axes.texts) == 0


def test_thousands_of_classes_have_no_confusion_matrix(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    names = tuple(map(str, range(1001)))
    folder = write_report(tmp_path, make_evaluation(1001), names, np.arange(5))
    assert sorted(path.name for path in folder.iterdir()) == ["classes.png", "curves.png"]
    training, evaluation = report._classes(make_evaluation(1001), names, np.arange(5)).axes
    assert training.patches[0].get_data().values.tolist() == [1] * 5 + [0] * 996
    assert evaluation.patches[0].get_data().values.tolist() == [3] * 1001


@pytest.mark.parametrize("entries", [
    [],  # a run that had ended already, whose metrics were removed
    [{"step": 1, "eval/loss": 0.5, "eval/accuracy": 0.5}],
], ids=str)
def test_curves_of_little(tmp_path, entries):
    write(tmp_path, ["a", "b"], entries=entries)


def test_curves_hold_every_point(tmp_path):
    entries = [{"step": i, "train/loss": 1 / i} for i in (1, 2, 4)]
    figure = report._curves([*entries, {"step": 4, "eval/loss": 0.3}])
    training, evaluation = figure.axes[0].lines
    assert training.get_xydata().tolist() == [[1, 1], [2, 0.5], [4, 0.25]]
    assert evaluation.get_xydata().tolist() == [[4, 0.3]]
