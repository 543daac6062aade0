import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absent_tpu import check_longest, traced
from cases import TOLERANCE, assert_close, causal_or_not, draw, mechanism_pattern, with_gradients

import combiner
from combiner import reference
from combiner.attention.combiner_mixture import CombinerMixture, attend_combiner_mixture
from combiner.core.mechanism import Context
from combiner.kernels.tpu import tiles
from combiner.kernels.tpu.mixture.mechanism import make_plan, refuse
from combiner.kernels.tpu.mixture.plan import Lines, MixturePlan
from combiner.ops.pooling import PLAIN
from combiner.ops.segments import without_padding
from combiner.ops.softmax import Dropout

NAME = 'combiner_mixture'
QUICK = {'xla_backend_optimization_level': 0}  # to compile takes longer than to run


def plan_of(q, columns: int, causal: bool) -> MixturePlan:
    return traced(lambda q: make_plan(q, columns, causal=causal, joint=False, pools=PLAIN['max']), q)


def explicit_dropout(plan: MixturePlan, key, rate):
    """Dropout for the plain form, by the weights that the kernels keep."""
    seeds = jax.lax.bitcast_convert_type(jax.random.bits(key, (plan.batch, plan.heads)), jnp.int32)
    kept, spans = jnp.int32(round((1 - rate) * 2**24)), [(plan.by_row, 1 + side) for side in range(plan.sides)]
    calls = iter([(plan.by_row, 0), (plan.by_column, 0), *spans, (plan.by_column, 1)])

    def of_line(seed, line, lines: Lines, kind: int):
        first_key = kind * lines.group + (lines == plan.by_column) * (1 + plan.sides) * plan.by_row.group
        keep = tiles.kept_weights(seed, line * lines.length, first_key, (lines.length, lines.group), kept)
        return jax.lax.dynamic_slice_in_dim(keep, line * lines.length % lines.group, lines.length, axis=1)

    def drop(weights):
        lines, kind = next(calls)
        (_, count, size, _), one = weights.shape, functools.partial(of_line, lines=lines, kind=kind)
        numbers = jnp.arange(count // plan.batch)
        keep = jax.vmap(lambda seed: jax.vmap(lambda line: one(seed, line))(numbers))(seeds.T.reshape(-1))
        return jnp.where(keep[..., :size, :size].reshape(weights.shape), weights / (1 - rate), 0)

    return drop


@causal_or_not
def test_dropout_has_the_same_mask_forward_and_backward(causal):
    """With padding, in two tiles of rows and two of columns; direct terms are dropped from both softmaxes or none."""
    rate, key, arrays = 0.3, jax.random.key(5), draw(2, 1041, 3, 32, count=4)
    valid = jnp.asarray(np.random.default_rng(0).random((2, 1041)) < 0.6)
    plan = plan_of(arrays[0], 16, causal)
    assert (plan.by_row.tiles, plan.by_column.tiles) == (2, 2)
    mechanism = CombinerMixture(causal=causal, columns=16, implementation='mosaic')

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(*arrays):
        context = Context(valid=valid, drop=Dropout(key, rate))
        return with_gradients(lambda *qkv: without_padding(mechanism.attend(*qkv, context), valid), *arrays)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def plain(*arrays):
        def attend(*qkv):
            options = {'valid': valid, 'drop': explicit_dropout(plan, key, rate)}
            return without_padding(attend_combiner_mixture(*qkv, columns=16, causal=causal, **options), valid)

        return with_gradients(attend, *arrays)

    for one, other in zip(run(*arrays), plain(*arrays), strict=True):
        assert_close(one, other, TOLERANCE[jnp.float32])


@causal_or_not
@pytest.mark.parametrize('hyper', [{}, {'joint': True}], ids=['mean', 'joint'])
def test_it_equals_the_oracle_where_many_positions_share_a_maximum(hyper, causal):
    """In eight rows of eight columns; each of the positions that hold a maximum has an equal part of its gradient."""
    q, k, *others = (np.asarray(x) for x in draw(1, 64, 1, 32, count=4))
    arrays = [*(np.round(x) for x in (q, k)), *others]
    valid = np.random.default_rng(0).random((1, 64)) < 0.8
    pattern = mechanism_pattern(NAME, 64, causal=causal, hyper={'columns': 8, **hyper})

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(*arrays):
        options = {'columns': 8, 'implementation': 'mosaic', 'valid': valid, **hyper}
        return with_gradients(lambda *qkv: combiner.attend(*qkv, NAME, causal=causal, **options), *arrays)

    expected = with_gradients(lambda *qkv: reference.attend(*qkv, pattern, valid=jnp.asarray(valid)), *arrays)
    for one, other in zip(run(*arrays), expected, strict=True):
        assert_close(one, other, TOLERANCE[jnp.float32])


@pytest.mark.parametrize(
    ('shape', 'dtype', 'hyper', 'message'),
    [
        ((1, 40, 1, 8), jnp.float16, {'columns': 16}, 'takes float32 or bfloat16, not float16'),
        ((1, 40, 1, 8), jnp.float32, {'columns': 5}, 'takes rows of a multiple of 8 positions in float32, not 5'),
        ((1, 40, 1, 8), jnp.bfloat16, {'columns': 8}, 'takes rows of a multiple of 16 positions in bfloat16, not 8'),
        ((1, 40, 1, 8), jnp.float32, {'columns': 8, 'joint': True, 'split': True}, 'spans that are not split'),
        ((1, 65536, 1, 8), jnp.float32, {'columns': 16}, 'MiB of vector memory for length 65536 and 16 columns'),
    ],
)
def test_what_the_kernel_cannot_do_is_told(shape, dtype, hyper, message):
    q = jax.ShapeDtypeStruct(shape, dtype)
    with pytest.raises(ValueError, match=f"implementation='mosaic' .*{message}.*; choose another, or None"):
        jax.eval_shape(lambda q: combiner.attend(q, q, q, NAME, causal=True, implementation='mosaic', **hyper), q)


@pytest.mark.parametrize(
    ('length', 'columns', 'rows', 'by_row', 'by_column'),
    [
        (1, 8, 16, Lines(8, 16, 1, 1), Lines(16, 8, 1, 1)),
        (512, 16, 32, Lines(16, 8, 4, 1), Lines(32, 4, 2, 2)),
        (1041, 16, 72, Lines(16, 8, 9, 1), Lines(72, 1, 8, 2)),
        (4096, 64, 64, Lines(64, 2, 8, 4), Lines(64, 2, 4, 8)),
        (65536, 256, 256, Lines(256, 1, 8, 32), Lines(256, 1, 8, 32)),
    ],
)
def test_groups_fill_the_lanes_and_tiles_hold_whole_groups(length, columns, rows, by_row, by_column):
    sizes = MixturePlan(NAME, 1, length, 1, 128, columns, True, 'max', 1, False, 'float32', 'TPU v5e', False)
    assert (sizes.blocks, sizes.by_row, sizes.by_column) == (rows, by_row, by_column)
    for lines, count in ((by_row, sizes.blocks), (by_column, columns)):
        assert lines.lines * lines.groups * lines.tiles == count


@pytest.mark.parametrize(
    ('device', 'dtype', 'causal', 'longest'),
    [
        ('TPU v5 lite', jnp.bfloat16, True, 262144),
        ('TPU v5 lite', jnp.bfloat16, False, 65536),
        ('TPU v5 lite', jnp.float32, True, 65536),
        ('TPU v5 lite', jnp.float32, False, 65536),
        ('TPU v5', jnp.bfloat16, True, 65536),
        ('TPU v5', jnp.bfloat16, False, 16384),
        ('TPU v5', jnp.float32, True, 65536),
        ('TPU v5', jnp.float32, False, 16384),
    ],
)
def test_how_long_a_sequence_may_be(device, dtype, causal, longest):
    """The table of the documentation."""
    check_longest(refuse, CombinerMixture(causal=causal), device, dtype, longest)
