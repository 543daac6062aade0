import numpy as np
import pytest

from combiner.data import recall, tasks
from combiner.data.task import open_split


def test_every_key_comes_again_at_its_distance_with_its_value():
    layout = recall.Layout(length=96, pairs=6, keys=8, values=5)
    for reach in recall.ranges(96):
        for record in recall.Recall(layout, [reach], seed=3, count=20):
            tokens, answers = record['tokens'], record['answers']
            pairs = np.flatnonzero((tokens > 0) & (tokens <= 8 * 5))
            values = {int(tokens[at] - 1) // 5: (int(tokens[at] - 1) % 5, at) for at in pairs}
            assert len(pairs) == len(values) == len(answers) == 6  # no key has two values
            assert np.count_nonzero(tokens) == 3 * 6
            for answer in answers:
                value, at = values[int(tokens[answer - 1]) - 1 - 8 * 5]
                assert tokens[answer] == 1 + 8 * 5 + 8 + value
                assert answer - 1 - at in reach


def test_ranges_cover_every_distance_once():
    for length in (6, 7, 64, 100, 256):
        for pairs in (1, length // 8):
            assert [d for reach in recall.ranges(length, pairs) for d in reach] == list(range(4, length - 1))
    assert recall.ranges(256, 8)[-2:] == [range(64, 128), range(128, 255)]


@pytest.mark.parametrize('pairs', [1, 8, 16])
@pytest.mark.parametrize('length', [64, 66, 80, 96, 128, 130, 136, 150, 177, 180, 264, 514])
def test_every_range_has_room(length, pairs):
    pairs = min(pairs, length // 8)
    task = tasks.make('recall', length=length, pairs=pairs)
    for name in task.evaluations:
        source = open_split(task.evaluated(name), 'test')
        assert all(len(source[index]['answers']) == pairs for index in range(8))


def test_splits_and_indices_differ_and_reading_again_does_not():
    task = tasks.make('recall', length=64, pairs=4)
    seen = [open_split(task, split)[i]['tokens'].tobytes() for split in ('train', 'validation', 'test') for i in (0, 1)]
    assert len(set(seen)) == 6
    assert open_split(task, 'test')[1]['tokens'].tobytes() == seen[-1]


def test_only_values_after_keys_count_and_each_range_has_a_result():
    task = tasks.make('recall', length=64, pairs=4)
    record = open_split(task, 'train')[0]
    np.testing.assert_array_equal(np.flatnonzero(task.transform(record)['weights']), np.sort(record['answers']))
    assert list(task.evaluations) == ['all', 'distance 4–7', 'distance 8–15', 'distance 16–31', 'distance 32–62']
    far = open_split(task.evaluated('distance 32–62'), 'test')[0]
    assert far['answers'].min() >= 33


@pytest.mark.parametrize('options', [{'pairs': 17}, {'pairs': 0}, {'length': 63}, {'values': 1}])
def test_sizes_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f'{next(iter(options))}={next(iter(options.values()))}'):
        tasks.make('recall', **options)


def test_pairs_without_room_are_refused():
    layout = recall.Layout(length=16, pairs=6, keys=8, values=2)
    with pytest.raises(ValueError, match='6 pairs find no room in 16 tokens'):
        recall.Recall(layout, recall.ranges(16), seed=0, count=1)[0]
