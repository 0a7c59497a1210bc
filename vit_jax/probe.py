"""Probe features: python -m vit_jax.probe --checkpoint=PATH --data=SOURCE"""

import json
from pathlib import Path

import jax
import numpy as np

from vit_jax import atomic, cli
from vit_jax.checkpoints.load import load_model
from vit_jax.data.pipeline import BadImages
from vit_jax.data.sources import Source, open_splits
from vit_jax.errors import UserError, did_you_mean
from vit_jax.images import eval_config
from vit_jax.probes import PROBES
from vit_jax.probes.evaluator import ProbeResults, make_probes
from vit_jax.probes.fewshot import L2, SEEDS, SHOTS
from vit_jax.probes.knn import NEIGHBORS, TEMPERATURE
from vit_jax.training import partition
from vit_jax.training.step import Pixels


def main(arguments: list[str]) -> None:
    """Runs the command; see `--help`."""
    parser = cli.ArgumentParser(
        prog="python -m vit_jax.probe",
        description="Measures how well the frozen features of a model classify images: few-shot "
        "least squares, nearest neighbours and logistic regression.",
        epilog=f"fewshot  the paper's and big_vision's: least squares to -1 and 1 with l2={L2:g}, "
        f"{SEEDS} seeds\n"
        f"knn      DINO's: {NEIGHBORS} neighbours, cosine similarity, temperature {TEMPERATURE}\n"
        "linear   logistic regression by L-BFGS; l2 is chosen on a tenth of the training images\n"
        "\nAll images, including the training images, are preprocessed as the checkpoint says.",
    )
    cli.add_model_flags(parser)
    parser.add_argument("--data", metavar="SOURCE", required=True,
                        help="tfds:NAME, folder:PATH or digits")
    parser.add_argument("--data_dir", metavar="DIR", help="where TFDS data sets are")
    parser.add_argument("--train_split", metavar="SPLIT",
                        help="what the probes are trained on; default: the source's own")
    parser.add_argument("--eval_split", metavar="SPLIT",
                        help="what they are tested on; default: the source's own")
    parser.add_argument("--what", metavar="PROBES", default=",".join(PROBES),
                        help="a subset of %(default)s")
    parser.add_argument("--shots", metavar="N,...", default=",".join(map(str, SHOTS)),
                        help="images per class of the few-shot probe, or all where there are fewer "
                        "(%(default)s)")
    parser.add_argument("--batch_size", metavar="N", type=int, default=128,
                        help="images at once (%(default)s)")
    parser.add_argument("--out", metavar="FILE.json", type=Path, help="also writes the results")
    flags = parser.parse(arguments)
    names = parse_probes(flags.what)
    shots = parse_shots(flags.shots)
    if flags.batch_size < 1:
        raise UserError(f"--batch_size={flags.batch_size} must be at least 1.")
    if flags.out and flags.out.suffix != ".json":
        raise UserError(f"--out={flags.out} does not end in .json; name the file to write, as in "
                        "--out=FILE.json.")
    if flags.out and not flags.out.absolute().parent.is_dir():
        raise UserError(f"--out: the folder {flags.out.absolute().parent} does not exist; create "
                        "it first.")

    loaded = load_model(flags.checkpoint, num_classes=0, **cli.model_options(flags))
    print(loaded.report)
    preprocessing = loaded.metadata["preprocessing"]
    size = tuple(preprocessing["image_size"])
    train_source, test_source = open_data(flags, size)

    config = eval_config(preprocessing)
    config.eval_batch_size = flags.batch_size
    mesh = partition.make_mesh(config)
    bad_images = BadImages("skip")
    probe = make_probes(
        loaded.model, config, mesh, train_source, test_source, bad_images,
        Pixels(preprocessing["mean"], preprocessing["std"]), names=names, shots=shots)
    results = probe(jax.device_put(loaded.params, partition.replicated(mesh)))

    print(f"{results.width} features of images of {size[0]}x{size[1]}; learned from "
          f"{results.train_images:,} of {train_source.name}, tested on {results.test_images:,} of "
          f"{test_source.name}")
    if bad_images.count:
        print(f"{bad_images.count} images could not be decoded and were skipped.")
    print(format_table(results))
    if flags.out:
        what = {"checkpoint": flags.checkpoint, "image_size": list(size),
                "train": train_source.name, "test": test_source.name}
        atomic.write_text(flags.out, json.dumps(what | to_json(results), indent=2) + "\n")


def open_data(flags, size: tuple[int, int]) -> tuple[Source, Source]:
    """What the flags name; errors speak of the flags, not of a config's keys."""
    try:
        return open_splits(
            flags.data, dir=flags.data_dir, train_split=flags.train_split,
            eval_split=flags.eval_split, image_size=size)
    except UserError as error:
        text = str(error)
        for key, flag in (("source", "data"), ("dir", "data_dir"), ("", "")):
            text = text.replace(f"config.data.{key}", f"--{flag}")
        raise UserError(text) from error


def parse_probes(text: str) -> tuple[str, ...]:
    """'fewshot,knn' to names. Raises UserError for an unknown one."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in PROBES:
            raise UserError(f"--what: {name!r} is not one of {', '.join(PROBES)}"
                            f"{did_you_mean(name, PROBES)}")
    return names


def parse_shots(text: str) -> tuple[int, ...]:
    """'1,5' to numbers. Raises UserError unless all are at least 1."""
    try:
        shots = tuple(int(part) for part in text.split(","))
    except ValueError:
        shots = (0,)
    if min(shots) < 1:
        raise UserError(f"--shots={text} must be numbers of images, such as 1,5,10,25.")
    return shots


def format_table(results: ProbeResults) -> str:
    """One line a probe; with several seeds their mean, and the lowest and highest."""
    lines = [f"{'probe':24}accuracy"]
    for shots, values in results.fewshot.items():
        lines.append(f"{f'{shots}-shot':24}{np.mean(values):.4f}  "
                     f"({min(values):.4f} to {max(values):.4f}, {len(values)} seeds)")
    if results.knn is not None:
        lines.append(f"{f'{NEIGHBORS} nearest neighbours':24}{results.knn:.4f}")
    if results.linear is not None:
        lines.append(f"{'linear':24}{results.linear.accuracy:.4f}  (l2 {results.linear.l2:g})")
    return "\n".join(lines)


def to_json(results: ProbeResults) -> dict:
    """The settings stand beside the numbers."""
    values = {"features": results.width, "train_images": results.train_images,
              "test_images": results.test_images}
    if results.fewshot:
        values["fewshot"] = {"l2": L2, "accuracy_by_seed": results.fewshot}
    if results.knn is not None:
        values["knn"] = {"neighbors": NEIGHBORS, "temperature": TEMPERATURE,
                         "accuracy": results.knn}
    if results.linear is not None:
        values["linear"] = results.linear._asdict()
    return values


if __name__ == "__main__":
    cli.run_command(main)
