"""Every recipe in configs/, with every argument that its docstring names."""

import runpy
from pathlib import Path

CONFIGS = Path(__file__).parent.parent / "configs"


def _table(file, name):
    return runpy.run_path(str(CONFIGS / file))[name]


RECIPES = [
    "quickstart.py",
    "cifar10.py",
    "cifar10.py:cpu",
    "folder.py:/data/my photos",
    *(f"finetune.py:B/16,{data}" for data in _table("finetune.py", "ROWS")),
    "finetune.py:B/16,vtab:svhn_cropped",
    "finetune.py:H/14,imagenet2012",
    "finetune.py:S/16,folder:/data/my photos",
    "masked_patches.py:cpu",
    "masked_patches.py:B/16",
    "masked_patches.py:R50+B/16,folder:/data/my photos",
    *(f"pretrain_i1k.py:{model},{recipe}"
      for model in _table("pretrain_i1k.py", "AUGREG")
      for recipe in _table("pretrain_i1k.py", "RECIPES")),
    *(f"pretrain_i21k.py:{model}" for model in _table("pretrain_i21k.py", "SETTINGS")),
    "pretrain_i21k.py:S/16,folder:/data/imagenet21k",
    *(f"pretrain_paper.py:{row}" + (",folder:/data/jft" if "-jft-" in row else "")
      for row in _table("pretrain_paper.py", "ROWS")),
    "pretrain_paper.py:B/16-i21k-90ep,folder:/data/imagenet21k",
]
