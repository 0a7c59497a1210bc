"""Carry weights to another library: python -m vit_jax.convert --from=PATH --to=TARGET --out=PATH"""

from pathlib import Path

from vit_jax import cli
from vit_jax.checkpoints.export import VerificationFailed, export_model
from vit_jax.checkpoints.load import load_model
from vit_jax.checkpoints.targets import TARGETS
from vit_jax.errors import UserError


def main(arguments: list[str]) -> None:
    """Runs the command; see `--help`."""
    parser = cli.ArgumentParser(
        prog="python -m vit_jax.convert",
        description="Writes a checkpoint in the format of another library, and checks with that "
        "library, if it is installed, that the numbers are the same. Exits with 0 only if they are "
        "(or the check was skipped), and leaves nothing under --out otherwise.",
    )
    parser.add_argument("--from", dest="source", metavar="PATH", required=True,
                        help="what load_model reads: a file, a directory, a run's workdir, or a "
                        "name such as augreg:B/16")
    parser.add_argument("--to", choices=TARGETS, required=True,
                        help="a directory for timm, Hugging Face (hf) or torchvision, or Google's "
                        "npz file")
    parser.add_argument("--out", metavar="PATH", type=Path, required=True,
                        help="the directory, for npz the file, to write")
    parser.add_argument("--match_eps", action="store_true",
                        help="rescale a hybrid's standardised kernels so that timm computes the "
                        "same; for inference, not for further training")
    parser.add_argument("--noverify", action="store_true", help="do not compare the outputs")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"),
                        help="of the tensors")
    parser.add_argument("--allow_gelu_change", action="store_true",
                        help="export tanh GELU to torchvision, which only has the exact GELU")
    parser.add_argument("--images", nargs="+", action="extend", default=[], metavar="PATH",
                        help="images or folders of images to compare on, besides random ones")
    cli.add_weights_flags(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    flags = parser.parse(arguments)
    if flags.noverify and flags.images:
        raise UserError("--images has no effect with --noverify; leave one of them out.")
    if flags.allow_gelu_change and flags.to != "torchvision":
        raise UserError("--allow_gelu_change is for --to=torchvision; leave it out.")

    loaded = load_model(flags.source, **cli.weights_options(flags))
    print(loaded.report, flush=True)
    try:
        print(export_model(
            loaded, flags.to, flags.out, match_eps=flags.match_eps, dtype=flags.dtype,
            allow_gelu_change=flags.allow_gelu_change, check=not flags.noverify,
            images=flags.images, overwrite=flags.overwrite))
    except VerificationFailed as error:
        print(error.report)
        raise


if __name__ == "__main__":
    cli.run_command(main)
