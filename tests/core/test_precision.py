"""Half precision: finite and right at every size of input, whatever a mechanism multiplies and sums on the way.

Against the result in float32 for the same, rounded input; gradients too in float16, whose range is small.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import UNPARTITIONED, attend_with, draw, random_variables, sizes_of

import combiner
from combiner.core import registry
from combiner.core.module import make_attention

LENGTH = 23
SCALES = np.array([0.1, 1, 2, 4, 8, 32], np.float32)


def cases():
    """Mechanisms at a head width whose root is a power of two: queries are scaled without rounding.

    At width 128 that rounding changes logits by the square of the inputs' size, whatever the mechanism; those without
    such logits have to be right there too.
    """
    for name in combiner.names():
        kernels = ('softmax', 'relu') if 'kernel' in registry.hyper_parameters(name) else (None,)
        for kernel, width in itertools.product(kernels, (64, 128) if name in UNPARTITIONED else (64,)):
            case = '-'.join(filter(None, [name, kernel, str(width)]))
            yield pytest.param(name, {'kernel': kernel} if kernel else {}, width, id=case)


def assert_right(actual, expected, dtype, what):
    """Compares every size of input with a tolerance in units of the result.

    A rounded summary key changes logits, and so weights, by the rounding times the size of the input. Gradients of
    queries and keys are differences of terms of the square of that size.
    """
    for scale, one, other in zip(SCALES, np.asarray(actual, np.float32), np.asarray(expected), strict=True):
        size = max(1, np.abs(other).max(), 0 if what == 'out' else scale**2)
        tolerance = 2 * float(jnp.finfo(dtype).eps) * max(1, scale) * size
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance, err_msg=f'{what}, {dtype.__name__}, {scale}')


@pytest.mark.parametrize(('name', 'kernel', 'width'), list(cases()))
def test_half_precision_is_finite_and_right(name, kernel, width):
    hyper = {key: value for key, value in sizes_of(name).items() if key != 'features'} | kernel
    frame = {'width': 16, 'heads': 1, 'qkv_width': width, 'max_length': LENGTH}
    module = make_attention(name, hyper, causal=registry.resolve(name).supported_causal[0], **frame)
    (x,) = draw(1, LENGTH, 16, count=1)
    known = random_variables(module, x, jnp.arange(LENGTH)[None])

    def attend(x, q, k, v):
        return attend_with(module, known, q, k, v, x=x)

    def one(*inputs):
        *inputs, cotangent = inputs
        out, pull_back = jax.vjp(attend, *inputs)
        return out, *pull_back(cotangent.astype(out.dtype))

    @jax.jit
    def run(*inputs):
        *inputs, cotangent = inputs
        inputs = [SCALES.reshape(-1, *(1,) * a.ndim) * a for a in inputs]
        inputs.append(jnp.broadcast_to(cotangent, (len(SCALES), *cotangent.shape)))
        found = {}
        for dtype, attention in ((jnp.float16, one), (jnp.bfloat16, lambda *inputs: (attend(*inputs[:-1]),))):
            rounded = [a.astype(dtype) for a in inputs]
            found[dtype.__name__] = jax.vmap(attention)(*rounded), *(a.astype(jnp.float32) for a in rounded)
        single = jax.vmap(one)
        both = [found[name][1:] for name in ('float16', 'bfloat16')]
        expected = single(*map(jnp.concatenate, zip(*both, strict=True)))
        return found['float16'][0], found['bfloat16'][0], expected

    inputs = x, *draw(1, LENGTH, 1, width), *draw(1, LENGTH, 1, width, count=1, seed=7)
    half, brain, expected = run(*inputs)
    for part, actual, right in zip(('out', 'dx', 'dq', 'dk', 'dv'), half, expected, strict=True):
        assert_right(actual, right[: len(SCALES)], jnp.float16, part)
    assert_right(brain[0], expected[0][len(SCALES) :], jnp.bfloat16, 'out')
