"""Half precision: finite and right at every size of input, whatever a mechanism multiplies and sums on the way."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import draw, random_variables, sizes_of

import combiner
from combiner.attention import registry

LENGTH, WIDTH = 23, 128
SCALES = np.array([0.1, 1, 2, 4, 8, 32], np.float32)
# Of the result in float32 for the same, rounded input. What a mechanism rounds on the way, such as scaled queries,
# changes logits by so much of their size, which is that of the input squared.
TOLERANCE = {jnp.float16: 2e-3, jnp.bfloat16: 1.6e-2}


def cases():
    for name in combiner.names():
        for kernel in ('softmax', 'relu') if 'kernel' in registry.hyper_parameters(name) else (None,):
            yield pytest.param(
                name, {} if kernel is None else {'kernel': kernel}, id=f'{name}-{kernel}' if kernel else name
            )


@pytest.mark.parametrize(('name', 'kernel'), list(cases()))
def test_half_precision_is_finite_and_right(name, kernel):
    hyper = {key: value for key, value in sizes_of(name).items() if key != 'features'} | kernel
    frame = {'width': 16, 'heads': 1, 'qkv_width': WIDTH, 'planned_length': LENGTH}
    module = registry.make(name, hyper, causal=registry.resolve(name).forms[0], **frame)
    (x,) = draw(1, LENGTH, 16, count=1)
    known = random_variables(module, x, jnp.arange(LENGTH)[None])
    attend = functools.partial(module.apply, known, method='attend_from')

    def one(*inputs):
        *inputs, cotangent = inputs
        out, pull_back = jax.vjp(attend, *inputs)
        return out, *pull_back(cotangent.astype(out.dtype))

    @jax.jit
    def run(*inputs):
        inputs = [SCALES.reshape(-1, *(1,) * a.ndim) * a for a in inputs[:-1]] + [jnp.stack([inputs[-1]] * len(SCALES))]
        found = []
        for dtype in TOLERANCE:
            rounded = [a.astype(dtype) for a in inputs]
            found.append((jax.vmap(one)(*rounded), jax.vmap(one)(*(a.astype(jnp.float32) for a in rounded))))
        return found

    inputs = x, *draw(1, LENGTH, 1, WIDTH), *draw(1, LENGTH, 1, WIDTH, count=1, seed=7)
    for dtype, (half, single) in zip(TOLERANCE, run(*inputs), strict=True):
        for part, actual, expected in zip(('out', 'dx', 'dq', 'dk', 'dv'), half, single, strict=True):
            for scale, one_, other in zip(SCALES, np.asarray(actual, np.float32), np.asarray(expected), strict=True):
                assert np.isfinite(one_).all(), (dtype, part, scale)
                error = np.abs(one_ - other).max() / max(1, np.abs(other).max(), scale**2)
                print(name, kernel, dtype.__name__, part, scale, f'{error:.1e}')
