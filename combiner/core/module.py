"""The Linen module around every mechanism: projections, padding, grouped heads, dropout and cache.

Letters: `b` batch, `l` length, `h` query heads, `g` key and value heads, `d` head width, `e` model width.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from combiner.core import compiled, distributed, registry
from combiner.core.mechanism import Context, Mechanism
from combiner.layers import STATE, parameter, project_from_heads, project_to_heads, rotate
from combiner.ops.chunking import target
from combiner.ops.segments import (
    checked_valid,
    finite_documents,
    finite_inputs,
    mark_broken,
    number_documents,
    without_padding,
)
from combiner.ops.softmax import Dropout, repeat_heads
from combiner.sharding import explicit_axes

OF_MECHANISMS = ('pattern', 'cost', 'attend', 'init_cache', 'decode_step')


class Attention(nn.Module):
    """Multi-head attention: a mechanism between its projections.

    Attributes:
        mechanism: the mechanism by which the heads attend.
        width: model width `e`.
        heads: query heads.
        qkv_width: width of all query heads together; None for `width`.
        value_width: width of all value heads together, if they were as many as query heads; None for `qkv_width`. If it
            differs, zeros widen the narrower heads before the mechanism, whose parameters are as wide.
        kv_heads: key and value heads, a divisor of `heads`; None for as many (grouped queries, Ainslie et al.
            2023).
        bias: whether the four projections have biases.
        rotary: whether to rotate queries and keys by their position (Su et al. 2021).
        dropout: rate on the joint weights.
        dtype: type of the computation; the parameters are float32.
        in_init: initialiser of the projections of the input.
        out_init: initialiser of the last projection.

    Raises:
        ValueError: values would be of another width than queries, which the mechanism does not allow.
        TypeError: a subclass has methods of a mechanism.
    """

    mechanism: Mechanism
    width: int
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

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuses a subclass that is a mechanism."""
        super().__init_subclass__(**options)
        if any(method in vars(cls) for method in OF_MECHANISMS):
            raise TypeError(
                f'{cls.__name__} subclasses Attention, the Linen module, which has a mechanism and is none: '
                'subclass combiner.Mechanism instead'
            )

    def __post_init__(self) -> None:
        """Checks the mechanism and the widths of the heads."""
        if not isinstance(self.mechanism, Mechanism):
            raise TypeError(
                f'the mechanism {self.mechanism!r} is none: give one, such as CombinerFixed(block=16), or use '
                'combiner.core.module.make_attention(name, …)'
            )
        of_keys, of_values = self.projected_widths
        if of_keys != of_values and not self.mechanism.allows_value_width:
            raise ValueError(
                f'{type(self.mechanism).__name__} needs values as wide as queries: heads of {of_values} and {of_keys}; '
                'leave value_width unset'
            )
        super().__post_init__()

    @property
    def projected_widths(self) -> tuple[int, int]:
        """Returns the widths of the projected heads: of a query or key, and of a value."""
        keys = self.width if self.qkv_width is None else self.qkv_width
        values = keys if self.value_width is None else self.value_width
        heads = max(self.heads, 1)  # 0 is refused later, with the other sizes
        return keys // heads, values // heads

    @property
    def head_width(self) -> int:
        """Returns the head width `d` of the mechanism, the same for queries, keys and values."""
        return max(self.projected_widths)

    def setup(self) -> None:
        """Makes the projections, and the variables of the mechanism."""
        self._check_sizes()
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        of_keys, of_values = self.projected_widths
        shapes = {'query': (self.heads, of_keys), 'key': (kv_heads, of_keys), 'value': (kv_heads, of_values)}
        zeros, axes = nn.initializers.zeros, ('heads', 'head_dim')
        projections = self.mechanism.projections

        def kernel(role: str) -> Array:
            return parameter(self, f'{role}_kernel', self.in_init, ('embed', *axes), (self.width, *shapes[role]))

        def bias(role: str) -> Array:
            return parameter(self, f'{role}_bias', zeros, axes, shapes[role])

        made = {role: kernel(role) for role in dict.fromkeys(projections)}
        self.query_kernel, self.key_kernel, self.value_kernel = (made[role] for role in projections)
        out_shape = (self.heads, of_values, self.width)
        self.out_kernel = parameter(self, 'out_kernel', self.out_init, (*axes, 'embed'), out_shape)
        if self.bias:
            made = {role: bias(role) for role in dict.fromkeys(projections)}
            self.biases = tuple(made[role] for role in projections)
            self.out_bias = parameter(self, 'out_bias', zeros, ('embed',), (self.width,))
        self.own_variables = self.mechanism.variables(self)

    def __call__(
        self,
        x: Float[Array, 'b l e'],
        positions: Int[Array, '#b l'],
        *,
        valid: Bool[Array, 'b l'] | None = None,
        segments: ArrayLike | None = None,
        deterministic: bool = True,
    ) -> Float[Array, 'b l e']:
        """Attends over the whole sequence.

        Args:
            x: the input.
            positions: the position of each token, for rotary positions.
            valid: positions that are no padding; padding is never read, not even a NaN in it, and gives zeros
                (or the last bias).
            segments: integers `[b, l]`, packed documents, each a contiguous run of one number; none attends to another.
                A NaN in one makes its own output NaN, gives it no gradient, and reaches no other.
            deterministic: whether dropout is off.

        Raises:
            ValueError: the mechanism does not support segments, or they are no integers, or `valid` is not bool; or
                `positions` are not as many as `x` has; or the mesh of `x` has explicit axes.
        """
        _check_positions(positions, x)
        valid = None if valid is None else checked_valid(valid, x.shape[:2])
        # Here, as the program below cuts 64 bits to 32.
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
        drop = Dropout(self.make_rng('dropout'), self.dropout) if self.dropout and training else None
        rng = self.make_rng('dropout') if self.mechanism.needs_rng and training else None
        self.mechanism.check_segments(segments)
        x, sound = without_padding(x, valid), None
        if segments is not None:
            sound = finite_documents(segments, valid, (x,))
            x = without_padding(x, sound)
        q, k, v = self._project(x, positions, valid, grouped=self.mechanism.takes_groups)
        if segments is not None and sound is not None:  # a projection can overflow too
            sound &= finite_inputs(segments, valid, q, k, v)
            q, k, v = (without_padding(role, sound) for role in (q, k, v))
        context = Context(x, valid, segments, drop, rng)
        attended = self.attend(q, k, v, context)
        if training and not self.is_initializing():
            self._update_state(q, k, context)
        return mark_broken(self._merge(without_padding(attended, valid)), sound, valid)

    def attend(
        self, q: Float[Array, 'b l h d'], k: Float[Array, 'b l g d'], v: Float[Array, 'b l g d'], context: Context
    ) -> Float[Array, 'b l h d']:
        """Attends as the mechanism does, with its variables."""
        return distributed.attend(self.mechanism, q, k, v, self.with_variables(context))

    def with_variables(self, context: Context) -> Context:
        """Returns the context with the variables of the mechanism and the projections of the module."""

        def project(x: Float[Array, 'b n e']) -> tuple[Array, Array, Array]:
            return self._project(x, jnp.zeros((1, x.shape[1]), int))

        return context._replace(variables=self.own_variables, project=project)

    def prefill(
        self,
        x: Float[Array, 'b l e'],
        positions: Int[Array, '#b l'],
        counts: Int[Array, ' b'],
        capacity: int,
    ) -> Float[Array, 'b l e']:
        """Attends as `__call__`, and keeps a cache of the first `counts` positions of a row in collection `cache`.

        A mechanism that uses the future does not use it here: all later positions are then like padding.

        Args:
            x: the prompts.
            positions: of their tokens.
            counts: how many tokens of each row are its prompt, at most `l`.
            capacity: most positions of prompt and continuation together.

        Raises:
            ValueError: the prompts have more positions than that, or `positions` are not as many; or the mechanism
                cannot decode.
        """
        _check_positions(positions, x)
        if x.shape[1] > capacity:
            raise ValueError(f'prompts of {x.shape[1]} positions do not fit into capacity={capacity}; give more')
        if not self.mechanism.causal:
            name = type(self.mechanism).__name__
            raise ValueError(f'{name}(causal=False) cannot decode: each position sees those after it')
        if self.mechanism.max_length is None and x.shape[1] != capacity:
            raise ValueError(f'set max_length={capacity}: sizes must not follow from a prompt of {x.shape[1]}')
        return self._run('prefilled', x, positions, counts, capacity=capacity)

    def prefilled(
        self, x: Float[Array, 'b l e'], positions: Int[Array, '#b l'], counts: Int[Array, ' b'], *, capacity: int
    ) -> Float[Array, 'b l e']:
        """Computes `prefill`, operation by operation."""
        length, valid = x.shape[1], None
        if self.mechanism.uses_future:  # as in `decode_step`: the row is padded behind its prompt, up to the capacity
            room = (0, 0), (0, capacity - length)
            x, positions = jnp.pad(x, (*room, (0, 0))), jnp.pad(positions, room)
            valid = jnp.arange(capacity) < counts[:, None]
        x = without_padding(x, valid)
        q, k, v = self._project(x, positions, valid)
        context = Context(x, valid)
        cache = self.mechanism.init_cache(q, k, v, self.with_variables(context), counts, capacity)
        self.put_variable('cache', 'state', cache)
        self.put_variable('cache', 'capacity', jnp.full(counts.shape, capacity, jnp.int32))
        return self._merge(without_padding(self.attend(q, k, v, context), valid)[:, :length])

    def decode(self, x: Float[Array, 'b 1 e'], index: Int[Array, ' b']) -> Float[Array, 'b 1 e']:
        """Attends from one more token of each row, at position `index`, using and updating the cache.

        At a position that the capacity of the cache does not hold, the output is NaN.

        Raises:
            ValueError: there is no cache, or there are several tokens of a row.
        """
        if x.shape[1] != 1:
            raise ValueError(f'decode takes one token of each row, [batch, 1, width], got {list(x.shape)}')
        if not self.has_variable('cache', 'state'):
            raise ValueError("there is no cache to decode from: call prefill first, with mutable=['cache']")
        return self._run('decoded', x, index)

    def decoded(self, x: Float[Array, 'b 1 e'], index: Int[Array, ' b']) -> Float[Array, 'b 1 e']:
        """Computes `decode`, operation by operation."""
        q, k, v = (projected[:, 0] for projected in self._project(x, index[:, None]))
        cache, context = self.get_variable('cache', 'state'), self.with_variables(Context(x[:, 0]))
        cache, attended = self.mechanism.decode_step(cache, index, q, k, v, context)
        self.put_variable('cache', 'state', cache)
        room = (index >= 0) & (index < self.get_variable('cache', 'capacity'))
        return jnp.where(room[:, None, None], self._merge(attended[:, None]), jnp.nan)

    def _run(self, method: str, x: Array, *args: Array | None, **options: Any) -> Array:
        """Runs a method as one program; not while variables are made, which happens once."""
        if axes := explicit_axes(x):
            raise ValueError(
                f'the mesh of x has the explicit axes {", ".join(axes)}, which Linen modules do not support; make it '
                'with combiner.sharding.make_mesh (or use combiner.attend, which takes explicit axes)'
            )
        if self.is_initializing():
            return getattr(self, method)(x, *args, **options)
        initialisers = {'in_init': Attention.in_init, 'out_init': Attention.out_init}
        return compiled.run(self, method, x, *args, unread=initialisers, **options)

    def _update_state(self, q: Float[Array, 'b l h d'], k: Float[Array, 'b l h d'], context: Context) -> None:
        for name, value in self.mechanism.update_state(q, k, self.with_variables(context)).items():
            boxed = nn.meta.replace_boxed(self.get_variable(STATE, name), value)
            self.put_variable(STATE, name, boxed)

    def _project(
        self,
        x: Float[Array, 'b l e'],
        positions: Int[Array, '#b l'],
        valid: Bool[Array, 'b l'] | None = None,
        *,
        grouped: bool = False,
    ) -> tuple[Array, Array, Array]:
        """Returns queries, keys and values; zeros at padding, whose `x` is zero too.

        They have as many heads each, or if `grouped` keys and values have `kv_heads`.
        """
        kernels = (self.query_kernel, self.key_kernel, self.value_kernel)
        q, k, v = (project_to_heads(x.astype(self.dtype), kernel) for kernel in kernels)
        if self.bias:
            biased = (a + bias.astype(self.dtype) for a, bias in zip((q, k, v), self.biases, strict=True))
            q, k, v = (without_padding(a, valid) for a in biased)
        if self.rotary:
            q, k = (rotate(a, positions, by_product=target().platform == 'tpu') for a in (q, k))
        if len(set(self.projected_widths)) > 1:
            q, k, v = (self._widen(a) for a in (q * self._lost_scale(), k, v))
        q = repeat_heads(q, self.heads)
        return (q, k, v) if grouped else (q, repeat_heads(k, self.heads), repeat_heads(v, self.heads))

    def _widen(self, x: Float[Array, 'b l g d']) -> Float[Array, 'b l g w']:
        """Appends zeros to heads, up to the head width of the mechanism."""
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.head_width - x.shape[-1])))

    def _lost_scale(self) -> float:
        """Returns a factor for queries, as the mechanism divides by the root of a width that includes zeros."""
        return (self.head_width / self.projected_widths[0]) ** 0.5

    def _merge(self, attended: Float[Array, 'b l h d']) -> Float[Array, 'b l e']:
        of_values = self.projected_widths[1]
        attended = attended if of_values == self.head_width else attended[..., :of_values]
        merged = project_from_heads(attended.astype(self.dtype), self.out_kernel)
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
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout={self.dropout} must be at least 0 and less than 1')


def _check_positions(positions: Array, x: Array) -> None:
    if positions.ndim != 2 or positions.shape[1] != x.shape[1] or positions.shape[0] not in (1, x.shape[0]):
        raise ValueError(
            f'positions must be [1 or {x.shape[0]}, {x.shape[1]}] for x {list(x.shape)}, got {list(positions.shape)}'
        )


def make_attention(
    name: str,
    hyper: Mapping[str, Any] | None = None,
    *,
    causal: bool = True,
    max_length: int | None = None,
    **frame: Any,
) -> Attention:
    """Makes the module around a mechanism of `registry.make_mechanism`; `frame` are the other fields of `Attention`.

    Raises:
        ValueError: as `registry.make_mechanism`.
    """
    return Attention(registry.make_mechanism(name, hyper, causal=causal, max_length=max_length), **frame)
