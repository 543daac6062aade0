"""The frame around every mechanism: the Linen module with projections, masks, grouped heads, dropout and cache.

Letters: `b` batch, `l` length, `h` query heads, `g` key and value heads, `d` head width, `e` model width.
"""

import dataclasses
from functools import partial
from numbers import Integral
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from combiner.core import compiled
from combiner.core.mechanism import Mechanism
from combiner.layers import parameter, repeat_heads, rotate, without_padding
from combiner.ops.segments import finite_documents, finite_inputs, mark_broken, number_documents


class Attention(Mechanism):
    """Multi-head attention: a mechanism, which a subclass supplies, between its projections.

    Attributes:
        width: model width `e`; needed only when used as a module.
        heads: query heads.
        qkv_width: width of all query heads together; None for `width`.
        value_width: width of all value heads together, were there as many as query heads; None for `qkv_width`. Where
            it differs, zeros widen the narrower heads before the mechanism sees them, and what it owns is as wide.
        kv_heads: key and value heads, a divisor of `heads`; None for as many (grouped queries, Ainslie et al.
            2023).
        bias: whether the four projections have biases.
        rotary: rotate queries and keys by their position (Su et al. 2021).
        dropout: rate on the joint weights.
        dtype: type of the computation; the parameters are float32.
        in_init: initialiser of the projections of the input.
        out_init: initialiser of the last projection.
    """

    width: int = 0
    heads: int = 1
    qkv_width: int | None = None
    value_width: int | None = None
    kv_heads: int | None = None
    bias: bool = False
    rotary: bool = False
    dropout: float = 0.0
    dtype: Dtype = jnp.float32
    in_init: Initializer = nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
    out_init: Initializer = nn.initializers.lecun_normal(in_axis=(-3, -2), out_axis=-1)

    zero_allowed = ()  # the integer hyper-parameters that may be 0; all others are at least 1

    def __post_init__(self) -> None:
        """Refuses sizes that are none, and values of another width where the mechanism cannot have them."""
        self._check_hyper_parameters()
        of_keys, of_values = self.projected_widths
        if of_keys != of_values and not self.allows_value_width:
            raise ValueError(
                f'{type(self).__name__} needs values as wide as queries: heads of {of_values} and {of_keys}; '
                'leave value_width unset'
            )
        super().__post_init__()

    def _check_hyper_parameters(self) -> None:
        """Refuses a hyper-parameter that is to be an integer, such as a size, and is none or too small."""
        frame = {field.name for field in dataclasses.fields(Attention)} - {'max_length'}
        for field in dataclasses.fields(self):
            if field.name in frame or field.type not in (int, int | None):
                continue
            value, least = getattr(self, field.name), int(field.name not in self.zero_allowed)
            if value is None and field.type is not int:
                continue
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise ValueError(f'{type(self).__name__}: {field.name} must be an integer, got {value!r}')
            if value < least:
                raise ValueError(f'{type(self).__name__}: {field.name} must be at least {least}, got {value}')

    @property
    def projected_widths(self) -> tuple[int, int]:
        """Widths of the projected heads: of a query or key, and of a value."""
        keys = self.width if self.qkv_width is None else self.qkv_width
        values = keys if self.value_width is None else self.value_width
        heads = max(self.heads, 1)  # none is refused later, with the other sizes
        return keys // heads, values // heads

    @property
    def head_width(self) -> int:
        """Head width `d` that the mechanism sees, of queries, keys and values alike."""
        return max(self.projected_widths)

    def setup(self) -> None:
        """Makes the projections."""
        self._check_sizes()
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        of_keys, of_values = self.projected_widths
        shapes = {'query': (self.heads, of_keys), 'key': (kv_heads, of_keys), 'value': (kv_heads, of_values)}
        zeros, axes = nn.initializers.zeros, ('heads', 'head_dim')

        def kernel(role: str) -> Array:
            return parameter(self, f'{role}_kernel', self.in_init, ('embed', *axes), (self.width, *shapes[role]))

        def bias(role: str) -> Array:
            return parameter(self, f'{role}_bias', zeros, axes, shapes[role])

        made = {role: kernel(role) for role in dict.fromkeys(self.projected)}
        self.query_kernel, self.key_kernel, self.value_kernel = (made[role] for role in self.projected)
        out_shape = (self.heads, of_values, self.width)
        self.out_kernel = parameter(self, 'out_kernel', self.out_init, (*axes, 'embed'), out_shape)
        if self.bias:
            made = {role: bias(role) for role in dict.fromkeys(self.projected)}
            self.biases = tuple(made[role] for role in self.projected)
            self.out_bias = parameter(self, 'out_bias', zeros, ('embed',), (self.width,))
        self.weight_dropout = nn.Dropout(self.dropout)

    def __call__(
        self,
        x: Float[Array, 'b l e'],
        positions: Int[Array, '#b l'],
        *,
        valid: Bool[Array, 'b l'] | None = None,
        segments: ArrayLike | None = None,
        deterministic: bool = True,
    ) -> Float[Array, 'b l e']:
        """Attention over the whole sequence.

        Args:
            x: the input.
            positions: the place of each token, for rotary positions.
            valid: positions that are no padding; padding is never read, not even a NaN in it, and gives zeros
                (or the last bias).
            segments: integers `[b, l]`, packed documents, each a contiguous run of one number; they do not see each
                other. A NaN in one makes its own output NaN, gives it no gradient, and reaches no other.
            deterministic: whether dropout is off.

        Raises:
            ValueError: the mechanism does not support segments, or they are no integers.
        """
        # Here, as the program below cuts 64 bits down to 32.
        segments = None if segments is None else number_documents(segments, x.shape[:2])
        return self._run('attended', x, positions, valid, segments, deterministic=deterministic)

    def attended(
        self,
        x: Float[Array, 'b l e'],
        positions: Int[Array, '#b l'],
        valid: Bool[Array, 'b l'] | None,
        segments: Int[Array, 'b l'] | None,
        *,
        deterministic: bool,
    ) -> Float[Array, 'b l e']:
        """Computes `__call__`, operation by operation."""
        training = not deterministic
        drop = partial(self.weight_dropout, deterministic=False) if self.dropout and training else None
        noise = {'noise': self.make_rng('dropout')} if self.needs_rng and training else {}
        packed, x, sound = packing(self, segments), without_padding(x, valid), None
        if segments is not None:
            sound = finite_documents(segments, valid, (x,))
            x = without_padding(x, sound)
        q, k, v = self._project(x, positions, valid)
        if segments is not None and sound is not None:  # a projection, too, can pass the largest number
            sound &= finite_inputs(segments, valid, q, k, v)
            q, k, v = (without_padding(role, sound) for role in (q, k, v))
        attended = self.attend_from(x, q, k, v, valid=valid, drop=drop, **packed, **noise)
        if training:
            self.update_state(q, k, valid=valid)
        return mark_broken(self._merge(without_padding(attended, valid)), sound, valid)

    def prefill(
        self,
        x: Float[Array, 'b l e'],
        positions: Int[Array, '#b l'],
        counts: Int[Array, ' b'],
        capacity: int,
    ) -> Float[Array, 'b l e']:
        """As `__call__`; keeps in collection `cache` what decoding needs of the first `counts` positions of a row."""
        if not self.causal:
            raise ValueError(f'{type(self).__name__}(causal=False) cannot decode: each position sees those after it')
        if self.max_length is None and x.shape[1] != capacity:
            raise ValueError(f'set max_length={capacity}: sizes must not follow from a prompt of {x.shape[1]}')
        return self._run('prefilled', x, positions, counts, capacity=capacity)

    def prefilled(
        self, x: Float[Array, 'b l e'], positions: Int[Array, '#b l'], counts: Int[Array, ' b'], *, capacity: int
    ) -> Float[Array, 'b l e']:
        """Computes `prefill`, operation by operation."""
        projected = self._project(x, positions)
        self.put_variable('cache', 'state', self.init_cache(x, *projected, counts, capacity))
        return self._merge(self.attend_from(x, *projected))

    def decode(self, x: Float[Array, 'b 1 e'], index: Int[Array, ' b']) -> Float[Array, 'b 1 e']:
        """Attends from one more token of each row, at position `index`, using and updating the cache."""
        if not self.has_variable('cache', 'state'):
            raise ValueError("there is no cache to decode from: call prefill first, with mutable=['cache']")
        return self._run('decoded', x, index)

    def decoded(self, x: Float[Array, 'b 1 e'], index: Int[Array, ' b']) -> Float[Array, 'b 1 e']:
        """Computes `decode`, operation by operation."""
        q, k, v = (projected[:, 0] for projected in self._project(x, index[:, None]))
        cache, attended = self.decode_step(self.get_variable('cache', 'state'), index, x[:, 0], q, k, v)
        self.put_variable('cache', 'state', cache)
        return self._merge(attended[:, None])

    def _run(self, method: str, *args: Array | None, **options: Any) -> Array:
        """Runs a method as one program; not where variables are made, which happens once."""
        if self.is_initializing():
            return getattr(self, method)(*args, **options)
        initialisers = {'in_init': Attention.in_init, 'out_init': Attention.out_init}
        return compiled.run(self, method, *args, unread=initialisers, **options)

    def _project(
        self, x: Float[Array, 'b l e'], positions: Int[Array, '#b l'], valid: Bool[Array, 'b l'] | None = None
    ) -> tuple[Array, Array, Array]:
        """Queries, keys and values, with as many heads each; zeros at padding, whose `x` is zero too."""

        def project(kernel: Array) -> Array:
            return jnp.einsum('ble,ehd->blhd', x.astype(self.dtype), kernel.astype(self.dtype))

        q, k, v = project(self.query_kernel), project(self.key_kernel), project(self.value_kernel)
        if self.bias:
            biased = (a + bias.astype(self.dtype) for a, bias in zip((q, k, v), self.biases, strict=True))
            q, k, v = (without_padding(a, valid) for a in biased)
        if self.rotary:
            q, k = rotate(q, positions), rotate(k, positions)
        if len(set(self.projected_widths)) > 1:
            q, k, v = (self._widen(a) for a in (q * self._lost_scale(), k, v))
        return repeat_heads(q, self.heads), repeat_heads(k, self.heads), repeat_heads(v, self.heads)

    def _widen(self, x: Float[Array, 'b l g d']) -> Float[Array, 'b l g w']:
        """Heads with zeros behind, as wide as the mechanism sees them."""
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.head_width - x.shape[-1])))

    def _lost_scale(self) -> float:
        """What queries are multiplied by, as the mechanism divides by the root of a width that zeros are part of."""
        return (self.head_width / self.projected_widths[0]) ** 0.5

    def _merge(self, attended: Float[Array, 'b l h d']) -> Float[Array, 'b l e']:
        of_values = self.projected_widths[1]
        attended = attended if of_values == self.head_width else attended[..., :of_values]
        merged = jnp.einsum('blhd,hde->ble', attended, self.out_kernel.astype(self.dtype))
        return merged + self.out_bias.astype(self.dtype) if self.bias else merged

    def _check_sizes(self) -> None:
        inner = self.width if self.qkv_width is None else self.qkv_width
        values = inner if self.value_width is None else self.value_width
        for size in (inner, values):
            if min(self.width, size, self.heads) < 1 or size % self.heads:
                raise ValueError(f'{self.heads} heads do not divide the width {size}; choose heads that do')
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        if kv_heads < 1 or self.heads % kv_heads:
            raise ValueError(f'{kv_heads} key heads do not divide {self.heads} heads; choose a divisor')


def packing(mechanism: Mechanism, segments: Int[Array, 'b l'] | None) -> dict[str, Array]:
    """The argument `segments` for mechanisms that take it.

    Raises:
        ValueError: there are segments, and the mechanism does not support them.
    """
    if segments is None:
        return {}
    if not mechanism.segments_supported:
        which = ' with these hyper-parameters' if mechanism.supports_segments else ''
        raise ValueError(
            f'{type(mechanism).__name__}{which} does not support segments; '
            'run the documents as rows of a batch, with `valid`'
        )
    return {'segments': segments}
