"""Numbers from running the authors' public JAX code (float32, CPU, no dropout, causal); see goldens/README.md."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close

import combiner
from combiner import reference
from combiner.attention.combiner_axial_rowmajor import CombinerAxialRowmajorAttention
from combiner.attention.combiner_fixed import CombinerFixedAttention
from combiner.attention.combiner_mixture import CombinerMixtureAttention

TOLERANCE = 2e-6
GOLDENS = Path(__file__).parents[1] / 'goldens'
BLOCK = 4


def load(name):
    with np.load(GOLDENS / f'{name}_L12_seg4_h2_d8_D16.npz') as arrays:
        return {key: jnp.asarray(value) for key, value in arrays.items()}


def close(actual, expected):
    """Within 2e-6 of the largest number: the files' own gradients are up to 3e-6 off (at sizes near 18) in float64."""
    assert_close(actual, expected, TOLERANCE)


@pytest.mark.parametrize('fast', [True, False], ids=['fast', 'oracle'])
@pytest.mark.parametrize(
    ('file', 'name', 'hyper'),
    [
        ('fixed', 'combiner_fixed', {'block': BLOCK}),
        ('mixture', 'combiner_mixture', {'columns': BLOCK, 'joint': True, 'split': True}),
    ],
    ids=['fixed', 'mixture'],
)
def test_attention(file, name, hyper, fast):
    golden = load(file)

    def attend(q, k, v):
        if fast:
            return combiner.attend(q, k, v, name, causal=True, **hyper)
        return reference.attend(q, k, v, combiner.pattern(name, 12, causal=True, **hyper))

    attended, pull_back = jax.vjp(attend, golden['q'], golden['k'], golden['v'])
    np.testing.assert_allclose(attended, golden['attn'], rtol=0, atol=TOLERANCE)
    for name, gradient in zip('qkv', pull_back(golden['cot_attn']), strict=True):
        close(gradient, golden[f'grad_{name}'])


def layer(module, golden, extra=None):
    """Output of a whole attention layer and its gradients for the golden cotangent."""
    params = {f'{name}_kernel': golden[f'W_{name}'] for name in ('query', 'key', 'value', 'out')} | (extra or {})
    apply = lambda params, x: module.apply({'params': params}, x, jnp.arange(12)[None])  # noqa: E731
    out, pull_back = jax.vjp(apply, params, golden['x'])
    return out, *pull_back(golden['cot_out'])


def check_layer(module, golden, extra=None):
    out, params, x = layer(module, golden, extra)
    np.testing.assert_allclose(out, golden['out'], rtol=0, atol=TOLERANCE)
    close(x, golden['grad_x'])
    for name in ('query', 'key', 'value', 'out'):
        close(params[f'{name}_kernel'], golden[f'grad_W_{name}'])


def test_combiner_fixed_layer():
    check_layer(CombinerFixedAttention(width=16, heads=2, block=BLOCK), load('fixed'))


def test_combiner_mixture_layer():
    module = CombinerMixtureAttention(width=16, heads=2, columns=BLOCK, joint=True, split=True)
    check_layer(module, load('mixture'))


def test_combiner_axial_rowmajor_layer_with_projected_keys():
    golden = load('axial')
    extra = {
        'span_inner_kernel': golden['W_keyrow_out'],
        'span_outer_kernel': golden['W_keyrow_heads'],
        'span_norm': {'scale': golden['ln_scale'], 'bias': golden['ln_bias']},
    }
    check_layer(CombinerAxialRowmajorAttention(width=16, heads=2, columns=BLOCK, key='projected'), golden, extra)
