import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from combiner import sharding


def test_mesh_sizes_fill_the_devices():
    assert dict(sharding.make_mesh().shape) == {'data': 8, 'fsdp': 1, 'context': 1, 'model': 1}
    assert dict(sharding.make_mesh(-1, 2, 2).shape) == {'data': 2, 'fsdp': 2, 'context': 1, 'model': 2}
    assert dict(sharding.make_mesh(-1, 2, 1, 4).shape) == {'data': 1, 'fsdp': 2, 'context': 4, 'model': 1}
    assert dict(sharding.make_mesh(1, -1, 1, devices=jax.devices()[:4]).shape) == {
        'data': 1,
        'fsdp': 4,
        'context': 1,
        'model': 1,
    }


@pytest.mark.parametrize('sizes', [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 8, 1), (16, 1, 1), (-1, 16, 1)])
def test_mesh_that_does_not_fit_is_refused_with_its_values(sizes):
    with pytest.raises(ValueError, match=f'data={sizes[0]}, fsdp={sizes[1]}, model={sizes[2]}'):
        sharding.make_mesh(*sizes)


def test_placement_follows_the_logical_axes(absl_log):
    mesh = sharding.make_mesh(2, 2, 2)
    tree = {
        'kernel': nn.LogicallyPartitioned(jax.ShapeDtypeStruct((3, 8, 4), jnp.float32), ('layers', 'embed', 'mlp')),
        'step': jax.ShapeDtypeStruct((), jnp.int32),
    }
    result = sharding.place(tree, mesh)
    assert result['kernel'].shape == (3, 8, 4)
    assert result['kernel'].sharding.spec == P(None, 'fsdp', 'model')
    assert result['step'].sharding.spec == P()
    tree['kernel'] = nn.LogicallyPartitioned(jax.ShapeDtypeStruct((3, 7, 4), jnp.float32), ('layers', 'embed', 'mlp'))
    assert sharding.place(tree, mesh)['kernel'].sharding.spec == P(None, None, 'model')
    assert "['kernel'] (3, 7, 4): 7 is not split over 2 devices (fsdp)" in absl_log.text


def test_batch_is_split_over_data_and_fsdp():
    mesh = sharding.make_mesh(2, 2, 2)
    assert sharding.batch_parts(mesh) == 4
    tokens = np.arange(32, dtype=np.int32).reshape(8, 4)
    batch = sharding.put_batch({'tokens': tokens}, mesh)
    np.testing.assert_array_equal(batch['tokens'], tokens)
    assert batch['tokens'].addressable_shards[0].data.shape == (2, 4)


def test_logical_constraints_work_within_the_mesh():
    mesh = sharding.make_mesh(2, 2, 2)
    with sharding.use(mesh):
        constrain = jax.jit(lambda x: nn.with_logical_constraint(x, ('batch', 'length', 'embed_act')))
        assert constrain(jnp.zeros((8, 4, 4))).sharding.spec == P(('data', 'fsdp'))


def test_positions_of_a_batch_are_split_over_context_if_it_divides_them():
    mesh = sharding.make_mesh(2, context=4)
    batch = {'tokens': np.zeros((2, 8)), 'pairs': np.zeros((2, 2, 8)), 'labels': np.zeros(2), 'odd': np.zeros((2, 7))}
    shapes = {name: x.addressable_shards[0].data.shape for name, x in sharding.put_batch(batch, mesh).items()}
    assert shapes == {'tokens': (1, 2), 'pairs': (1, 2, 2), 'labels': (1,), 'odd': (1, 7)}


@pytest.mark.parametrize(
    ('processes', 'shares'),
    [
        ([[0, 0], [0, 0], [1, 1], [1, 1]], [(0, 2), (1, 2)]),
        ([[0, 0, 0, 0, 1, 1, 1, 1]], [(0, 1), (0, 1)]),  # both read all, and take their positions
        ([[0, 0, 1, 1], [2, 2, 3, 3]], [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ],
)
def test_processes_with_the_same_examples_read_the_same_share(processes, shares):
    assert [sharding.find_share(np.array(processes), process) for process in range(len(shares))] == shares


@pytest.mark.parametrize('processes', [[[0, 0, 1], [1, 2, 2]], [[0], [1], [0], [1]]])
def test_processes_whose_examples_are_no_share_are_refused(processes):
    with pytest.raises(ValueError, match='does not split the examples of a batch evenly over the processes'):
        sharding.find_share(np.array(processes), 0)
