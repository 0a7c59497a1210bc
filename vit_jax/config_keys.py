"""Every key a run can have: default, type, choices and one line of meaning.

A key that is not listed in FIELDS does not exist, and every key listed is read somewhere. What is
done with the table (building, reading, checking a config) is in config.py.
"""

import dataclasses
import math
from typing import Any

from vit_jax.checkpoints.resize import POSITION_MODES
from vit_jax.models.masked import TARGETS
from vit_jax.models.variants import CHOICES as MODEL_CHOICES
from vit_jax.probes import PROBES


@dataclasses.dataclass(frozen=True)
class Field:
    """One key. `type` is int, float, bool, str or tuple; `optional` admits None; numbers lie in
    [minimum, maximum]; `length` counts a tuple's entries (all of one type, `item`)."""

    default: Any
    type: type
    help: str
    optional: bool = False
    choices: tuple = ()
    minimum: float = -math.inf
    maximum: float = math.inf
    item: type | None = None
    length: int | None = None


_MAX_STEPS = 2**31 - 1  # schedules count in int32


def _model(type_, help_, **kwargs):
    """A model override: None keeps the variant's value."""
    return Field(None, type_, help_, optional=True, **kwargs)


FIELDS: dict[str, Field] = {
    "seed": Field(0, int, "random seed of initialisation, data order, augmentation and dropout",
                  minimum=0, maximum=2**32 - 1),  # JAX drops higher bits
    "task": Field("classification", str, "training objective: classification, or masked patch "
                  "prediction without labels (the paper's appendix B.1.2)",
                  choices=("classification", "masked_patches")),
    "total_steps": Field(None, int, "optimizer updates; give this or epochs", optional=True,
                         minimum=1, maximum=_MAX_STEPS),
    "epochs": Field(None, float, "passes over the training data; give this or total_steps",
                    optional=True, minimum=0),
    "batch_size": Field(512, int, "images per update, over all devices and processes", minimum=1),
    "eval_batch_size": Field(None, int, "images per evaluation step; None: batch_size",
                             optional=True, minimum=1),
    "accumulation_steps": Field(1, int, "gradient accumulation: micro-batches per batch",
                                minimum=1),
    "log_every": Field(50, int, "steps between progress lines and entries of metrics.jsonl",
                       minimum=1),
    "eval_every": Field(1000, int, "steps between evaluations; 0: only at the end", minimum=0),
    "checkpoint_every": Field(1000, int, "steps between checkpoints; 0: only the best and the last",
                              minimum=0),
    "ema_decay": Field(None, float, "decay of an exponential moving average of the weights, which "
                       "is evaluated too (eval_ema/*); limited to (1 + t) / (10 + t) at update t",
                       optional=True, minimum=0, maximum=0.9999999),
    "profile_steps": Field(None, tuple, "(first, last): steps that the profiler records into "
                           "WORKDIR/profile", optional=True, item=int, length=2, minimum=1),
    "dtype": Field("float32", str, "type of the computation; parameters are always float32",
                   choices=("float32", "bfloat16")),
    "parallelism": Field("jit", str, "'jit' over the mesh, or 'pmap' (data parallel only)",
                         choices=("jit", "pmap")),
    "mesh.data": Field(-1, int, "size of the data-parallel axis; -1: all remaining devices",
                       minimum=-1),
    "mesh.fsdp": Field(1, int, "size of the FSDP axis, which shards batch, parameters and "
                       "optimizer state", minimum=1),
    "mesh.tensor": Field(1, int, "size of the tensor-parallel axis, which shards attention heads "
                         "and MLP hidden layers", minimum=1),
    "init": Field(None, str, "checkpoint to start from: a file, directory, workdir or name "
                  "(augreg:B/16)", optional=True),
    "init_head": Field("auto", str, "'auto' keeps the head of the init checkpoint if the classes "
                       "agree; 'reset' always starts with a new one",
                       choices=("auto", "reset")),
    "init_position_resize": Field("corner_aligned", str, "how the position embedding of the init "
                                  "checkpoint is resized",
                                  choices=POSITION_MODES),
    #
    "model.variant": Field("S/16", str, "a name such as B/16, R50+B/16 or R50x1"),
    "model.patch_size": _model(int, "pixels per side of a patch", minimum=1),
    "model.hidden_size": _model(int, "width of the tokens", minimum=1),
    "model.mlp_dim": _model(int, "hidden width of the MLP", minimum=1),
    "model.num_heads": _model(int, "attention heads", minimum=1),
    "model.num_layers": _model(int, "Transformer blocks", minimum=1),
    "model.stages": _model(tuple, "bottlenecks per stage of a convolutional baseline", item=int,
                           minimum=1),
    "model.classifier": _model(str, "what the head reads: the class token, or the patches' mean",
                               choices=("token", "gap")),
    "model.representation_size": _model(int, "width of a tanh layer before the head", minimum=1),
    "model.head_bias_init": _model(float, "initial bias of the head"),
    "model.position_embedding": _model(str, "kind of position embedding",
                                       choices=MODEL_CHOICES["position_embedding"]),
    "model.position_embedding_at": _model(
        str, "where it is added: once, in every layer, or the same one in every layer",
        choices=MODEL_CHOICES["position_embedding_at"]),
    "model.dropout_rate": _model(float, "dropout after every dense layer except q, k, v",
                                 minimum=0, maximum=0.99),
    "model.attention_dropout_rate": _model(float, "dropout of attention weights",
                                           minimum=0, maximum=0.99),
    "model.stochastic_depth_rate": _model(float, "probability of skipping a residual branch of the "
                                          "last block; grows linearly from 0 in the first",
                                          minimum=0, maximum=0.99),
    "model.scan_layers": _model(bool, "compile one block and loop over it"),
    "model.scan_unroll": _model(bool, "stack the parameters as scan_layers does, but unroll the "
                                "loop (done on GPUs anyway while scan_layers is None)"),
    "model.remat": _model(str, "what the backward pass recomputes to save memory",
                          choices=MODEL_CHOICES["remat"]),
    "model.attention_implementation": _model(
        str, "attention kernel; 'auto' is cuDNN's where it can be used",
        choices=MODEL_CHOICES["attention_implementation"]),
    "model.activation": _model(str, "Google's tanh GELU, or the exact one",
                               choices=MODEL_CHOICES["activation"]),
    "model.layer_scale": _model(float, "initial gamma of LayerScale"),
    "model.register_tokens": _model(int, "number of register tokens", minimum=0),
    #
    "data.source": Field("digits", str, "tfds:NAME, folder:PATH, digits or synthetic"),
    "data.dir": Field(None, str, "where TFDS data sets are; None: $TFDS_DATA_DIR or "
                      "~/tensorflow_datasets", optional=True),
    "data.train_split": Field(None, str, "None: the source's own", optional=True),
    "data.eval_split": Field(None, str, "None: the source's own", optional=True),
    "data.image_size": Field(224, int, "pixels per side of the model's input, or (height, width)",
                             minimum=1, item=int, length=2),
    "data.workers": Field(None, int, "workers that decode ahead; 0: none; None: one per core",
                          optional=True, minimum=0),
    "data.worker_kind": Field("auto", str, "'thread', 'process' or 'auto': processes for files, "
                              "threads for pixels in memory; see docs/data.md",
                              choices=("auto", "thread", "process")),
    "data.train_crop": Field("inception", str, "'inception' (random area and aspect), 'pad' (pad "
                             "and crop, for small images) or 'none' (squash)",
                             choices=("inception", "pad", "none")),
    "data.crop_area": Field((0.05, 1.0), tuple, "range of an inception crop's share of the image",
                            minimum=1e-6, maximum=1, item=float, length=2),
    "data.crop_aspect": Field((0.75, 4 / 3), tuple, "range of its width / height",
                              minimum=1e-6, item=float, length=2),
    "data.scaled_decode": Field(True, bool, "decode JPEGs at 1/2, 1/4 or 1/8 where an inception "
                                "crop keeps at least the model's size; see docs/data.md"),
    "data.crop_padding": Field(4, int, "pixels of zeros on each side for train_crop='pad'",
                               minimum=0),
    "data.flip": Field(True, bool, "mirror half of the training images left to right"),
    "data.randaugment": Field(None, tuple, "(operations, magnitude): that many of RandAugment's "
                              "operations on every training image, magnitude in [0, 30]",
                              optional=True, item=int, length=2, minimum=0, maximum=30),
    "data.random_erasing": Field(0.0, float, "probability that a rectangle of a training image "
                                 "becomes noise, as timm's mode 'pixel'", minimum=0, maximum=1),
    "data.mixup": Field(0.0, float, "alpha of the Beta distribution that mixup draws every image's "
                        "weight from; 0: no mixup", minimum=0),
    "data.cutmix": Field(0.0, float, "the same for CutMix; with both, each image gets one of them",
                         minimum=0),
    "data.eval_crop": Field("squash", str, "'squash' (the whole image, Google's code) or "
                            "'center_crop' (resize the short side, crop)",
                            choices=("squash", "center_crop")),
    "data.eval_resize": Field(None, int, "short side before center_crop; None: 8/7 of image_size",
                              optional=True, minimum=1),
    "data.interpolation": Field("bilinear", str, "of every resize",
                                choices=("bilinear", "bicubic")),
    "data.antialias": Field(False, bool, "low-pass filter when shrinking; False as Google's code"),
    "data.mean": Field(None, float, "mean for normalising pixels in [0, 1], one number or "
                       "(R, G, B); None: that of the init checkpoint, else 0.5",
                       optional=True, item=float, length=3),
    "data.std": Field(None, float, "standard deviation for normalising pixels, likewise",
                      optional=True, minimum=1e-6, item=float, length=3),
    "data.on_bad_image": Field("error", str, "what to do about an image that cannot be decoded",
                               choices=("error", "skip")),
    "data.max_pixels": Field(100_000_000, int, "largest image that is decoded, in pixels",
                             minimum=1),
    #
    "masked.target": Field("mean_color", str, "what is predicted for every corrupted patch: its "
                           "mean colour in 3 bits a channel, those of its 4x4 cells, or its pixels",
                           choices=TARGETS),
    "masked.rate": Field(0.5, float, "share of the patches that are corrupted", minimum=0.01,
                         maximum=1),
    #
    "probes.every": Field(0, int, "steps between probes of the features, and at the end; 0: none",
                          minimum=0),
    "probes.names": Field(("fewshot",), tuple, "which: fewshot, knn, linear (the last two read the "
                          "whole training split)", item=str, choices=PROBES),
    "probes.shots": Field((1, 5, 10, 25), tuple, "images per class of the few-shot probe", item=int,
                          minimum=1),
    "probes.source": Field(None, str, "as data.source, with its own splits; None: the run's data",
                           optional=True),
    #
    "loss.name": Field("softmax", str, "softmax cross-entropy, or sigmoid cross-entropy per class",
                       choices=("softmax", "sigmoid")),
    "loss.label_smoothing": Field(0.0, float, "probability spread evenly over all classes "
                                  "in training; evaluation does without",
                                  minimum=0, maximum=0.99),
    #
    "optimizer.name": Field("adamw", str, "update rule",
                            choices=("adamw", "adam", "adafactor", "sgd")),
    "optimizer.learning_rate": Field(1e-3, float, "peak of the schedule", minimum=0),
    "optimizer.weight_decay": Field(0.0, float, "decoupled, times the learning rate, kernels only",
                                    minimum=0),
    "optimizer.momentum": Field(0.9, float, "of sgd and adafactor", minimum=0,
                                maximum=0.999999),
    "optimizer.beta1": Field(0.9, float, "of adam and adamw", minimum=0, maximum=0.999999),
    "optimizer.beta2": Field(0.999, float, "of adam and adamw", minimum=0, maximum=0.999999),
    "optimizer.epsilon": Field(1e-8, float, "of adam and adamw", minimum=0),
    "optimizer.momentum_dtype": Field("float32", str, "of the stored first moment",
                                      choices=("float32", "bfloat16")),
    "optimizer.clip_norm": Field(None, float, "largest global gradient norm", optional=True,
                                 minimum=0),
    "optimizer.layer_decay": Field(1.0, float, "layer-wise learning-rate decay: factor per block, "
                                   "from the head down", minimum=0, maximum=1),
    "optimizer.frozen": Field((), tuple, "regular expressions: parameters whose path matches one "
                              "stay as they are; commas separate them, except inside brackets",
                              item=str),
    #
    "schedule.name": Field("cosine", str, "decay after the warmup",
                           choices=("cosine", "linear", "rsqrt", "constant")),
    "schedule.warmup_steps": Field(0, int, "updates of linear warmup from 0", minimum=0,
                                   maximum=_MAX_STEPS),
    "schedule.end_value": Field(0.0, float, "learning rate that cosine and linear end at",
                                minimum=0),
    "schedule.timescale": Field(10_000, int, "of rsqrt: rate / sqrt(1 + steps / timescale)",
                                minimum=1),
    "schedule.cooldown_steps": Field(0, int, "last updates, over which the rate falls linearly to "
                                     "0 (rsqrt and constant)", minimum=0, maximum=_MAX_STEPS),
}

# What may change when a run is resumed: nothing here changes the stream of batches or the updates,
# except for rounding. Two exceptions are announced: another total_steps changes the schedule, and
# with pmap each device draws its own random numbers (dropout, mixup and so on).
RESUMABLE = (
    "data.workers", "data.worker_kind", "data.dir", "data.on_bad_image",
    "mesh.data", "mesh.fsdp", "mesh.tensor", "parallelism",
    "log_every", "eval_every", "checkpoint_every", "eval_batch_size", "total_steps", "epochs",
    "profile_steps", "probes.every", "probes.names", "probes.shots", "probes.source",
)  # fmt: skip
