"""The tables of the paper: at the small scale the learning rate of every row is chosen, by validation alone."""

import json

import finished
import pytest

from experiments.harness import paper_table, step_cost, sweep
from experiments.harness import run as runs
from experiments.tables import table4_pretrained

ROWS = (finished.row('Full', published=4.25), finished.row('Axial', argument='attention=axial'))


class Fake(finished.Fake):
    """Trains to a validation figure that is better at the greater rate."""

    def __call__(self, command, log):
        ended = super().__call__(command, log)
        if command[2] == 'combiner.train' and not ended.status:
            rate = float(next(item for item in command if 'learning_rate' in item).partition('=')[2])
            with open(f'{command[-1]}/metrics.jsonl', 'w') as file:
                file.write(json.dumps({'step': 100, 'validation_bits_per_dim': 5 - rate}) + '\n')
        return ended


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs the command with commands that leave behind what the real ones would; gives what was trained."""
    monkeypatch.setattr(runs, 'environment', lambda: finished.ENVIRONMENT)
    monkeypatch.setattr(step_cost, 'time_interleaved', lambda configs, rounds: dict.fromkeys(configs, 'not here'))

    def run(*arguments, fake, status=0):
        monkeypatch.setattr(runs.Processes, '__call__', lambda self, command, log: fake(command, log))
        with pytest.raises(SystemExit) as ended:
            paper_table.command(
                ROWS, 'table0', ['--workdir', str(tmp_path), *arguments], module='experiments.tables.table1'
            )
        assert ended.value.code == status
        return [where for module, where in fake.said if module == 'combiner.train']

    return run


def test_small_rows_are_trained_with_two_rates_and_then_seeds_at_the_better_one(command, tmp_path):
    trained = command('--scale', 'small', '--seeds', '2', fake=Fake())
    assert trained == [*2 * ['rate-0.004/seed0', 'rate-0.008/seed0'], *2 * ['rate-0.008/seed1']]
    assert command('--scale', 'small', '--seeds', '2', fake=Fake()) == []
    table = json.loads((tmp_path / 'table0.json').read_text())
    assert [row['rate'] for row in table['sweep']] == [0.008, 0.008]
    assert [row['ours']['seeds'] for row in table['rows']] == [2, 2]
    assert '| Photos | Axial | 4.996 at 0.004, 4.992 at 0.008 | 0.008 |' in (tmp_path / 'table0.md').read_text()


class Diverging(Fake):
    """Diverges at the greater rate of one row, or is killed there."""

    def __init__(self, last_line):
        super().__init__()
        self.last_line = last_line

    def __call__(self, command, log):
        if command[2] == 'combiner.train' and '/axial/rate-0.008/' in command[-1]:
            log.write(f'step 1\n{self.last_line}\n'.encode())
            log.flush()
            return runs.Ended(1, 1.0, 1.0)
        return super().__call__(command, log)


def models(tmp_path):
    """The seeds of each row of the table, by model."""
    rows = json.loads((tmp_path / 'table0.json').read_text())['rows']
    return [(row['model'], row['published'], len(row['runs'])) for row in rows]


def test_a_rate_at_which_training_diverges_is_not_chosen_and_not_tried_again(command, tmp_path):
    fake = Diverging('error: training diverged at step 7: loss_nats nan')
    command('--scale', 'small', '--seeds', '2', fake=fake)
    fake.said.clear()
    assert command('--scale', 'small', '--seeds', '2', fake=fake) == []
    assert [row['rate'] for row in json.loads((tmp_path / 'table0.json').read_text())['sweep']] == [0.008, 0.004]
    assert models(tmp_path) == [('Full', 4.25, 2), ('Axial', None, 2)]


def test_a_row_whose_sweep_is_not_finished_is_in_the_table_once_and_without_a_result(command, tmp_path, capsys):
    command('--scale', 'small', fake=Diverging('error: no space left'), status=1)
    said = capsys.readouterr().out
    assert '1 of 2 runs are finished' in said  # the failed run is that of a rate
    assert '# takes up the others' in said
    assert models(tmp_path) == [('Full', 4.25, 1), ('Axial', None, 0)]
    table = (tmp_path / 'table0.md').read_text()
    assert '| Photos | Axial | 4.996 at 0.004 |  |' in table


def test_a_row_that_diverges_at_every_rate_fails_and_is_tried_again(command):
    class AllDiverge(Diverging):
        def __call__(self, command, log):
            return super().__call__([*command[:-1], command[-1].replace('rate-0.004', 'rate-0.008')], log)

    fake = AllDiverge('error: training diverged at step 7: loss_nats nan')
    for _ in range(2):
        command('--scale', 'small', '--rows', '*/axial', fake=fake, status=1)


def test_other_scales_have_the_rate_of_the_config(command, tmp_path):
    assert command('--scale', 'cpu', fake=finished.Fake()) == ['full/seed0', 'axial/seed0']
    assert 'sweep' not in json.loads((tmp_path / 'table0.json').read_text())


def test_the_best_accuracy_is_the_highest(tmp_path):
    swept = {}
    for rate, value in ((0.1, 0.3), (0.2, 0.4)):
        row = finished.row('Full', metric='accuracy')
        swept[rate] = run = finished.run(row, tmp_path / str(rate))
        finished.train(run.workdir, run.config_arguments())
        finished.evaluate(run.workdir, 0.5, 'accuracy')
        (run.workdir / 'metrics.jsonl').write_text(json.dumps({'step': 1, 'validation_accuracy': value}) + '\n')
    assert sweep.best(swept) == 0.2


def test_a_row_is_pretrained_into_a_folder_of_its_own_from_which_it_starts(tmp_path):
    row = next(row for row in table4_pretrained.PRETRAINED if (row.model, row.column) == ('Combiner-Fixed', 'ListOps'))
    run = finished.run(row, tmp_path, scale='small')
    before, train, evaluate = run.commands().values()
    assert before[-1] == str(run.workdir / 'pretraining')
    assert before[4] == 'configs/lra.py:task=listops,attention=combiner_fixed,pretrain=mlm,scale=small'
    assert f'--config.init_from={run.workdir / "pretraining"}' in train
    assert train[4] == 'configs/lra.py:task=listops,attention=combiner_fixed,scale=small'
    assert train[-1] == evaluate[-1] == str(run.workdir)
    given, used = runs.parse_config(before[3:-2]), run.config()
    assert given.data.options.pretrain == 'mlm'
    assert used.data.options.pretrain == 'none'
    assert (given.steps, given.optimizer.to_dict()) == (used.steps, used.optimizer.to_dict())
    assert not any(
        'pretraining' in word for command in finished.run(ROWS[0], tmp_path).commands().values() for word in command
    )
