import dataclasses

import numpy as np
import pytest
from PIL import Image

from combiner.data import inspect, pretraining, tasks
from configs import photos, text


def describe(config, split='train', **changes):
    arguments = {'examples': 2, 'count': 2, 'out': None} | changes
    return inspect.describe(config, split, arguments['examples'], arguments['count'], arguments['out'])


def test_images_are_described_and_drawn(tmp_path):
    path = tmp_path / 'images.png'
    said = describe(photos.get_config(), out=str(path))
    assert 'task photos16: photos 16x16' in said
    assert 'records: train 5,912, validation 1,360, test 1,853' in said
    assert '16 examples, 12,288 tokens, 12,288 targets that count' in said
    assert np.asarray(Image.open(path)).shape == (4 * 18, 4 * 2 * 18, 3)


def test_text_is_decoded_with_its_documents(data_dir):
    config = text.get_config('documents=packed,length=256,vocab_size=300')
    config.task, config.data.data_dir, config.data.batch_size = 'pg19', data_dir, 2
    said = describe(config)
    assert 'documents in a row: 1 to ' in said
    assert 'example 0: ' in said
    assert 'to 256, median 256; ' in said
    said = describe(config, 'test')
    assert 'words: ' in said
    assert 'bytes: ' in said


def test_classes_are_counted(data_dir):
    config = photos.get_config()
    config.task, config.data.data_dir = 'lra_text', data_dir
    said = describe(config, 'test', examples=1)
    assert 'classes: 0: 3, 1: 3' in said
    assert '6 examples, ' in said  # of a batch of 32, which is filled up
    assert 'lengths: 0 to' not in said
    assert 'example 0: class ' in said


def test_tokens_outside_of_the_vocabulary_are_told(monkeypatch):
    task = tasks.make('photos16')
    monkeypatch.setattr(tasks, 'make', lambda *_, **options: dataclasses.replace(task, vocab_size=100))
    with pytest.raises(ValueError, match=r'the tokens are 0 to 2\d\d, but the task has vocab_size=100: .* 0 to 99'):
        describe(photos.get_config())


@pytest.mark.parametrize('kind', pretraining.KINDS)
@pytest.mark.parametrize('name', ['lra_image', 'lra_pathfinder'])
def test_grey_images_are_drawn_with_what_is_masked(data_dir, tmp_path, name, kind):
    config = photos.get_config()
    config.task, config.data.data_dir, config.data.options = name, data_dir, {'pretrain': kind}
    said = describe(config, 'test', out=str(tmp_path / 'grey.png'))
    assert 'the first 2 images' in said
    assert np.asarray(Image.open(tmp_path / 'grey.png')).ndim == 2
