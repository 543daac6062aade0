"""The public face: mechanisms by name, as functions."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from combiner import attention, baselines, sharding
from combiner.core import distributed, registry
from combiner.core.compiled import circumstances
from combiner.core.mechanism import Context, Mechanism
from combiner.ops.segments import checked_valid, finite_inputs, mark_broken, number_documents, without_padding
from combiner.ops.softmax import Dropout, repeat_heads
from combiner.patterns import Mixture, Pattern

names = registry.names
_REGISTERED_BY_IMPORT = (attention, baselines)


def pattern(name: str, length: int, *, causal: bool, **hyper: Any) -> Pattern | Mixture:
    """Returns the partition of every position's support that a mechanism uses at this length.

    Raises:
        ValueError: the name, a hyper-parameter or its value is wrong.
        NotImplementedError: the mechanism's partition depends on its input.
    """
    return registry.make_mechanism(name, hyper, causal=causal).pattern(length)


def attend(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    name: str,
    *,
    causal: bool,
    valid: ArrayLike | None = None,
    segments: ArrayLike | None = None,
    **hyper: Any,
) -> Float[Array, 'b l h d']:
    """Attends from given queries to keys and values, in the shapes of `jax.nn.dot_product_attention`.

    Args:
        q: queries `[b, l, h, d]`, not scaled.
        k: keys `[b, l, g, d]`; `g` divides `h` (grouped queries).
        v: values `[b, l, g, d]`.
        name: a registered mechanism (`combiner.names()`), or a path like `mylab.strided:Strided`.
        causal: whether position `i` attends to positions `j ≤ i` only.
        valid: bool `[b, l]`, positions that are no padding. Padded keys are excluded from direct terms and from
            summaries, with any contents; the output at padding is zero.
        segments: integers `[b, l]`, packed documents, each a contiguous run of positions with one number: none attends
            to another, exactly as if every other document were padding. Not even a NaN spreads from one to another:
            it makes the outputs of its own document NaN, and gives it no gradient. Any integers are allowed; see
            `combiner.ops.segments.number_documents`.
        **hyper: the mechanism's own hyper-parameters.

    Returns:
        The attended values `[b, l, h, d]`, in the type of `q`; the softmax is computed in float32 at least.

    Raises:
        ValueError: a name, shape, type or value is wrong, or the mechanism has parameters and must be used in the
            Linen module `Attention`.
    """
    mechanism = registry.make_mechanism(name, hyper, causal=causal)
    return _program(mechanism, circumstances(), *_checked(mechanism, q, k, v, valid, segments))


def attention_fn(name: str, *, causal: bool = False, **hyper: Any) -> 'AttentionFn':
    """Makes a mechanism the `attention_fn` of `linen.MultiHeadDotProductAttention` and `nnx.MultiHeadAttention`.

    Two functions with the same arguments are equal and share their compiled programs. They can be pickled and copied.

    Args:
        name: as for `attend`.
        causal: whether position `i` attends to positions `j ≤ i` only.
        **hyper: the mechanism's own hyper-parameters.

    Raises:
        ValueError: the name or a hyper-parameter is wrong.
    """
    return AttentionFn(name, causal, tuple(sorted(hyper.items())))


@dataclasses.dataclass(frozen=True)
class AttentionFn:
    """A mechanism that Flax's attention modules call; made by `attention_fn`.

    A mask must be one of keys alone, of shape `[b, 1, 1, l]`, and is used as `valid`. Any other mask is refused: say
    `causal=True` in `attention_fn` instead of a causal mask. Dropout acts on the joint weights, with a separate mask
    for each batch row and head at any `broadcast_dropout`: this argument saves memory in Flax and does not change the
    average effect of dropout.

    Attributes:
        name: a registered mechanism or a dotted path.
        causal: whether position `i` attends to positions `j ≤ i` only.
        hyper: the names and values of its own hyper-parameters, sorted by name.
    """

    name: str
    causal: bool = False
    hyper: tuple[tuple[str, Any], ...] = ()
    mechanism: Mechanism = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Makes the mechanism, which checks the name and the hyper-parameters."""
        mechanism = registry.make_mechanism(self.name, dict(self.hyper), causal=self.causal)
        object.__setattr__(self, 'mechanism', mechanism)
        frozen = tuple((key, getattr(mechanism, key)) for key in sorted(dict(self.hyper)))
        object.__setattr__(self, 'hyper', frozen)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the arguments, from which the mechanism is made again."""
        return AttentionFn, (self.name, self.causal, self.hyper)

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: Array | None = None,
        *,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        broadcast_dropout: bool = False,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        is_causal: bool = False,
        module: Any = None,
        **others: Any,
    ) -> Array:
        """Attends as `linen.dot_product_attention` and `nnx.dot_product_attention` do.

        Raises:
            ValueError: an argument is given that the mechanism would have to ignore.
        """
        del broadcast_dropout
        if module is not None:
            raise ValueError(
                f'{self.name} cannot sow its weights: they are over tokens and summaries, and never side by side; '
                'leave sow_weights=False'
            )
        if is_causal and not self.causal:
            raise ValueError(f'{self.name} is bidirectional here: say attention_fn({self.name!r}, causal=True)')
        others = {'bias': bias, 'precision': precision, **others}
        refused = [argument for argument, given in others.items() if given is not None and given is not False]
        if refused:
            raise ValueError(f'{self.name} cannot honour {", ".join(refused)}: leave unset')
        dropout = None
        if dropout_rate and not deterministic:
            if not 0 < dropout_rate < 1:
                raise ValueError(f'dropout_rate={dropout_rate} must be at least 0 and less than 1')
            if dropout_rng is None:
                raise ValueError('dropout needs a random key: pass rngs with a `dropout` stream, or deterministic=True')
            dropout = dropout_rng, float(dropout_rate)
        q, k, v = (x if dtype is None else x.astype(dtype) for x in (query, key, value))
        checked = _checked(self.mechanism, q, k, v, _keys_only(mask, key.shape), None)
        return _program(self.mechanism, circumstances(), *checked, dropout)


def _checked(
    mechanism: Mechanism,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    valid: ArrayLike | None,
    segments: ArrayLike | None,
) -> tuple[Array, Array, Array, Array | None, Array | None]:
    """Checks arguments and returns them as arrays, with the documents numbered."""
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    shapes = f'q {q.dtype}{list(q.shape)}, k {k.dtype}{list(k.shape)}, v {v.dtype}{list(v.shape)}'
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(f'q, k and v must be [batch, length, heads, head width], got {shapes}')
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f'q, k and v must agree in batch, length and head width (self-attention only), got {shapes}; '
            'to decode, use the methods prefill and decode of combiner.Attention'
        )
    if not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(f'the key heads must divide the query heads, got {shapes}')
    if not q.size:
        raise ValueError(f'q, k and v must hold at least one position of one sequence, got {shapes}')
    if not (jnp.issubdtype(q.dtype, jnp.floating) and q.dtype == k.dtype == v.dtype):
        raise ValueError(f'q, k and v must have one floating-point type, got {shapes}; cast them first')
    if q.dtype.itemsize < 2:
        raise ValueError(f'q, k and v must have at least 16 bits, got {shapes}; cast them first')
    valid = None if valid is None else checked_valid(valid, q.shape[:2])
    segments = None if segments is None else number_documents(segments, q.shape[:2])
    mechanism.check_segments(segments)
    return q, k, v, valid, segments


@partial(jax.jit, static_argnums=(0, 1), inline=True)
def _program(
    mechanism: Mechanism,
    given: tuple[Any, ...],
    q: Array,
    k: Array,
    v: Array,
    valid: Array | None,
    segments: Array | None,
    dropout: tuple[Array, float | Array] | None = None,
) -> Array:
    """Attends by one program for each mechanism, shape and `given` circumstances; `dropout` is a random key and a rate.

    Padding and broken documents are zeroed first, so that not even a NaN in them spreads.
    """
    del given

    def attended(q, k, v, valid, segments, dropout):
        drop = None if dropout is None else Dropout(*dropout)
        sound = None if segments is None else finite_inputs(segments, valid, q, k, v)
        q, k, v = (without_padding(without_padding(x, valid), sound) for x in (q, k, v))
        if not mechanism.takes_groups:
            k, v = (repeat_heads(x, q.shape[2]) for x in (k, v))
        found = distributed.attend(mechanism, q, k, v, Context(valid=valid, segments=segments, drop=drop))
        return mark_broken(without_padding(found, valid), sound, valid)

    return sharding.with_automatic_axes(attended, like=q)(q, k, v, valid, segments, dropout)


def _keys_only(mask: Array | None, key_shape: tuple[int, ...]) -> Bool[Array, 'b l'] | None:
    if mask is None:
        return None
    batch, length = key_shape[:2]
    if mask.ndim != 4 or mask.shape[1:] != (1, 1, length) or mask.shape[0] not in (1, batch):
        raise ValueError(
            f'the mask must be one of keys alone, [{batch}, 1, 1, {length}], got {list(mask.shape)}; '
            'in place of a causal mask say attention_fn(name, causal=True)'
        )
    return jnp.broadcast_to(mask[:, 0, 0].astype(bool), (batch, length))
