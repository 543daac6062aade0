import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absent_tpu import check_longest, on, traced
from cases import TOLERANCE, assert_close, causal_or_not, draw, with_gradients

import combiner
from combiner.attention.combiner_axial_rowmajor import CombinerAxialRowmajor, attend_combiner_axial_rowmajor
from combiner.core.mechanism import Context
from combiner.kernels import choice
from combiner.kernels.tpu import tiles
from combiner.kernels.tpu.rowmajor.mechanism import make_plan, refuse
from combiner.kernels.tpu.rowmajor.plan import GridPlan
from combiner.ops.segments import without_padding
from combiner.ops.softmax import Dropout

NAME = 'combiner_axial_rowmajor'


def plan_of(q, columns: int, causal: bool) -> GridPlan:
    return traced(lambda q: make_plan(q, columns, causal=causal, key='attended', packed=False), q)


def explicit_dropout(plan: GridPlan, key, rate):
    """Dropout for the plain form, by the weights that the kernel keeps: first of rows, then of columns."""
    seeds = jax.lax.bitcast_convert_type(jax.random.bits(key, (plan.batch, plan.heads)), jnp.int32)
    kept, columns, calls = jnp.int32(round((1 - rate) * 2**24)), plan.block, iter(('rows', 'columns'))

    def of_row(seed, row, keys, is_rows):
        keep = tiles.kept_weights(seed, row * columns, 0, (columns, plan.group + keys), kept)
        first = row * columns % plan.group if is_rows else plan.group
        return jax.lax.dynamic_slice_in_dim(keep, first, keys, axis=1)

    def drop(weights):
        is_rows, keys, rows = next(calls) == 'rows', weights.shape[-1], jnp.arange(plan.rows)
        keep = jax.vmap(lambda seed: jax.vmap(lambda row: of_row(seed, row, keys, is_rows))(rows))(seeds.T.reshape(-1))
        return jnp.where(keep.reshape(weights.shape), weights / (1 - rate), 0)

    return drop


@causal_or_not
def test_dropout_has_the_same_mask_forward_and_backward_and_keys_may_be_tokens(causal):
    """In two tiles; the weights that are kept are a function of the seed and the positions.

    With padding, and cells beyond the end: the key of a summary whose token is missing is zero.
    """
    rate, key, arrays = 0.3, jax.random.key(5), draw(2, 1041, 3, 32, count=4)
    valid = jnp.asarray(np.random.default_rng(0).random((2, 1041)) < 0.6)
    plan = plan_of(arrays[0], 16, causal)
    assert (plan.tiles, plan.for_backward().tiles) == (2, 2)
    mechanism = CombinerAxialRowmajor(causal=causal, columns=16, key='token', implementation='mosaic')

    @jax.jit
    def run(*arrays):
        context = Context(valid=valid, drop=Dropout(key, rate))
        return with_gradients(lambda *qkv: without_padding(mechanism.attend(*qkv, context), valid), *arrays)

    @jax.jit
    def plain(*arrays):
        def attend(*qkv):
            options = {'valid': valid, 'drop': explicit_dropout(plan, key, rate)}
            out = attend_combiner_axial_rowmajor(*qkv, columns=16, causal=causal, key='token', **options)
            return without_padding(out, valid)

        return with_gradients(attend, *arrays)

    for one, other in zip(run(*arrays), plain(*arrays), strict=True):
        assert_close(one, other, TOLERANCE[jnp.float32])


@causal_or_not
def test_rows_of_a_table_that_no_tile_writes_change_no_gradient(causal):
    """65 rows of 32 columns are 3 tiles of 32 rows, and the table has 128; the interpreter fills the rest with NaN."""
    arrays = draw(1, 65 * 32, 1, 8, count=4)
    plan = plan_of(arrays[0], 32, causal).for_backward()
    assert (plan.tile_blocks, plan.tiles, plan.written_rows, plan.blocks) == (32, 3, 96, 128)

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, *arrays):
        options = {'causal': causal, 'columns': 32, 'implementation': implementation}
        return with_gradients(lambda *qkv: combiner.attend(*qkv, NAME, **options), *arrays)

    for one, other in zip(run('mosaic', *arrays), run('xla', *arrays), strict=True):
        assert_close(one, other, TOLERANCE[jnp.float32])


@pytest.mark.parametrize(
    ('shape', 'dtype', 'hyper', 'message'),
    [
        ((1, 40, 1, 8), jnp.float16, {'columns': 16}, 'takes float32 or bfloat16, not float16'),
        ((1, 40, 1, 8), jnp.float32, {'columns': 5}, 'takes rows of a multiple of 8 positions .*, not 5'),
        ((1, 400, 1, 8), jnp.bfloat16, {'columns': 72}, 'of 16 in bfloat16.*, not 72'),
        ((1, 65536, 1, 8), jnp.float32, {'columns': 128}, 'MiB of vector memory for length 65536 and 128 columns'),
    ],
)
def test_what_the_kernel_cannot_do_is_told(shape, dtype, hyper, message):
    q = jax.ShapeDtypeStruct(shape, dtype)
    with pytest.raises(ValueError, match=f"implementation='mosaic' .*{message}.*; choose another, or None"):
        jax.eval_shape(lambda q: combiner.attend(q, q, q, NAME, causal=True, implementation='mosaic', **hyper), q)


def test_projected_keys_take_the_plain_form_and_the_log_says_so(absl_log):
    choice._announce.cache_clear()
    module = combiner.Attention(CombinerAxialRowmajor(key='projected', columns=8), width=16, heads=2)
    x, positions = jax.ShapeDtypeStruct((1, 40, 16), jnp.float32), jax.ShapeDtypeStruct((1, 40), jnp.int32)
    with on('TPU v5 lite'):
        jax.eval_shape(module.init, jax.random.key(0), x, positions)
    assert 'xla, on tpu (mosaic takes the summary keys token and attended, not a function' in absl_log.text


@pytest.mark.parametrize(
    ('device', 'length', 'columns', 'rows', 'backward'),
    [
        ('TPU v5 lite', 4096, 32, 128, 128),
        ('TPU v5 lite', 16384, 64, 128, 128),
        ('TPU v5 lite', 65536, 128, 64, 16),
        ('TPU v5', 16384, 64, 64, 64),
        ('TPU v5 lite', 1000, 32, 32, 32),
    ],
)
def test_tiles_are_as_large_as_the_vector_memory_allows(device, length, columns, rows, backward):
    """The backward pass needs more memory, and has smaller tiles; both fit."""
    with on(device):
        plan = plan_of(jax.ShapeDtypeStruct((1, length, 8, 128), jnp.bfloat16), columns, causal=True)
    assert (plan.tile_blocks, plan.for_backward().tile_blocks) == (rows, backward)
    assert plan.for_backward().needed_memory <= plan.memory


@pytest.mark.parametrize(
    ('device', 'dtype', 'packed', 'longest'),
    [
        ('TPU v5 lite', jnp.bfloat16, False, 65536),
        ('TPU v5 lite', jnp.bfloat16, True, 32768),
        ('TPU v5 lite', jnp.float32, False, 32768),
        ('TPU v5 lite', jnp.float32, True, 16384),
        ('TPU v5', jnp.bfloat16, False, 16384),
        ('TPU v5', jnp.bfloat16, True, 16384),
        ('TPU v5', jnp.float32, False, 16384),
        ('TPU v5', jnp.float32, True, 8192),
    ],
)
def test_how_long_a_sequence_may_be(device, dtype, packed, longest):
    """The table of the documentation, with the columns of a pass that is not causal."""
    segments = True if packed else None
    check_longest(refuse, CombinerAxialRowmajor(causal=False), device, dtype, longest, segments=segments)
