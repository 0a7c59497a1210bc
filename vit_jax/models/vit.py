"""The Vision Transformer of "An Image is Worth 16x16 Words" (arXiv 2010.11929).

The modules, their names and their parameter tree are those of the authors' code. Read it bottom
up: `VisionTransformer` cuts the image into patches, `Encoder` adds positions and runs the blocks,
`Encoder1DBlock` is one Transformer layer.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vit_jax.models import resnet
from vit_jax.models.attention import (
    MultiHeadDotProductAttention,
    choose_implementation,
    fused_length,
    of_length,
)
from vit_jax.models.gelu import gelu
from vit_jax.models.normalization import LayerNorm
from vit_jax.models.partition import constrain_tokens
from vit_jax.models.positions import AddPositionEmbs

CLASSIFIERS = ("token", "gap", "unpooled", "token_unpooled")
ACTIVATIONS = {
    "gelu_tanh": functools.partial(gelu, approximate=True),
    "gelu": functools.partial(gelu, approximate=False),
}
REMAT_POLICIES = {
    "full": None,  # recompute everything
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "names": jax.checkpoint_policies.save_only_these_names("attention_out", "mlp_hidden"),
}


class PatchEmbedding(nn.Module):
    """The linear projection of flattened patches (paper, eq. 1).

    The parameters are those of a convolution whose stride is its size, kernel [P, P, C, D] and
    bias [D]; as one matrix product it is faster, most of all its gradient.
    """

    features: int
    patch_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images [B, H, W, C] to [B, H / P, W / P, D]."""
        batch, height, width, channels = images.shape
        side = self.patch_size
        kernel = self.param(
            "kernel", nn.initializers.lecun_normal(), (side, side, channels, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        rows, columns = height // side, width // side
        patches = images.astype(self.dtype).reshape(batch, rows, side, columns, side, channels)
        patches = patches.swapaxes(2, 3).reshape(-1, side * side * channels)
        kernel, bias = kernel.astype(self.dtype), bias.astype(self.dtype)
        x = patches @ kernel.reshape(-1, self.features) + bias
        return x.reshape(batch, rows, columns, self.features)


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
      position_embedding: kind of the block's own position embedding, added to its input; None for
        none.
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
        self, x: jax.Array, *, grid: tuple[int, int] | None = None, length: int | None = None,
        queries: int | None = None, drop_branch_rate=None, train: bool,
    ) -> jax.Array:
        """Maps tokens [B, N, D] to [B, N, D], or only the first `queries` of them: [B, queries, D].

        `grid` is that of the patches, needed only for a position embedding; `length` is that of
        `MultiHeadDotProductAttention`. `drop_branch_rate` is this block's probability of skipping a
        residual branch (stochastic depth, drawn for each image and branch); None for never.
        """

        def residual(branch, i):
            if self.layer_scale is not None:
                branch = LayerScale(self.layer_scale, name=f"LayerScale_{i}")(branch)
            if drop_branch_rate is None or not train:
                return branch
            keep = 1.0 - jnp.asarray(drop_branch_rate)
            kept = jax.random.bernoulli(self.make_rng("dropout"), keep, (shape[0], 1, 1))
            branch = branch.reshape(shape) / keep.astype(branch.dtype)
            return jnp.where(kept, branch, 0).reshape(-1, shape[-1])

        x = constrain_tokens(x)
        if self.position_embedding is not None:
            positioned = AddPositionEmbs(self.position_embedding, name="posembed_input")
            positions = positioned(jnp.zeros_like(x[:1, :length], jnp.float32), grid=grid)
            x = (x + of_length(positions, x.shape[1])).astype(self.dtype)
        # XLA's CPU backend runs sums and GELUs of [B * N, D] much faster than of [B, N, D].
        y = LayerNorm()(x.reshape(-1, x.shape[-1])).reshape(x.shape)
        x = x[:, :queries]
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        y = MultiHeadDotProductAttention(
            num_heads=self.num_heads,
            dtype=self.dtype,
            dropout_rate=self.attention_dropout_rate,
            relative_positions=self.relative_positions,
            implementation=self.attention_implementation,
        )(y, length=length, queries=queries, train=train).reshape(x.shape)
        y = nn.Dropout(self.dropout_rate)(y, deterministic=not train)
        x = x + residual(y, 0)

        y = LayerNorm()(x)
        y = MlpBlock(self.mlp_dim, self.dtype, self.dropout_rate, self.activation)(y, train=train)
        x = (x + residual(y, 1)).reshape(shape)
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
    scan_unroll: bool = False
    remat: str = "none"

    @nn.compact
    def __call__(
        self, x: jax.Array, *, grid: tuple[int, int], registers=None, fused: bool = False,
        queries: int | None = None, train: bool,
    ) -> jax.Array:
        """Maps tokens [B, N, D] to [B, R + N, D], float32; registers [1, R, D] follow the class
        token and get no position. `fused`: the blocks use cuDNN's attention. With `queries`, the
        last block computes only the first `queries` tokens: [B, queries, D]."""
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
            registers = jnp.broadcast_to(registers, (x.shape[0], *registers.shape[1:]))
            registers = registers.astype(x.dtype)
            x = jnp.concatenate([x[:, :prefix], registers, x[:, prefix:]], axis=1)
        x = nn.Dropout(self.dropout_rate)(x, deterministic=not train)
        self.sow("intermediates", "tokens", x)
        length = x.shape[1]
        if fused:  # padded once, not in every block
            x = of_length(x, fused_length(length))
        x = self._blocks(x, grid, shared, length, queries, train)
        return LayerNorm(name="encoder_norm")(x[:, :length])

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
        raise ValueError(f"position_embedding_at={place!r} cannot be combined with "
                         f"position_embedding={kind!r}: {reason}.")

    def _blocks(self, x, grid, positions, length, queries, train):
        # Stochastic depth grows linearly, from 0 in the first block to the full rate in the last.
        rates = [self.stochastic_depth_rate * i / max(1, self.num_layers - 1)
                 for i in range(self.num_layers)]
        loop = self.scan_layers and not self.scan_unroll

        def runner(queries=None):
            def run(block, x, rate):
                if positions is not None:
                    x = (x + of_length(positions, x.shape[1])).astype(x.dtype)
                return block(x, grid=grid, length=length, queries=queries, train=train,
                             drop_branch_rate=rate if self.stochastic_depth_rate else None)

            if self.remat == "none":
                return run
            # Inside a loop XLA's CSE cannot undo remat, so it need not be prevented.
            return nn.remat(run, policy=REMAT_POLICIES[self.remat], prevent_cse=not loop)

        if not self.scan_layers:
            for i, rate in enumerate(rates):
                last = i == self.num_layers - 1
                block = Encoder1DBlock(**self.block, name=f"encoderblock_{i}")
                x = runner(queries if last else None)(block, x, rate)
            return x

        def scan(length):
            return nn.scan(
                lambda block, x, rate: (runner()(block, x, rate), None),
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                length=length,
                unroll=length if self.scan_unroll else 1,
            )

        block, rates = Encoder1DBlock(**self.block, name="encoderblock"), jnp.asarray(rates)
        if queries is None or self.is_initializing():
            return scan(self.num_layers)(block, x, rates)[0][:, :queries]

        def of(function, layers):  # on the parameters of these alone
            return nn.map_variables(
                function, "params", lambda params: jax.tree.map(lambda p: p[layers], params))

        x, _ = of(scan(self.num_layers - 1), slice(-1))(block, x, rates[:-1])
        return of(runner(queries), -1)(block, x, rates[-1])


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
      dropout_rate: dropout after the position embedding and every dense layer except q, k, v.
      attention_dropout_rate: dropout of attention weights.
      stochastic_depth_rate: probability of skipping a residual branch in the last block.
      dtype: type of the computation; parameters, LayerNorm, softmax and logits are float32.
      scan_layers: one compiled block run in a loop; parameters get a leading layer axis.
      scan_unroll: with `scan_layers`, unrolls the loop but keeps the layer axis of the parameters.
      remat: what the backward pass recomputes: 'none', 'full', 'dots' (all but matrix products
        with weights), 'names' (all but attention outputs and MLP hidden layers).
      attention_implementation: 'xla', 'cudnn' (NVIDIA's fused kernel, for bfloat16), or 'auto' for
        cuDNN where it can be used (`attention.choose_implementation`).
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
    scan_unroll: bool = False
    remat: str = "none"
    attention_implementation: str = "auto"
    activation: str = "gelu_tanh"
    layer_scale: float | None = None
    register_tokens: int = 0

    def embed_patches(self, images: jax.Array) -> tuple[jax.Array, tuple[int, int]]:
        """Images [B, H, W, C] to patch embeddings [B, h * w, D] and the grid (h, w)."""
        resnet.check_images(images)
        check_image_size(images.shape[1:3], self.patch_pixels)

        x = images
        if self.resnet_stages is not None:
            x = resnet.resnet_features(x, self.resnet_stages, dtype=self.dtype)
        x = PatchEmbedding(self.hidden_size, self.patch_size, self.dtype, name="embedding")(x)
        batch, height, width, _ = x.shape
        x = x.reshape(batch, height * width, self.hidden_size)
        return constrain_tokens(x), (height, width)

    def encode_patches(
        self, x: jax.Array, grid: tuple[int, int], *, queries: int | None = None, train: bool,
    ) -> jax.Array:
        """Patch embeddings [B, h * w, D] to the encoder's tokens, float32, patches last; with
        `queries`, only to the first `queries` of them."""
        if self.classifier in ("token", "token_unpooled"):
            cls = self.param("cls", nn.initializers.zeros, (1, 1, self.hidden_size))
            cls = jnp.broadcast_to(cls, (x.shape[0], 1, self.hidden_size)).astype(x.dtype)
            x = jnp.concatenate([cls, x], axis=1)
        registers = None
        if self.register_tokens:
            registers = self.param(
                "register_tokens",
                nn.initializers.normal(stddev=0.02),
                (1, self.register_tokens, self.hidden_size),
            )

        # A fused kernel never materialises the attention weights, so recording cannot use it.
        recording = self.is_mutable_collection("intermediates")
        fused = not recording and self._kernel(x.shape[1], train)[0] == "cudnn"
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
            scan_unroll=self.scan_unroll,
            remat=self.remat,
            name="Transformer",
        )(x, grid=grid, registers=registers, fused=fused, queries=queries, train=train)

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
        # Recording needs all tokens.
        alone = self.leaves_out_tokens and not self.is_mutable_collection("intermediates")
        x = self.encode_patches(patches, grid, queries=1 if alone else None, train=train)

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
    def leaves_out_tokens(self) -> bool:
        """Whether the last block computes the class token alone: where nothing reads the others,
        they need no queries, no projection and no MLP there. A loop over the blocks computes all,
        since its parameters would have to be copied to set one block apart."""
        return self.classifier == "token" and (self.scan_unroll or not self.scan_layers)

    @property
    def stem_stride(self) -> int:
        """Image pixels per position of the patches' input: 1, or the stride of the ResNet."""
        return 1 if self.resnet_stages is None else resnet.total_stride(self.resnet_stages)

    @property
    def patch_pixels(self) -> int:
        """Pixels per side of the image region that one token stands for, in hybrids too."""
        return self.patch_size * self.stem_stride

    @nn.nowrap
    def patch_grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches of an image of (height, width) pixels."""
        return image_size[0] // self.patch_pixels, image_size[1] // self.patch_pixels

    @nn.nowrap
    def attention_kernel(self, image_size: tuple[int, int], *, train: bool) -> tuple[str, str]:
        """(name, reason) of the attention kernel for images of (height, width) on this machine;
        see `choose_implementation`."""
        patches = math.prod(self.patch_grid(image_size))
        return self._kernel(patches + ("token" in self.classifier), train)

    @nn.nowrap
    def _kernel(self, tokens, train):
        return choose_implementation(
            self.attention_implementation,
            dtype=self.dtype,
            length=tokens + self.register_tokens,
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
