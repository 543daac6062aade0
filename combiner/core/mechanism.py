"""The contract of a mechanism: a partition of the support, a function of queries, keys and values, a way to decode.

A mechanism is its hyper-parameters, and nothing else: a frozen value. `Attention` puts projections around it.

Letters: `b` batch, `l` length, `h` heads, `d` head width, `e` model width.

Every function of a mechanism takes these arguments, which its docstring does not repeat:

    q         queries `[b, l, h, d]`, not scaled
    k, v      keys and values `[b, l, h, d]`
    causal    whether position `i` attends to positions `j ≤ i` only
    valid     bool `[b, l]`, positions that are no padding; None for all. Padding must hold finite numbers
    segments  integers `[b, l]`, packed documents, each a contiguous run of positions with one number; None for one
              document. No document attends to another: every other document is like padding
    drop      dropout of the weights, which are joint over tokens and summaries; None for none
    pools     pooling of the members of a span into its summary query and key
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from numbers import Integral
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, NamedTuple, Optional, dataclass_transform, get_args, get_origin

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict
from jaxtyping import Array, Bool, Float, Int

from combiner import reference
from combiner.costs import cheapest_size
from combiner.kernels.choice import Implementation, check_known, choose
from combiner.ops.softmax import Drop, repeat_heads
from combiner.patterns import Cost, Mixture, Pattern

Count = Annotated[int, 'at least 0']  # the type of a hyper-parameter that may be 0; an `int` is at least 1
SIZES, COUNTS = (int, int | None), (Count, Optional[Count])  # noqa: UP045, as pyright knows no `Count | None` here


class Context(NamedTuple):
    """The optional inputs of a mechanism besides queries, keys and values; None for a missing one.

    Attributes:
        x: the input of the module, `[b, l, e]`, zero at padding; in `decode_step`, of the new token, `[b, e]`.
        valid: bool, `[b, l]`, positions that are no padding.
        segments: integers, `[b, l]`, packed documents; only given to a mechanism that supports them.
        drop: dropout of the weights.
        rng: in training, a random key for a mechanism that `needs_rng`.
        variables: the mechanism's own parameters and state, by name; None if it is used as a function, and empty if it
            has none.
        project: function from another input `[b, n, e]` to its queries, keys and values, by the projections of the
            module, as at position 0.
    """

    x: Any = None
    valid: Bool[Array, 'b l'] | None = None
    segments: Int[Array, 'b l'] | None = None
    drop: Drop | None = None
    rng: Array | None = None
    variables: Mapping[str, Array] | None = None
    project: Any = None


class RawCache(NamedTuple):
    """All positions so far: the cache of a mechanism without a better one."""

    x: Float[Array, 'b l e'] | None
    q: Float[Array, 'b l h d']
    k: Float[Array, 'b l h d']
    v: Float[Array, 'b l h d']


@dataclass_transform(kw_only_default=True, frozen_default=True)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mechanism:
    """One way to attend. The annotated attributes of a subclass are its hyper-parameters; it needs no decorator.

    A subclass defines its `pattern`. The other methods have defaults that are right and slow: `attend` runs the oracle,
    and `decode_step` runs `attend` over the whole sequence for every token. A mechanism that is no partition of its
    support has no pattern and defines `attend`.

    Two mechanisms with equal hyper-parameters are equal. Lists in them become tuples, and dictionaries frozen ones.

    Attributes:
        causal: whether position `i` attends to positions `j ≤ i` only.
        max_length: the length for which a hyper-parameter left at None is chosen; None for the length of the input. A
            model sets it, so that its mechanisms do not change with the length of their input.

    Raises:
        ValueError: a hyper-parameter is no integer where it must be, is too small, is none of the names in its type
            (`Annotated[str, NAMES]`), or has no hash; or the mechanism has no such form.
    """

    causal: bool = True
    max_length: int | None = None

    full_support: ClassVar[bool] = False  # every position of the support is reached
    input_dependent: ClassVar[bool] = False  # the pattern follows from the input, so that there is no `pattern(length)`
    uses_future: ClassVar[bool] = False  # the pattern depends on later positions, also if causal
    supported_causal: ClassVar[tuple[bool, ...]] = (True, False)  # the values of `causal` for which it is defined
    supports_segments: ClassVar[bool] = False  # `attend` separates packed documents; of an instance: with its fields
    # `attend` works on parts of sequences (`ops.parts`), heads apart: the first axis of its variables is heads. It gets
    # no `context.rng` and no `context.project` there.
    supports_context: ClassVar[bool] = False
    supports_dropout: ClassVar[bool] = True  # each pair has a weight, on which dropout can act
    allows_value_width: ClassVar[bool] = True  # zeros appended to queries and keys change nothing
    needs_rng: ClassVar[bool] = False  # in training, `attend` needs `context.rng`
    requires: ClassVar[str] = ''  # the parameters or state that `attend` needs, in words
    projections: ClassVar[tuple[str, str, str]] = ('query', 'key', 'value')  # of its queries, keys and values
    # The ways to compute `attend`, the best first, for a mechanism with a field `implementation: str | None = None`.
    implementations: ClassVar[Mapping[str, Implementation]] = MappingProxyType({})

    def __init_subclass__(cls, **options: Any) -> None:
        """Makes the subclass a frozen dataclass."""
        super().__init_subclass__(**options)
        _resolve_annotations(cls)
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)

    def __post_init__(self) -> None:
        """Checks the hyper-parameters, and makes them hashable."""
        name = type(self).__name__
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (*SIZES, *COUNTS):
                _check_integer(f'{name}: {field.name}', value, field)
            elif names := _names_of(field.type):
                _check_named(f'{name}: unknown {field.name}', value, names)
            elif not _has_hash(value):
                object.__setattr__(self, field.name, _frozen(f'{name}: {field.name}', value))
        if self.implementations:
            check_known(name, self.implementations, getattr(self, 'implementation', None))
        if not isinstance(self.causal, bool):
            raise ValueError(f'{name}: causal={self.causal!r} must be True or False')
        if self.causal not in self.supported_causal:
            kind, instead = ('causal', 'bidirectional') if self.causal else ('bidirectional', 'causal')
            raise ValueError(f'{name} has no {kind} form; say causal={not self.causal} for the {instead} one')

    def pattern(self, length: int) -> Pattern | Mixture:
        """Returns the partition of the support for a sequence of this length."""
        why = ': it does not partition its support'
        if self.input_dependent:
            why = ' that is known before it sees its input'
        raise NotImplementedError(f'{type(self).__name__} has no pattern{why}')

    def cost(self, length: int) -> Cost:
        """Returns the cost of `pattern(length)`; a subclass may know a closed form."""
        return self.pattern(length).cost()

    def size_or_cheapest(self, size: int | None, cost: Callable[..., Cost], length: int) -> int:
        """Returns a block or row length: `size` if given, else the cheapest power of two at `max_length`.

        At most the length: beyond it the pattern is the same, with more padding.
        """
        if size is None:
            size = cheapest_size(cost, self.max_length or length, causal=self.causal)
        return min(size, length)

    def attend(
        self, q: Float[Array, 'b l h d'], k: Float[Array, 'b l h d'], v: Float[Array, 'b l h d'], context: Context
    ) -> Float[Array, 'b l h d']:
        """Attends from all positions; by default by the oracle, O(l²).

        Raises:
            ValueError: the oracle gets packed documents, which it does not separate.
        """
        if context.segments is not None:
            name = type(self).__name__
            raise ValueError(f'the oracle does not support segments: define {name}.attend for packed documents')
        return reference.attend(q, k, v, self.pattern(q.shape[1]), valid=context.valid, drop=context.drop)

    def attend_by_best(
        self,
        q: Float[Array, 'b l h d'],
        k: Float[Array, 'b l g d'],
        v: Float[Array, 'b l g d'],
        context: Context,
        **sizes: Any,
    ) -> Float[Array, 'b l h d']:
        """Attends by the implementation that the field `implementation` names, or by the best on the platform.

        Args:
            q: queries, not scaled.
            k: keys, of as many heads or, if the mechanism `takes_groups`, of a divisor.
            v: values, likewise.
            context: the optional inputs, of which implementations get `valid`, `segments` and `drop`.
            **sizes: what all `implementations` take besides, and `causal`.

        Raises:
            ValueError: the implementation is unknown, or does not support this input on this platform.
        """
        options = {'valid': context.valid, 'segments': context.segments, 'drop': context.drop, **sizes}
        named = getattr(self, 'implementation', None)
        name = choose(type(self).__name__, self.implementations, named, q, causal=self.causal, **options)
        chosen = self.implementations[name]
        if not chosen.groups:
            k, v = (repeat_heads(x, q.shape[2]) for x in (k, v))
        return chosen.attend(q, k, v, causal=self.causal, **options)

    @property
    def takes_groups(self) -> bool:
        """Returns whether `attend` may get fewer key heads than query heads: each then serves consecutive query heads.

        True if one of the `implementations` takes them. False if a subclass has an `attend` of its own and inherits
        the `implementations`: it gets repeated heads.
        """
        attends, implements = (
            next(cls for cls in type(self).__mro__ if name in vars(cls)) for name in ('attend', 'implementations')
        )
        return issubclass(implements, attends) and any(one.groups for one in self.implementations.values())

    def variables(self, module: nn.Module) -> dict[str, Array]:
        """Makes the parameters and the state of the mechanism, for `own_variables`; by default none.

        A mechanism that cannot attend without them says in `requires` what they are.

        Args:
            module: the `Attention` around it, during its setup, with `width`, `heads` and `head_width`.
                `layers.parameter` and `layers.state` make variables of it.
        """
        del module
        return {}

    def own_variables(self, context: Context) -> Mapping[str, Array]:
        """Returns the parameters and the state of the mechanism, of a context.

        Raises:
            ValueError: the context has none, as the mechanism is used as a function.
        """
        if not context.variables:
            name = type(self).__name__
            module = f'combiner.Attention({type(self).__module__}.{name}(…), width=…, heads=…)'
            owned = self.requires or 'parameters or state'
            raise ValueError(f'{name} owns {owned}: use the Linen module {module}, or its function')
        return context.variables

    def update_state(
        self, q: Float[Array, 'b l h d'], k: Float[Array, 'b l h d'], context: Context
    ) -> dict[str, Array]:
        """Returns the state that training changes, by name, after each attention; by default none."""
        del q, k, context
        return {}

    def init_cache(
        self,
        q: Float[Array, 'b l h d'],
        k: Float[Array, 'b l h d'],
        v: Float[Array, 'b l h d'],
        context: Context,
        counts: Int[Array, ' b'],
        capacity: int,
    ) -> Any:
        """Returns a cache of the first `counts` positions of each sequence, with room for `capacity` positions."""
        del counts  # later positions are overwritten before use
        room = capacity - q.shape[1]
        tokens = RawCache(context.x, q, k, v)
        return jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, room)) + ((0, 0),) * (a.ndim - 2)), tokens)

    def decode_step(
        self,
        cache: Any,
        index: Int[Array, ' b'],
        q: Float[Array, 'b h d'],
        k: Float[Array, 'b h d'],
        v: Float[Array, 'b h d'],
        context: Context,
    ) -> tuple[Any, Float[Array, 'b h d']]:
        """Caches the token at position `index`, and attends from it, as `attend` does there.

        A mechanism that uses the future does not use it here: later positions are then like padding.
        """
        rows = jnp.arange(index.shape[0])
        tokens = RawCache(context.x, q, k, v)
        cache = jax.tree.map(lambda held, new: held.at[rows, index].set(new), cache, tokens)
        valid = jnp.arange(cache.q.shape[1]) <= index[:, None] if self.uses_future else None
        context = context._replace(x=cache.x, valid=valid)
        return cache, self.attend(cache.q, cache.k, cache.v, context)[rows, index]

    def context_block(self, length: int, parts: int) -> int:
        """Returns the number of positions in a block that no cut divides, if sequences are cut into `parts`."""
        del length, parts
        return 1

    def check_segments(self, segments: Any) -> None:
        """Refuses packed documents if the mechanism does not separate them.

        Raises:
            ValueError: segments are given, and not supported.
        """
        if segments is not None and not self.supports_segments:
            which = ' with these hyper-parameters' if type(self).supports_segments else ''
            raise ValueError(
                f'{type(self).__name__}{which} does not support segments; '
                'run the documents as rows of a batch, with `valid`'
            )


def _resolve_annotations(cls: type) -> None:
    """Replaces annotations that are text by types, by which the values of hyper-parameters are checked.

    Raises:
        TypeError: one has a name that is not defined when the class is.
    """
    try:
        cls.__annotations__ = inspect.get_annotations(cls, eval_str=True)
    except NameError as error:
        raise TypeError(
            f'a hyper-parameter of {cls.__name__} has a type that is unknown here: {error}; import it at the top of '
            'the file, not only for type checkers'
        ) from error


def _check_integer(name: str, value: Any, field: dataclasses.Field) -> None:
    """Refuses a hyper-parameter, such as a size, that is no integer or too small."""
    kind: Any = field.type
    least = int(kind in SIZES)
    if value is None and kind not in (int, Count):
        return
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f'{name} must be an integer, got {value!r}')
    if value < least:
        hint = '; annotate one that may be 0 as core.mechanism.Count' if value == field.default == 0 else ''
        raise ValueError(f'{name} must be at least {least}, got {value}{hint}')


def _names_of(kind: Any) -> tuple[Any, ...]:
    """Returns the names in a type `Annotated[str, NAMES]`; none of another type."""
    noted = get_args(kind)[1] if get_origin(kind) is Annotated else ()
    return noted if isinstance(noted, tuple) else ()


def _check_named(unknown: str, value: Any, names: tuple[Any, ...]) -> None:
    if value not in names:
        raise ValueError(f'{unknown} {value!r}; choose {", ".join(map(str, names))}')


def _frozen(name: str, value: Any) -> Any:
    """Returns the value with its lists as tuples and its dictionaries as frozen dictionaries.

    Raises:
        ValueError: the result cannot be hashed, such as an array.
    """
    frozen = _freeze(value)
    if not _has_hash(frozen):
        raise ValueError(
            f'{name} is a {type(value).__name__}, which has no hash, so that compiled programs cannot be told apart by '
            'it; give numbers, strings, tuples or functions'
        )
    return frozen


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return FrozenDict({key: _freeze(one) for key, one in value.items()})
    return tuple(map(_freeze, value)) if isinstance(value, list | tuple) else value


def _has_hash(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
