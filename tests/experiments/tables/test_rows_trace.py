"""Every row of every table starts: its state is placed on eight devices, and a step of training and evaluation traced.

At full size, and abstractly: no array is made.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import pytest

from combiner import build, optim, sharding, steps
from combiner.aot.programs import batch_shapes
from experiments.harness import declarations

ROWS = [(f'{table}/{row.column}/{row.model}', row) for table, rows in declarations.table_rows().items() for row in rows]


def config_of(row):
    return importlib.import_module(row.config.removesuffix('.py').replace('/', '.')).get_config(
        f'{row.argument},scale=full'
    )


def cases():
    """All rows; slow are those whose attention and whose trunk are, but for numbers, those of earlier ones."""
    known, found = set(), []
    for name, row in ROWS:
        config = config_of(row)
        choices = {value for value in config.model.attention.values() if not isinstance(value, int)}
        head, model = build.task(config).head, config.model
        kinds = {('attention', head, *sorted(choices)), ('trunk', head, model.scan, model.positions)}
        found.append(pytest.param(row, id=name, marks=[pytest.mark.slow] if kinds <= known else []))
        known |= kinds
    return found


def test_rows_are_found():
    assert len(ROWS) >= 132


@pytest.mark.parametrize('row', cases())
def test_a_full_size_row_starts(row):
    config = config_of(row)
    mesh = sharding.make_mesh(**config.mesh, devices=jax.devices())
    build.check_numbers(config, mesh)
    task = build.task(config)
    model, optimizer = build.model(config, task), optim.optimizer(config.optimizer, config.steps)
    with sharding.use(mesh):
        tokens = jax.ShapeDtypeStruct((sharding.batch_parts(mesh), *task.input_shape), jnp.int32)
        initialize = functools.partial(steps.initial_state, model, optimizer, config)
        state = sharding.place(jax.eval_shape(initialize, tokens), mesh)
        new, measured = jax.eval_shape(
            steps.make_train_step(config, task, model, optimizer), state, batch_shapes(task, config.data.batch_size)
        )
        variables = {'params': state.params, **state.collections}
        found = jax.eval_shape(
            steps.make_eval_step(model, task), variables, batch_shapes(task, config.run.eval_batch_size)
        )
    kept = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (state, new)]
    assert kept[0] == kept[1]
    assert measured.loss_nats.total.shape == found.loss_nats.total.shape == ()
