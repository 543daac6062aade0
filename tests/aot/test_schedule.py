"""Static schedules: the grid of a traced kernel, and the bundles in the compiler's text."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from combiner.aot import schedule

TEXT = """Schedule analysis:
\ttotal scheduled bundles:    {bundles}
\tempty scheduled bundles:    1
\t  71.00 scheduled bundles (100.00%): %{name} = f32[8]{{0}} {call}
"""
KERNEL = 'custom-call(%x), custom_call_target="tpu_custom_call"'


def double(x):
    def kernel(x, out):
        out[...] = x[...] * 2

    block = pl.BlockSpec((8, 128), lambda i, j: (i, j))
    grid = (x.shape[0] // 8, x.shape[1] // 128)
    return pl.pallas_call(kernel, out_shape=x, grid=grid, in_specs=[block], out_specs=block, name='double')(x)


def test_the_grid_of_a_kernel_is_found_within_other_functions():
    x = jax.ShapeDtypeStruct((32, 256), jnp.float32)
    repeated = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda i, x: jax.jit(double)(x), x))
    assert schedule.grid_steps(repeated.trace(x).jaxpr.jaxpr) == {'double': 4 * 2}
    assert schedule.grid_steps(jax.jit(lambda x: x + 1).trace(x).jaxpr.jaxpr) == {}
    batch = jax.ShapeDtypeStruct((5, 32, 256), jnp.float32)
    assert schedule.grid_steps(jax.jit(jax.vmap(double)).trace(batch).jaxpr.jaxpr) == {'double': 5 * 4 * 2}


@pytest.mark.parametrize(('name', 'base'), [('kernel.1', 'kernel'), ('a.b.12', 'a.b'), ('plain', 'plain')])
def test_xla_appends_a_number(name, base):
    assert schedule.base_name(name) == base


def test_a_transformation_stands_around_a_name():
    known = ('attend_forward', 'attend', 'other')
    assert schedule.traced_name('transpose_jvp_attend_forward__', known) == 'attend_forward'
    assert schedule.traced_name('kernel', known) is None


def test_bundles_are_those_of_kernels(tmp_path):
    texts = {
        '1-double.1-00-schedule-analysis_final_bundles.txt': TEXT.format(bundles=72, name='double.1', call=KERNEL),
        '2-double.2-00-schedule-analysis_final_bundles.txt': TEXT.format(bundles=81, name='double.2', call=KERNEL),
        '3-fusion-00-schedule-analysis_final_bundles.txt': TEXT.format(bundles=99, name='fusion', call='fusion(%x)'),
        '1-double.1-01-final_bundles.txt': 'no analysis',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    assert schedule.read_bundles(tmp_path) == {'double': 81}
