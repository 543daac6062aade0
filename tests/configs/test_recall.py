import pytest

from combiner import build
from combiner.data import tasks
from configs import recall


@pytest.mark.parametrize('scale', ['full', 'cpu', 'quick'])
def test_the_task_has_room_at_every_scale(scale):
    config = recall.get_config(f'scale={scale}')
    task = build.task(config)
    assert task.length == config.data.options.length
    assert task.name in tasks.TASKS


def test_argument():
    config = recall.get_config('attention=fixed+block=8,length=128,pairs=4,layers=2')
    assert config.model.attention.to_dict() == {'name': 'fixed', 'block': 8}
    assert (config.data.options.length, config.data.options.pairs, config.model.layers) == (128, 4, 2)
    assert config.data.batch_size * 128 == recall.get_config().data.batch_size * 256
