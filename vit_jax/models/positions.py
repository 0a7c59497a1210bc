"""The position embeddings that are added to the tokens."""

import flax.linen as nn
import jax
import jax.numpy as jnp

POSITION_EMBEDDINGS = ("learned_1d", "learned_2d", "sincos_2d", "relative", "none")
POSITION_PLACES = ("stem", "every_layer", "every_layer_shared")


def sincos_2d(height: int, width: int, features: int) -> jax.Array:
    """Fixed 2-D sine-cosine position embedding [H * W, D], as in MoCo v3 (arXiv 2104.02057).

    Raises:
      ValueError: `features` is not divisible by 4 (sine and cosine of two coordinates).
    """
    if features % 4 or features < 8:
        raise ValueError(f"sincos_2d needs a width divisible by 4 and at least 8, not {features}.")
    frequencies = 10_000.0 ** -jnp.linspace(0.0, 1.0, features // 4)
    y, x = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    y, x = (jnp.outer(axis.ravel(), frequencies) for axis in (y, x))
    return jnp.concatenate([jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)], axis=1)


class AddPositionEmbs(nn.Module):
    """Adds position embeddings to the token sequence.

    Attributes:
      kind: 'learned_1d' (one vector per token, the paper's default), 'learned_2d' (a table of D/2
        for rows and one for columns, concatenated; the class token gets none) or 'sincos_2d'
        (fixed; the class token gets none).
    """

    kind: str = "learned_1d"

    @nn.compact
    def __call__(self, x: jax.Array, *, grid: tuple[int, int]) -> jax.Array:
        """Args: x: [B, N, D], where the last height * width tokens are the grid of patches."""
        height, width = grid
        _, length, features = x.shape
        init = nn.initializers.normal(stddev=0.02)  # from BERT
        if self.kind == "learned_1d":
            return x + self._table("pos_embedding", init, (1, length, features), grid)
        if self.kind == "learned_2d":
            if features % 2:
                raise ValueError(f"learned_2d needs an even width, not {features}.")
            rows = self._table("row_embedding", init, (1, height, features // 2), grid)
            columns = self._table("column_embedding", init, (1, width, features // 2), grid)
            rows = jnp.repeat(rows, width, axis=1)
            columns = jnp.tile(columns, (1, height, 1))
            positions = jnp.concatenate([rows, columns], axis=-1)
        else:
            positions = sincos_2d(height, width, features)[None]
        prefix = length - height * width
        return x + jnp.pad(positions, ((0, 0), (prefix, 0), (0, 0)))

    def _table(self, name, init, shape, grid):
        if self.has_variable("params", name):
            have = jnp.shape(self.get_variable("params", name))
            if have != shape:
                raise ValueError(
                    f"{name} of these parameters has shape {list(have)}, but an image of "
                    f"{grid[0]}x{grid[1]} patches needs {list(shape)}: they were made for another "
                    "image size. Use that size, or resize the position embedding."
                )
        return self.param(name, init, shape)
