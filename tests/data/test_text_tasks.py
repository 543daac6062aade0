import itertools
import json

import numpy as np
import pytest

from combiner import sample
from combiner.data import pipeline, tasks, text_tasks, tfds_sources
from combiner.data.task import SPLITS, open_split
from combiner.data.text.tokenizer import END_OF_DOCUMENT, MASK, Tokenizer

VOCABULARY = 310


def make(name='wiki40b', **options):
    return tasks.make(name, **({'length': 48, 'vocab_size': VOCABULARY} | options))


def joined(batches):
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


@pytest.mark.parametrize('evaluation', text_tasks.EVALUATIONS)
@pytest.mark.parametrize(('stride', 'batch_size'), [(0, 1), (0, 7), (48, 7), (17, 1), (1, 7)])
def test_evaluation_counts_every_token_word_and_byte_of_the_documents_once(data_dir, evaluation, stride, batch_size):
    task = make(stride=stride, evaluation=evaluation)
    read = joined(list(pipeline.eval_batches(task, 'test', batch_size=batch_size, data_dir=data_dir)))
    records = tfds_sources.open_tfds('wiki40b/en', 'test', data_dir)
    texts = [records[index]['text'].decode() for index in range(len(records))]
    assert read['bytes'].sum() == sum(len(text.encode()) for text in texts)
    markers = ('\n_START_ARTICLE_\n', '\n_START_PARAGRAPH_\n', '_NEWLINE_')
    words = sum(len(split_at(text, markers)) for text in texts)
    assert read['words'].sum() == words
    counted = read['targets'][read['weights'] > 0]
    assert (counted == END_OF_DOCUMENT).sum() == len(texts)
    without = make(stride=0)
    plain = joined(list(pipeline.eval_batches(without, 'test', batch_size=1, data_dir=data_dir)))
    np.testing.assert_array_equal(counted, plain['targets'][plain['weights'] > 0])


@pytest.mark.parametrize('name', ['wiki40b', 'c4_masked'])
@pytest.mark.parametrize('documents', text_tasks.DOCUMENTS)
@pytest.mark.parametrize('split', SPLITS)
def test_every_split_and_kind_of_documents_is_evaluated_both_ways(data_dir, name, documents, split):
    task = make(name, documents=documents, vocab_size=VOCABULARY if name == 'wiki40b' else 300)
    assert tuple(task.evaluations) == ('documents', 'stream')
    found = {}
    for evaluation in text_tasks.EVALUATIONS:
        read = list(pipeline.eval_batches(task, split, batch_size=3, evaluation=evaluation, data_dir=data_dir))
        found[evaluation] = read = joined(read)
        assert ('segments' in read) == (documents == 'packed' and evaluation == 'stream')
        shown = read['segments'] > 0 if 'segments' in read else read['valid']
        assert (shown | (read['weights'] == 0)).all()
    counted = [read['targets'][read['weights'] > 0] for read in found.values()]
    if name == 'wiki40b':
        np.testing.assert_array_equal(*counted)
        for size in ('words', 'bytes'):
            assert len({read[size].sum() for read in found.values()}) == 1
    else:
        assert min(map(len, counted)) > 0.1 * found['documents']['valid'].sum()
    prompts = sample.tokens_to_complete(task, data_dir, 3, 24, split)
    starts = open_split(task.evaluated('documents'), split, data_dir)
    assert prompts.shape[1] == 48
    if name == 'wiki40b':
        np.testing.assert_array_equal(prompts[0], starts[0]['tokens'])


def test_the_chosen_evaluation_is_that_of_validation_and_comes_first(data_dir):
    for chosen in text_tasks.EVALUATIONS:
        task = make(evaluation=chosen)
        assert next(iter(task.evaluations)) == chosen
        assert task.context == task.evaluations[chosen].context
        keys = [
            open_split(each, 'test', data_dir)[1]['key'] for each in (task, task.evaluated(), task.evaluated(chosen))
        ]
        assert len(set(keys)) == 1
        assert ('token' in keys[0]) == (chosen == 'stream')
    with pytest.raises(ValueError, match="unknown evaluation 'lines' of task 'wiki40b'; known: documents, stream"):
        make().evaluated('lines')
    with pytest.raises(ValueError, match="unknown evaluation='lines'; choose stream or documents"):
        make(evaluation='lines')


def test_training_examples_do_not_depend_on_the_evaluation(data_dir):
    for documents, name in (('joined', 'none'), ('packed', 'segments'), ('cropped', 'valid')):
        both = [make(documents=documents, evaluation=chosen) for chosen in text_tasks.EVALUATIONS]
        assert len({pipeline.fingerprint(task, 'train', data_dir) for task in both}) == 1
        example = both[0].transform(open_split(both[0], 'train', data_dir)[0])
        assert set(example) == {'tokens', 'targets', 'weights', name} - {'none'}


def split_at(text, markers):
    for marker in markers:
        text = text.replace(marker, ' ')
    return text.split()


def test_a_stride_gives_context(data_dir):
    task = make(stride=16)
    read = joined(list(pipeline.eval_batches(task, 'test', batch_size=1, data_dir=data_dir)))
    first = read['weights'].argmax(axis=1)
    assert set(first) == {0, 32}
    assert (read['valid'].sum(axis=1) > 32)[first == 32].all()


@pytest.mark.parametrize('documents', ['packed', 'joined', 'cropped'])
def test_training_has_every_token_once(data_dir, documents):
    task = make(documents=documents)
    source = open_split(task, 'train', data_dir)
    examples = [task.transform(source[index]) for index in range(len(source))]
    tokens = np.concatenate([example['targets'][example['weights'] > 0] for example in examples])
    other = open_split(make(documents='cropped', length=4096), 'train', data_dir)
    expected = np.concatenate([other[index]['tokens'][: other[index]['count']] for index in range(len(other))])
    np.testing.assert_array_equal(tokens, expected)
    assert ('segments' in examples[0]) == task.packed == (documents == 'packed')
    assert ('valid' in examples[0]) == (documents == 'cropped')
    if documents == 'packed':
        for example in examples:
            ends = np.flatnonzero(example['tokens'] == END_OF_DOCUMENT)
            assert set(ends) >= set(np.flatnonzero(np.diff(example['segments']) > 0))


def test_masks_are_fixed_in_evaluation_whatever_the_batches(data_dir):
    task = make('c4_masked', vocab_size=300)
    for limit in (None, 3):
        first, other = (
            joined(list(pipeline.eval_batches(task, 'test', batch_size=size, limit=limit, data_dir=data_dir)))
            for size in (1, 4)
        )
        for name, value in first.items():
            np.testing.assert_array_equal(value, other[name][: len(value)])
    assert set(first['weights'].ravel()) == {0, 1}
    hidden = first['weights'] > 0
    assert hidden.sum() < 0.2 * first['valid'].sum()
    assert (first['tokens'][hidden] == MASK).mean() > 0.4
    np.testing.assert_array_equal(first['tokens'][~hidden], first['targets'][~hidden])
    assert not (first['targets'][hidden] == END_OF_DOCUMENT).any()


def test_masks_of_training_are_new_in_every_epoch_and_resume_bitwise(data_dir):
    task = make('c4_masked', vocab_size=300, documents='cropped')
    source = open_split(task, 'train', data_dir)
    batches = pipeline.train_batches(task, batch_size=1, seed=0, data_dir=data_dir)
    stream = list(itertools.islice(batches, 2 * len(source)))
    first, second = stream[: len(source)], stream[len(source) :]
    by_targets = {batch['targets'].tobytes(): batch['tokens'] for batch in first}
    changed = [not np.array_equal(by_targets[batch['targets'].tobytes()], batch['tokens']) for batch in second]
    assert sum(changed) > 0.5 * len(changed)
    whole, resumed = iter(batches), iter(batches)
    for _ in range(5):
        next(whole)
    resumed.set_state(json.loads(json.dumps(whole.get_state())))
    for expected, batch in itertools.islice(zip(whole, resumed, strict=True), 2 * len(source)):
        for name in expected:
            np.testing.assert_array_equal(expected[name], batch[name], strict=True)


@pytest.mark.parametrize('process_count', [2, 3])
def test_random_examples_do_not_depend_on_the_processes(data_dir, process_count):
    task = make('c4_masked', vocab_size=300)
    settings = {'batch_size': 6, 'seed': 2, 'data_dir': data_dir}
    alone = list(itertools.islice(pipeline.train_batches(task, **settings), 5))
    shares = [
        itertools.islice(pipeline.train_batches(task, **settings, process_index=index, process_count=process_count), 5)
        for index in range(process_count)
    ]
    for expected, *parts in zip(alone, *shares, strict=True):
        for name in expected:
            np.testing.assert_array_equal(expected[name], np.concatenate([part[name] for part in parts]))


def test_people_see_masks_and_ends(data_dir):
    task = make('c4_masked', vocab_size=300)
    batch = next(iter(pipeline.eval_batches(task, 'test', batch_size=1, data_dir=data_dir)))
    shown = task.show(batch['tokens'][0], data_dir)
    assert shown.count('▒') == (batch['tokens'][0] == MASK).sum()
    assert '▯' not in shown
    original = task.show(batch['targets'][0], data_dir)
    text = tfds_sources.open_tfds('c4/en', 'validation', data_dir)[0]['text'].decode()
    assert text.startswith(original)


def test_the_tokenizer_is_a_file_of_its_own_for_those_who_need_no_tokens(data_dir):
    task = make()
    open_split(task, 'train', data_dir)  # prepares the corpus
    assert Tokenizer.load(task.tokenizer(data_dir)).fingerprint == task.identity('train', data_dir)['tokenizer']
