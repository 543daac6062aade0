"""The oracle's output and gradients, by one compiled program that serves all patterns of a few positions.

A pattern is an argument of the program, as padded arrays, so that a test of another pattern compiles nothing.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array

from combiner import reference
from combiner.patterns import NO_ANCHOR, Mixture, Pattern

LENGTH = 23  # most positions of a pattern; few blocks divide it
MOST_SPANS = 8 * LENGTH  # of a pattern


def oracle(
    pattern: Pattern | Mixture, q: Any, k: Any, v: Any, cotangent: Any, valid: Any = None, **options: Any
) -> list[Array]:
    """Computes the oracle's output and gradients in float32, by one compiled program for all patterns.

    Args:
        pattern: of at most `LENGTH` positions and `MOST_SPANS` spans.
        q: queries.
        k: keys.
        v: values.
        cotangent: of the output, for the gradients.
        valid: positions that are no padding.
        **options: `key` and `pools` of `reference.attend`.
    """
    if isinstance(pattern, Mixture):  # the mean of attentions has the mean of their gradients
        parts = [oracle(part, q, k, v, cotangent, valid, **options) for part in pattern.parts]
        return [sum(results, jnp.zeros(())) / len(parts) for results in zip(*parts, strict=True)]
    batch, length = q.shape[:2]
    rows = LENGTH - length
    valid = np.ones((batch, length), bool) if valid is None else valid
    q, k, v, cotangent = (_padded(np.asarray(x, np.float32), 0, rows, 0, 0) for x in (q, k, v, cotangent))
    results = _oracle(q, k, v, cotangent, _padded(valid, 0, rows), padded_arrays(pattern), **options)
    return [x[:, :length] for x in results]


@functools.partial(jax.jit, static_argnames=('key', 'pools'))
def _oracle(
    q: Array, k: Array, v: Array, cotangent: Array, valid: Array, arrays: Any, **options: Any
) -> tuple[Array, ...]:
    pattern = pattern_of(arrays)
    out, pull_back = jax.vjp(lambda q, k, v: reference.attend(q, k, v, pattern, valid=valid, **options), q, k, v)
    return out, *pull_back(cotangent)


def padded_arrays(pattern: Pattern) -> dict[str, np.ndarray]:
    """Returns the arrays of a pattern, padded to `LENGTH` positions and `MOST_SPANS` spans.

    A span without members and a position that is not valid change nothing. As arguments of a compiled program they let
    one program serve all mechanisms and lengths.

    Raises:
        ValueError: the pattern has more spans.
    """
    rows, more = LENGTH - pattern.length, MOST_SPANS - len(pattern.spans)
    if more < 0:
        raise ValueError(f'{len(pattern.spans)} spans at length {pattern.length}: at most {MOST_SPANS} can be checked')
    arrays = {
        'direct': _padded(pattern.direct, rows, rows),
        'spans': _padded(pattern.spans, more, rows),
        'uses': _padded(pattern.uses, rows, more),
    }
    if pattern.nested is not None:
        positions, nested = pattern.parts()
        arrays['positions'] = _padded(positions, more, rows)
        arrays['nested'] = _padded(nested, more, more)
    if pattern.anchors is not None:
        arrays['anchors'] = _padded(pattern.anchors, more, fill=NO_ANCHOR)
    return arrays


def _padded(x: ArrayLike, *more: int, fill: int = 0) -> np.ndarray:
    """Appends so many elements along each axis."""
    room: Any = [(0, count) for count in more]
    return np.pad(x, room, constant_values=fill)


def pattern_of(arrays: dict[str, Any]) -> Pattern:
    """Returns the pattern of arrays that may be traced: its constructor asks for arrays of numpy."""
    pattern = object.__new__(Pattern)
    for part, value in {**arrays, 'parts': lambda: (arrays['positions'], arrays['nested'])}.items():
        object.__setattr__(pattern, part, value)
    return pattern
