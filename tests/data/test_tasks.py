import dataclasses
import inspect
from pathlib import Path

import numpy as np
import pytest

from combiner import metrics
from combiner.data import pipeline, tasks
from combiner.data.task import SPLITS, open_split

# Sizes that suit the small data sets.
OPTIONS = {'length': 64, 'vocab_size': 300}
OTHERS = {'lra_listops': {'length': 2000}, 'prose': {'vocab_size': 400}, 'prose_masked': {'vocab_size': 400}}
OTHERS['wiki40b'] = {'vocab_size': 310}


def small(name):
    known = inspect.signature(tasks.TASKS[name]).parameters
    return {option: value for option, value in (OPTIONS | OTHERS.get(name, {})).items() if option in known}


@pytest.mark.parametrize('name', tasks.TASKS)
def test_every_task_feeds_what_it_declares(name, data_dir):
    task = tasks.make(name, **small(name))
    assert task.name == name
    assert set(task.metrics) <= set(metrics.FIGURES)
    keys = {}
    for split in SPLITS:
        source = open_split(task, split, data_dir)
        keys[split] = {source[index]['key'] for index in range(min(len(source), 200))}
        assert len(keys[split]) == min(len(source), 200)
        for batch in list(pipeline.eval_batches(task, split, batch_size=2, data_dir=data_dir, limit=4)):
            check(task, batch)
    check(task, next(iter(pipeline.train_batches(task, batch_size=2, seed=0, data_dir=data_dir))))
    assert not keys['train'] & keys['validation']
    assert not keys['test'] & (keys['train'] | keys['validation'])


def check(task, batch):
    tokens, targets, weights = (batch[name] for name in ('tokens', 'targets', 'weights'))
    assert tokens.shape == (2, *task.input_shape)
    assert weights.shape == targets.shape == ((2,) if task.classes else tokens.shape)
    assert (tokens.dtype, targets.dtype, weights.dtype) == (np.int32, np.int32, np.float32)
    assert 0 <= tokens.min() <= tokens.max() < task.vocab_size
    assert 0 <= targets.min() <= targets.max() < (task.classes or task.vocab_size)
    assert weights.any()
    for name in ('valid', 'segments'):
        assert batch.get(name, tokens).shape == tokens.shape
    assert set(batch) <= {'tokens', 'targets', 'weights', 'valid', 'segments', 'words', 'bytes'}
    if 'valid' in batch and not task.classes:
        assert not weights[~batch['valid']].any()


@pytest.mark.parametrize(('name', 'length'), [('photos16', 768), ('photos32', 3072)])
def test_lengths(name, length):
    assert tasks.make(name).length == length


@pytest.mark.parametrize(('name', 'tile'), [('downsampled_imagenet64', 16), ('cifar10', 8)])
def test_tiles_of_images(name, tile, data_dir):
    whole, task = tasks.make(name), tasks.make(name, tile=tile)
    assert task.shape == (tile, tile, 3)
    assert task.dataset == f'{whole.dataset}, tiles of {tile}x{tile}'
    source, images = (open_split(each, 'validation', data_dir) for each in (task, whole))
    np.testing.assert_array_equal(source[1]['image'], images[0]['image'][:tile, tile : 2 * tile])
    check(task, next(iter(pipeline.train_batches(task, batch_size=2, seed=0, data_dir=data_dir))))


@pytest.mark.parametrize('tile', [-1, 7, 128])
def test_tiles_divide_images(tile):
    with pytest.raises(ValueError, match=f'tile={tile} must divide the side of the images, 64'):
        tasks.make('imagenet_resized64', tile=tile)


def test_unknown_task():
    with pytest.raises(ValueError, match=r"'photo16'; did you mean 'photos16'\? known: photos16, photos32, "):
        tasks.make('photo16')


def test_unknown_split():
    with pytest.raises(ValueError, match=r"'valid' of task 'photos16'; known: train, validation, test"):
        open_split(tasks.make('photos16'), 'valid')


def test_missing_data_directory(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere' does not exist"):
        open_split(tasks.make('photos16'), 'train', str(tmp_path / 'nowhere'))
    with pytest.raises(ValueError, match='the data directory is empty; give a file or folder'):
        open_split(tasks.make('photos16'), 'train', '')


def test_empty_split():
    task = dataclasses.replace(tasks.make('photos16'), source=lambda split, data_dir: [])
    with pytest.raises(ValueError, match=r"'train' of task 'photos16' has no records"):
        open_split(task, 'train')


def test_options():
    with pytest.raises(ValueError, match="task 'photos16' has no option length; it has: none"):
        tasks.make('photos16', length=3)
    with pytest.raises(ValueError, match="task 'prose' has no option strid; it has: length, vocab_size, "):
        tasks.make('prose', strid=3)
    with pytest.raises(ValueError, match="unknown documents='mixed'; choose packed, joined, cropped"):
        tasks.make('prose', documents='mixed')
    with pytest.raises(ValueError, match='length=64 must be at least 2, and stride=65 in 0'):
        tasks.make('prose', length=64, stride=65)
    with pytest.raises(ValueError, match="unknown files='mine'; choose generated or release"):
        tasks.make('lra_listops', files='mine')


@pytest.mark.parametrize('name', sorted(set(tasks.TASKS) - {'photos16', 'photos32', 'prose', 'prose_masked', 'recall'}))
def test_missing_data_say_how_to_get_them(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=r'combiner\.data\.prepare|combiner\.data\.generate|expected one of'):
        open_split(tasks.make(name), 'train', str(tmp_path))


def test_the_guide_has_every_task():
    guide = (Path(__file__).parents[2] / 'docs' / 'data.md').read_text(encoding='utf-8')
    assert not [name for name in tasks.TASKS if f'`{name}`' not in guide]


@pytest.fixture
def module_of_a_user(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    lines = (
        'from combiner.data import tasks',
        'TASKS = {"mine": lambda *, size=16: tasks.make(f"photos{size}")}',
        'other = print',
    )
    (tmp_path / 'tasks_of_a_user.py').write_text('\n'.join(lines), encoding='utf-8')


def test_a_task_may_be_an_entry_of_another_module(module_of_a_user):
    assert tasks.make('tasks_of_a_user:mine', size=32).length == 3072
    with pytest.raises(ValueError, match='has no option length; it has: size'):
        tasks.make('tasks_of_a_user:mine', length=3)


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('tasks_of_a_user:min', "unknown task 'min'; did you mean 'mine'"),
        ('tasks_of_a_user:other', "unknown task 'other'"),  # nothing but the entries is called
        ('os:system', 'cannot import the task os:system, an entry of os.TASKS'),
        ('no_such_module:mine', 'No module named'),
        (':mine', 'cannot import the task :mine'),
    ],
)
def test_a_path_leads_to_tasks_only(module_of_a_user, name, message):
    with pytest.raises(ValueError, match=message):
        tasks.make(name)
