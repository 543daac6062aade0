"""What a mechanism is: a partition of the support, a function of queries, keys and values, a way to decode.

A subclass defines its `pattern`. Defaults cover the methods that it does not define: `attend` runs the oracle, and
`decode_step` runs `attend` over the whole sequence for every token. Both are right and slow; override them for speed.
A mechanism that is no partition of its support (`has_pattern = False`) has no pattern and defines `attend`.

Letters: `b` batch, `l` length, `h` heads, `d` head width, `e` model width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from combiner import reference
from combiner.costs import cheapest_size
from combiner.ops.softmax import Drop
from combiner.patterns import Cost, Mixture, Pattern


class RawCache(NamedTuple):
    """Everything that came in so far: the cache of a mechanism that has no better one."""

    x: Float[Array, 'b l e']
    q: Float[Array, 'b l h d']
    k: Float[Array, 'b l h d']
    v: Float[Array, 'b l h d']


class Mechanism(nn.Module):
    """One way to attend. Subclasses add their hyper-parameters as fields; `Attention` adds the projections.

    Attributes:
        causal: whether position `i` sees positions `j ≤ i` only.
        max_length: the length for which a hyper-parameter left at None is chosen; None for the length of
            the input. A model sets it, so that its mechanisms do not change with the length of what they are
            given.
    """

    causal: bool = True
    max_length: int | None = None

    full_support = False  # whether every position of the support is reached; tested against the pattern, if any
    input_dependent = False  # whether the pattern depends on the input, so that no `pattern(length)` exists
    has_pattern = True  # whether there is a pattern at all: without one, the tests compare with no oracle
    uses_future = False  # whether later positions have a say even if causal: decoding then differs from reading
    supports_segments = False  # whether `attend` and `attend_from` also take segments, and keep packed documents apart
    requires = ''  # the parameters or state without which it cannot attend, so that only its Linen module can
    projected = ('query', 'key', 'value')  # the projections that queries, keys and values are of
    allows_value_width = True  # whether zeros appended to queries and keys change nothing: values may be wider
    has_weights = True  # whether there is a weight for each pair of positions, on which dropout can act
    needs_rng = False  # whether `attend_from` also takes `noise`, in training a random key
    supported_causal = (True, False)  # the values of `causal` for which it is defined

    def __post_init__(self) -> None:
        """Refuses a form that the mechanism does not have."""
        if self.causal not in self.supported_causal:
            kind, instead = ('causal', 'bidirectional') if self.causal else ('bidirectional', 'causal')
            name = type(self).__name__
            raise ValueError(f'{name} has no {kind} form; say causal={not self.causal} for the {instead} one')
        super().__post_init__()

    @property
    def segments_supported(self) -> bool:
        """Whether this one `supports_segments`; a subclass says where it depends on a hyper-parameter."""
        return self.supports_segments

    def pattern(self, length: int) -> Pattern | Mixture:
        """The partition of the support for a sequence of this length."""
        why = ' that is known before it sees its input' if self.has_pattern else ': it does not partition its support'
        raise NotImplementedError(f'{type(self).__name__} has no pattern{why}')

    def cost(self, length: int) -> Cost:
        """What `pattern(length)` costs; a subclass may know a closed form."""
        return self.pattern(length).cost()

    def size_or_cheapest(self, size: int | None, cost: Callable[..., Cost], length: int) -> int:
        """A block or row length: `size` if given, else the power of two that costs least at the planned length.

        No more than the length: beyond it a pattern is the same, and only padding would be added.
        """
        if size is None:
            size = cheapest_size(cost, self.max_length or length, causal=self.causal)
        return min(size, length)

    def attend(
        self,
        q: Float[Array, 'b l h d'],
        k: Float[Array, 'b l h d'],
        v: Float[Array, 'b l h d'],
        *,
        valid: Bool[Array, 'b l'] | None = None,
        drop: Drop | None = None,
    ) -> Float[Array, 'b l h d']:
        """The mechanism as a function of queries (not scaled), keys and values; here the oracle, O(l²).

        A mechanism that `supports_segments` takes `segments: Int[Array, 'b l']` too: every other document is then like
        padding.
        """
        if self.requires:
            module = f'{type(self).__module__}.{type(self).__name__}'
            raise ValueError(
                f'{type(self).__name__} owns {self.requires}: use the Linen module {module}, or its function'
            )
        return reference.attend(q, k, v, self.pattern(q.shape[1]), valid=valid, drop=drop)

    def attend_from(
        self,
        x: Float[Array, 'b l e'],
        q: Float[Array, 'b l h d'],
        k: Float[Array, 'b l h d'],
        v: Float[Array, 'b l h d'],
        **masks: Any,
    ) -> Float[Array, 'b l h d']:
        """As `attend`, same `masks`, for mechanisms that also read the module's input `x` or own parameters."""
        del x
        return self.attend(q, k, v, **masks)

    def update_state(
        self, q: Float[Array, 'b l h d'], k: Float[Array, 'b l h d'], *, valid: Bool[Array, 'b l'] | None = None
    ) -> None:
        """Called after each attention in training, for mechanisms whose state follows what they see; here nothing."""

    def init_cache(
        self,
        x: Float[Array, 'b l e'],
        q: Float[Array, 'b l h d'],
        k: Float[Array, 'b l h d'],
        v: Float[Array, 'b l h d'],
        counts: Int[Array, ' b'],
        capacity: int,
    ) -> Any:
        """A cache with room for `capacity` positions that holds the first `counts` ones of what is given."""
        del counts  # what lies beyond is overwritten before anything can see it
        room = capacity - q.shape[1]
        return RawCache(*(jnp.pad(a, ((0, 0), (0, room)) + ((0, 0),) * (a.ndim - 2)) for a in (x, q, k, v)))

    def decode_step(
        self,
        cache: Any,
        index: Int[Array, ' b'],
        x: Float[Array, 'b e'],
        q: Float[Array, 'b h d'],
        k: Float[Array, 'b h d'],
        v: Float[Array, 'b h d'],
    ) -> tuple[Any, Float[Array, 'b h d']]:
        """Takes a token at position `index` into the cache and attends from it: what `attend_from` gives there.

        A mechanism that uses the future does not here: later positions are then like padding.
        """
        rows = jnp.arange(index.shape[0])
        cache = RawCache(*(held.at[rows, index].set(new) for held, new in zip(cache, (x, q, k, v), strict=True)))
        valid = jnp.arange(cache.x.shape[1]) <= index[:, None] if self.uses_future else None
        return cache, self.attend_from(*cache, valid=valid)[rows, index]
