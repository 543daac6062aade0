"""What the tests of mechanisms share: all mechanisms with small hyper-parameters, random input, one tolerance."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import combiner
from combiner import reference
from combiner.core import registry
from combiner.core.mechanism import Context, Mechanism
from combiner.patterns import NO_ANCHOR, Mixture, Pattern

# Largest difference from the oracle, relative to the oracle's largest value; the oracle always computes in float32.
TOLERANCE = {jnp.float32: 5e-6, jnp.bfloat16: 2e-2}
SIZES = {
    'block': 5,
    'columns': 5,
    'chunk': 8,
    'branch': 3,
    'overlap': 3,
    'stride': 5,
    'window': 6,
    'features': 16,  # with 12, the gradient of a lone query, which is 0, comes out as 2e-5 without packing
}


def sizes_of(name: str) -> dict[str, int]:
    """Hyper-parameters of a mechanism that divide few lengths."""
    return {size: value for size, value in SIZES.items() if size in registry.hyper_parameters(name)}


def those(**attributes: bool | str) -> list[str]:
    """All mechanisms whose class has these attributes."""
    classes = {name: registry.resolve(name) for name in combiner.names()}
    return [name for name, of in classes.items() if all(getattr(of, key) == has for key, has in attributes.items())]


def has_pattern(name: str) -> bool:
    """Whether there is a pattern that is known before a mechanism sees its input."""
    return registry.resolve(name).pattern is not Mechanism.pattern


# Those whose pattern depends on their input, and those that own parameters, have tests of their own. Those without a
# pattern are compared in tests of their own, but share the tests that need no oracle.
FUNCTIONS = those(input_dependent=False, requires='')
KNOWN_AHEAD = [name for name in FUNCTIONS if has_pattern(name)]
UNPARTITIONED = [name for name in FUNCTIONS if not has_pattern(name)]


def mechanisms(names: list[str], keys: tuple[str, ...] = reference.KEYS) -> list:
    """`(name, hyper)` of mechanisms, with a block or row that divides few lengths, and each choice of key or kernel.

    All tests of one of them run in the same worker, where they share compiled programs.
    """
    found = []
    for name in names:
        known = registry.hyper_parameters(name)
        choices = {'key': keys, 'kernel': ('softmax', 'relu')}
        for choice in [{kind: one} for kind, ones in choices.items() if kind in known for one in ones] or [{}]:
            case = '-'.join([name, *choice.values()])
            found.append(pytest.param(name, sizes_of(name) | choice, id=case, marks=pytest.mark.xdist_group(case)))
    return found


every_mechanism = pytest.mark.parametrize(('name', 'hyper'), mechanisms(KNOWN_AHEAD))
every_unpartitioned = pytest.mark.parametrize(('name', 'hyper'), mechanisms(UNPARTITIONED))
every_function = pytest.mark.parametrize(('name', 'hyper'), mechanisms(KNOWN_AHEAD + UNPARTITIONED))
every_module = pytest.mark.parametrize(
    ('name', 'hyper'), mechanisms(KNOWN_AHEAD + UNPARTITIONED, (*reference.KEYS, 'projected'))
)
PACKING = those(input_dependent=False, requires='', supports_segments=True)
every_packing_function = pytest.mark.parametrize(('name', 'hyper'), mechanisms(PACKING))
causal_or_not = pytest.mark.parametrize('causal', [True, False], ids=['causal', 'bidirectional'])


def assignments(length: int, number: int = 5) -> dict[str, np.ndarray]:
    """Clusters of positions for Combiner-Routing.

    Random, all in one, in turn, in runs, one cluster that comes back at the end, and one token in each but one.
    """
    here = np.arange(length)
    return {
        'random': np.random.default_rng(length).integers(0, number, length),
        'one': np.full(length, number - 1),
        'turns': here % number,
        'runs': here * number // length,
        'returns': np.where((here < 2) | (here > length - 3), 0, 1),
        'rare': np.minimum(here, number - 1),
    }


def draw(*shape: int, count: int = 3, seed: int = 0, dtype=jnp.float32) -> list[jax.Array]:
    """Arrays of standard normal numbers."""
    return [jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(seed), count)]


def random_variables(module: nn.Module, *inputs):
    """A module's variables, random, without compiling their initialisation; the same in every call."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    values = jax.tree.map(lambda leaf: random.normal(0, 1 / 4, leaf.shape).astype(leaf.dtype), shapes)
    return jax.tree.map(jnp.asarray, nn.unbox(values))


def attend_with(module: nn.Module, variables, q, k, v, **context):
    """What the mechanism of a module makes of queries, keys and values, with the module's variables."""
    return module.apply(variables, q, k, v, Context(**context), method='attend')


def mechanism_pattern(name: str, length: int, *, causal: bool, hyper: dict):
    return combiner.pattern(name, length, causal=causal, **hyper)


def oracle_key(hyper: dict) -> dict:
    """The part of the hyper-parameters that the oracle takes besides the pattern."""
    return {'key': hyper['key']} if 'key' in hyper else {}


# Patterns as arguments of a compiled program, so that one program serves all mechanisms and lengths.
LONGEST = 23
MOST_SPANS = 8 * LONGEST


def padded_arrays(pattern: Pattern) -> dict[str, np.ndarray]:
    """The arrays of a pattern, padded to `LONGEST` positions and `MOST_SPANS` spans.

    A span without members and a position that is not valid change nothing.
    """
    rows, more = LONGEST - pattern.length, MOST_SPANS - len(pattern.spans)
    arrays = {
        'direct': np.pad(pattern.direct, ((0, rows), (0, rows))),
        'spans': np.pad(pattern.spans, ((0, more), (0, rows))),
        'uses': np.pad(pattern.uses, ((0, rows), (0, more))),
    }
    if pattern.nested is not None:
        positions, nested = pattern.parts()
        arrays['positions'] = np.pad(positions, ((0, more), (0, rows)))
        arrays['nested'] = np.pad(nested, ((0, more), (0, more)))
    if pattern.anchors is not None:
        arrays['anchors'] = np.pad(pattern.anchors, (0, more), constant_values=NO_ANCHOR)
    return arrays


def pattern_of(arrays: dict) -> Pattern:
    """The pattern of arrays that may be traced: its constructor asks for arrays of numpy."""
    pattern = object.__new__(Pattern)
    for part, value in {**arrays, 'parts': lambda: (arrays['positions'], arrays['nested'])}.items():
        object.__setattr__(pattern, part, value)
    return pattern


def oracle(pattern: Pattern | Mixture, q, k, v, cotangent, valid=None, **key) -> list[jax.Array]:
    """The oracle's output and gradients, in float32, by one compiled program for all patterns."""
    if isinstance(pattern, Mixture):  # the mean of attentions has the mean of their gradients
        parts = [oracle(part, q, k, v, cotangent, valid, **key) for part in pattern.parts]
        return [sum(results) / len(parts) for results in zip(*parts, strict=True)]
    batch, length = q.shape[:2]
    rows = LONGEST - length
    valid = np.ones((batch, length), bool) if valid is None else valid
    padded = [np.pad(np.asarray(x, np.float32), ((0, 0), (0, rows), (0, 0), (0, 0))) for x in (q, k, v, cotangent)]
    results = _oracle(*padded, np.pad(valid, ((0, 0), (0, rows))), padded_arrays(pattern), **key)
    return [x[:, :length] for x in results]


@functools.partial(jax.jit, static_argnames='key')
def _oracle(q, k, v, cotangent, valid, arrays, **key):
    pattern = pattern_of(arrays)
    out, pull_back = jax.vjp(lambda *qkv: reference.attend(*qkv, pattern, valid=valid, **key), q, k, v)
    return out, *pull_back(cotangent)


def assert_close(actual, expected, tolerance: float) -> None:
    """Elementwise, relative to the largest expected value."""
    actual, expected = (np.asarray(x, np.float32) for x in (actual, expected))
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)
