"""What the tests of mechanisms share: all mechanisms with small hyper-parameters, random input, one tolerance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import combiner
from combiner import reference
from combiner.attention import registry
from combiner.patterns import Pattern

# Largest difference from the oracle, relative to the oracle's largest value; the oracle always computes in float32.
TOLERANCE = {jnp.float32: 5e-6, jnp.bfloat16: 2e-2}

# Those whose pattern depends on their input have tests of their own.
KNOWN_AHEAD = [name for name in combiner.names() if not registry.resolve(name).by_content]


def mechanisms(keys: tuple[str, ...] = reference.KEYS) -> list:
    """`(name, hyper)` of all mechanisms, with a block or row that divides few lengths, and each choice of key.

    All tests of one of them run in the same worker, where they share compiled programs.
    """
    found = []
    for name in KNOWN_AHEAD:
        known = registry.hyper_parameters(name)
        sizes = {size: 5 for size in ('block', 'columns') if size in known}
        for choice in [{'key': key} for key in keys] if 'key' in known else [{}]:
            case = '-'.join([name, *choice.values()])
            found.append(pytest.param(name, sizes | choice, id=case, marks=pytest.mark.xdist_group(case)))
    return found


every_mechanism = pytest.mark.parametrize(('name', 'hyper'), mechanisms())
every_module = pytest.mark.parametrize(('name', 'hyper'), mechanisms((*reference.KEYS, 'projected')))
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


def mechanism_pattern(name: str, length: int, *, causal: bool, hyper: dict):
    return combiner.pattern(name, length, causal=causal, **hyper)


def traced_pattern(**parts) -> Pattern:
    """A pattern of arrays that a compiled program takes as arguments; its constructor asks for arrays of numpy."""
    pattern = object.__new__(Pattern)
    for part, value in parts.items():
        object.__setattr__(pattern, part, value)
    return pattern


def oracle_key(hyper: dict) -> dict:
    """The part of the hyper-parameters that the oracle takes beside the pattern."""
    return {'key': hyper['key']} if 'key' in hyper else {}


def assert_close(actual, expected, tolerance: float) -> None:
    """Elementwise, relative to the largest expected value."""
    actual, expected = (np.asarray(x, np.float32) for x in (actual, expected))
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)
