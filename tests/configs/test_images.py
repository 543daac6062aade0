import math

import jax
import jax.numpy as jnp
import pytest

from combiner import build
from configs import cifar10, imagenet64


def test_table_1_as_the_paper_says():
    for module, row in ((cifar10, 96), (imagenet64, 192)):
        config = module.get_config('attention=combiner_fixed,layers=12')
        assert (config.model.layers, config.model.width, config.model.heads) == (12, 512, 8)
        assert (config.steps, config.data.batch_size) == (500_000, 32)
        assert config.model.attention.to_dict() == {'name': 'combiner_fixed', 'block': row}


@pytest.mark.parametrize(
    ('module', 'expected'),
    [
        (cifar10, {'local_heads': 4, 'block': 256, 'clusters': 6, 'window': 512}),
        (imagenet64, {'local_heads': 6, 'block': 256, 'clusters': 8, 'window': 2_048}),
    ],
    ids=['cifar10', 'imagenet64'],
)
def test_routing_is_that_of_its_authors_code(module, expected):
    assert module.get_config('attention=routing').model.attention.to_dict() == {'name': 'routing', **expected}
    for scale in ('cpu', 'small', 'quick'):
        model = module.get_config(f'attention=routing,scale={scale}').model
        assert 0 < model.attention.local_heads < model.heads
    assert module.get_config('attention=routing+clusters=7').model.attention.clusters == 7


def test_table_2_has_the_architecture_of_child_et_al():
    config = cifar10.get_config('attention=combiner_axial_rowmajor,layers=128,architecture=sparse_transformer')
    model = config.model
    assert (model.layers, model.width, model.heads, model.qkv_width, model.mlp_ratio) == (128, 256, 2, 128, 2.0)
    assert (model.dropout, config.optimizer.learning_rate, config.optimizer.warmup_steps) == (0.25, 3.5e-4, 5_000)
    assert config.steps * config.data.batch_size == 120 * 48_000
    assert (model.value_width, model.embedding_dropout, model.initialization) == (256, 0.0, 'sparse_transformer')


def test_table_2_has_the_59_million_parameters_of_child_et_al():
    config = cifar10.get_config('attention=combiner_axial_rowmajor,layers=128,architecture=sparse_transformer')
    task = build.task(config)
    tokens = jax.ShapeDtypeStruct((1, *task.input_shape), jnp.int32)
    shapes = jax.eval_shape(build.model(config, task).init, jax.random.key(0), tokens)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == pytest.approx(59e6, rel=0.01)


@pytest.mark.parametrize('module', [cifar10, imagenet64])
def test_rows_at_full_size_keep_only_the_inputs_of_blocks(module):
    for layers in (6, 12):
        assert module.get_config(f'layers={layers}').model.remat == 'full'


@pytest.mark.parametrize(('scale', 'layers'), [('full', (6, 12, 128)), ('cpu', (2, 4, 8)), ('quick', (1, 2, 2))])
def test_a_scale_has_a_part_of_the_layers(scale, layers):
    arguments = ('layers=6', 'layers=12', 'layers=128,architecture=sparse_transformer')
    configs = [cifar10.get_config(f'{argument},scale={scale}') for argument in arguments]
    assert tuple(config.model.layers for config in configs) == layers


def test_tiles_take_the_place_of_images():
    whole, tiled = (imagenet64.get_config(f'attention=combiner_fixed,tile={tile},scale=cpu') for tile in (0, 16))
    assert (whole.data.options.tile, tiled.data.options.tile) == (0, 16)
    assert (tiled.data.batch_size, tiled.run.test_examples) == (16, 16 * whole.run.test_examples)
    assert (whole.model.attention.block, tiled.model.attention.block) == (192, 48)


def test_small_images_are_tiles_with_rows_clusters_and_windows_of_their_size():
    for module, side, batch in ((cifar10, 16, 2), (imagenet64, 32, 1)):
        config = module.get_config('attention=combiner_fixed,scale=small')
        assert (config.data.options.tile, config.data.batch_size) == (side, batch)
        assert build.task(config).shape == (side, side, 3)
        assert config.model.attention.block == 3 * side
        full, small = (module.get_config(f'attention=routing,scale={scale}').model for scale in ('full', 'small'))
        part = 3 * (side / (32 if module is cifar10 else 64)) ** 2 / 3
        assert small.attention.window == part * full.attention.window
        assert small.attention.clusters == full.attention.clusters
        assert 2 * small.attention.local_heads == full.attention.local_heads
        assert module.get_config('attention=reformer,scale=small').model.attention.rounds == 1
        assert module.get_config('attention=reformer+rounds=2,scale=small').model.attention.rounds == 2


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match='scale=large: choose full, cpu, small, quick'):
        cifar10.get_config('scale=large')
    with pytest.raises(ValueError, match='architecture=child: choose combiner or sparse_transformer'):
        cifar10.get_config('architecture=child')
    with pytest.raises(ValueError, match='known: attention, layers, tile, scale'):
        imagenet64.get_config('layer=6')
    for tile in (128, 24, -16):
        with pytest.raises(ValueError, match=f'tile={tile}: images of 64×64 can be cut into tiles of 1, 2, 4'):
            imagenet64.get_config(f'tile={tile}')
