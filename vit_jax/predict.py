"""Classify images: python -m vit_jax.predict --checkpoint=PATH IMAGE_OR_DIR ..."""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from vit_jax import atomic, cli
from vit_jax.checkpoints.load import Loaded, load_model
from vit_jax.data import imagenet
from vit_jax.data.folder import EXTENSIONS
from vit_jax.errors import UserError
from vit_jax.images import Unreadable, batches_of, find_images
from vit_jax.models.resnet import make_head
from vit_jax.training.step import Pixels, normalize

FORMATS = ("table", "json", "csv")
_WIDEST = 40  # characters of a class name in a table


class Prediction(NamedTuple):
    """What a model sees in an image."""

    file: str
    features: np.ndarray  # float32 [D]: what the head gets
    classes: list[int]  # indices, most probable first; empty without a head
    probabilities: list[float]


def main(arguments: list[str]) -> None:
    """Runs the command; see `--help`."""
    parser = cli.ArgumentParser(
        prog="python -m vit_jax.predict",
        description="Prints the most probable classes of images, or saves their features, using "
        "any checkpoint that vit_jax can read and the preprocessing that belongs to it.",
        epilog="Probabilities are a softmax over the classes or, for a run with config.loss.name="
        "sigmoid,\nindependent per class. A checkpoint with 1000 unnamed classes gets the names of "
        "ImageNet's.\nImages that cannot be read are reported on stderr and skipped, and the exit "
        "code is 1.",
    )
    cli.add_model_flags(parser)
    parser.add_argument("images", metavar="IMAGE_OR_DIR", nargs="+",
                        help=f"directories are searched for {', '.join(EXTENSIONS)}")
    parser.add_argument("--top", metavar="K", type=int, default=5, help="classes per image (5)")
    parser.add_argument("--format", choices=FORMATS, default="table",
                        help="of the output (%(default)s)")
    parser.add_argument("--features", metavar="OUT.npz", type=Path,
                        help="also saves `features`, float32 [images, width], the input of the "
                        "head, and `files`, the file names")
    parser.add_argument("--batch_size", metavar="N", type=int, default=32,
                        help="images at once (%(default)s)")
    flags = parser.parse(arguments)
    for flag in ("top", "batch_size"):
        if getattr(flags, flag) < 1:
            raise UserError(f"--{flag}={getattr(flags, flag)} must be at least 1.")
    if flags.features and flags.features.suffix != ".npz":  # as of `--features photo.jpg ...`
        raise UserError(f"--features={flags.features} does not end in .npz; name the file to write,"
                        " as in --features=OUT.npz.")
    if flags.features and not flags.features.absolute().parent.is_dir():
        raise UserError(f"--features: the folder {flags.features.absolute().parent} does not exist;"
                        " create it first.")

    unreadable = Unreadable()
    paths = find_images(flags.images, unreadable)
    loaded = load_model(flags.checkpoint, **cli.model_options(flags))
    print(loaded.report, file=sys.stderr)
    if not loaded.model.num_classes and not flags.features:
        raise UserError(f"{flags.checkpoint} has no head, so it gives features, not classes; save "
                        "them with --features=OUT.npz.")

    kept = []

    def results():
        for prediction in predict(loaded, paths, unreadable, flags.top, flags.batch_size):
            if flags.features:
                kept.append(prediction)
            yield prediction

    write = {"table": write_table, "json": write_json, "csv": write_csv}[flags.format]
    write(results(), class_names(loaded), paths)
    if kept:
        save_features(flags.features, kept, loaded)
    unreadable.check(paths)


def predict(
    loaded: Loaded, paths: list[str], unreadable: Unreadable, top: int, batch_size: int
) -> Iterator[Prediction]:
    """The model's view of every image that can be read, in order.

    Args:
      loaded: of `load_model`; its preprocessing is the images'.
      paths: files.
      unreadable: is told of the others.
      top: how many classes, at most.
      batch_size: images at once.

    Raises:
      UserError: the model gives a prediction for every patch.
    """
    model, preprocessing = loaded.model, loaded.metadata["preprocessing"]
    if "unpooled" in getattr(model, "classifier", ""):
        raise UserError(f"A model with classifier={model.classifier!r} gives one prediction per "
                        "patch, not per image.")
    features_of = model.clone(num_classes=0)
    body = {name: tree for name, tree in loaded.params.items() if name != "head"}
    head = make_head(model.num_classes, 0.0, model.dtype) if model.num_classes else None
    pixels = Pixels(preprocessing["mean"], preprocessing["std"])
    to_probabilities = jax.nn.sigmoid if loaded.metadata["loss"] == "sigmoid" else jax.nn.softmax

    @jax.jit
    def step(params, images):
        features = features_of.apply(
            {"params": params["body"]}, normalize(images, pixels), train=False)
        if head is None:
            return features, None
        logits = head.apply({"params": params["head"]}, features)
        return features, jax.lax.top_k(to_probabilities(logits), min(top, model.num_classes))

    params = jax.device_put({"body": body, "head": loaded.params.get("head")})
    for images, rows in batches_of(paths, preprocessing, unreadable, batch_size):
        features, best = jax.device_get(step(params, images))
        for row, path in rows:
            probabilities, classes = ([], []) if best is None else (x[row].tolist() for x in best)
            yield Prediction(path, np.float32(features[row]), classes, probabilities)


def class_names(loaded: Loaded) -> list[str] | None:
    """The checkpoint's; ImageNet's where it has 1000 classes and no names."""
    if loaded.metadata["class_names"] is None and loaded.model.num_classes == 1000:
        return list(imagenet.class_names())
    names = loaded.metadata["class_names"]
    return None if names is None else list(names)


def _rows(prediction: Prediction, names) -> list[dict[str, Any]]:
    return [
        {"class": str(index) if names is None else names[index], "index": index,
         "probability": probability}
        for index, probability in zip(prediction.classes, prediction.probabilities, strict=True)]


def write_table(predictions: Iterator[Prediction], names, paths: list[str]) -> None:
    """One line a class; the file stands before its first."""
    width = max(map(len, [*paths, "file"]))
    longest = min(_WIDEST, max(map(len, ["class", *(names or ())])))
    print(f"{'file':{width}}  {'class':{longest}}  index  probability")
    for prediction in predictions:
        file = prediction.file
        for row in _rows(prediction, names) or [{"class": "", "index": "", "probability": None}]:
            probability = "" if row["probability"] is None else f"{row['probability']:11.4f}"
            line = f"{file:{width}}  {row['class']:{longest}}  {row['index']:>5}  {probability}"
            print(line.rstrip(), flush=True)
            file = ""


def write_json(predictions: Iterator[Prediction], names, paths: list[str]) -> None:
    """An array of {file, predictions: [{class, index, probability}]}, one line an image."""
    separator = "["
    for prediction in predictions:
        entry = {"file": prediction.file, "predictions": _rows(prediction, names)}
        print(f"{separator}\n{json.dumps(entry, ensure_ascii=False)}", end="", flush=True)
        separator = ","
    print("\n]" if separator == "," else "[]", flush=True)


def write_csv(predictions: Iterator[Prediction], names, paths: list[str]) -> None:
    """file,rank,class,index,probability."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(("file", "rank", "class", "index", "probability"))
    for prediction in predictions:
        for rank, row in enumerate(_rows(prediction, names), start=1):
            writer.writerow((prediction.file, rank, *row.values()))
    sys.stdout.flush()


def save_features(path: Path, predictions: list[Prediction], loaded: Loaded) -> None:
    """`features` float32 [N, D] and `files` [N]; the file is whole or not there."""
    features = np.stack([p.features for p in predictions])
    with atomic.replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, features=features, files=np.array([p.file for p in predictions], str))
    print(f"{len(predictions)} x {features.shape[1]} features are in {path}.", file=sys.stderr)


if __name__ == "__main__":
    cli.run_command(main)
