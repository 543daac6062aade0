import dataclasses
import json
import subprocess

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from combiner import evaluate, sample
from combiner.data import tasks
from combiner.data.task import SPLITS
from combiner.run import agreement, provenance
from experiments.harness import loss_by_position


class Changed:
    """The tiny images of a split, one value of one of them another."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        record = self.images[index]
        return record | {'image': record['image'] ^ (index == 3)}


def changed(tiny, splits=(), identity=None):
    """The tiny task with other images in these splits."""
    source = tiny.TASK.source
    return dataclasses.replace(
        tiny.TASK,
        source=lambda split, data_dir: (Changed if split in splits else lambda x: x)(source(split, data_dir)),
        identity=(lambda split, data_dir: identity) if identity else None,
    )


def put(monkeypatch, task):
    monkeypatch.setattr(tasks, 'TASKS', {'tiny': lambda: task})


def test_a_training_records_every_split_and_what_it_is_made_with(workdir, tiny, tmp_path, monkeypatch):
    saved = json.loads((workdir / 'data.json').read_text())
    assert saved == provenance.fingerprints(tiny.TASK, None)
    assert set(saved) == {'train', 'validation', 'test'}
    task = changed(tiny, identity={'tokenizer': '12'})
    provenance.claim(tmp_path, provenance.fingerprints(task, None))
    assert json.loads((tmp_path / 'data.json').read_text()) == saved | {'tokenizer': '12'}


@pytest.mark.parametrize('split', SPLITS)
def test_hosts_with_other_data_are_refused(tiny, monkeypatch, split):
    found = provenance.fingerprints(tiny.TASK, None)
    there = provenance.fingerprints(changed(tiny, [split]), None)
    assert provenance.of_all_processes(tiny.TASK, None) == found
    other = agreement.compared('; '.join(f'{name}: {value}' for name, value in there.items()))
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    monkeypatch.setattr(multihost_utils, 'process_allgather', lambda own: np.stack([own, other]))
    with pytest.raises(ValueError, match=f'process 0 has .*{split}: {found[split]}.*process 1 has .*{there[split]}'):
        provenance.of_all_processes(tiny.TASK, None)


@pytest.mark.parametrize('split', SPLITS)
def test_other_data_are_refused_and_never_overwrite(workdir, tiny, monkeypatch, split):
    monkeypatch.setattr(
        sample, 'complete', lambda model, variables, prompts, *_, **options: np.zeros((len(prompts), 48), int)
    )
    first = evaluate.evaluate(workdir, split)
    drawn = sample.sample(workdir, split=split, examples=1, samples=1)
    path = workdir / f'evaluation_{split}_latest.json'
    before = path.read_bytes(), drawn.read_bytes()
    put(monkeypatch, changed(tiny, [split]))
    refused = rf'trained with other data \({split}: \w+ then, \w+ now\).*--other_data'
    for command in (evaluate.evaluate, sample.sample, loss_by_position.loss_by_position):
        with pytest.raises(ValueError, match=refused):
            command(workdir, split=split)
    other = evaluate.evaluate(workdir, split, other_data=True)
    elsewhere = sample.sample(workdir, split=split, examples=1, samples=1, other_data=True)
    assert other['nats'] != first['nats']
    assert (path.read_bytes(), drawn.read_bytes()) == before
    assert elsewhere != drawn
    (found,) = workdir.glob(f'evaluation_{split}_latest_other_data_*.json')
    assert json.loads(found.read_text())['nats'] == other['nats']
    # The other splits are as they were.
    others = set(SPLITS) - {split}
    assert not [each for each in others if provenance.check(workdir, changed(tiny, [split]), each, None)]


def test_training_refuses_every_changed_split_and_tokenizer(workdir, tiny, tmp_path):
    provenance.claim(tmp_path, provenance.fingerprints(changed(tiny, identity={'tokenizer': '12'}), None))
    another_tokenizer = changed(tiny, identity={'tokenizer': '13'})
    for task in (*(changed(tiny, [split]) for split in SPLITS), another_tokenizer):
        with pytest.raises(ValueError, match=r'trained with other data .*choose another --workdir'):
            provenance.claim(tmp_path, provenance.fingerprints(task, None))
    with pytest.raises(ValueError, match=r'tokenizer: 12 then, 13 now'):
        provenance.check(tmp_path, another_tokenizer, 'test', None)


def test_a_run_that_does_not_record_its_data_goes_on_and_says_so(workdir, tiny, tmp_path, absl_log):
    assert provenance.check(tmp_path, tiny.TASK, 'test', None) == ''
    assert 'does not record the test of its training' in absl_log.text
    (tmp_path / 'data.json').write_text('[1')
    with pytest.raises(ValueError, match=r'data.json is not valid JSON'):
        provenance.check(tmp_path, tiny.TASK, 'test', None)


def test_a_test_split_that_is_absent_stops_no_training(tiny, absl_log):
    def source(split, data_dir):
        if split == missing:
            raise FileNotFoundError(f'no {split}')
        return tiny.Images(split)

    missing = 'test'
    task = dataclasses.replace(tiny.TASK, source=source)
    assert set(provenance.fingerprints(task, None)) == {'train', 'validation'}
    assert 'the test split cannot be read (no test)' in absl_log.text
    missing = 'validation'
    with pytest.raises(FileNotFoundError, match='no validation'):
        provenance.fingerprints(task, None)


def test_the_commit_is_that_of_a_repository_of_this_code(tmp_path, monkeypatch):
    head = ('git', '-C', provenance.__file__.rpartition('/')[0], 'rev-parse', '--short=12', 'HEAD')
    expected = subprocess.run(head, capture_output=True, text=True, check=False)
    found = provenance.commit()
    assert found is None if expected.returncode else found.removesuffix('-dirty') == expected.stdout.strip()
    installed = tmp_path / 'site-packages' / 'combiner' / 'run' / 'provenance.py'
    installed.parent.mkdir(parents=True)
    (installed.parents[1] / '__init__.py').touch()
    subprocess.run(['git', 'init', '--quiet', str(tmp_path)], check=True)
    monkeypatch.setattr(provenance, '__file__', str(installed))
    assert provenance.commit() is None
