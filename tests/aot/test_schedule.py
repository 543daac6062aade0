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


def listing(*loops):
    """Bundles of a step of the grid with loops, each after the one before, or with one more `>` inside it."""
    lines = ['LB: loop body', '= control target key end', '     0   :  { %1 = vsyncpa [#allocation2], 0 }']
    lines += ['   0x1 LB: > { %s1 = sadd.s32 1, %s1 }']
    for marks, bundles, runs in loops:
        lines += [f'   0x2 LB: {marks} {{ %s2 = smov.u32 0 }} /* Start region 5 */']
        lines += [f'   0x3   : {marks} {{ %v3 = vld [vmem:[%s2] sm:$0xff] }}'] * (bundles - 2)
        lines += [
            f'   0x4   : {marks} {{ %p4 = scmp.ge.s32.totalorder %s5, {runs} /* loop exit test */  ;;  %s6 = s }}'
        ]
    return '\n'.join([*lines, '   0x5   : > { %p5 = scmp.ge.s32.totalorder %s29, 10 /* loop exit test */ }'])


@pytest.mark.parametrize(
    ('loops', 'again'),
    [
        ((), 0),
        ((('>>', 10, 4), ('>>', 5, 3)), 10 * 3 + 5 * 2),
        ((('>>', 10, 4), ('>>>', 5, 3)), 10 * 3 + 5 * (4 * 3 - 1)),
    ],
)
def test_loops_in_a_step_count_as_often_as_they_run(tmp_path, loops, again):
    analysis = TEXT.format(bundles=72, name='double.1', call=KERNEL)
    (tmp_path / '1-double.1-00-schedule-analysis_final_bundles.txt').write_text(analysis)
    (tmp_path / '1-double.1-01-final_bundles.txt').write_text(listing(*loops))
    assert schedule.read_bundles(tmp_path) == {'double': 72 + again}


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
