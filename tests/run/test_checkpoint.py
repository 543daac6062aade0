import gc
import json
import shutil
import sys

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from combiner import config as common
from combiner import sharding
from combiner.run import agreement, checkpoint, saved_config


def iterator():
    return iter(grain.MapDataset.range(100).shuffle(seed=1).repeat().to_iter_dataset())


def state(value):
    return {
        'params': {'w': jnp.full((8, 4), value)},
        'ema': None,
        'collections': {},
        'opt': (jnp.zeros(3), ()),
    }


def target(mesh=None, *axes):
    place = NamedSharding(mesh or sharding.make_mesh(devices=jax.devices()[:1]), PartitionSpec(*axes))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state(0.0))


def fill(workdir, losses):
    """One checkpoint for each validation loss, at steps 1, 2, …; returns the data drawn after each."""
    checkpoints, data = checkpoint.Checkpoints(workdir, 'abc'), iterator()
    following = {}
    for step, loss in enumerate(losses, 1):
        next(data)
        checkpoints.save(step, state(float(step)), data, loss)
        after = iterator()
        after.set_state(data.get_state())
        following[step] = next(after)
    checkpoints.close()
    return following


def value(restored):
    return float(restored['params']['w'][0, 0])


def test_latest_two_and_best_are_kept_also_over_restarts(tmp_path):
    fill(tmp_path, [3.0, 1.0, 2.0])
    checkpoints = checkpoint.Checkpoints(tmp_path, 'abc')
    for step, loss in [(4, 5.0), (5, None), (6, 4.0)]:
        checkpoints.save(step, state(float(step)), iterator(), loss)
    checkpoints.close()
    checkpoints = checkpoint.Checkpoints(tmp_path, read_only=True)
    assert checkpoints.steps() == [2, 5, 6]
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ['2', '5', '6']
    part = {'params': target()['params'], 'collections': {}}
    step, restored = checkpoints.restore_parameters(part, 'best')
    assert (step, value(restored), sorted(restored)) == (2, 2.0, ['collections', 'params'])
    step, restored = checkpoints.restore_parameters(part, 'latest')
    assert (step, value(restored)) == (6, 6.0)
    checkpoints.close()


def test_losses_on_other_examples_are_measured_again(tmp_path, absl_log):
    fill(tmp_path, [1.0, 2.0, 3.0, None])
    shutil.rmtree(tmp_path / 'checkpoints' / '3' / 'state')
    checkpoints = checkpoint.Checkpoints(tmp_path, 'abc', validated_on='new')
    assert checkpoints.best_step() == 1
    part = {'params': target()['params']}
    found = checkpoints.validate_again(part, lambda restored: 9 - value(restored))
    assert list(found) == [(1, 1.0, 8.0), (3, 3.0, None)]
    assert 'checkpoint 3 cannot be read' in absl_log.text
    assert list(checkpoints.validate_again(part, value)) == []
    checkpoints.save(5, state(5.0), iterator(), 8.5)
    checkpoints.close()
    checkpoints = checkpoint.Checkpoints(tmp_path, 'abc', validated_on='newest')
    assert (checkpoints.steps(), checkpoints.best_step()) == ([1, 4, 5], 1)
    checkpoints.save(6, state(6.0), iterator(), 8.7)
    checkpoints.close()
    checkpoints = checkpoint.Checkpoints(tmp_path, read_only=True)
    assert checkpoints.best_step() == 6  # of those measured as the newest is
    checkpoints.close()


def test_state_and_data_come_back_together(tmp_path):
    following = fill(tmp_path, [None, None])
    checkpoints, data = checkpoint.Checkpoints(tmp_path, 'abc'), iterator()
    restored = checkpoints.restore(target(), data)
    assert jax.tree.structure(restored) == jax.tree.structure(state(0.0))
    assert value(restored) == 2.0
    assert next(data) == following[2]
    checkpoints.close()


def test_nothing_to_restore(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, 'abc')
    assert checkpoints.restore(target(), iterator()) is None
    checkpoints.close()


def test_a_saved_state_may_be_donated_at_once(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, 'abc')
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    big = state(7.0) | {'params': {'w': jnp.full((1000, 1000), 7.0)}}
    checkpoints.save(1, big, iterator())
    overwrite(big)
    checkpoints.close()
    checkpoints = checkpoint.Checkpoints(tmp_path, 'abc')
    shape = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])),
        state(7.0) | {'params': {'w': jnp.zeros((1000, 1000))}},
    )
    assert (checkpoints.restore(shape, iterator())['params']['w'] == 7).all()
    checkpoints.close()


def test_restores_onto_another_mesh(tmp_path):
    fill(tmp_path, [None])
    checkpoints = checkpoint.Checkpoints(tmp_path, 'abc')
    mesh = sharding.make_mesh(1, 8, 1)
    wanted = target(mesh) | {'params': target(mesh, 'fsdp')['params']}
    restored = checkpoints.restore(wanted, iterator())['params']['w']
    assert restored.sharding.spec == PartitionSpec('fsdp')
    assert restored.addressable_shards[0].data.shape == (1, 4)
    np.testing.assert_array_equal(restored, np.ones((8, 4)))
    checkpoints.close()


def files(folder):
    return sorted(path for path in folder.rglob('*') if path.is_file())


@pytest.fixture
def quick_collection():
    """A garbage collection examines only objects made from here on, not those of JAX and of other tests."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope='module')
def original(tmp_path_factory):
    """(workdir with three checkpoints, the data drawn after each); to alter the folder, copy it."""
    workdir = tmp_path_factory.mktemp('original')
    return workdir, fill(workdir, [3.0, 2.0, 1.0])


@pytest.mark.parametrize('damage', ['truncate', 'half', 'delete'])
@pytest.mark.usefixtures('quick_collection')
def test_any_damaged_file_falls_back_or_does_no_harm(tmp_path, original, damage, absl_log):
    original, following = original
    fallbacks = 0
    for file in files(original / 'checkpoints' / '3'):
        workdir = tmp_path / 'copy'
        shutil.copytree(original, workdir)
        victim = workdir / file.relative_to(original)
        if damage == 'delete':
            victim.unlink()
        else:
            with victim.open('r+b') as opened:
                opened.truncate(0 if damage == 'truncate' else victim.stat().st_size // 2)
        checkpoints, data = checkpoint.Checkpoints(workdir, 'abc'), iterator()
        step = value(checkpoints.restore(target(), data))
        gc.collect()  # Orbax's abandoned reads would complain here, or in any later test
        assert next(data) == following[step]
        if step == 2:
            fallbacks += 1
            assert (workdir / 'corrupt' / '3').is_dir()
            assert checkpoints.steps() == [2]
            checkpoints.save(3, state(3.0), data)  # the same step can be saved again
        else:
            assert step == 3
            assert (workdir / 'corrupt').exists() == (file.name == 'metrics' and damage != 'delete')
        checkpoints.close()
        shutil.rmtree(workdir)
    assert fallbacks >= 5
    assert 'checkpoint 3 cannot be read' in absl_log.text
    assert 'continuing from step 2' in absl_log.text


def test_every_checkpoint_damaged_is_an_error_and_moves_nothing(tmp_path):
    fill(tmp_path, [None, None])
    for step in '12':
        shutil.rmtree(tmp_path / 'checkpoints' / step / 'state')
    checkpoints = checkpoint.Checkpoints(tmp_path, 'abc')
    with pytest.raises(ValueError, match=r'no checkpoint in .* can be read \(steps 2, 1;.*another --workdir'):
        checkpoints.restore(target(), iterator())
    assert checkpoints.steps() == [1, 2]
    with pytest.raises(ValueError, match=r'no suitable checkpoint of .* can be read \(steps 2, 1\)'):
        checkpoints.restore_parameters({'params': target()['params']}, 'latest')
    checkpoints.close()


@pytest.mark.usefixtures('quick_collection')
def test_a_failed_read_leaves_nothing_behind_that_complains_later(tmp_path, monkeypatch):
    """Of many arrays one is damaged: Orbax raises at once and abandons the reads of the others."""
    big = state(1.0) | {'params': {name: jax.random.normal(jax.random.key(0), (300, 300)) for name in 'abcdefghw'}}
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), big)
    checkpoints = checkpoint.Checkpoints(tmp_path, 'abc')
    checkpoints.save(1, big, iterator())
    checkpoints.close()
    for file in (tmp_path / 'checkpoints' / '1' / 'state' / 'ocdbt.process_0' / 'd').iterdir():
        if file.stat().st_size > 1e5:
            file.write_bytes(file.read_bytes()[:1000])
    complaints = []
    monkeypatch.setattr(sys, 'unraisablehook', complaints.append)
    for _ in range(5):
        checkpoints = checkpoint.Checkpoints(tmp_path, 'abc')
        with pytest.raises(ValueError, match='no checkpoint'):
            checkpoints.restore(wanted, iterator())
        with pytest.raises(ValueError, match='no suitable checkpoint'):
            checkpoints.restore_parameters({'params': wanted['params']}, 'latest')
        checkpoints.close()
        gc.collect()
    assert not complaints


def test_parameters_of_the_newest_checkpoint_that_can_be_read(tmp_path, absl_log):
    fill(tmp_path, [None, None])
    shutil.rmtree(tmp_path / 'checkpoints' / '2' / 'state')
    checkpoints = checkpoint.Checkpoints(tmp_path, read_only=True)
    step, _ = checkpoints.restore_parameters({'params': target()['params']}, 'latest')
    assert step == 1
    assert 'checkpoint 2 of' in absl_log.text
    assert checkpoints.steps() == [1, 2]
    checkpoints.close()


def test_reading_frees_nothing_of_a_training_in_the_same_process(tmp_path):
    fill(tmp_path, [None])
    (tmp_path / 'checkpoints' / 'deleted' / '7').mkdir(parents=True)
    checkpoint.Checkpoints(tmp_path, read_only=True).close()
    assert (tmp_path / 'checkpoints' / 'deleted' / '7').exists()


def test_other_data_are_refused(tmp_path):
    fill(tmp_path, [None])
    checkpoints = checkpoint.Checkpoints(tmp_path, 'def')
    with pytest.raises(ValueError, match=r"data_fingerprint 'abc', this run 'def'; point config.data.data_dir"):
        checkpoints.restore(target(), iterator())
    checkpoints.close()


def test_the_position_of_other_numbers_of_processes_is_read(tmp_path):
    """The files are as two processes leave them, and only their own name and number say so."""
    following = fill(tmp_path, [None])
    files = tmp_path / 'checkpoints' / '1'
    for index in range(2):
        shutil.copy(files / 'data' / 'process_0-of-1.json', files / 'data' / f'process_{index}-of-2.json')
    (files / 'data' / 'process_0-of-1.json').unlink()
    provenance = files / 'provenance' / 'metadata'
    provenance.write_text(json.dumps(json.loads(provenance.read_text()) | {'processes': 2}))
    checkpoints, data = checkpoint.Checkpoints(tmp_path, 'abc'), iterator()
    assert value(checkpoints.restore(target(), data)) == 1.0
    assert next(data) == following[1]
    checkpoints.close()


def test_processes_that_see_other_checkpoints_are_refused(tmp_path, monkeypatch):
    fill(tmp_path, [None, None])
    checkpoints = checkpoint.Checkpoints(tmp_path, 'abc')
    for other in ('none', 'step 1'):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.jax, 'process_count', lambda: 2)
            gathered = lambda newest, other=other: np.stack([newest, agreement.compared(other)])  # noqa: E731
            patch.setattr(checkpoint.multihost_utils, 'process_allgather', gathered)
            message = rf'the newest: step 2 for process 0, {other} for process 1\): .*; repeat the command'
            with pytest.raises(ValueError, match=message):
                checkpoints.restore(target(), iterator())
    checkpoints.close()


def test_all_processes_take_a_step_that_each_of_them_can_read(tmp_path, monkeypatch):
    fill(tmp_path, [None, None])
    checkpoints, others = checkpoint.Checkpoints(tmp_path, 'abc'), iter((False, True))
    alone = checkpoint.multihost_utils.process_allgather

    def gathered(own, **options):
        return np.array([own, next(others)]) if isinstance(own, np.bool_) else alone(own, **options)

    monkeypatch.setattr(checkpoint.multihost_utils, 'process_allgather', gathered)
    assert value(checkpoints.restore(target(), iterator())) == 1.0
    assert checkpoints.steps() == [1]
    assert (tmp_path / 'corrupt' / '2').is_dir()
    checkpoints.close()


@pytest.mark.parametrize('error', [MemoryError(), OSError('503 UNAVAILABLE'), RuntimeError('RESOURCE_EXHAUSTED: 9 GB')])
def test_what_says_nothing_about_a_file_moves_none(tmp_path, monkeypatch, error):
    fill(tmp_path, [1.0, 2.0])
    checkpoints = checkpoint.Checkpoints(tmp_path, 'abc', validated_on='new')

    def fails(step, **parts):
        raise error

    monkeypatch.setattr(checkpoints, '_read', fails)
    part = {'params': target()['params']}
    for reads in (
        lambda: checkpoints.restore(target(), iterator()),
        lambda: checkpoints.restore_parameters(part, 'latest'),
        lambda: list(checkpoints.validate_again(part, value)),
    ):
        with pytest.raises(type(error)):
            reads()
    assert (checkpoints.steps(), checkpoints.best_step()) == ([1, 2], 1)
    checkpoints.close()


def test_reading_needs_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match='has no checkpoint yet'):
        checkpoint.Checkpoints(tmp_path, read_only=True)
    fill(tmp_path, [None])
    checkpoints = checkpoint.Checkpoints(tmp_path, read_only=True)
    with pytest.raises(ValueError, match='no checkpoint with a validation loss'):
        checkpoints.restore_parameters({'params': target()['params']}, 'best')
    checkpoints.close()


def config(**changes):
    result = ConfigDict(
        {
            'steps': 10,
            'data': {'data_dir': None},
            'mesh': {'data': -1},
            'run': {'log_every': 5},
            'betas': (0.9, 0.95),
        }
    )
    result.update_from_flattened_dict(changes)
    return result


def test_config_is_saved_as_json_and_loaded(tmp_path):
    saved_config.claim(tmp_path / 'run', config())
    assert json.loads((tmp_path / 'run' / 'config.json').read_text())['steps'] == 10
    assert saved_config.load(tmp_path / 'run').run.log_every == 5
    with pytest.raises(ValueError, match=r'no config.json'):
        saved_config.load(tmp_path)
    (tmp_path / 'config.json').write_text('{"steps": ')
    with pytest.raises(ValueError, match='not valid JSON'):
        saved_config.load(tmp_path)
    (tmp_path / 'config.json').write_text('[1]')
    with pytest.raises(ValueError, match=r'not valid JSON \(\[1\] is not an object\)'):
        saved_config.load(tmp_path)


def test_a_workdir_must_be_a_folder_that_can_be_written(tmp_path):
    (tmp_path / 'file').touch()
    for workdir in (tmp_path / 'file', tmp_path / 'file' / 'run'):
        with pytest.raises(ValueError, match=r'cannot be written \(.*choose another --workdir'):
            saved_config.claim(workdir, config())
    with pytest.raises(ValueError, match='the workdir is empty'):
        saved_config.claim('', config())


def test_a_workdir_belongs_to_one_config(tmp_path):
    saved_config.claim(tmp_path, config())
    saved_config.claim(tmp_path, config(**{'run.log_every': 7, 'mesh.data': 8, 'data.data_dir': '/elsewhere'}))
    assert saved_config.load(tmp_path).run.log_every == 7
    other = config(steps=20)
    other.chance = 3
    with pytest.raises(ValueError, match=r"chance: 'absent' there, 3 here; steps: 10 there, 20 here\); choose another"):
        saved_config.claim(tmp_path, other)


def test_a_field_that_a_run_is_older_than_has_its_default(tmp_path, caplog):
    given = common.base()
    saved = given.to_dict()
    del saved['seed'], saved['run']['test_examples'], saved['model']['mlp_dropout']
    (tmp_path / 'config.json').write_text(json.dumps(saved))
    with caplog.at_level('INFO', logger='absl'):
        assert saved_config.load(tmp_path).to_dict() == given.to_dict()
        assert saved_config.differences(tmp_path, given) == []
    said = 'their defaults are used: model.mlp_dropout, run.test_examples, seed'
    assert [said in record.message for record in caplog.records] == [True]
    given.model.mlp_dropout = 0.5
    with pytest.raises(ValueError, match=r'\(model.mlp_dropout: 0.0 there, 0.5 here\); choose another'):
        saved_config.claim(tmp_path, given)
    given.model.mlp_dropout = 0.0
    saved_config.claim(tmp_path, given)
    assert json.loads((tmp_path / 'config.json').read_text()) == given.to_dict()


@pytest.mark.parametrize('which', ['latest', 'best'])
def test_a_step_that_a_training_replaces_before_it_is_read(tmp_path, which):
    """All the steps that the reader has listed are gone when it begins to read."""
    fill(tmp_path, [3.0])
    reader = checkpoint.Checkpoints(tmp_path, read_only=True)
    writer, data = checkpoint.Checkpoints(tmp_path, 'abc'), iterator()
    for step in (2, 3, 4):
        writer.save(step, state(float(step)), data, 3.0 - 0.1 * step)
    writer.close()
    found, restored = reader.restore_parameters({'params': target()['params']}, which)
    assert (found, value(restored)) == (4, 4.0)
    reader.close()


@pytest.mark.parametrize('which', ['latest', 'best'])
def test_a_step_that_a_training_replaces_while_it_is_read(tmp_path, monkeypatch, which):
    """Each of the first reads finds its step gone, as if a training had saved and removed it in between."""
    fill(tmp_path, [3.0])
    reader = checkpoint.Checkpoints(tmp_path, read_only=True)
    writer, data = checkpoint.Checkpoints(tmp_path, 'abc'), iterator()
    read, step = checkpoint.Checkpoints._read, 1

    def racing(self, number, **items):
        nonlocal step
        while step < 7 and self is reader and number > step - 2:
            step += 1
            writer.save(step, state(float(step)), data, 3.0 - 0.1 * step)
            writer.manager.wait_until_finished()
        return read(self, number, **items)

    monkeypatch.setattr(checkpoint.Checkpoints, '_read', racing)
    found, restored = reader.restore_parameters({'params': target()['params']}, which)
    assert (found, value(restored)) == (step, float(step))
    reader.close()
    writer.close()


def test_a_full_disk_is_told_in_a_line_and_costs_nothing(tmp_path, monkeypatch):
    fill(tmp_path, [1.0])
    checkpoints = checkpoint.Checkpoints(tmp_path, 'abc')
    with monkeypatch.context() as patch:

        def full(*_, **__):
            raise ValueError("RESOURCE_EXHAUSTED: Failed to write 3576 bytes to file 8 [os_error_code='28']")

        patch.setattr(checkpoints.manager, 'save', full)
        message = r'no space left in .* for a checkpoint, .* about 140 bytes .*; make room .* \(steps: 1\)'
        with pytest.raises(OSError, match=message):
            checkpoints.save(2, state(2.0), iterator())
    checkpoints.save(2, state(2.0), iterator())
    checkpoints.close()
    assert checkpoint.Checkpoints(tmp_path, read_only=True).steps() == [1, 2]
