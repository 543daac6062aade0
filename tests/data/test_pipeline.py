import dataclasses
import itertools
import json

import numpy as np
import pytest

from combiner.data import ops, pipeline, tasks
from combiner.data.task import Task

PROCESS_COUNTS = [1, 2, 3]


def make_task(records: int, first: int = 0) -> Task:
    """A task whose example i is the tokens [i + 1, i + 1] (0 marks padding)."""
    return Task(
        name='numbers',
        dataset='numbers',
        source=lambda split, data_dir: range(first + 1, first + records + 1),
        transform=lambda number: ops.language_model(np.full(2, number, np.int32)),
        vocab_size=first + records + 1,
        shape=(2,),
        head='language_model',
        metrics=('bits_per_dim',),
    )


def read(task, process_count=1, count=None, **arguments):
    """The numbers of the first global batches, put together from every process: a row per batch."""
    processes = [
        itertools.islice(
            pipeline.train_batches(task, process_index=index, process_count=process_count, **arguments), count
        )
        for index in range(process_count)
    ]
    return [np.concatenate([batch['tokens'][:, 0] for batch in parts]) for parts in zip(*processes, strict=True)]


@pytest.mark.parametrize('process_count', PROCESS_COUNTS)
@pytest.mark.parametrize('records', [5, 24, 31])
def test_every_example_once_per_epoch_over_all_processes(records, process_count):
    epochs = 6
    stream = np.concatenate(read(make_task(records), process_count, records, batch_size=epochs, seed=0))
    stream = stream.reshape(epochs, records)
    for epoch in stream:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(1, records + 1))
    assert len({tuple(epoch) for epoch in stream}) == epochs


@pytest.mark.parametrize('process_count', PROCESS_COUNTS)
def test_shards_of_an_epoch_are_disjoint_and_complete(process_count):
    shards = []
    for index in range(process_count):
        batches = pipeline.train_batches(
            make_task(24), batch_size=6, seed=1, process_index=index, process_count=process_count
        )
        shards.append({int(row) for batch in itertools.islice(batches, 4) for row in batch['tokens'][:, 0]})
    assert {len(shard) for shard in shards} == {24 // process_count}
    assert set().union(*shards) == set(range(1, 25))


@pytest.mark.parametrize('process_count', PROCESS_COUNTS[1:])
def test_global_batches_do_not_depend_on_the_processes(process_count):
    alone, together = (read(make_task(31), count, 20, batch_size=12, seed=3) for count in (1, process_count))
    np.testing.assert_array_equal(alone, together)


@pytest.mark.parametrize('counts', [(1, 2, 4, 1), (4, 1, 2)])
def test_the_number_of_processes_may_change_within_an_epoch(counts):
    """Each part ends within an epoch, and continues from the position that every process of the last part has."""
    records, part = 35, 7
    task = dataclasses.replace(make_task(records), randomise=lambda example, rng: example | {'drawn': rng.random(1)})
    arguments = {'batch_size': 8, 'seed': 2}
    state, found, drawn = None, [], []
    for count in counts:
        processes = [
            iter(pipeline.train_batches(task, process_index=index, process_count=count, **arguments))
            for index in range(count)
        ]
        for process in processes if state is not None else ():
            process.set_state(json.loads(state))
        for _ in range(part):
            batches = [next(process) for process in processes]
            found.append(np.concatenate([batch['tokens'][:, 0] for batch in batches]))
            drawn.append(np.concatenate([batch['drawn'] for batch in batches]))
        states = {json.dumps(process.get_state()) for process in processes}
        assert len(states) == 1
        state = states.pop()
    alone = list(itertools.islice(pipeline.train_batches(task, **arguments), len(found)))
    np.testing.assert_array_equal(found, [batch['tokens'][:, 0] for batch in alone])
    np.testing.assert_array_equal(drawn, [batch['drawn'] for batch in alone])
    stream = np.concatenate(found)
    for epoch in stream[: len(stream) // records * records].reshape(-1, records):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(1, records + 1))


def test_order_follows_from_the_seed():
    first, again, other = (read(make_task(50), 1, 5, batch_size=10, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize('consumed', [0, 1, 4, 23])
@pytest.mark.parametrize(('process_index', 'process_count'), [(0, 1), (1, 2)])
@pytest.mark.parametrize('task', [make_task(31), tasks.make('photos16')], ids=lambda task: task.name)
def test_resumes_bitwise_in_mid_epoch(task, process_index, process_count, consumed):
    batches = pipeline.train_batches(
        task, batch_size=6, seed=5, process_index=process_index, process_count=process_count
    )
    whole, resumed = iter(batches), iter(batches)
    for _ in range(consumed):
        next(whole)
    state = json.loads(json.dumps(whole.get_state()))
    next(resumed)
    resumed.set_state(state)
    for expected, batch in itertools.islice(zip(whole, resumed, strict=True), 12):
        assert expected.keys() == batch.keys()
        for name in expected:
            np.testing.assert_array_equal(expected[name], batch[name], strict=True)


@pytest.mark.parametrize('process_count', PROCESS_COUNTS)
@pytest.mark.parametrize('batch_size', [6, 60])
@pytest.mark.parametrize('limit', [None, 1, 7, 18, 99])
def test_evaluation_reads_every_example_once(limit, batch_size, process_count):
    task = make_task(31)
    processes = [
        list(
            pipeline.eval_batches(
                task,
                'test',
                batch_size=batch_size,
                limit=limit,
                process_index=index,
                process_count=process_count,
            )
        )
        for index in range(process_count)
    ]
    count = min(limit or 31, 31)
    assert {len(batches) for batches in processes} == {-(-count // batch_size)}
    for batch in itertools.chain(*processes):
        assert batch['tokens'].shape == batch['weights'].shape == (batch_size // process_count, 2)
        np.testing.assert_array_equal(batch['weights'], np.where(batch['tokens'] > 0, 1, 0))
    rows = [
        number
        for parts in zip(*processes, strict=True)
        for batch in parts
        for number in batch['tokens'][:, 0]
        if number
    ]
    assert len(rows) == count
    assert rows == sorted(set(rows))
    ends = [*(np.arange(count) * 31 // count).tolist(), 31]
    assert all(first <= row - 1 < end for first, row, end in zip(ends, rows, ends[1:], strict=False))


@pytest.mark.parametrize('batch_size', [1, 2, 5, 31, 32])
def test_evaluation_takes_any_batch_size_and_can_be_read_again(batch_size):
    batches = pipeline.eval_batches(make_task(31), 'validation', batch_size=batch_size)
    for _ in range(2):
        tokens = np.concatenate([batch['tokens'][:, 0] for batch in batches])
        np.testing.assert_array_equal(tokens[tokens > 0], np.arange(1, 32))


def test_fingerprint_follows_the_name_the_split_the_length_and_the_contents():
    task = make_task(40)
    fingerprint = pipeline.fingerprint(task, 'train')
    assert fingerprint == pipeline.fingerprint(make_task(40), 'train')
    assert len(bytes.fromhex(fingerprint)) == 8
    others = [
        pipeline.fingerprint(dataclasses.replace(task, name='other'), 'train'),
        pipeline.fingerprint(task, 'test'),
        pipeline.fingerprint(make_task(41), 'train'),
        pipeline.fingerprint(make_task(40, first=1), 'train'),
    ]
    assert len({fingerprint, *others}) == 5


def test_fingerprint_reads_a_fixed_sample_of_a_large_set():
    read_numbers = []
    task = make_task(10_000)

    def transform(number):
        read_numbers.append(number)
        return task.transform(number)

    pipeline.fingerprint(dataclasses.replace(task, transform=transform), 'train')
    assert len(set(read_numbers)) == 256
    assert read_numbers[-1] > 9_900


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'batch_size': 0}, 'batch_size 0 is not a positive multiple of process_count 1'),
        ({'batch_size': 5, 'process_count': 2}, 'batch_size 5 is not a positive multiple of process_count 2'),
        ({'batch_size': 4, 'process_index': 2, 'process_count': 2}, 'process_index 2 does not lie in 0..1'),
        ({'batch_size': 4, 'data_dir': 'no/where'}, "'no/where' does not exist"),
    ],
)
def test_bad_arguments(arguments, message):
    task = make_task(31)
    with pytest.raises(ValueError, match=message):
        pipeline.train_batches(task, seed=0, **arguments)
    with pytest.raises(ValueError, match=message):
        pipeline.eval_batches(task, 'test', **arguments)


@pytest.mark.parametrize('seed', [-1, 2**32])
def test_bad_seed(seed):
    with pytest.raises(ValueError, match=f'seed {seed} does not lie'):
        pipeline.train_batches(make_task(31), batch_size=4, seed=seed)


def test_bad_limit_and_split():
    with pytest.raises(ValueError, match='limit 0 leaves nothing'):
        pipeline.eval_batches(make_task(31), 'test', batch_size=4, limit=0)
    with pytest.raises(ValueError, match="unknown split 'tests'"):
        pipeline.eval_batches(make_task(31), 'tests', batch_size=4)
