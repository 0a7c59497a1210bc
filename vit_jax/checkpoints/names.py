"""Names of published checkpoints: `augreg:B/16`, `imagenet21k:ViT-B_16`, ... and their addresses.

    FAMILY:MODEL                     a variant in our names, Google's or timm's; '.npz' may follow
    augreg:MODEL,KEY=VALUE,...       a choice among AugReg's 50,000 files; see `resolve`
    augreg:FILE                      one of them by its full name

The families are folders of Google's public storage, listed in the README of
github.com/google-research/vision_transformer and in its issues 195 and 223 (`gsam`).
"""

import csv
import math
import os
import re
from typing import NamedTuple
from urllib.parse import quote

from vit_jax.checkpoints.download import download
from vit_jax.errors import UserError, did_you_mean
from vit_jax.models.variants import canonical_name

MODELS_URL = "https://storage.googleapis.com/vit_models"  # a mirror: $VIT_JAX_MODELS_URL

# (resolution in pixels where the file name gives none, files)
FILES = {
    "imagenet21k": (224, (
        "ViT-B_16", "ViT-B_32", "ViT-B_8", "ViT-L_16", "ViT-L_32", "ViT-H_14",
        "R50+ViT-B_16", "R26+ViT-B_32", "R50+ViT-L_32")),
    "imagenet21k+imagenet2012": (384, (
        "ViT-B_16", "ViT-B_16-224", "ViT-B_32", "ViT-B_8", "ViT-L_16", "ViT-L_16-224", "ViT-L_32",
        "R50+ViT-B_16")),
    "sam": (224, ("ViT-B_16", "ViT-B_32", "ViT-L_16", "ViT-L_32", "ViT-S_16")),
    "gsam": (224, ("ViT-S_16", "ViT-S_32", "ViT-B_16", "ViT-B_32")),
}
FAMILIES = ("augreg", *FILES)

AUGREG = ("Ti/16", "S/32", "S/16", "B/32", "B/16", "B/8", "L/16", "R+Ti/16", "R26+S/32", "R50+L/32")
_AUGREG_PREFIXES = {re.sub("[+/]", "_", variant): variant for variant in AUGREG}
_AUGREG_FILE = re.compile(  # the upstream file, and what a fine-tuned one adds
    rf"({'|'.join(_AUGREG_PREFIXES)})-i(?:1k|21k|21k_30)-\d+ep-lr_[\d.e-]+-aug_[a-z]+\d?-wd_[\d.]+"
    r"-do_[\d.]+-sd_[\d.]+(?:--[a-z]\w+-steps_\d+k-lr_[\d.]+-res_\d+)?"
)
# What can be chosen -> column of index.csv
UPSTREAM = {"pretraining": "ds", "augmentation": "aug", "weight_decay": "wd", "dropout": "do",
            "stochastic_depth": "sd"}
ADAPTED = {"dataset": "adapt_ds", "resolution": "adapt_resolution"}


class Remote(NamedTuple):
    """A published checkpoint."""

    url: str
    file_name: str
    family: str
    variant: str  # a key of models.variants.VARIANTS
    reason: str  # for a choice: "final_val=0.479, the best of 28"; else ""


def is_name(text: str) -> bool:
    """Whether `text` has the form of a name rather than of a path.

    False for existing files and directories, Windows drives and URLs (`https://...`). The family
    need not exist; `resolve` then suggests the nearest.
    """
    is_like_one = re.match(r"[A-Za-z0-9_+]{2,}:(?!//)", text)
    return is_like_one is not None and not os.path.exists(text)


def resolve(
    name: str, *, cache_dir: str | os.PathLike | None = None, progress: bool = True
) -> Remote:
    """The file that a name stands for. Only AugReg models need the network, and only once: for
    `index.csv`, which stays in the cache.

    `augreg:B/16` is the file pretrained on ImageNet-21k for 300 epochs with the best validation
    accuracy of its pretraining (column `final_val`), as in Google's train.py. These keys choose
    among other files:

      pretraining: i21k (the default), i21k_30 (30 epochs) or i1k.
      augmentation: none, light0, light1, medium1, medium2, strong1 or strong2.
      weight_decay, dropout, stochastic_depth: numbers.
      dataset, resolution: fine-tuned files instead, and the best of them by the accuracy on the
        fine-tuning's validation split (`adapt_final_val`). Accuracies on different data sets do
        not compare, so a resolution alone means imagenet2012; a data set alone, any resolution.

    For example `augreg:B/16,dataset=imagenet2012,resolution=384,augmentation=medium1`; the form
    `augreg:B/16?dataset=imagenet2012&resolution=384` is read too, but must be quoted in a shell.

    A resolution in MODEL (`ViT-B_16-224`, `vit_base_patch16_384`) must be the file's.

    Args:
      name: FAMILY:MODEL, see the module.
      cache_dir, progress: of `download`, for the index.

    Raises:
      UserError: unknown family, model, key or value, with the nearest or all that there are; the
        index cannot be downloaded or read.
    """
    family, _, model = name.partition(":")
    if family not in FAMILIES:
        raise UserError(
            f"{name!r} is neither a file nor the name of a checkpoint: no family is called "
            f"{family!r}{did_you_mean(family, FAMILIES)} The families are: {', '.join(FAMILIES)}."
        )
    if family == "augreg":
        stem, variant, reason = _augreg_file(name, model, cache_dir, progress)
    else:
        stem, variant, reason = *_listed_file(name, family, model), ""
    return Remote(_address(family, f"{stem}.npz"), f"{stem}.npz", family, variant, reason)


def _address(family: str, file_name: str) -> str:
    base = (os.environ.get("VIT_JAX_MODELS_URL") or MODELS_URL).rstrip("/")
    return f"{base}/{quote(family)}/{quote(file_name)}"


def _split_resolution(model: str) -> tuple[str | None, int | None]:
    """Our name of a variant (None if it is none), and the resolution that `model` names."""
    base, resolution = re.fullmatch(r"(.*?)(?:[-_](224|384))?", model, re.DOTALL).groups()
    try:
        variant = None if "." in base else canonical_name(base)  # timm's tags name other weights
    except ValueError:
        variant = None
    return variant, resolution and int(resolution)


def _listed_file(name, family, model):
    usual, files = FILES[family]
    known = {}
    for file in files:
        variant, resolution = _split_resolution(file)
        known[variant, resolution or usual] = file
    model = model.removesuffix(".npz")
    if family == "gsam":  # Google's name of the architecture, though not of the files
        model = model.removesuffix("-gap-norep")
    variant, resolution = _split_resolution(model)
    file = known.get((variant, resolution or usual))
    if file is None:
        raise UserError(
            f"{name!r} is not published{did_you_mean(model, files)} The models of {family} are: "
            f"{', '.join(files)} ({usual} pixels where the name does not say)."
        )
    return file, variant


def _augreg_file(name, model, cache_dir, progress):
    """Stem of the file, variant and reason."""
    model, *pairs = re.split("[?&,]", model)
    model = model.removesuffix(".npz")
    if re.search("-i2?1k", model):  # a file, not a model
        match = _AUGREG_FILE.fullmatch(model)
        if not match or pairs:
            raise UserError(
                f"{name!r} does not name a file of AugReg; they are called MODEL-DATA-EPOCHSep-lr_X"
                "-aug_X-wd_X-do_X-sd_X[--DATASET-steps_Xk-lr_X-res_X].npz, and no keys follow."
            )
        return model, _AUGREG_PREFIXES[match[1]], ""
    variant, resolution = _split_resolution(model)
    variant = _AUGREG_PREFIXES.get(model, variant)
    if variant not in AUGREG:
        raise UserError(f"{name!r} is not published{did_you_mean(model, AUGREG)} "
                        f"The models of AugReg are: {', '.join(AUGREG)}.")
    if resolution == 384:
        raise UserError(f"{name!r}: AugReg pretrained at 224 pixels; for a fine-tuned file, use "
                        f"'augreg:{variant},dataset=imagenet2012,resolution=384'.")
    return _best_file(name, variant, _parse_choice(name, pairs), cache_dir, progress)


def _parse_choice(name: str, pairs: list[str]) -> dict[str, str]:
    choice, known = {}, (*UPSTREAM, *ADAPTED)
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key not in known:
            raise UserError(f"{name!r} has an unknown key {key!r}{did_you_mean(key, known)} "
                            f"The keys are: {', '.join(known)}.")
        if not value or key in choice:
            raise UserError(f"{name!r} must give one value for {key!r}, as in {key}=VALUE.")
        choice[key] = value
    return choice


def _best_file(name, variant, choice, cache_dir, progress):
    adapted = "adapt_" if choice.keys() & ADAPTED.keys() else ""
    choice = {"pretraining": "i21k"} | ({"dataset": "imagenet2012"} if adapted else {}) | choice
    columns = UPSTREAM | ADAPTED
    score, file = f"{adapted}final_val", f"{adapted}filename"
    rows = _read_index(variant, (score, file, *columns.values()), cache_dir, progress)
    for key, value in choice.items():
        there = {row[columns[key]] for row in rows}
        rows = [row for row in rows if _same(row[columns[key]], value)]
        if not rows:
            raise UserError(f"{name!r}: AugReg published no such file with {key}={value}, only "
                            f"with {key}={' or '.join(sorted(there))}{did_you_mean(value, there)}")
    scores = {row[file]: _number(row[score]) for row in rows}
    best = max(scores, key=scores.get)
    reason = f"{score}={scores[best]:g}, the best of {len(scores)}"
    return best.removesuffix(".npz"), variant, reason


def _read_index(variant, columns, cache_dir, progress) -> list[dict[str, str]]:
    """What AugReg's index says of `variant`. Its first two `columns` are a score and a file; rows
    without them are left out."""
    path = download(_address("augreg", "index.csv"), cache_dir=cache_dir, progress=progress)
    prefix = re.sub("[+/]", "_", variant) + "-"
    try:
        with open(path, newline="", encoding="utf-8") as table:
            rows = [
                {column: row[column] or "" for column in columns}
                for row in csv.DictReader(table) if (row["filename"] or "").startswith(prefix)
            ]
        score, file = columns[:2]
        rows = [row for row in rows if row[file] and math.isfinite(_number(row[score]))]
        if not rows:
            raise ValueError(f"it lists no file of {variant}")
    except (OSError, ValueError, csv.Error) as error:  # ValueError: not in UTF-8, among others
        problem = str(error)
    except KeyError as error:
        problem = f"it has no column {error}"
    else:
        return rows
    raise UserError(
        f"{path} cannot be read as AugReg's index: {problem}; delete it to download it again."
    )


def _same(cell: str, value: str) -> bool:
    return cell == value or _number(cell) == _number(value)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
