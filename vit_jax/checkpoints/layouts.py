"""PyTorch's names and layouts of the same tensors: timm, Hugging Face, torchvision.

One description a library serves both directions: a generator that lists, for a given `Structure`,
which of our parameters correspond to which of their tensors, and how one becomes the other. Our
names are the paths of the unstacked parameter tree, joined by '/'.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

BLOCK = "Transformer/encoderblock_{}/"
ATTENTION = "MultiHeadDotProductAttention_0/"
POSITIONS = "Transformer/posembed_input/pos_embedding"


@dataclasses.dataclass(frozen=True)
class Structure:
    """What a model consists of, as far as the names of its tensors tell."""

    num_layers: int
    class_token: bool = True
    positions: bool = True
    registers: bool = False
    layer_scale: bool = False
    pre_logits: bool = False
    head: bool = True
    resnet_stages: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Transform:
    """`export` turns our array(s) into theirs; `load` turns theirs into ours, given the heads."""

    export: Callable[..., np.ndarray]
    load: Callable[[np.ndarray, int], tuple[np.ndarray, ...]]


def _heads_kernel(kernel):  # [D, H, d] -> [H d, D]
    return kernel.reshape(kernel.shape[0], -1).T


def _load_heads_kernel(weight, heads):
    return weight.T.reshape(weight.shape[1], heads, -1)


SAME = Transform(lambda x: x, lambda x, heads: (x,))
MATRIX = Transform(lambda x: x.T, lambda x, heads: (x.T,))
CONV = Transform(  # HWIO <-> OIHW
    lambda x: x.transpose(3, 2, 0, 1), lambda x, heads: (x.transpose(2, 3, 1, 0),))
HEADS_KERNEL = Transform(_heads_kernel, lambda x, heads: (_load_heads_kernel(x, heads),))
HEADS_BIAS = Transform(lambda x: x.reshape(-1), lambda x, heads: (x.reshape(heads, -1),))
OUT_KERNEL = Transform(  # [H, d, D] <-> [D, H d]
    lambda x: x.reshape(-1, x.shape[-1]).T, lambda x, heads: (x.T.reshape(heads, -1, x.shape[0]),))
QKV_KERNEL = Transform(
    lambda *qkv: np.concatenate([_heads_kernel(x) for x in qkv]),
    lambda x, heads: tuple(_load_heads_kernel(part, heads) for part in np.split(x, 3)))
QKV_BIAS = Transform(
    lambda *qkv: np.concatenate([x.reshape(-1) for x in qkv]),
    lambda x, heads: tuple(part.reshape(heads, -1) for part in np.split(x, 3)))


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of their tensors and the one or three of ours that it holds."""

    ours: tuple[str, ...]
    theirs: str
    transform: Transform = SAME


def _norm(ours, theirs):
    yield Entry((f"{ours}/scale",), f"{theirs}.weight")
    yield Entry((f"{ours}/bias",), f"{theirs}.bias")


def _layer(ours, theirs, kernel=MATRIX, bias=SAME):
    yield Entry((f"{ours}/kernel",), f"{theirs}.weight", kernel)
    yield Entry((f"{ours}/bias",), f"{theirs}.bias", bias)


def _fused_qkv(ours, weight, bias):
    for name, theirs, transform in (("kernel", weight, QKV_KERNEL), ("bias", bias, QKV_BIAS)):
        names = tuple(f"{ours}{part}/{name}" for part in ("query", "key", "value"))
        yield Entry(names, theirs, transform)


def timm(s: Structure) -> Iterator[Entry]:
    """timm's `VisionTransformer`, hybrids included."""
    if s.class_token:
        yield Entry(("cls",), "cls_token")
    if s.registers:
        yield Entry(("register_tokens",), "reg_token")
    if s.positions:
        yield Entry((POSITIONS,), "pos_embed")
    if s.resnet_stages is not None:
        yield from _timm_resnet(s.resnet_stages)
    yield from _layer("embedding", "patch_embed.proj", CONV)
    for i in range(s.num_layers):
        ours, theirs = BLOCK.format(i), f"blocks.{i}."
        yield from _norm(f"{ours}LayerNorm_0", f"{theirs}norm1")
        yield from _fused_qkv(
            ours + ATTENTION, f"{theirs}attn.qkv.weight", f"{theirs}attn.qkv.bias")
        yield from _layer(f"{ours}{ATTENTION}out", f"{theirs}attn.proj", OUT_KERNEL)
        yield from _norm(f"{ours}LayerNorm_1", f"{theirs}norm2")
        yield from _layer(f"{ours}MlpBlock_0/Dense_0", f"{theirs}mlp.fc1")
        yield from _layer(f"{ours}MlpBlock_0/Dense_1", f"{theirs}mlp.fc2")
        if s.layer_scale:
            yield Entry((f"{ours}LayerScale_0/gamma",), f"{theirs}ls1.gamma")
            yield Entry((f"{ours}LayerScale_1/gamma",), f"{theirs}ls2.gamma")
    yield from _norm("Transformer/encoder_norm", "norm")
    if s.head:
        yield from _layer("head", "head")


def _timm_resnet(stages):
    backbone = "patch_embed.backbone."
    stem = f"{backbone}stem." if stages else backbone
    yield Entry(("conv_root/kernel",), f"{stem}conv.weight", CONV)
    yield from _norm("gn_root", f"{stem}norm")
    for stage, units in enumerate(stages):
        for unit in range(units):
            ours = f"block{stage + 1}/unit{unit + 1}/"
            theirs = f"{backbone}stages.{stage}.blocks.{unit}."
            for n in (1, 2, 3):
                yield Entry((f"{ours}conv{n}/kernel",), f"{theirs}conv{n}.weight", CONV)
                yield from _norm(f"{ours}gn{n}", f"{theirs}norm{n}")
            if unit == 0:
                yield Entry((f"{ours}conv_proj/kernel",), f"{theirs}downsample.conv.weight", CONV)
                yield from _norm(f"{ours}gn_proj", f"{theirs}downsample.norm")


def hf(s: Structure) -> Iterator[Entry]:
    """Hugging Face's `ViTForImageClassification` on disk; `ViTModel` with its pooler where there
    is no head."""
    if s.class_token:
        yield Entry(("cls",), "vit.embeddings.cls_token")
    if s.positions:
        yield Entry((POSITIONS,), "vit.embeddings.position_embeddings")
    yield from _layer("embedding", "vit.embeddings.patch_embeddings.projection", CONV)
    for i in range(s.num_layers):
        ours, theirs = BLOCK.format(i), f"vit.encoder.layer.{i}."
        yield from _norm(f"{ours}LayerNorm_0", f"{theirs}layernorm_before")
        for name in ("query", "key", "value"):
            yield from _layer(f"{ours}{ATTENTION}{name}", f"{theirs}attention.attention.{name}",
                              HEADS_KERNEL, HEADS_BIAS)
        yield from _layer(
            f"{ours}{ATTENTION}out", f"{theirs}attention.output.dense", OUT_KERNEL)
        yield from _norm(f"{ours}LayerNorm_1", f"{theirs}layernorm_after")
        yield from _layer(f"{ours}MlpBlock_0/Dense_0", f"{theirs}intermediate.dense")
        yield from _layer(f"{ours}MlpBlock_0/Dense_1", f"{theirs}output.dense")
    yield from _norm("Transformer/encoder_norm", "vit.layernorm")
    if s.pre_logits:
        yield from _layer("pre_logits", "vit.pooler.dense")
    if s.head:
        yield from _layer("head", "classifier")


def torchvision(s: Structure) -> Iterator[Entry]:
    """torchvision's `VisionTransformer`."""
    if s.class_token:
        yield Entry(("cls",), "class_token")
    yield from _layer("embedding", "conv_proj", CONV)
    if s.positions:
        yield Entry((POSITIONS,), "encoder.pos_embedding")
    for i in range(s.num_layers):
        ours, theirs = BLOCK.format(i), f"encoder.layers.encoder_layer_{i}."
        yield from _norm(f"{ours}LayerNorm_0", f"{theirs}ln_1")
        yield from _fused_qkv(ours + ATTENTION, f"{theirs}self_attention.in_proj_weight",
                              f"{theirs}self_attention.in_proj_bias")
        yield from _layer(
            f"{ours}{ATTENTION}out", f"{theirs}self_attention.out_proj", OUT_KERNEL)
        yield from _norm(f"{ours}LayerNorm_1", f"{theirs}ln_2")
        yield from _layer(f"{ours}MlpBlock_0/Dense_0", f"{theirs}mlp.0")
        yield from _layer(f"{ours}MlpBlock_0/Dense_1", f"{theirs}mlp.3")
    yield from _norm("Transformer/encoder_norm", "encoder.ln")
    if s.pre_logits:
        yield from _layer("pre_logits", "heads.pre_logits")
    if s.head:
        yield from _layer("head", "heads.head")


@dataclasses.dataclass(frozen=True)
class Layout:
    """A library's layout: its entries, and where the parts of a `Structure` show in its names."""

    entries: Callable[[Structure], Iterable[Entry]]
    patch_kernel: str  # the tensor that gives a file of this library away
    parts: Mapping[str, str]  # field of Structure -> a tensor that exists exactly with it
    block: str  # regular expression of a block's tensors, with the index as its group


LAYOUTS = {
    "timm": Layout(timm, "patch_embed.proj.weight", {
        "class_token": "cls_token", "registers": "reg_token", "positions": "pos_embed",
        "layer_scale": "blocks.0.ls1.gamma", "head": "head.weight",
    }, r"blocks\.(\d+)\."),
    "hf": Layout(hf, "vit.embeddings.patch_embeddings.projection.weight", {
        "class_token": "vit.embeddings.cls_token",
        "positions": "vit.embeddings.position_embeddings",
        "pre_logits": "vit.pooler.dense.weight", "head": "classifier.weight",
    }, r"vit\.encoder\.layer\.(\d+)\."),
    "torchvision": Layout(torchvision, "conv_proj.weight", {
        "class_token": "class_token", "positions": "encoder.pos_embedding",
        "pre_logits": "heads.pre_logits.weight", "head": "heads.head.weight",
    }, r"encoder\.layers\.encoder_layer_(\d+)\."),
}  # fmt: skip

# Other spellings of the same tensors, brought to the names above: DINOv2's own (its blocks in
# chunks, registers), torchvision before 2022, Hugging Face models without a head.
_SPELLINGS = {
    "timm": ((r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."), (r"^register_tokens$", "reg_token"),
             (r"\.gamma_([12])$", r".ls\1.gamma")),
    "torchvision": ((r"\.mlp\.linear_1\.", ".mlp.0."), (r"\.mlp\.linear_2\.", ".mlp.3.")),
    "hf": (
        (r"^(embeddings|encoder|layers|layernorm|pooler)\.", r"vit.\1."),
        # transformers 5 in memory, as torch.save(model.state_dict()) writes it
        (r"^vit\.layers\.(\d+)\.", r"vit.encoder.layer.\1."),
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."), (r"\.mlp\.fc2\.", ".output.dense."),
    ),
}


def recognise(names: Iterable[str]) -> str | None:
    """Which library's names these are; None for none of them."""
    names = set(names)
    if "patch_embed.proj.weight" in names:
        return "timm"
    if "conv_proj.weight" in names:
        return "torchvision"
    if any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in names):
        return "hf"
    return None


def usual_names(library: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors under the names that `LAYOUTS` lists, whatever the file spells."""
    result = {}
    for name, tensor in tensors.items():
        for pattern, replacement in _SPELLINGS[library]:
            name = re.sub(pattern, replacement, name)
        result[name] = tensor
    return result


def structure_of(library: str, names: Iterable[str]) -> Structure:
    """What a file of this library holds, from the usual names of its tensors."""
    layout, names = LAYOUTS[library], set(names)
    layers = {int(m[1]) for name in names if (m := re.match(layout.block, name))}
    parts = {part: name in names for part, name in layout.parts.items()}
    return Structure(len(layers), resnet_stages=_timm_stages(names), **parts)


def _timm_stages(names):
    if not any(name.startswith("patch_embed.backbone.") for name in names):
        return None
    units = {m.groups() for name in names
             if (m := re.match(r"patch_embed\.backbone\.stages\.(\d+)\.blocks\.(\d+)\.", name))}
    stages = sorted({int(stage) for stage, _ in units})
    return tuple(sum(int(stage) == s for stage, _ in units) for s in stages)


def our_structure(names: Iterable[str]) -> Structure:
    """The same from our own parameter names."""
    names = set(names)
    blocks = {m[1] for name in names if (m := re.match(r"Transformer/encoderblock_(\d+)/", name))}
    units = {m.groups() for name in names if (m := re.match(r"block(\d+)/unit(\d+)/", name))}
    stages = sorted({int(stage) for stage, _ in units})
    return Structure(
        num_layers=len(blocks),
        class_token="cls" in names,
        positions=POSITIONS in names,
        registers="register_tokens" in names,
        layer_scale=BLOCK.format(0) + "LayerScale_0/gamma" in names,
        pre_logits="pre_logits/kernel" in names,
        head="head/kernel" in names,
        resnet_stages=tuple(sum(int(stage) == s for stage, _ in units) for s in stages)
        if "conv_root/kernel" in names else None,
    )
