"""Hours of training on the cards: every card has those of all its rows, as the formula gives them."""

import importlib

import pytest

from combiner.monitoring import flops
from experiments.harness import declarations, training_hours

ROWS = [row for rows in declarations.table_rows().values() for row in rows]


@pytest.mark.parametrize('config', dict.fromkeys(row.config for row in ROWS))
def test_a_card_has_the_hours_of_all_its_rows(config):
    card = importlib.import_module(config.removesuffix('.py').replace('/', '.')).__doc__
    lines = training_hours.card(config, ROWS)
    assert '\n'.join(lines) in card, 'python -m experiments.tables.hours --write'


def test_hours_are_steps_times_arithmetic_over_speed():
    assert flops.hours(6e12, steps=1000, chips=8, peak=500e12, mfu=0.3) == pytest.approx(6e15 / 1.2e15 / 3600)


def test_the_table_of_a_card_is_replaced_and_the_rest_kept(tmp_path):
    (tmp_path / 'card.py').write_text('"""Card.\n\n    chip-hours, of old\n    a  1\n\nRest.\n"""\n')
    training_hours.write('card.py', ['    head', '    b  2'], tmp_path)
    assert (tmp_path / 'card.py').read_text() == '"""Card.\n\n    head\n    b  2\n\nRest.\n"""\n'
    with pytest.raises(ValueError, match='has no line that starts with'):
        training_hours.write('card.py', [], tmp_path)


def test_writing_refuses_what_it_would_ignore(capsys):
    for ignored in (['--mfu=0.5'], ['--rows=cifar-10/*']):
        with pytest.raises(SystemExit):
            training_hours.command(ROWS, None, ['--write', *ignored])
        assert 'leave out --rows and --mfu' in capsys.readouterr().err
