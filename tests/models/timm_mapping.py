"""From our parameter tree to a timm state dict, written for tests alone.

Deliberately not the converter of `vit_jax.checkpoints`: two independent mappings that agree are
worth more than one used twice.
"""

import numpy as np


def to_timm(params, *, match_eps=True):
    """Arrays by timm's names, for plain ViTs, hybrids and post-activation ResNets.

    Args:
      params: nested dictionaries of arrays with blocks unstacked.
      match_eps: rescales the kernels of standardised convolutions so that timm's
        sqrt(var + 1e-8) divides them by what our std + 1e-5 does.
    """
    is_vit = "Transformer" in params
    state = {}
    backbone = "patch_embed.backbone." if is_vit else ""
    if "conv_root" in params:
        stem = backbone if "block1" not in params else backbone + "stem."
        state[f"{stem}conv.weight"] = _standardised(params["conv_root"]["kernel"], match_eps)
        _norm(state, f"{stem}norm", params["gn_root"])
    for block in (name for name in params if name.startswith("block")):
        for unit, tree in params[block].items():
            prefix = f"{backbone}stages.{int(block[5:]) - 1}.blocks.{int(unit[4:]) - 1}."
            for suffix in (name[4:] for name in tree if name.startswith("conv")):
                conv, norm = (
                    ("downsample.conv", "downsample.norm")
                    if suffix == "_proj"
                    else (f"conv{suffix}", f"norm{suffix}")
                )
                kernel = tree[f"conv{suffix}"]["kernel"]
                state[f"{prefix}{conv}.weight"] = _standardised(kernel, match_eps)
                _norm(state, f"{prefix}{norm}", tree[f"gn{suffix}"])
    if not is_vit:
        state["head.fc.weight"] = params["head"]["kernel"].T[:, :, None, None]
        state["head.fc.bias"] = params["head"]["bias"]
        return state

    state["patch_embed.proj.weight"] = params["embedding"]["kernel"].transpose(3, 2, 0, 1)
    state["patch_embed.proj.bias"] = params["embedding"]["bias"]
    transformer = params["Transformer"]
    positions = transformer["posembed_input"]["pos_embedding"]
    if "cls" in params:
        state["cls_token"] = params["cls"]
    if "register_tokens" in params:
        # timm's positions are then those of the patches alone: the class token takes its own along.
        state["reg_token"] = params["register_tokens"]
        if "cls" in params:
            state["cls_token"] = params["cls"] + positions[:, :1]
            positions = positions[:, 1:]
    state["pos_embed"] = positions
    for name, block in transformer.items():
        if name.startswith("encoderblock_"):
            _block(state, f"blocks.{name.split('_')[1]}.", block)
    _norm(state, "norm", transformer["encoder_norm"])
    _dense(state, "head", params["head"])
    return state


def _block(state, prefix, block):
    attention = block["MultiHeadDotProductAttention_0"]
    width = attention["out"]["bias"].size
    parts = [attention[name] for name in ("query", "key", "value")]
    state[f"{prefix}attn.qkv.weight"] = np.concatenate(
        [part["kernel"].reshape(width, width).T for part in parts]
    )
    state[f"{prefix}attn.qkv.bias"] = np.concatenate([part["bias"].ravel() for part in parts])
    state[f"{prefix}attn.proj.weight"] = attention["out"]["kernel"].reshape(width, width).T
    state[f"{prefix}attn.proj.bias"] = attention["out"]["bias"]
    for i in (0, 1):
        _norm(state, f"{prefix}norm{i + 1}", block[f"LayerNorm_{i}"])
        _dense(state, f"{prefix}mlp.fc{i + 1}", block["MlpBlock_0"][f"Dense_{i}"])
        if f"LayerScale_{i}" in block:
            state[f"{prefix}ls{i + 1}.gamma"] = block[f"LayerScale_{i}"]["gamma"]


def _norm(state, name, norm):
    state[f"{name}.weight"], state[f"{name}.bias"] = norm["scale"], norm["bias"]


def _dense(state, name, dense):
    state[f"{name}.weight"], state[f"{name}.bias"] = dense["kernel"].T, dense["bias"]


def _standardised(kernel, match_eps):
    if match_eps:
        kernel = kernel.astype(np.float64)
        centred = kernel - kernel.mean((0, 1, 2))
        std = centred.std((0, 1, 2))
        kernel = (centred * np.sqrt(1e-8 / ((std + 1e-5) ** 2 - std**2))).astype(np.float32)
    return kernel.transpose(3, 2, 0, 1)
