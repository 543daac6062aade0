import math

import pytest

from experiments.harness import table


def test_the_interval_is_students():
    # Mean 2, standard deviation 1; t of 2 degrees of freedom is 4.3027.
    assert table.interval([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / math.sqrt(3), abs=1e-5)
    assert table.interval([1.0]) is None


@pytest.mark.parametrize(
    ('pairs', 'expected'),
    [
        ([(3.0, 5.0), (2.0, 4.0), (1.0, 4.5), (4.0, 9.0)], 0.8),
        ([(3.0, 1.0), (2.0, 2.0), (1.0, 3.0), (None, 4.0), (0.5, None)], -1.0),
        ([(3.0, 1.0), (2.0, 2.0)], None),  # too few
        ([(3.0, 1.0), (2.0, 1.0), (1.0, 1.0)], None),  # no order
        ([(3.0, 5.0), (3.0, 4.0), (3.0, 3.0)], None),
    ],
)
def test_the_order_is_compared_with_the_published_one(pairs, expected):
    rows = [
        {'column': 'Photos', 'published': published, 'ours': {} if mean is None else {'mean': mean}}
        for published, mean in pairs
    ]
    count = sum(None not in pair for pair in pairs)
    other = {'column': 'Other', 'published': None, 'ours': {'mean': 1.0}}
    ((column, found),) = table.rank_correlations([*rows, other]).items()
    assert column == 'Photos'
    assert found == (None if expected is None else pytest.approx(expected), count)


def test_rows_evaluated_on_other_examples_are_named():
    def row(model, *examples, column='Photos'):
        return {'column': column, 'model': model, 'runs': examples}

    codecs, other = ({'codecs_bits_per_dim': {'png': png}} for png in (5.0, 6.0))
    new = {**codecs, 'evaluated_on': 'a/7'}
    rows = [row('Old', other), row('Full', codecs, new), row('Fixed', new, other), row('None')]
    short, long = ({'evaluated_on': each, 'context': f'windows of {each}'} for each in ('a/7', 'b/3'))
    text = [row('Full', short, column='Text'), row('Axial', {}, column='Text'), row('Full, 8k', long, column='Text')]
    assert table.other_examples([*rows, *text]) == ['Photos, evaluated on other examples than most rows: Old; Fixed.']
    assert table.other_examples([]) == []


FIRST, SECOND = (
    {'column': 'Photos', 'model': model, 'seconds_per_step': seconds, 'memory_mb': 9.0, 'compile_seconds': 1.0}
    for model, seconds in (('Full', 0.25), ('Fixed', 0.5))
)
ONE = {'device': 'abacus', 'machine': 'x86_64', 'cores': 2, 'python': '3.11', 'commit': 'abc'}
ONE |= {'rounds': 5, 'rows': [SECOND, FIRST]}
TWO = {**ONE, 'device': 'slide rule', 'commit': None, 'rounds': 3}
ROWS = [{'column': 'Photos', 'model': model} for model in ('Full', 'Fixed')]


def test_steps_of_one_session_stand_in_the_order_of_the_table():
    body, how = table.timings({'rows': ROWS, 'costs': [ONE]})
    assert body == [['Full', 'Photos', '0.25', '9', '1.0'], ['Fixed', 'Photos', '0.5', '9', '1.0']]
    assert 'in one process, without data or validation: medians of 5 rounds.' in how
    assert how.endswith('Measured on abacus (x86_64, 2 cores), python 3.11, commit abc.')


def test_steps_of_several_sessions_are_said_to_be_of_several():
    body, how = table.timings({'rows': ROWS, 'costs': [{**ONE, 'rows': [SECOND]}, {**TWO, 'rows': [FIRST]}]})
    assert [cells[0] for cells in body] == ['Full', 'Fixed']
    assert 'Measured on abacus (x86_64, 2 cores), python 3.11, commit abc.' in how
    _, _, other = how.partition('Photos, Full: in another process, ')
    machine, _, compare = other.partition(', commit unknown. ')
    assert machine == 'medians of 3 rounds, on slide rule (x86_64, 2 cores), python 3.11'
    assert compare == 'Only seconds of one process can be compared.'


def test_of_sessions_on_one_machine_only_the_commit_is_said_again():
    costs = [{**ONE, 'rows': [SECOND]}, {**ONE, 'rows': [FIRST], 'commit': 'def'}]
    _, how = table.timings({'rows': ROWS, 'costs': costs})
    assert 'Photos, Full: in another process, at commit def. Only seconds' in how


def test_a_session_that_timed_nothing_is_not_described():
    empty = {**TWO, 'rows': [], 'not_measured': [FIRST]}
    assert table.timings({'rows': ROWS, 'costs': [ONE, empty]}) == table.timings({'rows': ROWS, 'costs': [ONE]})
    assert table.timings({'rows': ROWS, 'costs': [empty]}) == table.timings({'rows': ROWS}) == ([], '')


@pytest.mark.parametrize(
    ('metric', 'published', 'expected'),
    [
        ('bits_per_dim', (2.77, 3.666), 3),
        ('bits_per_dim', (None, None), 3),
        ('accuracy', (0.3638, None), 2),
        ('accuracy', (None, None), 1),
        ('perplexity', (17.26, None), 2),
        ('word_perplexity', (None, None), 0),
    ],
)
def test_a_column_has_the_decimals_of_its_published_values(metric, published, expected):
    rows = [{'metric': metric, 'published': value} for value in published]
    assert table.decimals(rows) == expected
