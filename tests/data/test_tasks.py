import dataclasses

import numpy as np
import pytest

from combiner.data import tasks
from combiner.data.task import SPLITS, open_split


@pytest.mark.parametrize('name', tasks.TASKS)
@pytest.mark.parametrize('split', SPLITS)
def test_every_task_feeds_what_it_declares(name, split):
    task = tasks.make(name)
    assert task.name == name
    source = open_split(task, split)
    for index in (0, len(source) - 1):
        example = task.transform(source[index])
        assert example['tokens'].shape == example['weights'].shape == (task.length,)
        assert example['tokens'].dtype == np.int32
        assert example['weights'].dtype == np.float32
        assert 0 <= example['tokens'].min() <= example['tokens'].max() < task.vocab_size


@pytest.mark.parametrize(('name', 'length'), [('photos16', 768), ('photos32', 3072)])
def test_lengths(name, length):
    assert tasks.make(name).length == length


def test_unknown_task():
    with pytest.raises(ValueError, match=r"'photo16'; did you mean 'photos16'\? known: photos16, photos32, "):
        tasks.make('photo16')


def test_unknown_split():
    with pytest.raises(ValueError, match=r"'valid' of task 'photos16'; known: train, validation, test"):
        open_split(tasks.make('photos16'), 'valid')


def test_missing_data_directory(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere' does not exist"):
        open_split(tasks.make('photos16'), 'train', str(tmp_path / 'nowhere'))
    with pytest.raises(ValueError, match=r"data directory '' does not exist; .*leave data_dir unset"):
        open_split(tasks.make('photos16'), 'train', '')


def test_empty_split():
    task = dataclasses.replace(tasks.make('photos16'), source=lambda split, data_dir: [])
    with pytest.raises(ValueError, match=r"'train' of task 'photos16' has no records"):
        open_split(task, 'train')
