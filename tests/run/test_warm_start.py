"""A run that starts from another has its backbone bit for bit, says what it took, and resumes without it."""

import functools
import json
import shutil

import flax.linen as nn
import jax
import numpy as np
import pytest

from combiner import build, optim, sharding, steps, train
from combiner.data import pretraining, tasks
from combiner.run import checkpoint, warm_start


@pytest.fixture(scope='module')
def with_tasks():
    """The tiny tasks, and the classification's without labels."""
    import tiny

    masked = functools.partial(pretraining.pretraining, tiny.TASKS['tiny_classes'](), 'mlm', padding=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, 'TASKS', {**tiny.TASKS, 'tiny_masked': masked})
        yield tiny


def run(tiny, workdir, task, **changes):
    state = train.train(tiny.config(task, **changes), workdir, devices=jax.devices()[:1])
    return state, tiny.digest(state)


@pytest.fixture(scope='module')
def source(with_tasks, tmp_path_factory):
    """(workdir, final state) of a masked language model."""
    workdir = tmp_path_factory.mktemp('source')
    return workdir, run(with_tasks, workdir, 'tiny_masked', steps=3)[0]


def first_state(tiny, **changes):
    config = tiny.config('tiny_classes', **changes)
    task, mesh = build.task(config), sharding.make_mesh(devices=jax.devices()[:1])
    model, optimizer = build.model(config, task), optim.optimizer(config.optimizer, config.steps)
    state = nn.meta.unbox(steps.initial_state(model, optimizer, config, build.blank_tokens(task, mesh)))
    placement = jax.tree.map(lambda leaf: leaf.sharding, sharding.place(jax.eval_shape(lambda: state), mesh))
    return jax.device_put(state, placement)


def test_the_backbone_is_taken_bit_for_bit_and_the_head_is_new(with_tasks, source):
    state = first_state(with_tasks)
    start = warm_start.load(source[0], state)
    taken, old = dict(start.state.params['Encoder_0']['trunk']), dict(source[1].params['trunk'])
    embedding = old.pop('embedding')
    assert embedding.shape[0] == 257
    np.testing.assert_array_equal(taken.pop('embedding'), embedding[:256])
    jax.tree.map(np.testing.assert_array_equal, taken, old)
    for name in ('Dense_0', 'Dense_1'):
        jax.tree.map(np.testing.assert_array_equal, start.state.params[name], state.params[name])
    jax.tree.map(np.testing.assert_array_equal, start.state.ema, start.state.params)
    assert f'started from step 3 of {source[0]}: ' in start.report
    assert 'trunk.embedding: the first 256 of 257 rows' in start.report
    assert 'new here: params.Dense_0.bias' in start.report
    assert 'not taken: params.logits_kernel' in start.report


def test_a_run_that_started_from_another_resumes_exactly_without_it(with_tasks, source, tmp_path):
    moved = shutil.copytree(source[0], tmp_path / 'source')
    _, whole = run(with_tasks, tmp_path / 'run', 'tiny_classes', init_from=str(moved))
    _, cold = run(with_tasks, tmp_path / 'cold', 'tiny_classes')
    assert whole != cold
    lineage = json.loads((tmp_path / 'run' / 'data.json').read_text())['init_from']
    assert lineage.startswith('step 3, ')
    shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '6')
    shutil.rmtree(moved)
    assert run(with_tasks, tmp_path / 'run', 'tiny_classes', init_from=str(moved))[1] == whole
    assert json.loads((tmp_path / 'run' / 'data.json').read_text())['init_from'] == lineage
    with pytest.raises(ValueError, match=r'init_from: .* there, None here'):
        run(with_tasks, tmp_path / 'run', 'tiny_classes')


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'model.layers': 3}, r'trunk\.stack\..*: \(2, .* there, \(3, .* here'),
        ({'model.positions': 'image'}, r'trunk\.position_embedding\.axis_0: \(48, 16\) there, \(4, 16\) here'),
        ({'model.bias': 'all'}, r'bias: absent there, \(2, .*\) here'),
    ],
)
def test_another_backbone_is_refused_by_its_arrays(with_tasks, source, changes, message):
    with pytest.raises(ValueError, match=message):
        warm_start.load(source[0], first_state(with_tasks, **changes))


def test_an_unfinished_run_is_refused(with_tasks, source, tmp_path):
    shutil.copytree(source[0], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(config | {'steps': 5}))
    with pytest.raises(ValueError, match='has taken 3 of its 5 steps; finish it first'):
        warm_start.load(tmp_path, first_state(with_tasks))
    with pytest.raises(ValueError, match='none is not the workdir of a run'):
        warm_start.load(tmp_path / 'none', first_state(with_tasks))


def test_a_run_whose_last_checkpoint_is_damaged_is_refused(with_tasks, tmp_path, monkeypatch):
    run(with_tasks, tmp_path, 'tiny_masked', steps=4, **{'run.checkpoint_every': 3})
    damaged = 'its last checkpoint, of step 4, cannot be read'
    with monkeypatch.context() as patch:  # its list of arrays is all that can be read
        patch.setattr(checkpoint.Checkpoints, '_candidates', lambda self, which: [3])
        with pytest.raises(ValueError, match=rf'{damaged} \(that of step 3 can\); restore it'):
            warm_start.load(tmp_path, first_state(with_tasks))
    for file in (tmp_path / 'checkpoints' / '4' / 'state').rglob('d/*'):
        file.write_bytes(b'')
    with pytest.raises(ValueError, match=damaged):
        warm_start.load(tmp_path, first_state(with_tasks))


def test_a_wrong_source_leaves_the_workdir_to_the_right_one(with_tasks, source, tmp_path):
    for wrong in (tmp_path / 'none', source[0]):
        changes = {'init_from': str(wrong), 'model.layers': 3}
        with pytest.raises(ValueError, match=r'is not the workdir of a run|has another backbone'):
            run(with_tasks, tmp_path / 'run', 'tiny_classes', **changes)
        assert not (tmp_path / 'run' / 'config.json').exists()
