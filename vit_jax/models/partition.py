"""The one thing a model needs to know about device meshes: its tokens are split by batch."""

import jax
from jax.sharding import PartitionSpec


def constrain_tokens(x: jax.Array) -> jax.Array:
    """Keeps activations [B, N, D] or [B, D] split over the mesh's batch axes, data and fsdp.

    Without this the compiler may keep FSDP's parameters in place and split the activations by
    feature instead, which is a slow tensor parallelism. Outside a mesh (`jax.set_mesh`), and
    inside pmap, it does nothing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not {"data", "fsdp"} <= set(mesh.axis_names) or mesh.manual_axes:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(("data", "fsdp")))
