"""Sizes that do not suit the length: far beyond it, no sizes at all, and one position more than whole blocks."""

import dataclasses
import functools
import inspect
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SIZES, TOLERANCE, assert_close, attend_with, draw, random_variables

import combiner
from combiner.attention import (
    combiner_axial_horizontal,
    combiner_axial_rowmajor,
    combiner_axial_vertical,
    combiner_fixed,
    combiner_mixture,
)
from combiner.attention.combiner_routing import attend_combiner_routing
from combiner.baselines import axial, fixed
from combiner.core import registry
from combiner.core.mechanism import COUNTS, Context, Mechanism
from combiner.core.mechanism import SIZES as SIZES_OF_FIELDS
from combiner.core.module import make_attention
from combiner.ops import chunking

LENGTH = 24
FRAME = {'width': 16, 'heads': 2, 'max_length': LENGTH}
FAR = 2**15  # a power of two, as some have to be


def sizes() -> list[tuple[str, str]]:
    """`(name, hyper-parameter)`: all that are integers, of all mechanisms."""
    of_all = {field.name for field in dataclasses.fields(Mechanism)}
    fields = [(name, field) for name in combiner.names() for field in dataclasses.fields(registry.resolve(name))]
    return [(name, of.name) for name, of in fields if of.name not in of_all and of.type in (*SIZES_OF_FIELDS, *COUNTS)]


every_size = pytest.mark.parametrize(('name', 'size'), sizes())
# Counts of something else than positions: parameters or work that was asked for.
NOT_OF_POSITIONS = {'local_heads', 'iterations', 'seed', 'redraw', 'rounds', 'rank', 'features', 'clusters'}


def made(name, **hyper):
    """As causal as it can be, but for global positions, which see ahead."""
    causal = registry.resolve(name).supported_causal[0] and not hyper.get('globals')
    return make_attention(name, hyper, causal=causal, **FRAME)


def init_cache(module, x, q, k, v, counts):
    return module.mechanism.init_cache(q, k, v, module.with_variables(Context(x)), counts, LENGTH)


@every_size
def test_no_size_but_a_positive_integer(name, size):
    for value in (-3, 2.5, True, '4'):
        with pytest.raises(ValueError, match=f'{size}.*{value}'):
            made(name, **{size: value})
    kinds = {field.name: field.type for field in dataclasses.fields(registry.resolve(name))}
    if kinds[size] in COUNTS:
        made(name, **{size: 0})
    else:
        with pytest.raises(ValueError, match=f'{size} must be at least 1, got 0'):
            made(name, **{size: 0})


def test_the_max_length_is_a_size():
    for name in combiner.names():
        with pytest.raises(ValueError, match='max_length must be at least 1, got 0'):
            registry.make_mechanism(name, {}, causal=registry.resolve(name).supported_causal[0], max_length=0)


@pytest.mark.parametrize('columns', [0, -1])
def test_functions_refuse_them_too(columns):
    """Those that take no mechanism's word for it."""
    qkv = draw(1, 6, 1, 4)
    functions = {
        combiner_axial_horizontal.attend_combiner_axial_horizontal: 'columns',
        combiner_axial_rowmajor.attend_combiner_axial_rowmajor: 'columns',
        combiner_axial_vertical.attend_combiner_axial_vertical: 'columns',
        combiner_mixture.attend_combiner_mixture: 'columns',
        combiner_fixed.attend_combiner_fixed: 'block',
        axial.attend_axial: 'columns',
        fixed.attend_fixed: 'block',
    }
    for attend, size in functions.items():
        with pytest.raises(ValueError, match=f'must hold at least 1 position, got {columns}'):
            attend(*qkv, causal=True, **{size: columns})


@pytest.mark.parametrize(('name', 'size'), [case for case in sizes() if case[1] not in NOT_OF_POSITIONS])
def test_a_size_far_beyond_the_length_is_one_as_long(name, size):
    """The same program, and a cache of the same size."""
    (x,), qkv = draw(1, LENGTH, 16, count=1), draw(1, LENGTH, 2, 8)
    programs, caches = [], []
    for value in (1 << (LENGTH - 1).bit_length(), FAR):
        module = made(name, **{size: value})
        known = random_variables(module, x, jnp.arange(LENGTH)[None])
        attend = functools.partial(attend_with, module, known)
        program = jax.make_jaxpr(lambda x, q, k, v, attend=attend: attend(q, k, v, x=x))(x, *qkv)
        text = re.sub(r'\d+:i32\[\]', 'number', str(program))  # which masks what it is compared with
        programs.append((text, [np.asarray(const) for const in program.consts]))
        if module.mechanism.causal:
            start = functools.partial(module.apply, known, method=init_cache)
            caches.append(jax.eval_shape(start, x, *qkv, jnp.array([5])))
    (as_long, its_numbers), (far, far_numbers) = programs
    assert far == as_long
    for one, other in zip(far_numbers, its_numbers, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len({str(jax.tree.leaves(cache)) for cache in caches}) <= 1


@pytest.mark.parametrize('causal', [True, False])
def test_more_clusters_than_tokens(causal):
    qkv = draw(1, LENGTH, 2, 8)
    clusters = jax.random.randint(jax.random.key(3), (1, LENGTH, 2), 0, 5)
    valid = jnp.arange(LENGTH)[None] != 7
    attend = functools.partial(attend_combiner_routing, *qkv, block=4, causal=causal, valid=valid)
    few, many = (jax.jit(functools.partial(attend, number=number)) for number in (5, FAR))
    program = many.lower(clusters).compile()
    assert_close(program(clusters * 4000), few(clusters), TOLERANCE[jnp.float32])
    assert program.memory_analysis().temp_size_in_bytes < 4e6


BLOCK, HEADS, WIDTH = 8, 4, 16


def temporaries(name, length):
    """Bytes that attention over so many positions needs besides its input and output, forward."""
    hyper = dict.fromkeys(SIZES.keys() & registry.hyper_parameters(name).keys(), BLOCK)
    frame = {'width': 16, 'heads': HEADS, 'qkv_width': HEADS * WIDTH, 'max_length': 512}
    module = make_attention(name, hyper, causal=registry.resolve(name).supported_causal[0], **frame)
    x, q = (jax.ShapeDtypeStruct((1, length, *sizes), jnp.float32) for sizes in ((16,), (HEADS, WIDTH)))
    known = jax.eval_shape(module.init, jax.random.key(0), x, jax.ShapeDtypeStruct((1, length), jnp.int32))

    def attend(known, x, q, k, v):
        return attend_with(module, known, q, k, v, x=x)

    return jax.jit(attend).lower(known, x, q, q, q).compile().memory_analysis().temp_size_in_bytes


def chunked():
    """Returns the mechanisms that are computed in chunks on a CPU."""
    found = []
    for name in combiner.names():
        source = inspect.getsource(sys.modules[registry.resolve(name).__module__])
        if any(tool in source for tool in ('Blocks', 'map_heads', 'map_grids', 'attend_window', 'Kernelized')):
            found.append(name)
    return found


@pytest.mark.parametrize('name', chunked())
def test_memory_does_not_depend_on_what_divides_the_number_of_blocks(name, monkeypatch):
    """37 blocks have no divisor but themselves, 36 have many; the last one is partial in both."""
    monkeypatch.setattr(chunking, 'CHUNK_LOGITS', 2**11)
    composite, prime = (temporaries(name, blocks * BLOCK - BLOCK + 1) for blocks in (36, 37))
    assert prime <= 1.3 * composite
