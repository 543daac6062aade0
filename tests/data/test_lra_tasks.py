import numpy as np
import pytest

from combiner.data import lra_tasks, tasks
from combiner.data.lra import listops
from combiner.data.task import open_split


def first(task, data_dir, split='test'):
    source = open_split(task, split, data_dir)
    return source[0], task.transform(source[0])


def test_listops_is_tokens_without_parentheses_and_the_value(data_dir):
    record, example = first(tasks.make('lra_listops'), data_dir)
    tokens = example['tokens'][example['valid']]
    words = [word for word in record['source'].split() if word not in '()']
    assert [listops.VOCABULARY[token] for token in tokens] == words
    assert example['targets'] == listops.evaluate(tokens.tolist())
    assert not example['tokens'][~example['valid']].any()


def test_an_expression_that_is_too_long_is_refused_by_its_key():
    record = {'source': '( ( [MAX 1 ) ] )', 'label': 1, 'key': 'test/4'}
    assert lra_tasks.list_operations(record, 3)['valid'].all()
    with pytest.raises(ValueError, match='record test/4 has 3 tokens, more than length=2; raise length'):
        lra_tasks.list_operations(record, 2)


@pytest.mark.parametrize(
    ('validation', 'sizes'), [('held_out', (18, 2, 6)), ('test', (20, 6, 6))], ids=['held_out', 'test']
)
def test_text_holds_reviews_out_unless_it_follows_the_benchmark(data_dir, validation, sizes):
    task = tasks.make('lra_text', validation=validation)
    assert task.length == 4000
    assert tuple(len(open_split(task, split, data_dir)) for split in ('train', 'validation', 'test')) == sizes
    record, example = first(task, data_dir)
    assert bytes(example['tokens'][example['valid']].astype(np.uint8) - 1) == record['text']


def test_retrieval_reads_pairs(data_dir):
    record, example = first(tasks.make('lra_retrieval', length=50), data_dir)
    for row, name in enumerate(('text1', 'text2')):
        assert bytes((example['tokens'][row] - 1).astype(np.uint8)) == record[name][:50]
    assert example['targets'] == record['label']


@pytest.mark.parametrize('black_is_padding', [False, True])
def test_pathfinder_reads_the_background_unless_configured_otherwise(data_dir, black_is_padding):
    task = tasks.make('lra_pathfinder', black_is_padding=black_is_padding)
    record, example = first(task, data_dir)
    np.testing.assert_array_equal(example['tokens'].reshape(32, 32), record['image'])
    assert example['valid'].all() != black_is_padding


def test_pathfinder_refuses_other_sizes_and_difficulties():
    with pytest.raises(ValueError, match='lra_pathfinder33_easy'):
        tasks.make('lra_pathfinder', size=33, difficulty='easy')
    with pytest.raises(ValueError, match='lra_pathfinder32_harder'):
        tasks.make('lra_pathfinder', difficulty='harder')
