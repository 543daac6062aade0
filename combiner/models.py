"""Models, one for each kind of task: a head on the transformer's backbone.

Letters: `b` batch, `l` length, `e` model width, `u` vocabulary, `y` classes.
"""

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from combiner.core import registry
from combiner.core.mechanism import Mechanism
from combiner.core.module import make_attention
from combiner.initializers import INITIALIZATIONS
from combiner.layers import parameter
from combiner.transformer import BIASES, REMATS, Backbone

SET_BY_HEAD = {'shape', 'vocabulary', 'prefix', 'causal', 'parent', 'name'}


class _Predictor(nn.Module):
    """A backbone followed by logits over the vocabulary.

    Attributes:
        backbone: function that returns the backbone.
        vocabulary: number of distinct tokens `u`.
        tied: whether the output matrix is the embedding; otherwise it is a separate matrix, initialised to zero (Child
            et al. 2019).
    """

    backbone: Callable[..., Backbone]
    vocabulary: int
    tied: bool = False
    causal: ClassVar[bool]

    def setup(self) -> None:
        """Creates the backbone (with a prefix if it is causal) and the output matrix."""
        self.trunk = self.backbone(vocabulary=self.vocabulary, prefix=self.causal, causal=self.causal)
        if not self.tied:
            axes, shape = ('embed', 'vocab'), (self.trunk.width, self.vocabulary)
            self.logits_kernel = parameter(self, 'logits_kernel', nn.initializers.zeros, axes, shape)
        if self.trunk.bias == 'all':
            self.logits_bias = parameter(self, 'logits_bias', nn.initializers.zeros, ('vocab',), (self.vocabulary,))

    def _logits(self, features: Float[Array, 'b l e']) -> Float[Array, 'b l u']:
        kernel = self.trunk.embedding.T if self.tied else self.logits_kernel
        kernel = kernel.astype(features.dtype)
        logits = jnp.einsum('ble,eu->blu', features, kernel, preferred_element_type=jnp.float32)
        return logits + self.logits_bias if self.trunk.bias == 'all' else logits


class LanguageModel(_Predictor):
    """Autoregressive model: predicts each token from the tokens before it.

    The backbone's prefix shifts the input right by one position.
    """

    causal = True

    def __call__(
        self,
        tokens: Int[Array, 'b l'],
        *,
        valid: Bool[Array, 'b l'] | None = None,
        segments: Int[Array, 'b l'] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, 'b l u']:
        """Returns the logits of `tokens` themselves, each given the tokens before it.

        Args:
            tokens: the sequence to predict.
            valid: True for tokens, False for padding.
            segments: the packed document of each token. Each token is then predicted from the earlier tokens of its
                document and from the token just before the document, which marks its beginning.
            deterministic: whether dropout is off.
        """
        valid = None if valid is None else valid[:, :-1]
        features = self.trunk(tokens[:, :-1], valid=valid, segments=segments, deterministic=deterministic)
        return self._logits(features)

    def prefill(self, tokens: Int[Array, 'b l'], counts: Int[Array, ' b'], capacity: int) -> Float[Array, 'b u']:
        """Fills the cache from the prompts and returns the logits of the next token.

        Args:
            tokens: prompts, shorter than `capacity`.
            counts: number of prompt tokens in each row.
            capacity: maximum length of prompt and continuation together.

        Raises:
            ValueError: the prompts are not shorter than `capacity`.
        """
        if tokens.shape[1] >= capacity:
            raise ValueError(f'a prompt of {tokens.shape[1]} tokens is too long; give at most {capacity - 1}')
        features = self.trunk.prefill(tokens, counts + 1, capacity)
        return self._logits(jnp.take_along_axis(features, counts[:, None, None], axis=1))[:, 0]

    def decode(self, tokens: Int[Array, ' b'], index: Int[Array, ' b']) -> Float[Array, 'b u']:
        """Appends token `index - 1` of each row to the cache and returns the logits of token `index`."""
        return self._logits(self.trunk.decode(tokens, index))[:, 0]


def unrolled(model: LanguageModel) -> LanguageModel:
    """Returns the model with blocks that run one after another, not in a scan; its variables: `of_unrolled`."""
    return model.clone(backbone=partial(model.backbone, scan=False))


def of_unrolled(model: LanguageModel, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns variables of the model as `unrolled(model)` has them: those of a scanned stack apart, block by block."""
    backbone = model.backbone(vocabulary=model.vocabulary, prefix=model.causal, causal=model.causal)

    def apart(tree: Any) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        found = {name: apart(part) for name, part in tree.items() if name != 'blocks_0'}
        for i in range(backbone.layers if 'blocks_0' in tree else 0):
            found[f'blocks_{i}'] = jax.tree.map(operator.itemgetter(i), tree['blocks_0'])
        return found

    return apart(nn.unbox(variables)) if backbone.scan else dict(variables)


class MaskedLanguageModel(_Predictor):
    """Bidirectional model: predicts the token at each position, masked or not (Devlin et al. 2019)."""

    causal = False

    def __call__(
        self,
        tokens: Int[Array, 'b l'],
        *,
        valid: Bool[Array, 'b l'] | None = None,
        segments: Int[Array, 'b l'] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, 'b l u']:
        """Returns logits at every position, given all tokens; with `segments`, given all tokens of its document."""
        return self._logits(self.trunk(tokens, valid=valid, segments=segments, deterministic=deterministic))


class Encoder(nn.Module):
    """A bidirectional backbone that maps a sequence to one vector.

    Attributes:
        backbone: function that returns the backbone.
        vocabulary: number of distinct tokens `u`.
        pool: `mean` over all positions except padding, or `cls`: the features of the backbone's prefix.
    """

    backbone: Callable[..., Backbone]
    vocabulary: int
    pool: str = 'mean'

    def setup(self) -> None:
        """Creates the backbone."""
        if self.pool not in ('mean', 'cls'):
            raise ValueError(f'unknown pool {self.pool!r}; choose mean or cls')
        overrides = {}
        if self.pool == 'cls':
            plain = self.backbone(vocabulary=self.vocabulary, prefix=False, causal=False, parent=None)
            if plain.positions == 'image':
                raise ValueError("pool='cls' puts a token before the image; choose pool='mean' or other positions")
            overrides = {'shape': (plain.max_length + 1,)}
        self.trunk = self.backbone(vocabulary=self.vocabulary, prefix=bool(overrides), causal=False, **overrides)

    def __call__(
        self,
        tokens: Int[Array, 'b l'],
        *,
        valid: Bool[Array, 'b l'] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, 'b e']:
        """Returns one feature vector per sequence."""
        features = self.trunk(tokens, valid=valid, deterministic=deterministic)
        if self.pool == 'cls':
            return features[:, 0].astype(jnp.float32)
        weights = jnp.ones(tokens.shape, jnp.float32) if valid is None else valid.astype(jnp.float32)
        total = jnp.einsum('ble,bl->be', features.astype(jnp.float32), weights)
        return total / jnp.maximum(weights.sum(axis=1, keepdims=True), 1)


class Classifier(nn.Module):
    """A classifier of sequences: an MLP with one hidden layer on the encoder's vector (Tay et al. 2021).

    Attributes:
        encoder: function that returns the encoder.
        classes: number of classes `y`.
        hidden: width of the hidden layer.
    """

    encoder: Callable[[], Encoder]
    classes: int
    hidden: int

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, 'b l'],
        *,
        valid: Bool[Array, 'b l'] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, 'b y']:
        """Returns the class logits of each sequence."""
        features = self.encoder()(tokens, valid=valid, deterministic=deterministic)
        return nn.Dense(self.classes)(nn.relu(nn.Dense(self.hidden)(features)))


class DualEncoder(nn.Module):
    """A classifier of pairs of sequences: an MLP on `[u, v, u·v, u-v]` (Tay et al. 2021).

    One encoder computes `u` of the first sequence and `v` of the second.

    Attributes:
        encoder: function that returns the encoder.
        classes: number of classes `y`.
        hidden: width of the hidden layer.
    """

    encoder: Callable[[], Encoder]
    classes: int
    hidden: int

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, 'b 2 l'],
        *,
        valid: Bool[Array, 'b 2 l'] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, 'b y']:
        """Returns the class logits of each pair."""
        encoder = self.encoder()
        flat_valid = None if valid is None else valid.reshape(-1, valid.shape[-1])
        flat = encoder(tokens.reshape(-1, tokens.shape[-1]), valid=flat_valid, deterministic=deterministic)
        u, v = jnp.moveaxis(flat.reshape(-1, 2, flat.shape[-1]), 1, 0)
        hidden = nn.Dense(self.hidden)(jnp.concatenate([u, v, u * v, u - v], axis=-1))
        return nn.Dense(self.classes)(nn.relu(hidden))


def build(
    head: str,
    vocabulary: int,
    shape: tuple[int, ...],
    config: Mapping[str, Any],
    classes: int = 0,
    *,
    packed: bool = False,
) -> nn.Module:
    """Builds the model of a task.

    Args:
        head: `language_model`, `masked_language_model`, `classifier` or `dual_encoder`.
        vocabulary: number of distinct tokens.
        shape: axes of the longest input, e.g. rows, columns and channels.
        config: fields of `Backbone`, and `tied` (language models) or `pool` (the others).
        classes: number of classes, for the last two heads.
        packed: whether rows hold several documents, which must not attend to each other.

    Raises:
        ValueError: the head, a key, the mechanism or one of its hyper-parameters is unknown; a number is out of range;
            or the mechanism does not support this head, attention dropout or packed documents.
    """
    heads: dict[str, tuple[str, Callable[..., nn.Module]]] = {
        'language_model': ('tied', LanguageModel),
        'masked_language_model': ('tied', MaskedLanguageModel),
        'classifier': ('pool', Classifier),
        'dual_encoder': ('pool', DualEncoder),
    }
    if head not in heads:
        raise ValueError(f'unknown head {head!r}; choose one of {", ".join(heads)}')
    own_key, model = heads[head]
    settings = dict(config)
    own = {own_key: settings.pop(own_key)} if own_key in settings else {}
    known = sorted({field.name for field in dataclasses.fields(Backbone)} - SET_BY_HEAD)
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(f'unknown model settings {", ".join(unknown)}; a {head} has: {", ".join([*known, own_key])}')
    _check_numbers(settings)
    predicts_tokens = own_key == 'tied'
    if not predicts_tokens and classes < 2:
        raise ValueError(f'a {head} needs at least 2 classes, got {classes}')
    settings['attention'] = attention = dict(settings['attention'])
    settings['dtype'] = jnp.dtype(settings.get('dtype', 'float32'))
    hyper = {key: value for key, value in attention.items() if key != 'name'}
    widths: dict[str, Any] = {
        key: settings[key] for key in ('width', 'heads', 'qkv_width', 'value_width') if key in settings
    }
    # A whole module, as `Attention` checks the widths of the heads when it is made: here, not only in `init`.
    module = make_attention(attention['name'], hyper, causal=head == 'language_model', **widths)
    _check_supported(module.mechanism, attention, settings.get('attention_dropout', 0.0), packed)
    backbone = partial(Backbone, shape=tuple(shape), **settings)
    if predicts_tokens:
        return model(backbone, vocabulary, **own)
    hidden = int(settings['width'] * settings.get('mlp_ratio', Backbone.mlp_ratio))
    return model(partial(Encoder, backbone, vocabulary, **own), classes, hidden)


def _check_supported(
    mechanism: Mechanism, attention: Mapping[str, Any], attention_dropout: float, packed: bool
) -> None:
    name = attention['name']
    if attention_dropout and not mechanism.supports_dropout:
        raise ValueError(f'{name} has no attention weights: set model.attention_dropout to 0, not {attention_dropout}')
    if packed and not mechanism.supports_segments:
        if type(mechanism).supports_segments:  # with other hyper-parameters
            name = '+'.join([name, *(f'{key}={value}' for key, value in attention.items() if key != 'name')])
        raise ValueError(f'{name} does not support packed documents; set data.options.documents=joined or cropped')


def _check_numbers(settings: Mapping[str, Any]) -> None:
    for name in ('layers', 'width', 'heads', 'kv_heads', 'qkv_width', 'value_width', 'mlp_ratio'):
        if settings.get(name) is not None and settings[name] <= 0:
            raise ValueError(f'model.{name}={settings[name]} must be positive')
    if 'mlp_ratio' in settings and settings['width'] * settings['mlp_ratio'] < 1:
        raise ValueError(
            f'model.mlp_ratio={settings["mlp_ratio"]} gives no hidden unit at width {settings["width"]}; increase it'
        )
    for name in ('dropout', 'attention_dropout', 'mlp_dropout', 'embedding_dropout'):
        if settings.get(name) is not None and not 0 <= settings[name] < 1:
            raise ValueError(f'model.{name}={settings[name]} must be at least 0 and less than 1')
    std = settings.get('embedding_std')
    if std is not None and not 0 <= std < math.inf:
        raise ValueError(f'model.embedding_std={std} must be at least 0 and finite')
    for name, known in (('bias', BIASES), ('initialization', INITIALIZATIONS), ('remat', REMATS)):
        if name in settings and settings[name] not in known:
            raise ValueError(f'model.{name}={settings[name]!r}: choose {", ".join(known)}')
    if settings.get('dtype', 'float32') not in ('float32', 'bfloat16'):
        raise ValueError(f'model.dtype={settings["dtype"]!r}: choose float32 or bfloat16')
    if 'name' not in settings['attention']:
        raise ValueError(f'model.attention has no name; choose one of {", ".join(registry.names())}')
