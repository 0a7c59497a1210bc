"""Two layouts of the same parameters: one subtree per block, or blocks stacked for `scan_layers`.

Unstacked, `Transformer` holds `encoderblock_0`, `encoderblock_1`, ...; stacked, one `encoderblock`
whose leaves have a leading layer axis. Checkpoints always hold the unstacked layout. Both
functions take any tree that contains parameter trees, an optimizer state for example.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_BLOCK = "encoderblock"


def unstack_blocks(
    tree: Any, block: Callable[[Any, int], Any] = lambda leaf, index: leaf[index]
) -> Any:
    """Replaces every stacked `encoderblock` by `encoderblock_{i}`; leaves other trees alone.
    `block` takes the part of a block out of a stacked leaf."""

    def unstack(node):
        blocks = node[_BLOCK]
        leaves = jax.tree.leaves(blocks)
        count = leaves[0].shape[0] if leaves else 0
        rest = {k: v for k, v in node.items() if k != _BLOCK}
        return rest | {
            f"{_BLOCK}_{i}": jax.tree.map(lambda x, i=i: block(x, i), blocks) for i in range(count)
        }

    return _map_dicts(unstack, tree, lambda node: _BLOCK in node)


def stack_blocks(tree: Any) -> Any:
    """The inverse of `unstack_blocks`. NumPy's arrays stay on the host."""

    def stacked(*parts):
        return (np if isinstance(parts[0], np.ndarray) else jnp).stack(parts)

    def stack(node):
        names = sorted((k for k in node if re.fullmatch(rf"{_BLOCK}_\d+", k)),
                       key=lambda k: int(k.rsplit("_", 1)[1]))
        rest = {k: v for k, v in node.items() if k not in names}
        return rest | {
            _BLOCK: jax.tree.map(stacked, *(node[k] for k in names))
        }

    return _map_dicts(stack, tree, lambda node: f"{_BLOCK}_0" in node)


def _map_dicts(function, tree, matches):
    """Applies `function` to the dictionaries that match, inside any pytree."""

    def is_match(node):
        return isinstance(node, dict) and matches(node)

    return jax.tree.map(lambda n: function(n) if is_match(n) else n, tree, is_leaf=is_match)
