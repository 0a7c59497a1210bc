"""What a model consists of: python -m vit_jax.summary NAME_OR_CHECKPOINT"""

import os
import sys

from vit_jax import cli
from vit_jax.checkpoints.adapt import flatten, input_channels
from vit_jax.checkpoints.load import load_model
from vit_jax.checkpoints.names import is_name
from vit_jax.config import base_config
from vit_jax.errors import UserError
from vit_jax.models.summary import format_summary, summarize
from vit_jax.models.variants import canonical_name
from vit_jax.training.state import build_model


def main(arguments: list[str]) -> None:
    """Runs the command; see `--help`."""
    overrides, rest = cli.split_overrides(arguments)
    parser = cli.ArgumentParser(
        prog="python -m vit_jax.summary",
        description="Prints layers, output shapes, parameters and FLOPs of a model, for one image.",
        epilog="--config.model.KEY=VALUE changes the model, as in a run's config, for example\n"
        "  python -m vit_jax.summary B/16 --config.model.classifier=gap --image_size=384",
    )
    parser.add_argument("name", metavar="NAME_OR_CHECKPOINT",
                        help="a variant (B/16, R50+B/16, vit_base_patch16_224), or a checkpoint: "
                        "a file, a directory, a run's workdir, or a name such as augreg:B/16")
    parser.add_argument("--image_size", metavar="N[,M]", help="pixels per side, or height,width; "
                        "default 224, or the checkpoint's")
    parser.add_argument("--num_classes", metavar="K", type=int,
                        help="default 1000, or the checkpoint's; 0: no head")
    parser.add_argument("--depth", metavar="N", type=int, default=2,
                        help="levels of modules to show (2)")
    flags = parser.parse(rest)
    if flags.depth < 1:
        raise UserError(f"--depth={flags.depth} must be at least 1.")
    if flags.num_classes is not None and flags.num_classes < 0:
        raise UserError(f"--num_classes={flags.num_classes} must be at least 0.")
    size = cli.parse_image_size(flags.image_size) if flags.image_size else None
    for key in overrides:
        if not key.startswith("model.") or key == "model.variant":
            raise UserError(f"--config.{key} has no effect here; only --config.model.* keys have.")

    try:
        variant = canonical_name(flags.name)
    except ValueError as error:
        if not os.path.exists(os.path.expanduser(flags.name)) and not is_name(flags.name):
            raise UserError(f"{error} Nor is it the path of a checkpoint.") from None
        if overrides:
            raise UserError(f"--config.{next(iter(overrides))} has no effect on a checkpoint, only "
                            "on a variant.") from None
        classes = {} if flags.num_classes is None else {"num_classes": flags.num_classes}
        loaded = load_model(flags.name, image_size=size, **classes)
        print(loaded.report, file=sys.stderr)
        model, size = loaded.model, tuple(loaded.metadata["preprocessing"]["image_size"])
        channels = input_channels(flatten(loaded.params))
    else:
        config = base_config()
        config.model.variant = variant
        cli.apply_overrides(config, overrides)
        size, channels = size or (224, 224), 3
        classes = 1000 if flags.num_classes is None else flags.num_classes
        model = build_model(config, classes, size)
    print(format_summary(summarize(model, size, channels), flags.depth))


if __name__ == "__main__":
    cli.run_command(main)
