"""The Vision Transformer of "An Image is Worth 16x16 Words" (arXiv 2010.11929).

The modules, their names and their parameter tree are those of the authors' code. Read it bottom
up: `VisionTransformer` cuts the image into patches, `Encoder` adds positions and runs the blocks,
`Encoder1DBlock` is one Transformer layer.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vit_jax.models import resnet
from vit_jax.models.attention import MultiHeadDotProductAttention, choose_implementation
from vit_jax.models.partition import constrain_tokens

CLASSIFIERS = ("token", "gap", "unpooled", "token_unpooled")
POSITION_EMBEDDINGS = ("learned_1d", "learned_2d", "sincos_2d", "relative", "none")
POSITION_PLACES = ("stem", "every_layer", "every_layer_shared")
ACTIVATIONS = {
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "gelu": lambda x: nn.gelu(x, approximate=False),
}
REMAT_POLICIES = {
    "full": None,  # recompute everything
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "names": jax.checkpoint_policies.save_only_these_names("attention_out", "mlp_hidden"),
}
LAYER_NORM_EPSILON = 1e-6


def sincos_2d(height: int, width: int, features: int, temperature: float = 10_000.0) -> jax.Array:
    """Fixed 2-D sine-cosine position embedding [H * W, D], as in MoCo v3 (arXiv 2104.02057).

    Raises:
      ValueError: `features` is not divisible by 4 (sine and cosine of two coordinates).
    """
    if features % 4 or features < 8:
        raise ValueError(f"sincos_2d needs a width divisible by 4 and at least 8, not {features}.")
    frequencies = temperature ** -jnp.linspace(0.0, 1.0, features // 4)
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


class MlpBlock(nn.Module):
    """Two dense layers with a GELU between, D -> mlp_dim -> D."""

    mlp_dim: int
    dtype: Any = jnp.float32
    dropout_rate: float = 0.0
    activation: str = "gelu_tanh"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        def dense(features):
            return nn.Dense(
                features,
                dtype=self.dtype,
                kernel_init=nn.initializers.xavier_uniform(),
                bias_init=nn.initializers.normal(stddev=1e-6),
            )

        width = x.shape[-1]
        x = checkpoint_name(dense(self.mlp_dim)(x), "mlp_hidden")
        x = ACTIVATIONS[self.activation](x)
        x = nn.Dropout(self.dropout_rate)(x, deterministic=not train)
        x = dense(width)(x)
        return nn.Dropout(self.dropout_rate)(x, deterministic=not train)


class LayerScale(nn.Module):
    """Multiplies every channel by a learned gamma (arXiv 2103.17239, section 2)."""

    initial: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gamma = self.param("gamma", nn.initializers.constant(self.initial), (x.shape[-1],))
        return x * gamma.astype(x.dtype)


class Encoder1DBlock(nn.Module):
    """One Transformer layer: attention and MLP, each after LayerNorm and with a residual.

    Attributes:
      mlp_dim: width of the MLP's hidden layer.
      num_heads: attention heads.
      dtype: type of the computation; LayerNorm and softmax are float32.
      dropout_rate: dropout after the attention projection and both dense layers of the MLP.
      attention_dropout_rate: dropout of the attention weights.
      layer_scale: initial gamma of LayerScale on both branches; None for none.
      position_embedding: kind of a position embedding of the block's own, added to what comes in;
        None for none.
      activation, relative_positions, attention_implementation: see `VisionTransformer`.
    """

    mlp_dim: int
    num_heads: int
    dtype: Any = jnp.float32
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    layer_scale: float | None = None
    position_embedding: str | None = None
    activation: str = "gelu_tanh"
    relative_positions: bool = False
    attention_implementation: str = "auto"

    @nn.compact
    def __call__(
        self, x: jax.Array, *, grid: tuple[int, int] | None = None, drop_branch_rate=None,
        train: bool,
    ) -> jax.Array:
        """Maps tokens [B, N, D] to [B, N, D].

        `grid` is that of the patches, which only a position embedding asks for. `drop_branch_rate`
        is this block's probability to skip a residual branch (stochastic depth, drawn for each
        image and branch); None for never.
        """

        def residual(branch, i):
            if self.layer_scale is not None:
                branch = LayerScale(self.layer_scale, name=f"LayerScale_{i}")(branch)
            if drop_branch_rate is None or not train:
                return branch
            keep = 1.0 - jnp.asarray(drop_branch_rate)
            kept = jax.random.bernoulli(self.make_rng("dropout"), keep, (branch.shape[0], 1, 1))
            return jnp.where(kept, branch / keep.astype(branch.dtype), 0)

        def norm():
            return nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, dtype=jnp.float32)

        x = constrain_tokens(x)
        if self.position_embedding is not None:
            positioned = AddPositionEmbs(self.position_embedding, name="posembed_input")
            x = positioned(x, grid=grid).astype(self.dtype)
        y = norm()(x)
        y = MultiHeadDotProductAttention(
            num_heads=self.num_heads,
            dtype=self.dtype,
            dropout_rate=self.attention_dropout_rate,
            relative_positions=self.relative_positions,
            implementation=self.attention_implementation,
        )(y, train=train)
        y = nn.Dropout(self.dropout_rate)(y, deterministic=not train)
        x = x + residual(y, 0)

        y = norm()(x)
        y = MlpBlock(self.mlp_dim, self.dtype, self.dropout_rate, self.activation)(y, train=train)
        x = x + residual(y, 1)
        self.sow("intermediates", "tokens", x)
        return x


class Encoder(nn.Module):
    """Position embeddings, `num_layers` blocks and a final LayerNorm.

    Attributes are those of `VisionTransformer`; `block` holds the arguments of `Encoder1DBlock`.
    """

    num_layers: int
    block: dict[str, Any]
    position_embedding: str = "learned_1d"
    position_embedding_at: str = "stem"
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    scan_layers: bool = False
    remat: str = "none"

    @nn.compact
    def __call__(self, x: jax.Array, *, grid: tuple[int, int], registers=None, train: bool):
        """Maps tokens [B, N, D] to [B, R + N, D], float32; registers [1, R, D] follow the class
        token and get no position."""
        kind, shared = self.position_embedding, None
        if self.position_embedding_at != "stem":
            self._check_place(registers)
        if self.position_embedding_at == "every_layer_shared":
            nothing = jnp.zeros((1, *x.shape[1:]))
            shared = AddPositionEmbs(kind, name="posembed_input")(nothing, grid=grid)
        elif self.position_embedding_at == "stem" and kind not in ("relative", "none"):
            x = AddPositionEmbs(kind, name="posembed_input")(x, grid=grid)
        x = x.astype(self.block["dtype"])
        if registers is not None:
            prefix = x.shape[1] - grid[0] * grid[1]
            registers = jnp.broadcast_to(registers, (len(x), *registers.shape[1:])).astype(x.dtype)
            x = jnp.concatenate([x[:, :prefix], registers, x[:, prefix:]], axis=1)
        x = nn.Dropout(self.dropout_rate)(x, deterministic=not train)
        self.sow("intermediates", "tokens", x)
        x = self._blocks(x, grid, shared, train)
        return nn.LayerNorm(
            epsilon=LAYER_NORM_EPSILON, dtype=jnp.float32, name="encoder_norm"
        )(x)

    def _check_place(self, registers):
        place, kind = self.position_embedding_at, self.position_embedding
        if kind == "none":
            reason = "there is no position embedding"
        elif kind == "relative":
            reason = "relative positions are in the attention of every layer already"
        elif kind == "sincos_2d" and place == "every_layer":
            reason = "sincos_2d is the same in every layer; use 'every_layer_shared'"
        elif registers is not None:
            reason = "register tokens, which have no position, come after it; use 'stem'"
        else:
            return
        raise ValueError(f"position_embedding_at={place!r} does not go with "
                         f"position_embedding={kind!r}: {reason}.")

    def _blocks(self, x, grid, positions, train):
        # Stochastic depth grows linearly, from 0 in the first block to the full rate in the last.
        rates = [self.stochastic_depth_rate * i / max(1, self.num_layers - 1)
                 for i in range(self.num_layers)]

        def run(block, x, rate):
            if positions is not None:
                x = (x + positions).astype(x.dtype)
            return block(x, grid=grid, train=train,
                         drop_branch_rate=rate if self.stochastic_depth_rate else None)

        if self.remat != "none":
            run = nn.remat(
                run, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scan_layers
            )
        if not self.scan_layers:
            for i, rate in enumerate(rates):
                x = run(Encoder1DBlock(**self.block, name=f"encoderblock_{i}"), x, rate)
            return x

        scanned = nn.scan(
            lambda block, x, rate: (run(block, x, rate), None),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.num_layers,
        )
        x, _ = scanned(Encoder1DBlock(**self.block, name="encoderblock"), x, jnp.asarray(rates))
        return x


class VisionTransformer(nn.Module):
    """Image classifier: patches (or the features of a ResNet) -> Transformer -> head.

    Attributes:
      num_classes: classes K; 0 returns features instead of logits.
      patch_size: pixels per side of a patch; on a hybrid, positions of the feature map.
      hidden_size: width D of the tokens.
      mlp_dim: hidden width of the MLP.
      num_heads: attention heads.
      num_layers: Transformer blocks.
      resnet_stages: bottlenecks per stage of a hybrid's ResNet, () for its root alone; None for
        plain patches.
      classifier: 'token' (the class token), 'gap' (mean of the patches, no class token),
        'unpooled' (every patch, no class token), 'token_unpooled' (class token and every patch).
      representation_size: width of a tanh layer before the head (`pre_logits`); None for none.
      head_bias_init: initial bias of the head (-10 in the paper's sigmoid pretraining).
      position_embedding: one of POSITION_EMBEDDINGS.
      position_embedding_at: where it is added (paper, Table 8): 'stem' (once, to the patch
        embeddings), 'every_layer' (each block has its own and begins with adding it) or
        'every_layer_shared' (one, added at the beginning of every block).
      dropout_rate: dropout after the position embedding and after every dense layer but q, k, v.
      attention_dropout_rate: dropout of attention weights.
      stochastic_depth_rate: probability to skip a residual branch in the last block.
      dtype: type of the computation; parameters, LayerNorm, softmax and logits are float32.
      scan_layers: one compiled block run in a loop; parameters get a leading layer axis.
      remat: what the backward pass recomputes: 'none', 'full', 'dots' (all but matrix products
        with weights), 'names' (all but attention outputs and MLP hidden layers).
      attention_implementation: 'xla', 'cudnn' (NVIDIA's fused kernel), or 'auto' for cuDNN where it
        can be used (`attention.choose_implementation`): bfloat16 and, because of JAX, an even
        number of tokens, as 'gap' or a register token gives with 14x14 patches.
      activation: 'gelu_tanh' (Google's) or 'gelu' (exact, PyTorch's).
      layer_scale: initial LayerScale gamma; None for none.
      register_tokens: number R of register tokens (arXiv 2309.16588).
    """

    num_classes: int
    patch_size: int
    hidden_size: int
    mlp_dim: int
    num_heads: int
    num_layers: int
    resnet_stages: tuple[int, ...] | None = None
    classifier: str = "token"
    representation_size: int | None = None
    head_bias_init: float = 0.0
    position_embedding: str = "learned_1d"
    position_embedding_at: str = "stem"
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: str = "none"
    attention_implementation: str = "auto"
    activation: str = "gelu_tanh"
    layer_scale: float | None = None
    register_tokens: int = 0

    def embed_patches(self, images: jax.Array) -> tuple[jax.Array, tuple[int, int]]:
        """Images [B, H, W, C] to patch embeddings [B, h * w, D] and the grid (h, w)."""
        resnet.check_images(images)
        check_image_size(images.shape[1:3], self.patch_size * self.stem_stride)

        x = images
        if self.resnet_stages is not None:
            x = resnet.resnet_features(x, self.resnet_stages, dtype=self.dtype)
        x = nn.Conv(
            self.hidden_size,
            kernel_size=(self.patch_size, self.patch_size),
            strides=(self.patch_size, self.patch_size),
            padding="VALID",
            dtype=self.dtype,
            name="embedding",
        )(x)
        batch, height, width, _ = x.shape
        x = x.reshape(batch, height * width, self.hidden_size)
        return constrain_tokens(x), (height, width)

    def encode_patches(self, x: jax.Array, grid: tuple[int, int], *, train: bool) -> jax.Array:
        """Patch embeddings [B, h * w, D] to the encoder's tokens, float32, patches last."""
        if self.classifier in ("token", "token_unpooled"):
            cls = self.param("cls", nn.initializers.zeros, (1, 1, self.hidden_size))
            cls = jnp.broadcast_to(cls, (len(x), 1, self.hidden_size)).astype(x.dtype)
            x = jnp.concatenate([cls, x], axis=1)
        registers = None
        if self.register_tokens:
            registers = self.param(
                "register_tokens",
                nn.initializers.normal(stddev=0.02),
                (1, self.register_tokens, self.hidden_size),
            )

        return Encoder(
            num_layers=self.num_layers,
            block=dict(
                mlp_dim=self.mlp_dim,
                num_heads=self.num_heads,
                dtype=self.dtype,
                dropout_rate=self.dropout_rate,
                attention_dropout_rate=self.attention_dropout_rate,
                layer_scale=self.layer_scale,
                position_embedding=self.position_embedding
                if self.position_embedding_at == "every_layer" else None,
                activation=self.activation,
                relative_positions=self.position_embedding == "relative",
                attention_implementation=self.attention_implementation,
            ),
            position_embedding=self.position_embedding,
            position_embedding_at=self.position_embedding_at,
            dropout_rate=self.dropout_rate,
            stochastic_depth_rate=self.stochastic_depth_rate,
            scan_layers=self.scan_layers,
            remat=self.remat,
            name="Transformer",
        )(x, grid=grid, registers=registers, train=train)

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Maps images [B, H, W, C] in [-1, 1] to float32 logits.

        Returns:
          [B, K]; for the unpooled classifiers [B, N, K]. With `num_classes=0` the features
          instead of logits, [B, D] or [B, N, D].

        Raises:
          ValueError: the image size is not divisible by the patch size (hybrids: by the stride of
            their ResNet times the patch size), or does not fit the position embedding.
        """
        patches, grid = self.embed_patches(images)
        x = self.encode_patches(patches, grid, train=train)

        patches = x[:, -patches.shape[1] :]
        if self.classifier == "token":
            x = x[:, 0]
        elif self.classifier == "gap":
            x = jnp.mean(patches, axis=1)
        elif self.classifier == "token_unpooled":
            x = jnp.concatenate([x[:, :1], patches], axis=1)
        else:
            x = patches
        x = constrain_tokens(x)

        if self.representation_size is not None:
            x = nn.Dense(self.representation_size, dtype=self.dtype, name="pre_logits")(x)
            x = constrain_tokens(jnp.tanh(x.astype(jnp.float32)))
        if not self.num_classes:
            return x
        return resnet.make_head(self.num_classes, self.head_bias_init, self.dtype)(x)

    @property
    def stem_stride(self) -> int:
        """Pixels per position of what the patches are cut from: 1, or the stride of the ResNet."""
        return 1 if self.resnet_stages is None else resnet.total_stride(self.resnet_stages)

    @nn.nowrap
    def attention_kernel(self, image_size: tuple[int, int], *, train: bool) -> tuple[str, str]:
        """(name, reason) of the attention kernel for images of (height, width) on this machine;
        see `choose_implementation`."""
        multiple = self.patch_size * self.stem_stride
        patches = (image_size[0] // multiple) * (image_size[1] // multiple)
        return choose_implementation(
            self.attention_implementation,
            dtype=self.dtype,
            length=patches + self.register_tokens + ("token" in self.classifier),
            head_dim=self.hidden_size // self.num_heads,
            dropout_rate=self.attention_dropout_rate if train else 0.0,
            relative_positions=self.position_embedding == "relative",
        )


def check_image_size(size: tuple[int, int], multiple: int) -> None:
    """Raises ValueError unless both sides are positive multiples of `multiple`."""
    if any(side % multiple or side == 0 for side in size):
        near = "x".join(str(max(1, round(side / multiple)) * multiple) for side in size)
        raise ValueError(
            f"image size {size[0]}x{size[1]} is not divisible into patches of "
            f"{multiple}x{multiple} pixels; the nearest size that is: {near}."
        )
