"""The formula of a model's arithmetic, compared with what XLA compiles."""

import json
from pathlib import Path

import jax
import pytest

from combiner import build, sharding
from combiner import config as common
from combiner.aot import cost, programs
from combiner.core import registry
from combiner.core.mechanism import Mechanism
from combiner.monitoring import flops
from experiments.harness import declarations, runner
from experiments.harness.run import full_size

COMPILED = json.loads((Path(__file__).parents[2] / 'results' / 'compile.json').read_text(encoding='utf-8'))['steps']
MASKED = 2.5  # times the products of an attention, at most: those that are masked too, and logits computed again


class Values(Mechanism):
    """No attention at all, so that the dense layers alone compute."""

    def attend(self, q, k, v, context):
        del context
        return v + 0 * q + 0 * k


def both(config):
    """(by formula, as compiled) of a training step."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    text = programs.training_step(config, mesh).compile().as_text()
    return flops.training_step(config, build.task(config)), cost.count(text).flops


@pytest.mark.parametrize(('task', 'pooling'), [('tiny', 0), ('tiny_classes', 2 * 8 * 48 * 16)])
def test_dense_layers_are_compiled_as_the_formula_counts_them(tiny, task, pooling):
    changes = {'model.qkv_width': 8, 'model.kv_heads': 1, 'model.mlp_ratio': 3.0, 'optimizer.accumulation': 2}
    config = tiny.config(task, **changes)
    config.model.attention = common.attention(f'{__name__}:Values')
    formula, compiled = both(config)
    assert formula.attention is None
    assert compiled == formula.total + pooling


def test_attention_is_compiled_with_at_most_two_and_a_half_times_the_products(tiny):
    """XLA counts products that are masked, half of them in a triangle, and logits that are computed again."""
    config = tiny.config()
    config.model.attention = common.attention('combiner_fixed', row=12)
    formula, compiled = both(config)
    assert formula.attention
    assert 1 <= (compiled - formula.dense) / formula.attention <= MASKED


@pytest.mark.parametrize('step', [step for step in COMPILED if step['fits']], ids=lambda step: step['row'])
def test_steps_of_tables_are_compiled_as_the_formula_says(step):
    """A third more, at most, for the forward pass that remat computes again; and what is masked of an attention.

    That is 5 % of a step, or where attention is much of it, 2.5 times its products.

    Kernels that do not state their arithmetic leave out attention, and so does the formula of some attentions.
    """
    row = next(row for rows in declarations.table_rows().values() for row in runner.select(rows, '') if name(row, step))
    config = full_size(row)
    formula, compiled = flops.training_step(config, build.task(config)), step['flops'] * step['chips']
    assert compiled >= (formula.dense if step['kernels_without_flops'] else formula.total)
    if formula.attention is not None:
        assert compiled <= 4 / 3 * max(1.05 * formula.total, formula.dense + MASKED * formula.attention)


def name(row, step):
    return runner.names_of(row)[0] == step['row']


def test_attention_without_a_formula_is_left_out():
    assert flops.attention(registry.make_mechanism('performer'), 64, 8) is None
    oracle = type('Oracle', (Mechanism,), {'pattern': registry.resolve('full').pattern})(causal=True)
    assert flops.attention(oracle, 64, 8) == 2 * 16 * (64 * 65 // 2)
    assert flops.attention(oracle, flops.LONGEST_PATTERN + 1, 8) is None


def test_a_pair_has_two_sequences_and_a_wider_head(tiny):
    config = tiny.config('tiny_classes')
    one = tiny.TASKS['tiny_classes']()
    pair = tiny.task('pairs', 'dual_encoder', classes=2)
    single, double = flops.forward(config, one), flops.forward(config, pair)
    assert double.attention == 2 * single.attention
    assert double.dense - 2 * single.dense == 2 * (4 * 16 * 32 + 32 * 2) - 2 * 2 * (16 * 32 + 32 * 2)
