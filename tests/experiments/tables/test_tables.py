"""Every row of every table: its config resolves, its model is what the card says, and differs where it should only."""

import importlib
import inspect
import itertools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from combiner import build, metrics, optim, sharding
from combiner import config as common
from combiner.data import tasks

TABLES = ('table1', 'table2', 'table3', 'table4', 'table5', 'pg19')
ROWS = {name: importlib.import_module(f'experiments.tables.{name}').ROWS for name in TABLES}
ALL = [pytest.param(name, row, id=f'{name}/{row.column}/{row.model}') for name in TABLES for row in ROWS[name]]
# What may differ within a column, besides the attention itself.
LAYERS = {'model.layers'}
LENGTH = {'data.options.length', 'data.batch_size', 'run.eval_examples', 'run.eval_batch_size'}
WEIGHTS = {'model.attention_dropout'}  # which not every mechanism has
OF_THE_BENCHMARK = WEIGHTS | {
    *(
        f'model.{name}'
        for name in ('layers', 'heads', 'width', 'qkv_width', 'mlp_ratio', 'dropout', 'mlp_dropout', 'pool')
    ),
    'optimizer.weight_decay',
}
MAY_DIFFER = {
    ('table1', 'CIFAR-10'): LAYERS,
    ('table1', 'ImageNet-64'): LAYERS,
    ('table3', 'Wiki-40B'): LENGTH,
    **{('table4', column): WEIGHTS for column in ('ListOps', 'Text', 'Retrieval')},
    ('table4', 'Image'): OF_THE_BENCHMARK,
    ('table4', 'Pathfinder'): OF_THE_BENCHMARK,
    ('table5', 'C4'): LENGTH,
    ('pg19', 'PG-19'): LENGTH,
}


def module(path):
    return importlib.import_module(path.removesuffix('.py').replace('/', '.'))


def config_of(row, scale):
    return module(row.config).get_config(f'{row.argument},scale={scale}')


def card(text):
    """The parameters on a card: {(mechanism or 'others', argument of the column): number}."""
    lines = iter(text.splitlines())
    columns = next(line.split()[1:] for line in lines if line.startswith('    parameters '))
    found = {}
    for line in itertools.takewhile(str.strip, lines):
        name, *numbers = line.split()
        found |= {(name, column): n.replace(',', '') for column, n in zip(columns, numbers, strict=True)}
    return {key: int(number) for key, number in found.items() if number != '–'}


def on_card(row):
    items = row.argument.split(',')
    name = common.mechanism(dict(item.split('=', 1) for item in items)['attention'])[0]
    counts = card(module(row.config).__doc__)
    (column,) = {column for _, column in counts} & set(items)
    return counts.get((name, column), counts.get(('others', column)))


def test_a_card_is_read_by_mechanism_and_column():
    text = 'Title.\n\n    parameters  layers=6  layers=12\n    reformer  1,234  –\n    others  5  6\n\n    x  7'
    assert card(text) == {('reformer', 'layers=6'): 1234, ('others', 'layers=6'): 5, ('others', 'layers=12'): 6}


@pytest.mark.parametrize(('name', 'row'), ALL)
def test_the_model_has_the_parameters_of_its_card(name, row):
    config = config_of(row, 'full')
    task = build.task(config)
    model = build.model(config, task)
    tokens = jax.ShapeDtypeStruct((1, *task.input_shape), jnp.int32)
    parameters = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens)['params'])
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameters)) == on_card(row)


@pytest.mark.parametrize('scale', common.SCALES)
@pytest.mark.parametrize(('name', 'row'), ALL)
def test_what_training_asks_of_a_config_holds(name, row, scale):
    config = config_of(row, scale)
    task = build.task(config)
    build.model(config, task)
    optim.optimizer(config.optimizer, config.steps)
    build.check_numbers(config, sharding.make_mesh(devices=jax.devices()[:1]))
    assert row.metric in task.metrics
    assert row.metric in metrics.FIGURES
    assert config.steps >= config.run.eval_every
    assert config.data.data_dir is None
    # Fields that a config does not have cannot be given on the command line.
    assert set(config.data.options) == set(inspect.signature(tasks.TASKS[config.task]).parameters)


def flat(config):
    leaves, _ = jax.tree_util.tree_flatten_with_path(config.to_dict(), is_leaf=lambda x: not isinstance(x, dict))
    return {'.'.join(str(entry.key) for entry in path): value for path, value in leaves}


@pytest.mark.parametrize('scale', common.SCALES)
@pytest.mark.parametrize('name', TABLES)
def test_rows_of_a_column_differ_in_attention_only(name, scale):
    columns = {}
    for row in ROWS[name]:
        columns.setdefault(row.column, []).append(flat(config_of(row, scale)))
    for column, configs in columns.items():
        for config in configs[1:]:
            keys = configs[0].keys() | config.keys()
            differing = {key for key in keys if configs[0].get(key) != config.get(key)}
            differing = {key for key in differing if not key.startswith('model.attention.')}
            assert differing <= MAY_DIFFER.get((name, column), set())


@pytest.mark.parametrize('name', TABLES)
def test_every_row_is_another_run(name):
    rows = ROWS[name]
    assert len({(row.column, row.model) for row in rows}) == len(rows)
    assert len({(row.config, row.argument) for row in rows}) == len(rows)


@pytest.mark.parametrize('name', TABLES)
def test_smaller_scales_are_smaller(name):
    for row in ROWS[name]:
        sizes = [
            (config.model.layers, config.model.width, config.steps, config.data.batch_size)
            for config in (config_of(row, scale) for scale in ('full', 'cpu', 'quick'))
        ]
        for larger, smaller in itertools.pairwise(sizes):
            assert all(a >= b for a, b in zip(larger, smaller, strict=True))
            assert larger != smaller


@pytest.mark.parametrize('name', TABLES)
def test_small_rows_of_a_column_read_the_same_tokens_and_fewer_than_full_ones(name):
    def tokens(row, scale):
        config = config_of(row, scale)
        return config.steps * config.data.batch_size * math.prod(build.task(config).input_shape)

    for column in {row.column for row in ROWS[name]}:
        found = [[tokens(row, scale) for scale in common.SCALES] for row in ROWS[name] if row.column == column]
        assert all(quick < small < full and quick < cpu < full for full, cpu, small, quick in found)
        assert len({small for _, _, small, _ in found}) == 1


@pytest.mark.parametrize('name', TABLES)
def test_what_a_model_is_called_says_its_layers_and_length(name):
    for row in ROWS[name]:
        config = config_of(row, 'full')
        if said := re.search(r'(\d+) layers', row.model):
            assert config.model.layers == int(said[1])
        if said := re.search(r'-(\d)k$', row.model):
            assert config.data.options.length == 1024 * int(said[1])


def test_no_row_of_the_paper_is_left_out():
    published = {name: (len(rows), sum(row.published is not None for row in rows)) for name, rows in ROWS.items()}
    assert published == {
        'table1': (28, 23),
        'table2': (2, 2),
        'table3': (11, 9),
        'table4': (78, 65),
        'table5': (13, 12),
        'pg19': (6, 0),
    }


def test_published_accuracies_have_the_published_means():
    said = re.findall(r'([A-Z][\w-]+)\s(\d\d\.\d\d)', module('experiments/tables/table4.py').__doc__)
    values = {}
    for row in ROWS['table4']:
        if row.published is not None:
            values.setdefault(row.model, []).append(row.published)
    assert {model: float(mean) for model, mean in said} == pytest.approx(
        {model: 100 * sum(five) / 5 for model, five in values.items()}, abs=0.01
    )
