"""The transformer around an attention mechanism: embeddings, residual blocks, and a scanned stack of blocks.

Letters: `b` batch, `l` length, `m` length with the prefix, `e` model width, `u` vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int

from combiner.core.module import make_attention
from combiner.initializers import INITIALIZATIONS
from combiner.layers import Mlp, Positions, constrain, norm, parameter

BIASES = {
    'none': 'no biases',
    'mlp': 'biases in the two dense layers of the feed-forward network',
    'all': 'biases in every dense layer (the projections of attention too), in LayerNorm and in the logits',
}


# What a block keeps of its forward pass for the backward pass, which computes the rest again.
REMATS = {
    'none': 'everything',
    'dots': 'its input and the results of its dense layers, the projections of attention included',
    'full': 'its input',
}


class Block(nn.Module):
    """Pre-normalised residual block, `x += attention(norm(x))`, `x += mlp(norm(x))`, dropout at each branch's end.

    Attributes:
        attention: function that returns the attention module (not the module itself: its parameters must belong to
            this block).
        mlp: function that returns the feed-forward module.
        dropout: rate at the end of each branch.
        dtype: type of the computation.
        bias: whether the normalisations have biases.
    """

    attention: Callable[[], nn.Module]
    mlp: Callable[[], nn.Module]
    dropout: float = 0.0
    dtype: Dtype = jnp.float32
    bias: bool = False

    def setup(self) -> None:
        """Creates the two branches."""
        self.attention_norm, self.mlp_norm = (norm(self.dtype, bias=self.bias) for _ in range(2))
        self.attention_branch, self.mlp_branch = self.attention(), self.mlp()
        self.attention_dropout, self.mlp_dropout = nn.Dropout(self.dropout), nn.Dropout(self.dropout)

    def __call__(
        self,
        x: Float[Array, 'b l e'],
        positions: Int[Array, '#b l'],
        *,
        valid: Bool[Array, 'b l'] | None = None,
        segments: Int[Array, 'b l'] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, 'b l e']:
        """Processes whole sequences."""
        attended = self.attention_branch(
            self.attention_norm(x), positions, valid=valid, segments=segments, deterministic=deterministic
        )
        return self._add_residuals(x, attended, deterministic)

    def prefill(
        self, x: Float[Array, 'b l e'], positions: Int[Array, '#b l'], counts: Int[Array, ' b'], capacity: int
    ) -> Float[Array, 'b l e']:
        """Works as `__call__` and keeps the cache for `decode`."""
        return self._add_residuals(
            x, self.attention_branch.prefill(self.attention_norm(x), positions, counts, capacity)
        )

    def decode(self, x: Float[Array, 'b 1 e'], index: Int[Array, ' b']) -> Float[Array, 'b 1 e']:
        """Processes one more token of each row, at position `index`."""
        return self._add_residuals(x, self.attention_branch.decode(self.attention_norm(x), index))

    def _add_residuals(self, x: Array, attended: Array, deterministic: bool = True) -> Array:
        x = x + self.attention_dropout(attended, deterministic=deterministic).astype(x.dtype)
        transformed = self.mlp_branch(self.mlp_norm(x), deterministic=deterministic)
        x = x + self.mlp_dropout(transformed, deterministic=deterministic).astype(x.dtype)
        return constrain(x)


class Stack(nn.Module):
    """A sequence of blocks, then a normalisation.

    Attributes:
        block: function that returns one block.
        layers: number of blocks.
        scan: whether one compiled block runs in a loop, so that compile time does not grow with depth; parameters get
            a leading axis.
        remat: see `REMATS`.
        dtype: type of the computation.
        bias: whether the last normalisation has a bias.
    """

    block: Callable[..., Block]
    layers: int
    scan: bool = True
    remat: str = 'none'
    dtype: Dtype = jnp.float32
    bias: bool = False

    def setup(self) -> None:
        """Creates the blocks; with `scan`, a single one."""
        self.blocks = [self.block() for _ in range(1 if self.scan else self.layers)]
        self.norm = norm(self.dtype, bias=self.bias)

    def __call__(self, x: Float[Array, 'b l e'], *args: Any, **kwargs: Any) -> Float[Array, 'b l e']:
        """Applies `Block.__call__` of all blocks."""
        return self._run(lambda block, x: block(x, *args, **kwargs), x)

    def prefill(self, x: Float[Array, 'b l e'], *args: Any) -> Float[Array, 'b l e']:
        """Applies `Block.prefill` of all blocks."""
        return self._run(lambda block, x: block.prefill(x, *args), x)

    def decode(self, x: Float[Array, 'b 1 e'], *args: Any) -> Float[Array, 'b 1 e']:
        """Applies `Block.decode` of all blocks."""
        return self._run(lambda block, x: block.decode(x, *args), x)

    def _run(self, layer: Callable[[Block, Array], Array], x: Array) -> Array:
        if self.remat != 'none':
            # Products of attention have batch axes, those of dense layers have none.
            kept = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if self.remat == 'dots' else None
            layer = nn.remat(layer, prevent_cse=not self.scan, policy=kept)
        if not self.scan:
            for block in self.blocks:
                x = layer(block, x)
            return self.norm(x)
        scanned = nn.scan(
            lambda block, x, _: (layer(block, x), None),
            variable_axes={True: 0},
            split_rngs={'params': True, 'dropout': True},
            length=self.layers,
            metadata_params={nn.PARTITION_NAME: 'layers'},
        )
        return self.norm(scanned(self.blocks[0], x, None)[0])


class Backbone(nn.Module):
    """The part that all models share: embedding, positions and stack.

    Attributes:
        attention: mechanism (a registered name or a dotted path) and its hyper-parameters: `{'name': …, …}`.
        shape: axes of the longest input, e.g. rows, columns and channels; their product is its length.
        vocabulary: number of distinct input tokens `u`.
        prefix: whether a learned vector is put before the first token; it takes one position.
        causal: whether position `i` attends to positions `j ≤ i` only.
        layers, width, heads, kv_heads, mlp_ratio: sizes; `kv_heads` None for `heads`.
        qkv_width: total width of all query heads; None for `width`.
        value_width: total width of all value heads; None for `qkv_width`.
        bias: see `BIASES`.
        dropout: rate at the end of each residual branch.
        attention_dropout: rate on the joint weights.
        mlp_dropout: rate inside the feed-forward network.
        embedding_dropout: rate on the sum of the embeddings; None for `dropout`.
        positions: see `layers.Positions`.
        initialization: see `initializers.INITIALIZATIONS`.
        embedding_std: initial standard deviation of a token's embedding at the input of the stack; None for the value
            of `initialization`.
        scan, remat, dtype: see `Stack`.
    """

    attention: Mapping[str, Any]
    shape: tuple[int, ...]
    vocabulary: int
    prefix: bool
    causal: bool
    layers: int
    width: int
    heads: int
    kv_heads: int | None = None
    qkv_width: int | None = None
    value_width: int | None = None
    bias: str = 'none'
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    mlp_dropout: float = 0.0
    embedding_dropout: float | None = None
    positions: str = 'learned'
    initialization: str = 'default'
    embedding_std: float | None = None
    scan: bool = True
    remat: str = 'none'
    dtype: Dtype = jnp.float32

    @property
    def max_length(self) -> int:
        """Length of the longest input."""
        return int(np.prod(self.shape))

    def setup(self) -> None:
        """Creates embedding, positions and stack."""
        init = INITIALIZATIONS[self.initialization](self.layers, self.width, self.positions, len(self.shape))
        hyper = {key: value for key, value in self.attention.items() if key != 'name'}
        biased = self.bias == 'all'

        def attention() -> nn.Module:
            return make_attention(
                self.attention['name'],
                hyper,
                width=self.width,
                heads=self.heads,
                kv_heads=self.kv_heads,
                qkv_width=self.qkv_width,
                value_width=self.value_width,
                bias=biased,
                causal=self.causal,
                max_length=self.max_length,
                rotary=self.positions == 'rotary',
                dropout=self.attention_dropout,
                dtype=self.dtype,
                in_init=init.heads_in,
                out_init=init.heads_out,
            )

        def mlp() -> nn.Module:
            hidden = int(self.width * self.mlp_ratio)
            return Mlp(hidden, self.dtype, init.mlp_out, init.mlp_in, self.bias != 'none', self.mlp_dropout)

        def block() -> Block:
            return Block(attention, mlp, self.dropout, self.dtype, biased)

        # Sinusoids are much larger than initial embeddings. So token embeddings are multiplied by √width, as in Vaswani
        # et al. (2017, §3.4); a tied output matrix then starts at a suitable size too.
        self.token_scale = self.width**0.5 if self.positions == 'sinusoid' else 1.0
        std = init.token_std if self.embedding_std is None else self.embedding_std / self.token_scale
        normal = nn.initializers.normal(std)
        self.embedding = parameter(self, 'embedding', normal, ('vocab', 'embed'), (self.vocabulary, self.width))
        if self.prefix:
            self.begin = parameter(self, 'begin', normal, ('embed',), (self.width,))
        self.position_embedding = Positions(self.positions, tuple(self.shape), self.width, init.position_std)
        self.stack = Stack(block, self.layers, self.scan, self.remat, self.dtype, biased)
        self.input_dropout = nn.Dropout(self.dropout if self.embedding_dropout is None else self.embedding_dropout)

    def __call__(
        self,
        tokens: Int[Array, 'b l'],
        *,
        valid: Bool[Array, 'b l'] | None = None,
        segments: Int[Array, 'b m'] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, 'b m e']:
        """Returns the features of every position; with a prefix, its features come first.

        Args:
            tokens: the input.
            valid: True for tokens, False for padding.
            segments: the packed document of each position, the prefix included.
            deterministic: whether dropout is off.

        Raises:
            ValueError: the input is too long, or the mechanism does not support the given segments.
        """
        x, positions = self._embed_all(tokens)
        if valid is not None and self.prefix:
            valid = jnp.pad(valid, ((0, 0), (1, 0)), constant_values=True)
        x = self.input_dropout(x, deterministic=deterministic)
        return self.stack(x, positions, valid=valid, segments=segments, deterministic=deterministic)

    def prefill(self, tokens: Int[Array, 'b l'], counts: Int[Array, ' b'], capacity: int) -> Float[Array, 'b m e']:
        """Works as `__call__` and keeps a cache of the first `counts` positions, with room for `capacity` positions."""
        self._check_length(capacity)
        x, positions = self._embed_all(tokens)
        return self.stack.prefill(x, positions, counts, capacity)

    def decode(self, tokens: Int[Array, ' b'], index: Int[Array, ' b']) -> Float[Array, 'b 1 e']:
        """Returns the features of one more token of each row, at position `index`."""
        return self.stack.decode(self._add_positions(self.embedding[tokens[:, None]], index[:, None]), index)

    def _embed_all(self, tokens: Int[Array, 'b l']) -> tuple[Float[Array, 'b m e'], Int[Array, '1 m']]:
        if self.prefix:  # tokens are moved, not their embeddings: these may be cut over devices
            tokens = jnp.pad(tokens, ((0, 0), (1, 0)))
        positions = jnp.arange(tokens.shape[1])[None]
        x = self.embedding[tokens]
        if self.prefix:
            x = jnp.where(positions[..., None] == 0, self.begin, x)
        self._check_length(x.shape[1])
        return self._add_positions(x, positions), positions

    def _add_positions(self, x: Float[Array, 'b l e'], positions: Int[Array, '#b l']) -> Float[Array, 'b l e']:
        return constrain((self.token_scale * x + self.position_embedding(positions)).astype(self.dtype))

    def _check_length(self, length: int) -> None:
        if length > self.max_length:
            raise ValueError(
                f'length {length} exceeds the {"x".join(map(str, self.shape))} positions of the model; '
                f'give at most {self.max_length} tokens, or build a model of a larger shape'
            )
