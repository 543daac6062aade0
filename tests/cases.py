"""What the tests of mechanisms share: all mechanisms with small hyper-parameters, and the module `combiner.testing`."""

import flax.linen as nn
import jax
import numpy as np
import pytest

import combiner
from combiner import reference
from combiner.core import registry
from combiner.core.mechanism import Context, Mechanism
from combiner.oracle import LENGTH, oracle, padded_arrays, pattern_of
from combiner.testing import TOLERANCE, assert_close, draw, random_variables

__all__ = ['TOLERANCE', 'assert_close', 'draw', 'oracle', 'padded_arrays', 'pattern_of', 'random_variables']
LONGEST = LENGTH

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


def attend_with(module: nn.Module, variables, q, k, v, **context):
    """What the mechanism of a module makes of queries, keys and values, with the module's variables."""
    return module.apply(variables, q, k, v, Context(**context), method='attend')


def with_gradients(attend, *arrays):
    """The output of `attend` for all arrays but the last one, and the gradients for that cotangent."""
    *qkv, cotangent = arrays
    out, pull_back = jax.vjp(attend, *qkv)
    return out, *pull_back(cotangent)


def mechanism_pattern(name: str, length: int, *, causal: bool, hyper: dict):
    return combiner.pattern(name, length, causal=causal, **hyper)


def oracle_key(hyper: dict) -> dict:
    """The part of the hyper-parameters that the oracle takes besides the pattern."""
    return {'key': hyper['key']} if 'key' in hyper else {}
