import jax
import numpy as np

from experiments.harness import step_cost


def test_a_step_learns_and_says_what_it_needs(tiny):
    config = tiny.config()
    step = step_cost.Step(config)
    assert step.tokens == config.data.batch_size * 48
    parameters = sum(leaf.size for leaf in jax.tree.leaves(step.state.params))
    assert step.memory_mb > 3 * 4 * parameters / 1e6  # they and Adam's two averages
    before = jax.tree.map(np.asarray, step.state.params)
    assert step() > 0
    assert int(step.state.step) == 1
    changed = jax.tree.map(lambda a, b: (a != b).any(), before, step.state.params)
    assert any(jax.tree.leaves(changed))


def test_more_tokens_need_more_memory(tiny):
    small, large = (step_cost.Step(tiny.config(**{'data.batch_size': size})).memory_mb for size in (8, 32))
    assert large > small


def test_what_cannot_be_measured_is_said_and_the_others_are_measured(tiny, monkeypatch):
    def broken():
        raise ValueError('no such data\nand more')

    made = step_cost.Step

    class Large(made):
        def __call__(self):
            raise MemoryError('out of memory')

    class Silent(made):
        def __init__(self, config):
            raise MemoryError

    steps = iter((made, Large, Silent))
    monkeypatch.setattr(step_cost, 'Step', lambda config: next(steps)(config))
    configs = {'broken': broken, 'tiny': tiny.config, 'large': tiny.config, 'silent': tiny.config}
    found = step_cost.time_interleaved(configs, rounds=2)
    assert list(found) == list(configs)
    assert found['broken'] == 'ValueError: no such data'
    assert found['large'] == 'MemoryError: out of memory'
    assert found['silent'] == 'MemoryError: MemoryError()'
    assert found['tiny'].keys() == {'seconds_per_step', 'memory_mb', 'compile_seconds'}
    assert min(found['tiny'].values()) > 0
