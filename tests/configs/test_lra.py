import numpy as np
import pytest

import combiner
from combiner import config as common
from combiner import optim
from combiner.core import registry
from combiner.data.lra import pathfinder
from configs import lra
from experiments.tables import table4

BASE = {  # layers, heads, width, width of all heads, of the feed-forward network; batch, steps, pooling, positions
    'listops': (4, 8, 512, 512, 1024, 32, 5_000, 'cls', 'sinusoid'),
    'text': (4, 4, 256, 256, 1024, 32, 20_000, 'cls', 'sinusoid'),
    'retrieval': (4, 4, 128, 128, 512, 32, 5_000, 'cls', 'sinusoid'),
    'image': (1, 1, 32, 32, 64, 256, 35_000, 'cls', 'learned'),
    'pathfinder': (1, 2, 32, 16, 32, 512, 62_400, 'mean', 'sinusoid'),
    'pathx': (1, 2, 32, 16, 32, 64, 500_000, 'mean', 'learned'),
}


def sizes(config):
    model = config.model
    return (model.layers, model.heads, model.width, model.qkv_width, model.width * model.mlp_ratio)


@pytest.mark.parametrize('task', BASE)
def test_combiner_has_the_base_settings(task):
    config = lra.get_config(f'task={task},attention=combiner_fixed')
    rest = (config.data.batch_size, config.steps, config.model.pool, config.model.positions)
    assert (*sizes(config), *rest) == BASE[task]
    assert (config.optimizer.b1, config.optimizer.b2, config.optimizer.eps) == (0.9, 0.98, 1e-9)
    assert config.optimizer.clip_norm == (1.0 if task == 'pathx' else 0.0)


@pytest.mark.parametrize('task', ['listops', 'text', 'retrieval'])
def test_the_rate_is_that_of_the_benchmark(task):
    config = lra.get_config(f'task={task}')
    warmup = {'listops': 1_000, 'text': 8_000, 'retrieval': 8_000}[task]
    rate = optim.schedule(config.optimizer, config.steps)
    for step in (100, 900, 4_999, config.steps):
        expected = 0.05 * min(1, step / warmup) / max(step, warmup) ** 0.5
        np.testing.assert_allclose(rate(step - 1), expected, rtol=2e-3)


@pytest.mark.parametrize(
    ('argument', 'expected'),
    [
        ('task=image,attention=performer', (1, 8, 128, 64, 128)),
        ('task=image,attention=local+block=64', (1, 2, 128, 64, 128)),
        ('task=pathfinder,attention=bigbird', (4, 2, 64, 32, 64)),
        ('task=pathfinder,attention=performer', (1, 8, 128, 64, 128)),
        ('task=text,attention=performer', (4, 4, 256, 256, 1024)),
        ('task=text,attention=performer,scale=cpu', (2, 4, 64, 64, 256)),
        ('task=pathfinder,attention=bigbird,scale=quick', (1, 2, 32, 16, 32)),
    ],
)
def test_a_model_has_the_sizes_of_its_own(argument, expected):
    assert sizes(lra.get_config(argument)) == expected


def test_settings_of_single_models():
    sinkhorn = lra.get_config('task=image,attention=sinkhorn')
    assert (sinkhorn.optimizer.weight_decay, sinkhorn.model.dropout, sinkhorn.model.attention_dropout) == (
        0.7,
        0.1,
        0.2,
    )
    assert lra.get_config('task=image,attention=longformer').model.pool == 'mean'
    assert lra.get_config('task=pathfinder,attention=full').model.dropout == 0.2
    assert lra.get_config('task=pathfinder,attention=longformer').model.dropout == 0.1


BENCHMARK = {  # hyper-parameters in its code, on texts, and on images
    'Local': ({'block': 50}, {'block': 64}),
    'Sparse': ({'block': 50, 'summary': 10}, {'block': 50, 'summary': 10}),
    'Linformer': ({'rank': 16}, {'rank': 16}),
    'Sinkhorn': ({'block': 50}, {'block': 64}),
    'BigBird': ({'block': 64}, {'block': 64}),
    'Performer': ({'kernel': 'relu', 'features': 256}, {'kernel': 'relu', 'features': 256}),
}


@pytest.mark.parametrize('model', BENCHMARK)
@pytest.mark.parametrize('column', ['Text', 'Retrieval', 'ListOps', 'Image', 'Pathfinder'])
def test_rows_have_the_hyper_parameters_of_the_benchmark(model, column):
    (row,) = (row for row in table4.ROWS if (row.model, row.column) == (model, column))
    attention = lra.get_config(row.argument).model.attention.to_dict()
    expected = BENCHMARK[model][column in ('Image', 'Pathfinder')]
    if (model, column) == ('Performer', 'ListOps'):
        expected = {'kernel': 'softmax', 'features': 256}
    assert attention == {'name': attention['name'], **expected}


def test_every_model_with_settings_of_its_own_is_a_mechanism():
    for models in lra.MODELS.values():
        assert set(models) <= set(combiner.names())


def test_images_have_their_rows_and_texts_their_length():
    for scale, rows in (('full', 128), ('cpu', 64), ('quick', 32)):
        config = lra.get_config(f'task=pathx,attention=combiner_axial_rowmajor,scale={scale}')
        assert config.model.attention.columns == rows == config.data.options.size
    config = lra.get_config('task=retrieval,scale=cpu')
    assert (config.data.options.length, config.data.batch_size) == (1_000, 8)
    assert 'block' not in config.model.attention
    assert lra.get_config('task=pathfinder,difficulty=easy').data.options.difficulty == 'easy'
    small = lra.get_config('task=pathfinder,difficulty=easy,size=16,scale=cpu')
    assert (small.data.options.size, small.model.attention.block, small.data.batch_size) == (16, 16, 32_768 // 256)


@pytest.mark.parametrize('size', pathfinder.SIZES)
def test_a_batch_has_an_image_of_any_size(size):
    for scale in common.SCALES:
        config = lra.get_config(f'task=pathfinder,difficulty=easy,size={size},scale={scale}')
        assert config.data.batch_size >= 1
        assert config.run.eval_batch_size >= 1


def test_biases_dropout_and_embeddings_are_those_of_the_benchmark_at_full_scale_only():
    for task, dropout in (('text', 0.1), ('image', 0.3), ('pathx', 0.1)):
        model = lra.get_config(f'task={task}').model
        assert (model.bias, model.mlp_dropout, model.dropout, model.embedding_std) == ('mlp', dropout, dropout, 1.0)
        for scale in ('cpu', 'quick'):
            model = lra.get_config(f'task={task},scale={scale}').model
            assert (model.bias, model.mlp_dropout, model.embedding_std) == ('none', 0.0, None)


@pytest.mark.parametrize('task', lra.SMALL)
def test_small_models_of_a_task_are_equal_but_for_their_attention(task):
    for attention in ('full', 'longformer', 'sinkhorn+block=64', 'combiner_fixed'):
        config = lra.get_config(f'task={task},attention={attention},scale=small')
        width = lra.SMALL[task].width
        assert sizes(config) == (2, 4, width, width, 2 * width)
        assert (config.model.pool, config.model.positions) == ('mean', lra.SMALL[task].positions)


@pytest.mark.parametrize(
    ('task', 'part', 'blocks'),
    [('listops', 32, (9, 2)), ('text', 8, (18, 4)), ('image', 4, (25, 5)), ('pathfinder', 7, (19, 4))],
)
def test_small_windows_and_blocks_of_the_benchmark_shrink_with_the_sequences(task, part, blocks):
    def attention(text):
        return lra.get_config(f'task={task},attention={text},scale=small').model.attention.to_dict()

    full, small = (lra.get_config(f'task={task},scale={scale}').data.options.to_dict() for scale in ('full', 'small'))
    lengths = [options.get('length') or options['size'] ** 2 for options in (full, small)]
    assert round(lengths[0] / lengths[1]) in (part, part - 1)  # 2,000 positions of ListOps become 64
    assert attention('fixed+block=50+summary=10') == {'name': 'fixed', 'block': blocks[0], 'summary': blocks[1]}
    assert (attention('longformer')['window'], attention('bigbird+block=64')['block']) == (512 // part, 64 // part)
    assert attention('performer+kernel=relu+features=256')['features'] == 256
    assert (attention('reformer')['rounds'], attention('reformer+rounds=2')['rounds']) == (1, 2)
    rows = {'image': {'block': 16}, 'pathfinder': {'block': 12}}
    assert attention('combiner_fixed') == {'name': 'combiner_fixed', **rows.get(task, {})}


def test_dropout_of_weights_is_that_of_the_benchmark_at_full_scale_only():
    for scale, rate in (('full', 0.2), ('cpu', 0.0), ('quick', 0.0)):
        assert lra.get_config(f'task=image,scale={scale}').model.attention_dropout == rate


@pytest.mark.parametrize('name', combiner.names())
def test_a_mechanism_has_dropout_of_weights_if_it_has_weights(name):
    expected = 0.2 if registry.resolve(name).supports_dropout else 0.0
    assert lra.get_config(f'task=image,attention={name}').model.attention_dropout == expected


@pytest.mark.parametrize(
    ('argument', 'message'),
    [
        ('task=images', 'task=images: choose listops, text, retrieval, image, pathfinder, pathx'),
        ('task=pathx,difficulty=easy', 'difficulty=easy: only task=pathfinder has one, not pathx'),
        ('task=image,size=16', 'size=16: only task=pathfinder has one, not image'),
        ('scale=large', 'scale=large: choose full, cpu, small, quick'),
        ('attention=perfomer', "unknown mechanism 'perfomer'; did you mean 'performer'"),
    ],
)
def test_bad_arguments_are_refused(argument, message):
    with pytest.raises(ValueError, match=message):
        lra.get_config(argument)
