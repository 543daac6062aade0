"""The transformer around an attention mechanism: blocks, a scanned stack of them, a head for each kind of task.

Letters: `b` batch, `l` length, `e` model width, `u` vocabulary, `y` classes.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int

from combiner.attention import registry
from combiner.layers import Mlp, Positions, constrain, norm, parameter

_SET_BY_TASK = {'shape', 'vocabulary', 'causal', 'parent', 'name'}


class Block(nn.Module):
    """Pre-normalised residual block, `x += attention(norm(x))`, `x += mlp(norm(x))`, dropout at each branch's end.

    Attributes:
        attention: makes the attention module; a maker and not a module, so that the parameters belong to this
            block.
        mlp: makes the feed-forward module, for the same reason.
        dropout: rate at the end of each branch.
        dtype: type of the computation.
    """

    attention: Callable[[], nn.Module]
    mlp: Callable[[], nn.Module]
    dropout: float = 0.0
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Makes the two branches."""
        self.attention_norm, self.mlp_norm = norm(self.dtype), norm(self.dtype)
        self.attention_branch, self.mlp_branch = self.attention(), self.mlp()
        self.attention_dropout, self.mlp_dropout = nn.Dropout(self.dropout), nn.Dropout(self.dropout)

    def __call__(
        self,
        x: Float[Array, 'b l e'],
        positions: Int[Array, '#b l'],
        *,
        valid: Bool[Array, 'b l'] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, 'b l e']:
        """The whole sequence at once."""
        attended = self.attention_branch(self.attention_norm(x), positions, valid=valid, deterministic=deterministic)
        return self._finish(x, attended, deterministic)

    def prefill(
        self, x: Float[Array, 'b l e'], positions: Int[Array, '#b l'], counts: Int[Array, ' b'], capacity: int
    ) -> Float[Array, 'b l e']:
        """As `__call__`, keeping the cache for `decode`."""
        return self._finish(x, self.attention_branch.prefill(self.attention_norm(x), positions, counts, capacity))

    def decode(self, x: Float[Array, 'b 1 e'], index: Int[Array, ' b']) -> Float[Array, 'b 1 e']:
        """One more token of each row, at position `index`."""
        return self._finish(x, self.attention_branch.decode(self.attention_norm(x), index))

    def _finish(self, x: Array, attended: Array, deterministic: bool = True) -> Array:
        x = x + self.attention_dropout(attended, deterministic=deterministic).astype(x.dtype)
        transformed = self.mlp_branch(self.mlp_norm(x))
        x = x + self.mlp_dropout(transformed, deterministic=deterministic).astype(x.dtype)
        return constrain(x)


class Stack(nn.Module):
    """Blocks one after the other, then a normalisation.

    Attributes:
        block: makes one block.
        layers: how many.
        scan: one compiled block run in a loop, so that compile time does not grow with depth; parameters get
            a leading axis.
        remat: keep only the input of each block for the backward pass, and compute the rest again.
        dtype: type of the computation.
    """

    block: Callable[..., Block]
    layers: int
    scan: bool = True
    remat: bool = False
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Makes the blocks: one that stands for all of them, or a list."""
        self.blocks = [self.block() for _ in range(1 if self.scan else self.layers)]
        self.norm = norm(self.dtype)

    def __call__(self, x: Float[Array, 'b l e'], *args: Any, **kwargs: Any) -> Float[Array, 'b l e']:
        """All blocks, arguments as for `Block.__call__`."""
        return self._run(lambda block, x: block(x, *args, **kwargs), x)

    def prefill(self, x: Float[Array, 'b l e'], *args: Any) -> Float[Array, 'b l e']:
        """All blocks, arguments as for `Block.prefill`."""
        return self._run(lambda block, x: block.prefill(x, *args), x)

    def decode(self, x: Float[Array, 'b 1 e'], *args: Any) -> Float[Array, 'b 1 e']:
        """All blocks, arguments as for `Block.decode`."""
        return self._run(lambda block, x: block.decode(x, *args), x)

    def _run(self, layer: Callable[[Block, Array], Array], x: Array) -> Array:
        if self.remat:
            layer = nn.remat(layer, prevent_cse=not self.scan)
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
    """Embedding, positions and stack: what all heads share.

    Attributes:
        attention: mechanism (a registered name or a dotted path) and its hyper-parameters: `{'name': …, …}`.
        shape: axes of the longest input, e.g. rows, columns and channels; their product is its length.
        vocabulary: distinct input tokens `u`.
        causal: whether position `i` sees positions `j ≤ i` only.
        layers, width, heads, kv_heads, mlp_ratio: sizes; `kv_heads` None for `heads`.
        dropout: rate at the end of each residual branch.
        attention_dropout: rate on the joint weights.
        positions: see `layers.Positions`.
        scan, remat, dtype: see `Stack`.
    """

    attention: Mapping[str, Any]
    shape: tuple[int, ...]
    vocabulary: int
    causal: bool
    layers: int
    width: int
    heads: int
    kv_heads: int | None = None
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    positions: str = 'learned'
    scan: bool = True
    remat: bool = False
    dtype: Dtype = jnp.float32

    @property
    def max_length(self) -> int:
        """The longest input."""
        return int(np.prod(self.shape))

    def setup(self) -> None:
        """Makes embedding, positions and stack; each branch's last matrix starts smaller, by `1/√(2·layers)`."""
        out_init = nn.initializers.variance_scaling(0.5 / self.layers, 'fan_in', 'normal', in_axis=-2)
        heads_out_init = nn.initializers.variance_scaling(0.5 / self.layers, 'fan_in', 'normal', in_axis=(-3, -2))
        hyper = {key: value for key, value in self.attention.items() if key != 'name'}

        def attention() -> nn.Module:
            frame = {
                'width': self.width,
                'heads': self.heads,
                'kv_heads': self.kv_heads,
                'causal': self.causal,
            }
            frame |= {
                'rotary': self.positions == 'rotary',
                'dropout': self.attention_dropout,
                'dtype': self.dtype,
            }
            frame |= {'out_init': heads_out_init, 'planned_length': self.max_length}
            return registry.make(self.attention['name'], hyper, **frame)

        def mlp() -> nn.Module:
            return Mlp(int(self.width * self.mlp_ratio), self.dtype, out_init)

        def block() -> Block:
            return Block(attention, mlp, self.dropout, self.dtype)

        init = nn.initializers.normal(0.02)
        self.embedding = parameter(self, 'embedding', init, ('vocab', 'embed'), (self.vocabulary, self.width))
        self.position_embedding = Positions(self.positions, tuple(self.shape), self.width)
        self.stack = Stack(block, self.layers, self.scan, self.remat, self.dtype)
        self.input_dropout = nn.Dropout(self.dropout)

    def __call__(
        self,
        tokens: Int[Array, 'b l'],
        *,
        valid: Bool[Array, 'b l'] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, 'b l e']:
        """Features of every position."""
        positions = self._arange(tokens.shape[1])
        x = self.input_dropout(self._embed(tokens, positions), deterministic=deterministic)
        return self.stack(x, positions, valid=valid, deterministic=deterministic)

    def prefill(self, tokens: Int[Array, 'b l'], counts: Int[Array, ' b'], capacity: int) -> Float[Array, 'b l e']:
        """As `__call__`, keeping the cache of the first `counts` positions, with room for `capacity`."""
        self._arange(capacity)
        positions = self._arange(tokens.shape[1])
        return self.stack.prefill(self._embed(tokens, positions), positions, counts, capacity)

    def decode(self, tokens: Int[Array, ' b'], index: Int[Array, ' b']) -> Float[Array, 'b 1 e']:
        """Features of one more token of each row, at position `index`."""
        return self.stack.decode(self._embed(tokens[:, None], index[:, None]), index)

    def _arange(self, length: int) -> Int[Array, '1 l']:
        if length > self.max_length:
            raise ValueError(
                f'a grid of {"x".join(map(str, self.shape))} positions does not hold length {length}; '
                f'give at most {self.max_length} tokens, or a model of a larger shape'
            )
        return jnp.arange(length)[None]

    def _embed(self, tokens: Int[Array, 'b l'], positions: Int[Array, '#b l']) -> Float[Array, 'b l e']:
        x = self.embedding[tokens] + self.position_embedding(positions)
        return constrain(x.astype(self.dtype))


class LanguageModel(nn.Module):
    """Autoregressive model: logits of each token given the ones before it.

    The input is shifted right by one behind a begin-of-sequence token, which is one more than the vocabulary.

    Attributes:
        backbone: makes the backbone, for a vocabulary of one more.
        vocabulary: distinct tokens `u`.
        tied: use the embedding as the last matrix too; else a matrix of its own, zero at first (Child et al.
            2019).
    """

    backbone: Callable[..., Backbone]
    vocabulary: int
    tied: bool = False

    def setup(self) -> None:
        """Makes the backbone and the last matrix."""
        self.trunk = self.backbone(vocabulary=self.vocabulary + 1, causal=True)
        if not self.tied:
            axes, shape = ('embed', 'vocab'), (self.trunk.width, self.vocabulary)
            self.logits_kernel = parameter(self, 'logits_kernel', nn.initializers.zeros, axes, shape)

    def __call__(
        self,
        tokens: Int[Array, 'b l'],
        *,
        valid: Bool[Array, 'b l'] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, 'b l u']:
        """Logits of `tokens` themselves, each given the ones before it."""
        features = self.trunk(self._shift(tokens)[:, :-1], valid=valid, deterministic=deterministic)
        return self._logits(features)

    def prefill(self, tokens: Int[Array, 'b l'], counts: Int[Array, ' b'], capacity: int) -> Float[Array, 'b u']:
        """Reads the first `counts` tokens of each row into the cache; logits of the token that follows them.

        Args:
            tokens: prompts, shorter than `capacity`.
            counts: how many tokens of each row are prompt.
            capacity: the longest sequence, prompt and continuation together.
        """
        if tokens.shape[1] >= capacity:
            raise ValueError(f'a prompt of {tokens.shape[1]} tokens leaves no room within {capacity}')
        features = self.trunk.prefill(self._shift(tokens), counts + 1, capacity)
        return self._logits(jnp.take_along_axis(features, counts[:, None, None], axis=1))[:, 0]

    def decode(self, tokens: Int[Array, ' b'], index: Int[Array, ' b']) -> Float[Array, 'b u']:
        """Takes token number `index - 1` of each row and gives the logits of token number `index`."""
        return self._logits(self.trunk.decode(tokens, index))[:, 0]

    def _shift(self, tokens: Int[Array, 'b l']) -> Int[Array, 'b m']:
        return jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=self.vocabulary)

    def _logits(self, features: Float[Array, 'b l e']) -> Float[Array, 'b l u']:
        kernel = self.trunk.embedding[: self.vocabulary].T if self.tied else self.logits_kernel
        return jnp.einsum('ble,eu->blu', features, kernel.astype(features.dtype), preferred_element_type=jnp.float32)


class Encoder(nn.Module):
    """One vector for a whole sequence, by a bidirectional backbone.

    Attributes:
        backbone: makes the backbone.
        vocabulary: distinct tokens `u`.
        pool: `mean` over the positions that are no padding, or `cls`: the features of a token put before all
            others.
    """

    backbone: Callable[..., Backbone]
    vocabulary: int
    pool: str = 'mean'

    def setup(self) -> None:
        """Makes the backbone."""
        if self.pool not in ('mean', 'cls'):
            raise ValueError(f'unknown pool {self.pool!r}; choose mean or cls')
        longer = {}
        if self.pool == 'cls':
            plain = self.backbone(vocabulary=self.vocabulary, causal=False, parent=None)
            if plain.positions == 'image':
                raise ValueError("pool='cls' puts a token before the image; choose pool='mean' or other positions")
            longer = {'shape': (plain.max_length + 1,)}
        self.trunk = self.backbone(vocabulary=self.vocabulary + 1, causal=False, **longer)

    def __call__(
        self,
        tokens: Int[Array, 'b l'],
        *,
        valid: Bool[Array, 'b l'] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, 'b e']:
        """Features of each sequence."""
        if self.pool == 'cls':
            tokens = jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=self.vocabulary)
            valid = None if valid is None else jnp.pad(valid, ((0, 0), (1, 0)), constant_values=True)
        features = self.trunk(tokens, valid=valid, deterministic=deterministic)
        if self.pool == 'cls':
            return features[:, 0].astype(jnp.float32)
        weights = jnp.ones(tokens.shape) if valid is None else valid.astype(jnp.float32)
        total = jnp.einsum('ble,bl->be', features.astype(jnp.float32), weights)
        return total / jnp.maximum(weights.sum(axis=1, keepdims=True), 1)


class Classifier(nn.Module):
    """Class logits of a sequence: a linear map of its vector.

    Attributes:
        encoder: makes the encoder.
        classes: number of classes `y`.
    """

    encoder: Callable[[], Encoder]
    classes: int

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, 'b l'],
        *,
        valid: Bool[Array, 'b l'] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, 'b y']:
        """Logits of the class of each sequence."""
        return nn.Dense(self.classes)(self.encoder()(tokens, valid=valid, deterministic=deterministic))


class DualEncoder(nn.Module):
    """Class logits of a pair of sequences, read by one encoder: an MLP of `[u, v, u·v, u-v]` (Tay et al. 2021).

    Attributes:
        encoder: makes the encoder.
        classes: number of classes `y`.
    """

    encoder: Callable[[], Encoder]
    classes: int

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, 'b 2 l'],
        *,
        valid: Bool[Array, 'b 2 l'] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, 'b y']:
        """Logits of the class of each pair."""
        encoder = self.encoder()
        flat_valid = None if valid is None else valid.reshape(-1, valid.shape[-1])
        flat = encoder(tokens.reshape(-1, tokens.shape[-1]), valid=flat_valid, deterministic=deterministic)
        u, v = jnp.moveaxis(flat.reshape(-1, 2, flat.shape[-1]), 1, 0)
        hidden = nn.relu(nn.Dense(flat.shape[-1])(jnp.concatenate([u, v, u * v, u - v], axis=-1)))
        return nn.Dense(self.classes)(hidden)


def build(head: str, vocabulary: int, shape: tuple[int, ...], config: Mapping[str, Any], classes: int = 0) -> nn.Module:
    """The model of a task.

    Args:
        head: `language_model`, `classifier` or `dual_encoder`.
        vocabulary: distinct tokens.
        shape: axes of the longest input, e.g. rows, columns and channels.
        config: fields of `Backbone`, and `tied` (language model) or `pool` (the others).
        classes: number of classes, for the last two heads.

    Raises:
        ValueError: the head, a key, or the mechanism or one of its hyper-parameters is unknown.
    """
    heads: dict[str, tuple[str, Callable[..., nn.Module]]] = {
        'language_model': ('tied', LanguageModel),
        'classifier': ('pool', Classifier),
        'dual_encoder': ('pool', DualEncoder),
    }
    if head not in heads:
        raise ValueError(f'unknown head {head!r}; choose one of {", ".join(heads)}')
    own_key, model = heads[head]
    settings = dict(config)
    own = {own_key: settings.pop(own_key)} if own_key in settings else {}
    known = sorted({field.name for field in dataclasses.fields(Backbone)} - _SET_BY_TASK)
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(f'unknown model settings {", ".join(unknown)}; a {head} has: {", ".join([*known, own_key])}')
    settings['attention'] = attention = dict(settings['attention'])
    settings['dtype'] = jnp.dtype(settings.get('dtype', 'float32'))
    registry.make(attention['name'], {key: value for key, value in attention.items() if key != 'name'})

    backbone = partial(Backbone, shape=tuple(shape), **settings)
    if head == 'language_model':
        return model(backbone, vocabulary, **own)
    return model(partial(Encoder, backbone, vocabulary, **own), classes)
