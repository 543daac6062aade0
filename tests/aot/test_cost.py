"""Counts of small programs with known answers, compiled for a CPU, and of fragments that only other compilers write."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from combiner.aot import cost
from combiner.aot.hlo import parse
from combiner.aot.loops import trip_count

F32 = jnp.float32
DEVICES = 8


def counted(function, *shapes, dtype=F32):
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return cost.count(jax.jit(function).lower(*arrays).compile().as_text())


def entry(body: str, *others: str, header: str = 'HloModule m, num_partitions=8') -> str:
    computations = '\n\n'.join([*others, 'ENTRY %main (a: f32[1]) -> f32[1] {\n' + body + '\n}'])
    return f'{header}\n\n{computations}\n'


def test_a_matrix_product():
    found = counted(lambda a, b: a @ b, (16, 32), (32, 24))
    assert found.flops == 2 * 16 * 32 * 24
    assert found.hbm_bytes == 4 * (16 * 32 + 32 * 24 + 16 * 24)
    assert found.collectives == {}
    assert found.loops_of_unknown_length == 0


def test_a_loop_counts_as_often_as_it_runs():
    def scanned(x, w):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    assert counted(scanned, (16, 32), (7, 32, 32)).flops == 7 * 2 * 16 * 32 * 32


def test_nested_loops_multiply():
    def inner(x, w):
        return lax.fori_loop(0, 5, lambda i, x: jnp.tanh(x @ w), x)

    def outer(x, w):
        return lax.scan(lambda x, w: (inner(x, w), None), x, w)[0]

    assert counted(outer, (16, 32), (3, 32, 32)).flops == 3 * 5 * 2 * 16 * 32 * 32


def test_a_loop_reads_slices_and_not_the_stack():
    def scanned(x, w):
        return lax.scan(lambda x, w: (x + w, x.sum()), x, w)

    short, long = (counted(scanned, (64, 64), (steps, 64, 64)).hbm_bytes for steps in (8, 16))
    array = 4 * 64 * 64
    assert 8 * 2 * array <= long - short <= 8 * 8 * array  # a stack that is read whole would grow by 8 times 24


def test_a_loop_of_unknown_length_counts_once_and_is_reported():
    def until(x, w):
        return lax.while_loop(lambda x: x.sum() < 1e6, lambda x: x @ w, x)

    found = counted(until, (16, 32), (32, 32))
    assert found.flops == 2 * 16 * 32 * 32
    assert found.loops_of_unknown_length == 1


def test_the_length_of_a_loop_follows_from_its_counter():
    def text(start, step, bound, direction):
        return entry(
            f"""  %start = s32[] constant({start})
  %copied = s32[] copy(%start)
  %t = (s32[]) tuple(%copied)
  ROOT %loop = (s32[]) while(%t), condition=%cond, body=%body""",
            f"""%body (p: (s32[])) -> (s32[]) {{
  %p = (s32[]) parameter(0)
  %one = s32[] constant({step})
  %i = s32[] get-tuple-element(%p), index=0
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[]) tuple(%next)
}}""",
            f"""%test (a: s32[]) -> pred[] {{
  %a = s32[] parameter(0)
  %bound = s32[] constant({bound})
  ROOT %less = pred[] compare(%a, %bound), direction={direction}
}}""",
            """%cond (q: (s32[])) -> pred[] {
  %q = (s32[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  ROOT %f = pred[] fusion(%j), kind=kLoop, calls=%test
}""",
        )

    def length(*numbers):
        module = parse(text(*numbers))
        main = module.computations['main']
        return trip_count(module, main, main.instructions['loop'])

    assert length(0, 1, 7, 'LT') == 7
    assert length(2, 1, 7, 'LE') == 6
    assert length(9, 1, 7, 'LT') == 0
    assert length(0, 2, 7, 'LT') is None
    assert length(0, 1, 7, 'NE') is None


def test_of_a_conditional_the_branch_with_more_traffic_counts():
    def either(x, w):
        return lax.cond(x.sum() > 0, lambda: x @ w @ w, lambda: x)

    assert counted(either, (16, 32), (32, 32)).flops == 2 * 2 * 16 * 32 * 32


def test_a_batched_product_in_a_gradient():
    def loss(x, w):
        return (jnp.einsum('bik,bkj->bij', x, w) ** 2).sum()  # else XLA turns products with ones into sums

    found = counted(jax.grad(loss, argnums=(0, 1)), (4, 16, 32), (4, 32, 24))
    assert found.flops == 3 * 2 * 4 * 16 * 32 * 24
    found = counted(lambda x, w: jnp.einsum('bik,bkj->bij', x, w), (4, 16, 32), (4, 32, 24))
    assert found.flops == 2 * 4 * 16 * 32 * 24


@pytest.mark.parametrize(
    ('images', 'kernel', 'options', 'products'),
    [
        ((2, 8, 8, 3), (3, 3, 3, 5), {'padding': 'VALID'}, 2 * 6 * 6 * 9 * 3 * 5),
        ((2, 8, 8, 3), (3, 3, 3, 5), {'padding': 'VALID', 'window_strides': (2, 2)}, 2 * 3 * 3 * 9 * 3 * 5),
        ((2, 8, 8, 3), (3, 3, 3, 5), {'padding': 'SAME'}, 2 * (6 * 3 + 2 * 2) ** 2 * 3 * 5),
        ((2, 8, 8, 4), (3, 3, 2, 6), {'padding': 'VALID', 'feature_group_count': 2}, 2 * 6 * 6 * 9 * 2 * 6),
    ],
)
def test_convolutions_count_the_positions_that_meet_an_element(images, kernel, options, products):
    text = entry_of_convolution(images, kernel, **{'window_strides': (1, 1), **options})
    assert cost.count(text).flops == 2 * products


def entry_of_convolution(images, kernel, **options):
    """The text before optimization, as a CPU's compiler replaces convolutions."""
    arrays = [jax.ShapeDtypeStruct(shape, F32) for shape in (images, kernel)]
    numbers = ('NHWC', 'HWIO', 'NHWC')
    lowered = jax.jit(lambda x, w: lax.conv_general_dilated(x, w, dimension_numbers=numbers, **options)).lower(*arrays)
    text = lowered.compiler_ir('hlo').as_hlo_text(print_large_constants=True)
    return text if '%' in text else with_percent_signs(text)


def with_percent_signs(text):
    """Marks names as compiled programs do."""
    lines = []
    for line in text.splitlines():
        head, equals, rest = line.partition(' = ')
        if equals:
            name = head.removeprefix('  ').removeprefix('ROOT ')
            shape, opcode, arguments = rest.partition(' ')[0], *rest.partition(' ')[2].split('(', 1)
            inside, _, after = arguments.partition(')')
            if opcode != 'parameter':
                inside = ', '.join(f'%{each.strip()}' for each in inside.split(','))
            root = 'ROOT ' * ('ROOT' in head)
            line = f'  {root}%{name} = {shape} {opcode}({inside}){after}'
        elif line.startswith('ENTRY'):
            line = 'ENTRY %main (a: f32[1]) -> f32[1] {'
        lines.append(line)
    return '\n'.join(lines) + '\n'


def test_a_batched_product_as_a_convolution_of_a_tpu():
    """The batch axis is spatial, with a kernel that meets padding and holes except once."""
    text = entry(
        """  %x = f32[8,16,32]{2,1,0} parameter(0)
  %w = f32[8,32,24]{2,1,0} parameter(1)
  ROOT %c = f32[8,16,24]{2,1,0} convolution(%x, %w), window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf"""
    )
    assert cost.count(text).flops == 2 * 8 * 16 * 32 * 24


@pytest.mark.parametrize(
    ('collective', 'kind', 'size', 'sent'),
    [
        (lambda x: lax.psum(x, 'x'), 'all-reduce', 4096, 2 * 4096 * 7 / 8),
        (lambda x: lax.all_gather(x, 'x'), 'all-gather', 8 * 4096, 8 * 4096 * 7 / 8),
        (lambda x: lax.psum_scatter(x, 'x', tiled=True), 'reduce-scatter', 4096, 4096 * 7 / 8),
        (lambda x: lax.ppermute(x, 'x', [(i, (i + 1) % 8) for i in range(8)]), 'collective-permute', 4096, 4096),
        (lambda x: lax.all_to_all(x.reshape(8, -1), 'x', 0, 0), 'all-to-all', 4096, 4096 * 7 / 8),
    ],
)
def test_collectives_of_eight_devices(collective, kind, size, sent):
    mesh = jax.make_mesh((DEVICES,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(
        collective, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec('x'), check_vma=False
    )
    found = counted(mapped, (1024,)).collectives
    assert found == {kind: cost.Traffic(1, size, sent)}


def test_collectives_in_a_loop_count_as_often():
    mesh = jax.make_mesh((DEVICES,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))

    def summed(x):
        return lax.fori_loop(0, 5, lambda i, x: jnp.tanh(lax.psum(x, 'x')), x)

    mapped = jax.shard_map(summed, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec('x'), check_vma=False)
    assert counted(mapped, (1024,)).collectives == {'all-reduce': cost.Traffic(5, 5 * 4096, 5 * 2 * 4096 * 7 / 8)}


@pytest.mark.parametrize(
    ('groups', 'size'),
    [
        ('{{0,1},{2,3},{4,5},{6,7}}', 2),
        ('[2,4]<=[8]', 4),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", 4),
        ('{}', 8),
    ],
)
def test_an_asynchronous_collective_counts_once_with_the_size_of_its_groups(groups, size):
    text = entry(
        f"""  %x = f32[256]{{0}} parameter(0)
  %s = (f32[256]{{0}}, f32[{256 * size}]{{0}}) all-gather-start(%x), replica_groups={groups}, dimensions={{0}}
  ROOT %d = f32[{256 * size}]{{0}} all-gather-done(%s)"""
    )
    found = cost.count(text)
    assert found.collectives == {'all-gather': cost.Traffic(1, 1024 * size, 1024 * (size - 1))}
    assert found.hbm_bytes == 1024 + 1024 * size


def test_arrays_on_the_chip_are_no_traffic_of_the_memory():
    text = entry(
        """  %x = f32[256]{0} parameter(0)
  %s = (f32[256]{0:S(1)}, f32[256]{0}, u32[]{:S(2)}) copy-start(%x)
  %d = f32[256]{0:S(1)} copy-done(%s)
  ROOT %n = f32[256]{0} negate(%d)"""
    )
    found = cost.count(text)
    assert found.hbm_bytes == 1024 + 1024  # x is read once, n is written
    assert found.accessed_bytes == 4 * 1024


def test_a_wrapped_asynchronous_operation_counts_once():
    text = entry(
        """  %x = f32[256]{0} parameter(0)
  %s = ((f32[256]{0}), f32[128]{0}, s32[]) async-start(%x), calls=%wrapped
  %u = ((f32[256]{0}), f32[128]{0}, s32[]) async-update(%s)
  ROOT %d = f32[128]{0} async-done(%u)""",
        """%wrapped (p: f32[256]) -> f32[128] {
  %p = f32[256]{0} parameter(0)
  ROOT %slice = f32[128]{0} slice(%p), slice={[0:128]}
}""",
    )
    assert cost.count(text).hbm_bytes == 2 * 512


def test_a_fusion_that_updates_in_place_moves_the_update():
    text = entry(
        """  %stack = f32[64,256]{1,0} parameter(0)
  %row = f32[1,256]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %f = f32[64,256]{1,0} fusion(%stack, %row, %i), kind=kLoop, calls=%update""",
        """%update (s: f32[64,256], r: f32[1,256], j: s32[]) -> f32[64,256] {
  %s = f32[64,256]{1,0} parameter(0)
  %r = f32[1,256]{1,0} parameter(1)
  %j = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %u = f32[64,256]{1,0} dynamic-update-slice(%s, %r, %j, %zero)
}""",
    )
    assert cost.count(text).hbm_bytes == 1024 + 1024 + 4


def kernel(config=''):
    return entry(
        f"""  %x = bf16[16,128]{{1,0:T(8,128)(2,1)}} parameter(0)
  %k.7 = (bf16[16,128]{{1,0}}, f32[128]{{0:S(1)}}) custom-call(%x), custom_call_target="tpu_custom_call"{config}
  ROOT %o = bf16[16,128]{{1,0}} get-tuple-element(%k.7), index=0"""
    )


def test_a_kernel_counts_its_operands_and_results():
    found = cost.count(kernel())
    assert found.hbm_bytes == 2 * 16 * 128 * 2
    assert found.accessed_bytes == 2 * 16 * 128 * 2 + 512
    assert found.kernels == [cost.Kernel('k', 1, found.hbm_bytes, states_flops=False)]
    assert found.flops == 0


def test_a_kernel_may_state_its_arithmetic():
    stated = ', backend_config={"custom_call_config":{"body":"…","cost_estimate":{"flops":"123","bytes_accessed":"9"}}}'
    found = cost.count(kernel(stated))
    assert found.flops == 123
    assert found.kernels[0].states_flops


def test_a_product_by_cublas():
    numbers = '"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}'
    config = f'backend_config={{"gemm_backend_config":{{{numbers}}}}}'
    text = entry(
        """  %x = f32[16,32]{1,0} parameter(0)
  %w = f32[32,24]{1,0} parameter(1)
  %g = (f32[16,24]{1,0}, s8[4194304]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm", CONFIG
  ROOT %o = f32[16,24]{1,0} get-tuple-element(%g), index=0""".replace('CONFIG', config)
    )
    found = cost.count(text)
    assert found.flops == 2 * 16 * 32 * 24
    assert found.hbm_bytes == 4 * (16 * 32 + 32 * 24 + 16 * 24)  # without the workspace


def test_cycles_are_xlas_estimate_times_the_loop():
    text = entry(
        """  %x = f32[256]{0} parameter(0)
  %t = (f32[256]{0}) tuple(%x)
  ROOT %w = (f32[256]{0}) while(%t), condition=%c, body=%b, backend_config={"known_trip_count":{"n":"3"}}""",
        """%b (p: (f32[256])) -> (f32[256]) {
  %p = (f32[256]{0}) parameter(0)
  %g = f32[256]{0} get-tuple-element(%p), index=0
  %n = f32[256]{0} negate(%g), backend_config={"window_config":{"estimated_cycles":"70"}}
  ROOT %o = (f32[256]{0}) tuple(%n)
}""",
        """%c (q: (f32[256])) -> pred[] {
  %q = (f32[256]{0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}""",
    )
    assert cost.count(text).cycles == 210
