"""Masked predictions as a picture: python -m vit_jax.masked --checkpoint=WORKDIR --out=FILE.png
IMAGE_OR_DIR ..."""

import sys
from pathlib import Path

import numpy as np

from vit_jax import atomic, cli
from vit_jax.analysis import figures
from vit_jax.analysis.masked import picture, reconstruct
from vit_jax.checkpoints.load import load_masked_model
from vit_jax.data.folder import EXTENSIONS
from vit_jax.errors import UserError
from vit_jax.images import Unreadable, batches_of, find_images
from vit_jax.training.step import Pixels

_MOST = 8  # images in the picture


def main(arguments: list[str]) -> None:
    """Runs the command; see `--help`."""
    parser = cli.ArgumentParser(
        prog="python -m vit_jax.masked",
        description="Draws what a model that was pretrained with config.task=masked_patches sees "
        "of images, and the colours it predicts for the patches it does not see.",
        epilog=f"The first {_MOST} images are drawn.",
    )
    parser.add_argument("--checkpoint", metavar="WORKDIR", required=True,
                        help="of the pretraining run")
    parser.add_argument("images", metavar="IMAGE_OR_DIR", nargs="+",
                        help=f"directories are searched for {', '.join(EXTENSIONS)}")
    parser.add_argument("--out", metavar="FILE.png", type=Path, required=True,
                        help="the picture to write")
    parser.add_argument("--rate", metavar="SHARE", type=float, default=0.5,
                        help="of patches to corrupt (%(default)s)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the corruption")
    cli.add_weights_flags(parser)
    flags = parser.parse(arguments)
    if flags.out.suffix != ".png":
        raise UserError(f"--out={flags.out} does not end in .png; name the file to write, as in "
                        "--out=FILE.png.")
    if not 0 < flags.rate <= 1:
        raise UserError(f"--rate={flags.rate:g} must be more than 0 and at most 1.")
    if not flags.out.absolute().parent.is_dir():
        raise UserError(f"--out: the folder {flags.out.absolute().parent} does not exist; create "
                        "it first.")
    if not 0 <= flags.seed < 2**32:  # JAX drops higher bits
        raise UserError(f"--seed={flags.seed} must be at least 0 and below {2**32}.")
    unreadable = Unreadable()
    paths = find_images(flags.images, unreadable)[:_MOST]
    loaded = load_masked_model(flags.checkpoint, **cli.weights_options(flags))
    preprocessing = loaded.metadata["preprocessing"]
    images = [pixels[row] for pixels, rows in batches_of(paths, preprocessing, unreadable, _MOST)
              for row, _ in rows]
    if images:
        pixels = Pixels(preprocessing["mean"], preprocessing["std"])
        try:
            result = reconstruct(loaded.model, loaded.params, np.stack(images), rate=flags.rate,
                                 seed=flags.seed, pixels=pixels)
        except ValueError as error:
            raise UserError(f"--rate={flags.rate}: {error}") from None
        with figures.style(), atomic.replacing(flags.out) as temporary:
            picture(result).savefig(temporary)
        print(f"{len(images)} images are in {flags.out}.", file=sys.stderr)
    unreadable.check(paths)


if __name__ == "__main__":
    cli.run_command(main)
