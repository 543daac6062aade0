"""Data directories in a cloud store; see `cloud`."""

import itertools
from pathlib import Path

import cloud
import numpy as np
import pytest

from combiner.data import pipeline, tasks
from combiner.data.task import open_split

DATA = 'gs://bucket/data'


@pytest.fixture
def stored(data_dir, monkeypatch):
    """The data directory of the tests, in the store too."""
    cloud.serve(monkeypatch)
    for file in Path(data_dir).rglob('*'):
        if file.is_file():
            cloud.put(f'bucket/data/{file.relative_to(data_dir)}', file.read_bytes())
    return data_dir


@pytest.mark.parametrize(
    ('name', 'options'), [('cifar10', {}), ('lra_listops', {}), ('lra_pathfinder', {'size': 32}), ('lra_text', {})]
)
def test_records_are_read_from_the_store(stored, name, options):
    task = tasks.make(name, **options)
    local, remote = (pipeline.train_batches(task, batch_size=4, seed=1, data_dir=folder) for folder in (stored, DATA))
    for expected, batch in itertools.islice(zip(local, remote, strict=True), 3):
        for field in expected:
            np.testing.assert_array_equal(expected[field], batch[field], strict=True)
    assert pipeline.fingerprint(task, 'train', stored) == pipeline.fingerprint(task, 'train', DATA)


def test_tokens_go_to_a_local_folder_that_is_asked_for(stored, tmp_path, monkeypatch):
    task = tasks.make('wiki40b', length=32, vocab_size=320)
    with pytest.raises(
        ValueError, match=r'gs://bucket/data is a cloud path: set the environment variable COMBINER_CACHE'
    ):
        open_split(task, 'train', DATA)
    monkeypatch.setenv('COMBINER_CACHE', str(tmp_path))
    assert pipeline.fingerprint(task, 'train', DATA) == pipeline.fingerprint(task, 'train', stored)


def test_what_is_not_there_or_cannot_be_read_there_is_refused(stored):
    with pytest.raises(ValueError, match=r'can be read from a local disk only; copy them to a folder of this machine'):
        open_split(tasks.make('lra_retrieval'), 'train', DATA)
    with pytest.raises(ValueError, match="data directory 'gs://bucket/other' does not exist"):
        open_split(tasks.make('cifar10'), 'train', 'gs://bucket/other')
    (shard,) = (name for name in cloud.OBJECTS if 'cifar10-train.array_record' in name)
    del cloud.OBJECTS[shard]
    with pytest.raises(FileNotFoundError, match=f'gs://{shard} of cifar10 is missing; delete'):
        open_split(tasks.make('cifar10'), 'train', DATA)
