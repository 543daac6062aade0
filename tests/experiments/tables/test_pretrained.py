"""A row of Table 4 that starts from a model without classes: the two have the same backbone, whatever the attention."""

from pathlib import Path

import jax
import pytest
from flax import linen as nn

from combiner import build, sharding
from combiner.run import warm_start
from experiments.harness import run as runs
from experiments.tables import table4_pretrained


def arrays(arguments):
    """The shapes of a model's variables, by the names that `warm_start` compares."""
    config = runs.parse_config(arguments)
    task, mesh = build.task(config), sharding.make_mesh(devices=jax.devices()[:1])
    with sharding.use(mesh):
        found = jax.eval_shape(build.model(config, task).init, jax.random.key(0), build.blank_tokens(task, mesh))
    found = nn.meta.unbox(found)
    return warm_start._by_name({'params': found.pop('params'), 'collections': found})


@pytest.mark.parametrize('row', table4_pretrained.PRETRAINED, ids=lambda row: f'{row.column}-{row.model}')
def test_the_backbones_are_the_same(row):
    pretrain, train, _ = runs.Run(row, 'quick', 0, Path('run')).commands().values()
    before, after = (arrays(command[3:-2]) for command in (pretrain, train))
    assert warm_start._matching('run', before, after)
