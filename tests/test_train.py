import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from combiner import evaluate, metrics, models, optim, sample, sharding, train
from combiner import steps as pure_steps
from combiner.data import pipeline, tasks
from combiner.run import checkpoint, saved_config

ROOT = Path(__file__).parents[1]
ONE = slice(0, 1)


def run(tiny, workdir, devices=ONE, **changes):
    return train.train(tiny.config(**changes), workdir, devices=jax.devices()[devices])


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    """(workdir, final state) of the tiny config as it is, on one device; to alter the folder, copy it."""
    import tiny

    workdir = tmp_path_factory.mktemp('plain')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, 'TASKS', tiny.TASKS)
        return workdir, run(tiny, workdir)


def interrupted(plain, workdir):
    """A copy of the plain run as if it had been killed between steps 3 and 6."""
    shutil.copytree(plain[0], workdir, dirs_exist_ok=True)
    shutil.rmtree(workdir / 'checkpoints' / '6')


def lines(workdir):
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def steps(workdir):
    return sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir() if path.name.isdigit())


def assert_close(actual, expected, tolerance=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), actual, expected)


@pytest.mark.parametrize('sizes', [(8, 1, 1), (2, 2, 2), (1, 8, 1)])
def test_eight_devices_compute_what_one_does(tiny, tmp_path, plain, sizes):
    mesh = dict(zip(('mesh.data', 'mesh.fsdp', 'mesh.model'), sizes, strict=True))
    state = run(tiny, tmp_path, slice(None), **mesh)
    assert len(jax.tree.leaves(state.params)[0].sharding.device_set) == 8
    assert_close(state.params, plain[1].params, 2e-4)
    curves = ([line['loss_nats'] for line in lines(path) if 'loss_nats' in line] for path in (plain[0], tmp_path))
    np.testing.assert_allclose(*curves, rtol=1e-5)


def test_a_run_continues_on_another_mesh(tiny, tmp_path, plain):
    interrupted(plain, tmp_path)
    state = run(tiny, tmp_path, slice(None), **{'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.model': 2})
    assert_close(state.params, plain[1].params, 2e-4)
    assert state.rng.tolist() == plain[1].rng.tolist()


class Counting(nn.Module):
    """A model with state of its own besides its parameters."""

    @nn.compact
    def __call__(self, tokens, valid=None, deterministic=True):
        calls = self.variable('statistics', 'calls', lambda: jnp.zeros(()))
        if not deterministic:
            calls.value += 1
        bias = self.param('bias', nn.initializers.zeros, (256,))
        return jnp.broadcast_to(bias, (*tokens.shape, 256)) + 0 * calls.value


def test_model_state_is_updated_and_kept(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(models, 'build', lambda *_, **__: Counting())
    state = run(tiny, tmp_path, **{'optimizer.accumulation': 2})
    assert state.collections['statistics']['calls'] == 12
    assert run(tiny, tmp_path, **{'optimizer.accumulation': 2}).collections['statistics']['calls'] == 12


def test_centroids_are_trained_saved_continued_evaluated_and_sampled_from(tiny, tmp_path):
    config = tiny.config(**{'run.eval_every': 100, 'optimizer.accumulation': 2})
    config.model.attention = ConfigDict({'name': 'combiner_routing', 'clusters': 5})
    whole = train.train(config, tmp_path, devices=jax.devices()[ONE])
    (held,) = jax.tree.leaves(whole.collections)
    assert held.shape == (2, 2, 5, 8)
    trained = evaluate.load(tmp_path, mesh=sharding.make_mesh(devices=jax.devices()[ONE]))
    (loaded,) = jax.tree.leaves(trained.variables['state'])
    np.testing.assert_array_equal(loaded, held)
    assert evaluate.evaluate(tmp_path)['bits_per_dim'] < 9
    assert sample.complete(trained.model, trained.variables, np.zeros((1, 40), int), 48).shape == (1, 48)
    shutil.rmtree(tmp_path / 'checkpoints' / '6')
    assert tiny.digest(train.train(config, tmp_path, devices=jax.devices()[ONE])) == tiny.digest(whole)


def test_classes_are_learned_and_measured_and_padding_is_read(tiny, tmp_path):
    config = tiny.config('tiny_classes', **{'optimizer.accumulation': 2, 'data.batch_size': 8})
    config.model.attention = ConfigDict({'name': 'bigbird', 'block': 4})
    train.train(config, tmp_path, devices=jax.devices()[ONE])
    curve = lines(tmp_path)
    assert all(0 <= line['accuracy'] <= 1 for line in curve if 'accuracy' in line)
    assert any('accuracy' in line for line in curve)
    assert all('bits_per_dim' not in line for line in curve)
    result = evaluate.evaluate(tmp_path)
    trained = evaluate.load(tmp_path)
    hits = 0
    for record in tiny.Images('test'):
        example = {name: jnp.asarray(value)[None] for name, value in tiny.classified(record).items()}
        logits = trained.model.apply(trained.variables, example['tokens'], valid=example['valid'])
        hits += int(logits.argmax() == example['targets'][0])
    assert result['accuracy'] == pytest.approx(hits / 24)
    assert (result['examples'], result['targets'], result['metrics']) == (24, 24, ['accuracy'])
    assert f'accuracy {hits / 24:.2%}' in evaluate.report(result)


# Batches without targets


def without_targets(monkeypatch, batches, value=0):
    """Takes the weights out of these batches, counted from 1, on their way to the device; NaN poisons them."""
    count = 0
    put_batch = sharding.put_batch

    def put(batch, mesh):
        nonlocal count
        count += 1
        return put_batch(batch | ({'weights': batch['weights'] * np.float32(value)} if count in batches else {}), mesh)

    monkeypatch.setattr(sharding, 'put_batch', put)


ALONE = {'run.eval_every': 100, 'run.checkpoint_every': 1, 'run.log_every': 1}


@pytest.mark.parametrize('parts', [1, 2])
def test_a_batch_without_targets_changes_nothing_and_is_counted(tiny, tmp_path, monkeypatch, capsys, parts):
    """No bit but the step's number, also of the centroids, which move without a gradient, and of the counts."""
    without_targets(monkeypatch, (2,))
    changes = {'optimizer.accumulation': parts, 'optimizer.warmup_steps': 1, 'optimizer.weight_decay': 0.1}
    config = tiny.config(steps=2, **ALONE, **changes)
    config.model.attention = ConfigDict({'name': 'routing', 'clusters': 5})
    after = train.train(config, tmp_path, devices=jax.devices()[ONE])
    assert int(optim.updates_made(after.opt_state, None)) == 1
    shutil.rmtree(tmp_path / 'checkpoints' / '2')
    reader = checkpoint.Checkpoints(tmp_path, read_only=True)
    step, before = reader.restore_parameters(jax.eval_shape(lambda: after), 'latest')
    reader.close()
    assert (step, int(after.step)) == (1, 2)
    assert tiny.digest(before.replace(step=after.step)) == tiny.digest(after)
    first, second, _ = lines(tmp_path)
    assert (first.get('empty_batches'), second['empty_batches']) == (None, 1)
    assert ('loss_nats' in first, 'loss_nats' in second) == (True, False)
    assert all(math.isfinite(value) for value in second.values())
    assert 'step 2: no target of the batch counts, so it changed nothing' in capsys.readouterr().out


def test_batches_without_targets_do_not_hide_a_divergence(tiny, tmp_path, monkeypatch):
    without_targets(monkeypatch, (2,), value='nan')
    with pytest.raises(FloatingPointError, match='diverged at step 2: loss_nats nan'):
        run(tiny, tmp_path, **ALONE)


def test_a_split_without_targets_has_no_figure(tiny, tmp_path, monkeypatch, capsys):
    def transform(record):
        example = tiny.TASK.transform(record)
        return example | {'weights': example['weights'] * record['key'].startswith('train')}

    monkeypatch.setitem(tasks.TASKS, 'tiny', lambda: tiny.task('tiny', transform=transform))
    run(tiny, tmp_path, steps=3)
    (line,) = [line for line in lines(tmp_path) if 'validation_examples' in line]
    assert line == {'step': 3, 'validation_examples': 0}
    assert 'step 3: validation no targets' in capsys.readouterr().out
    for split in ('validation', 'test'):
        with pytest.raises(ValueError, match=rf'no target counts in what was read of tiny \({split}\).*another split'):
            evaluate.evaluate(tmp_path, split)
    assert evaluate.evaluate(tmp_path, 'train')['examples'] == 24


# The loop


def test_curve_has_units_and_each_step_once(tiny, tmp_path, plain):
    curve = lines(plain[0])
    assert [line['step'] for line in curve if 'loss_nats' in line] == [2, 3, 4, 6]  # step 3 is saved
    assert set(curve[0]) == {
        'step',
        'loss_nats',
        'bits_per_dim',
        'gradient_norm',
        'parameter_norm',
        'learning_rate',
        'tokens_per_second',
        'tokens_per_second_per_chip',
        'goodput',
        'seconds_in_steps',
        'seconds_in_all',
        'model_tflops_per_second_per_chip',
    }
    validation = [line for line in curve if 'validation_loss_nats' in line]
    assert [(line['step'], line['validation_examples']) for line in validation] == [(3, 8.0), (6, 8.0)]
    assert curve[0]['bits_per_dim'] == pytest.approx(8, abs=0.2)
    in_steps = [(line['step'], line['seconds_in_steps']) for line in curve if 'seconds_in_steps' in line]
    assert [step for step, _ in in_steps] == [2, 3, 4, 6]
    assert sorted(seconds for _, seconds in in_steps) == [seconds for _, seconds in in_steps]
    interrupted(plain, tmp_path)
    run(tiny, tmp_path)
    again = lines(tmp_path)
    assert [line['step'] for line in again] == [line['step'] for line in curve]
    for name in ('loss_nats', 'gradient_norm', 'validation_loss_nats'):
        assert [line.get(name) for line in again] == [line.get(name) for line in curve]


def test_the_first_lines_say_what_is_trained_and_how_long_it_takes(tiny, tmp_path, plain, capsys):
    interrupted(plain, tmp_path)
    run(tiny, tmp_path)
    said = dict(line.split(': ', 1) for line in capsys.readouterr().out.splitlines()[:5])
    assert said['config'].startswith(
        'tiny, combiner_axial_rowmajor+columns=12, 2 layers of width 16, sequences of 48, '
    )
    assert (said['data'], said['workdir']) == ('tiny gradients', f'{tmp_path}, from step 3 to 6')
    assert int(said['parameters'].replace(',', '')) == sum(leaf.size for leaf in jax.tree.leaves(plain[1].params))
    assert re.fullmatch('about .* for the other 3 steps, at the speed measured before', said['time'])


def test_steps_to_trace_beyond_the_end_are_refused_before_the_workdir_is_made(tiny, tmp_path):
    with pytest.raises(ValueError, match='--profile=5:7: the training ends with step 6; trace steps up to that one'):
        train.train(tiny.config(), tmp_path / 'run', devices=jax.devices()[ONE], profile=range(5, 8))
    assert not (tmp_path / 'run').exists()


def validated(workdir):
    reader = checkpoint.Checkpoints(workdir, read_only=True)
    found = {step: reader.manager.metrics(step) for step in reader.steps()}, reader.best_step()
    reader.close()
    return found


def test_the_best_checkpoint_is_that_of_the_same_examples(tiny, tmp_path, monkeypatch, capsys):
    """After `run.eval_examples` was changed, checkpoints that are kept are validated on the new examples."""
    changes = {'run.eval_every': 2, 'run.checkpoint_every': 2, 'optimizer.warmup_steps': 0}
    original = pure_steps.evaluate_batches

    def flattering(step, variables, batches, mesh):  # on one example, what is trained little looks best
        batches = list(batches)
        total = original(step, variables, batches, mesh)
        if sum((batch['weights'] > 0).any(axis=1).sum() for batch in batches) == 1:
            total = total.replace(loss_nats=total.loss_nats.replace(total=total.loss_nats.total / 1000))
        return total

    monkeypatch.setattr(pure_steps, 'evaluate_batches', flattering)
    run(tiny, tmp_path, steps=6, **changes, **{'run.eval_examples': 1})
    before, _ = validated(tmp_path)
    for path in (tmp_path / 'checkpoints' / '6',):  # as if it had been killed after step 4
        shutil.rmtree(path)
    run(tiny, tmp_path, steps=6, **changes, **{'run.eval_examples': 24})
    after, best = validated(tmp_path)
    assert len({values['validated_on'] for values in after.values()}) == 1
    assert best == 6
    assert set(after) == {4, 6}
    model = evaluate.load(tmp_path, 'best')
    assert model.step == 6
    monkeypatch.setattr(pure_steps, 'evaluate_batches', original)
    expected = evaluate.evaluate(tmp_path, 'validation', 'best')['loss_nats']
    assert after[6]['validation_loss_nats'] == pytest.approx(expected, rel=1e-5)
    old, new = before[4]['validation_loss_nats'], after[4]['validation_loss_nats']
    said = f'checkpoint 4: validation loss {old:.4f} was measured on other examples; on those of now {new:.4f}'
    out = capsys.readouterr().out
    assert said in out
    run(tiny, tmp_path, steps=6, **changes, **{'run.eval_examples': None})  # which are as many
    assert 'other examples' not in capsys.readouterr().out


def test_validation_never_reads_the_test_split(tiny, tmp_path, monkeypatch):
    asked = []
    original = pipeline.eval_batches

    def spy(task, split, **options):
        asked.append((split, options['limit']))
        return original(task, split, **options)

    monkeypatch.setattr(pipeline, 'eval_batches', spy)
    run(tiny, tmp_path)
    assert set(asked) == {('validation', 8)}


def test_next_step_is_dispatched_before_metrics_are_read(tiny, tmp_path, monkeypatch):
    order = []
    put_batch, to_host = sharding.put_batch, metrics.to_host
    monkeypatch.setattr(sharding, 'put_batch', lambda *a: order.append('step') or put_batch(*a))
    monkeypatch.setattr(metrics, 'to_host', lambda *a: order.append('read') or to_host(*a))
    run(tiny, tmp_path, steps=5, **{'run.eval_every': 100, 'run.checkpoint_every': 100, 'run.log_every': 1})
    assert order[:9] == ['step', 'step', 'read', 'step', 'read', 'step', 'read', 'step', 'read']


def test_first_non_finite_loss_stops_the_run_and_is_not_saved(tiny, tmp_path, monkeypatch):
    count = 0
    put_batch = sharding.put_batch

    def poisoned(batch, mesh):
        nonlocal count
        count += 1
        return put_batch(batch | {'weights': batch['weights'] * (np.float32('nan') if count == 4 else 1)}, mesh)

    monkeypatch.setattr(sharding, 'put_batch', poisoned)
    with pytest.raises(FloatingPointError, match=r'diverged at step 4: loss_nats nan, gradient_norm nan'):
        run(tiny, tmp_path, **{'run.checkpoint_every': 1, 'run.eval_every': 100})
    assert steps(tmp_path) == [2, 3]


def test_parameters_out_of_range_are_not_saved(tiny, tmp_path):
    with pytest.raises(FloatingPointError, match=r'diverged at step 1: .* parameter_norm inf'):
        run(tiny, tmp_path, **{'optimizer.learning_rate': 1e38, 'run.checkpoint_every': 1})
    assert steps(tmp_path) == []


@pytest.mark.parametrize(('number', 'status'), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_exit_and_the_run_continues(tiny, tmp_path, plain, monkeypatch, number, status):
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    count = 0
    put_batch = sharding.put_batch

    def interrupting(*args):
        nonlocal count
        count += 1
        if count == 2:
            os.kill(os.getpid(), number)
        return put_batch(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sharding, 'put_batch', interrupting)
        with pytest.raises(SystemExit) as stopped:
            run(tiny, tmp_path)
    assert stopped.value.code == status
    assert steps(tmp_path) == [2]
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert tiny.digest(run(tiny, tmp_path)) == tiny.digest(plain[1])


# kill -9

LONG = ('steps=40', 'run.checkpoint_every=3', 'run.eval_every=6', 'run.log_every=1', 'model.dropout=0.1')


def started(*arguments):
    environment = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
    return subprocess.Popen(
        [sys.executable, str(ROOT / 'tests' / 'tiny.py'), *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return re.search('digest (.*)', output)[1]


def kill_during_a_save(process, workdir):
    """Kills at the sight of the next unfinished checkpoint; returns whether there was one."""
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if any((workdir / 'checkpoints').glob('*tmp*')):
            process.kill()
            process.communicate()
            return True
    process.communicate()
    return False


def kill_after_a_line(process, chance):
    """Kills a random moment after a random number of lines of progress."""
    wanted = chance.randint(1, 8)
    for line in process.stdout:
        wanted -= line.startswith('step ')
        if not wanted:
            break
    time.sleep(chance.random() * 0.05)
    process.kill()
    process.communicate()


def kill_and_continue(tmp_path, kills, seed):
    """Final digest of a run that was killed, of one that was not, and how many kills met a save."""
    whole = started(tmp_path / 'whole', *LONG)
    chance, met = random.Random(seed), 0
    for kill in range(kills):
        process = started(tmp_path / 'killed', *LONG)
        if kill % 2:
            met += kill_during_a_save(process, tmp_path / 'killed')
        else:
            kill_after_a_line(process, chance)
        assert process.returncode == -signal.SIGKILL
    digest = finish(started(tmp_path / 'killed', *LONG))
    curve = [line['step'] for line in lines(tmp_path / 'killed') if 'loss_nats' in line]
    assert curve == list(range(1, 41))
    return digest, finish(whole), met


def test_killed_and_started_again_gives_bitwise_the_same(tmp_path):
    killed, whole, met = kill_and_continue(tmp_path, kills=4, seed=0)
    assert killed == whole
    assert met == 2


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(1, 5))
def test_killed_many_times(tmp_path, seed):
    killed, whole, _ = kill_and_continue(tmp_path, kills=8, seed=seed)
    assert killed == whole


# Bad input


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'task': 'photo'}, "unknown task 'photo'; known: tiny, "),
        ({'data.batch_size': 6, 'optimizer.accumulation': 4}, r'batch_size=6 must be a multiple of 1 .* x 4'),
        ({'run.log_every': 0}, 'config.run.log_every=0 must be at least 1'),
        ({'optimizer.name': 'sgd'}, "unknown optimizer.name 'sgd'"),
        ({'optimizer.clip_norm': -1.0}, 'optimizer.clip_norm=-1.0 must be at least 0 and finite'),
        ({'optimizer.learning_rate': math.inf}, 'optimizer.learning_rate=inf must be at least 0 and finite'),
        ({'optimizer.ema_decay': 1.0}, 'optimizer.ema_decay=1.0 must be at least 0 and less than 1'),
        ({'mesh.fsdp': 2}, 'fsdp=2, model=1 does not fit 1 devices'),
        ({'model.attention.name': 'nope'}, "unknown mechanism 'nope'|nope"),
    ],
)
def test_bad_config_is_refused_before_anything_is_written(tiny, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(tiny, tmp_path / 'run', **changes)
    assert not (tmp_path / 'run').exists()


def test_other_config_and_other_data_are_refused(tiny, tmp_path, plain, monkeypatch):
    shutil.copytree(plain[0], tmp_path, dirs_exist_ok=True)
    with pytest.raises(ValueError, match='steps: 6 there, 8 here'):
        run(tiny, tmp_path, steps=8)
    monkeypatch.setattr(pipeline, 'fingerprint', lambda *_: 'other')
    with pytest.raises(ValueError, match="this run 'other'"):
        run(tiny, tmp_path)


def test_checkpoints_of_another_model_whose_config_was_lost(tiny, tmp_path, plain):
    shutil.copytree(plain[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / 'config.json').unlink()
    for changes, message in [
        (
            {'model.width': 32},
            r'another model or optimizer \(params.*\[.*16\] there, float32\[.*32\] here; .* and \d+ more',
        ),
        ({'model.layers': 1}, r'\(params.trunk.stack.blocks_0.*: float32\[2, .*\] there, float32\[1, .*\] here'),
        ({'optimizer.ema_decay': 0.0}, r'\(ema.* there, absent here; .*choose another --workdir, or continue'),
    ]:
        with pytest.raises(ValueError, match=message):
            run(tiny, tmp_path, **changes)
        assert not (tmp_path / 'config.json').exists()
        assert steps(tmp_path) == [3, 6]
        assert not (tmp_path / 'corrupt').exists()
    assert tiny.digest(run(tiny, tmp_path)) == tiny.digest(plain[1])


def test_newest_checkpoint_corrupt(tiny, tmp_path, plain):
    shutil.copytree(plain[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / 'checkpoints' / '6' / 'state' / 'manifest.ocdbt').unlink()
    assert tiny.digest(run(tiny, tmp_path)) == tiny.digest(plain[1])
    assert steps(tmp_path) == [3, 6]
    assert (tmp_path / 'corrupt' / '6').is_dir()


def test_command_answers_mistakes_with_a_line_and_status_2(tmp_path):
    photos = '--config=configs/photos.py'
    cases = {
        ('--config=configs/photos.py:attention=nope',): 'nope',
        ('--config=configs/photos.py:atention=full',): "unknown config argument 'atention'; did you mean 'attention'",
        ('--config=configs/photo.py',): "config file 'configs/photo.py' does not exist",
        ('--config=README.md',): "'README.md' is not a Python file; give the path of a config file",
        ('--config=combiner/config.py',): "'combiner/config.py' has no function get_config",
        (photos, '--config.optimizer.learningrate=1'): 'did you mean config.optimizer.learning_rate?',
        (photos, '--config.model.attention.decay=0.9'): 'argument: attention=combiner_axial_rowmajor+decay=0.9',
        (photos, '--config.steps=many'): 'many',
        (photos, '--config.data.data_dir=/nonexistent'): "data directory '/nonexistent' does not exist",
        (photos, '--config.data.data_dir='): 'the data directory is empty; give a file or folder',
        (
            photos,
            '--config.model.attention=full',
        ): 'write --config=configs/photos.py:attention=full, or --config.model.attention.name=full',
        (photos, '--config.optimizer=adamw'): 'not a value; write --config.optimizer.name=adamw',
        (photos, 'stray'): "unexpected argument 'stray'",
        (): '--config',
    }
    called = [(f'--workdir={tmp_path / "run"}', *arguments) for arguments in cases]
    new_process = [sys.executable, '-m', 'combiner.train', *called[0]]
    alone = subprocess.run(new_process, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    forked = subprocess.run(
        [sys.executable, str(ROOT / 'tests' / 'forked.py'), 'combiner.train'],
        input=json.dumps(called),
        cwd=ROOT,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert forked.returncode == 0, forked.stderr
    found = json.loads(forked.stdout)
    assert found[0] == [alone.returncode, alone.stderr]
    for message, (status, error) in zip(cases.values(), found, strict=True):
        assert status == 2, error
        assert error.startswith('error: ')
        assert error.count('\n') == 1, error
        assert message in error
    assert not (tmp_path / 'run').exists()


def test_the_commands_say_once_how_softmax_attention_is_computed(tmp_path):
    changes = ('steps=3', 'model.attention={"name": "full"}')
    for arguments in ((tmp_path, *changes), ('--evaluate', tmp_path)):
        output = started(*arguments).communicate(timeout=120)[0]
        (line,) = re.findall('.*Full: .*', output)
        assert 'blockwise, on cpu (cudnn needs a GPU, this is cpu; splash needs a TPU, this is cpu)' in line
        # Nothing that others say of no importance.
        assert not re.findall('^I(?!.*(?:Full: |first batch after )).*', output, re.MULTILINE)


def test_the_saved_config_is_the_resolved_one(tiny, plain):
    assert saved_config.load(plain[0]).to_dict() == tiny.config().to_dict()
