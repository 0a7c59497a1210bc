"""Which device holds what: the mesh, and a table from parameter paths to partition specs."""

import re
from typing import Any

import jax
import ml_collections
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vit_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

# First match wins; everything else (norms, most biases, position embeddings) is replicated. The
# paths of optimizer moments end like their parameters' and match the same row.
RULES = (
    (r"(query|key|value)/kernel$", P("fsdp", "tensor", None)),  # [D, H, d]
    (r"(query|key|value)/bias$", P("tensor", None)),  # [H, d]
    (r"out/kernel$", P("tensor", None, "fsdp")),  # [H, d, D]
    (r"Dense_0/kernel$", P("fsdp", "tensor")),  # [D, M]
    (r"Dense_0/bias$", P("tensor")),  # [M]
    (r"Dense_1/kernel$", P("tensor", "fsdp")),  # [M, D]
    (r"(embedding|conv\w+|conv\d)/kernel$", P(None, None, None, "fsdp")),  # [h, w, C, D]
    (r"(pre_logits|head)/kernel$", P("fsdp", None)),  # [D, K]
)


def make_mesh(config: ml_collections.ConfigDict, devices=None) -> Mesh:
    """The devices as a mesh of axes data, fsdp, tensor, sized by `config.mesh`.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    # Auto: the compiler propagates shardings. make_mesh's default would ask the model for them.
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def mesh_sizes(config: ml_collections.ConfigDict, devices: int) -> tuple[int, int, int]:
    """`config.mesh` for so many devices, its -1 filled in.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    data, fsdp, tensor = (config.mesh[axis] for axis in AXES)
    if data == -1:
        data = max(1, devices // (fsdp * tensor))
    if data * fsdp * tensor != devices:
        raise UserError(
            f"config.mesh with data={config.mesh.data}, fsdp={fsdp}, tensor={tensor} does not fit "
            f"{devices} devices; choose sizes whose product is {devices}, or data=-1 with fsdp * "
            "tensor a divisor of it."
        )
    return data, fsdp, tensor


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis is split over the axes data and fsdp."""
    return NamedSharding(mesh, BATCH)


def batch_shards(mesh: Mesh) -> int:
    """Parts that a batch is split into; must divide the batch size."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def state_shardings(state: Any, mesh: Mesh) -> tuple[Any, list[str]]:
    """Shardings for every leaf of a train state, and what could not be split.

    Args:
      state: arrays or their shapes; any tree whose paths end in parameter paths.
      mesh: from `make_mesh`.

    Returns:
      (tree of NamedShardings, sentences about axes that a mesh axis does not divide).
    """
    notes: dict[str, None] = {}

    def sharding(path, leaf):
        name = "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))
                        for key in path)
        spec = _spec(name, leaf.shape, mesh, notes)
        return NamedSharding(mesh, spec)

    return jax.tree.map_with_path(sharding, state), list(notes)


def _spec(name, shape, mesh, notes):
    for pattern, spec in RULES:
        if not re.search(pattern, name):
            continue
        axes = tuple(spec)
        if len(axes) == len(shape) - 1 and "/encoderblock/" in name:
            axes = (None, *axes)  # blocks stacked by scan_layers
        if len(axes) != len(shape):
            return P()  # not shaped like its parameter: Adam's counters and the like
        kept = []
        for axis, size in zip(axes, shape, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                kind = re.sub(r".*encoderblock(_\d+)?/", "", name)
                kind = re.sub(r"^.*(params|mu|nu|ema|trace)/", "", kind)
                notes[f"mesh.{axis}={mesh.shape[axis]} does not divide an axis of {size} in "
                      f"{kind}, which stays replicated."] = None
                axis = None
            kept.append(axis)
        return P(*kept)
    return P()
