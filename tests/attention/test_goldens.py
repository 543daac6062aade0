"""Numbers from running the authors' public JAX code (float32, CPU, no dropout, causal); see goldens/README.md."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close

import combiner
from combiner import reference
from combiner.attention.combiner_axial_rowmajor import CombinerAxialRowmajor
from combiner.attention.combiner_fixed import CombinerFixed
from combiner.attention.combiner_mixture import CombinerMixture
from combiner.core.module import Attention

TOLERANCE = 2e-6
GOLDENS = Path(__file__).parents[1] / 'goldens'
BLOCK = 4


def load(name):
    with np.load(GOLDENS / f'{name}_L12_seg4_h2_d8_D16.npz') as arrays:
        return {key: jnp.asarray(value) for key, value in arrays.items()}


def close(actual, expected):
    """Within 2e-6 of the largest number: the files' own gradients are up to 3e-6 off (at sizes near 18) in float64."""
    assert_close(actual, expected, TOLERANCE)


def with_gradients(function, cotangent, *arguments):
    @jax.jit
    def run(cotangent, *arguments):
        out, pull_back = jax.vjp(function, *arguments)
        return out, pull_back(cotangent)

    return run(cotangent, *arguments)


@pytest.mark.parametrize('fast', [True, False], ids=['fast', 'oracle'])
@pytest.mark.parametrize(
    ('file', 'name', 'hyper'),
    [
        ('fixed', 'combiner_fixed', {'block': BLOCK}),
        ('logn', 'combiner_logsparse', {'chunk': 4}),
        ('mixture', 'combiner_mixture', {'columns': BLOCK, 'joint': True, 'split': True}),
    ],
    ids=['fixed', 'logsparse', 'mixture'],
)
def test_attention(file, name, hyper, fast):
    golden = load(file)

    def attend(q, k, v):
        if fast:
            return combiner.attend(q, k, v, name, causal=True, **hyper)
        return reference.attend(q, k, v, combiner.pattern(name, 12, causal=True, **hyper))

    attended, gradients = with_gradients(attend, golden['cot_attn'], *(golden[x] for x in 'qkv'))
    np.testing.assert_allclose(attended, golden['attn'], rtol=0, atol=TOLERANCE)
    for name, gradient in zip('qkv', gradients, strict=True):
        close(gradient, golden[f'grad_{name}'])


def layer(module, golden, extra=None):
    """Output of a whole attention layer and its gradients for the golden cotangent."""
    params = {f'{name}_kernel': golden[f'W_{name}'] for name in ('query', 'key', 'value', 'out')} | (extra or {})
    apply = lambda params, x: module.apply({'params': params}, x, jnp.arange(12)[None])  # noqa: E731
    out, gradients = with_gradients(apply, golden['cot_out'], params, golden['x'])
    return out, *gradients


def check_layer(module, golden, extra=None):
    out, params, x = layer(module, golden, extra)
    np.testing.assert_allclose(out, golden['out'], rtol=0, atol=TOLERANCE)
    close(x, golden['grad_x'])
    for name in ('query', 'key', 'value', 'out'):
        close(params[f'{name}_kernel'], golden[f'grad_W_{name}'])


def test_combiner_fixed_layer():
    check_layer(Attention(CombinerFixed(block=BLOCK), width=16, heads=2), load('fixed'))


def test_combiner_mixture_layer():
    mechanism = CombinerMixture(columns=BLOCK, joint=True, split=True)
    check_layer(Attention(mechanism, width=16, heads=2), load('mixture'))


def test_combiner_axial_rowmajor_layer_with_projected_keys():
    golden = load('axial')
    extra = {
        'span_inner_kernel': golden['W_keyrow_out'],
        'span_outer_kernel': golden['W_keyrow_heads'],
        'span_norm_scale': golden['ln_scale'],
        'span_norm_bias': golden['ln_bias'],
    }
    mechanism = CombinerAxialRowmajor(columns=BLOCK, key='projected')
    check_layer(Attention(mechanism, width=16, heads=2), golden, extra)
