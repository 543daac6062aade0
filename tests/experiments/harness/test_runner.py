import json
import shlex
import sys

import finished
import pytest
from PIL import Image

from experiments.harness import run as runs
from experiments.harness import runner

ROWS = (
    finished.row('Full', 'Photos', published=4.25),
    finished.row('Full', 'Larger Photos', 'attention=full,size=32'),
    finished.row('Combiner-Fixed', 'Photos', 'attention=combiner_fixed'),
)


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    """The rows whose steps were timed, of each time that some were; Combiner-Fixed cannot be."""
    times = []

    def time_interleaved(configs, rounds):
        costs = {'seconds_per_step': 0.125 * rounds, 'memory_mb': 1234.4, 'compile_seconds': 2.0}
        made = {run: make().model.attention.name for run, make in configs.items()}
        times.append([f'{run.row.column}, {run.row.model}' for run in made])
        return {run: 'MemoryError: small' if name == 'combiner_fixed' else costs for run, name in made.items()}

    monkeypatch.setattr(runner.step_cost, 'time_interleaved', time_interleaved)
    monkeypatch.setattr(runs, 'environment', lambda: finished.ENVIRONMENT)
    return times


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs the command with commands that leave behind what the real ones would; gives (status, what was executed)."""

    def run(*arguments, broken='', rows=ROWS):
        fake = finished.Fake(broken)
        monkeypatch.setattr(runs.Processes, '__call__', lambda self, command, log: fake(command, log))
        with pytest.raises(SystemExit) as stopped:
            runner.command(rows, 'small', ['--scale', 'quick', '--workdir', str(tmp_path), *arguments])
        return stopped.value.code or 0, fake.said

    return run


def test_it_runs_what_is_not_done_and_writes_the_table(command, tmp_path, capsys):
    status, said = command('--seeds', '2')
    assert status == 0
    assert [where for module, where in said if module == 'combiner.train'] == [
        *('full/seed0', 'full/seed0', 'combiner-fixed/seed0'),
        *('full/seed1', 'full/seed1', 'combiner-fixed/seed1'),
    ]
    assert (tmp_path / 'small' / 'quick' / 'larger-photos' / 'full' / 'seed1' / runs.EVALUATION).exists()
    assert '6 of 6 runs are finished' in capsys.readouterr().out
    assert command('--seeds', '2') == (0, [])
    table = json.loads((tmp_path / 'small.json').read_text())
    assert [row['ours']['mean'] for row in table['rows']] == [4.25] * 3
    assert '| Full | 4.25 | 4.25 ± ' in (tmp_path / 'small.md').read_text()
    with Image.open(tmp_path / 'small.png') as picture:
        assert picture.width > picture.height > 100


def test_the_table_is_written_between_runs(command, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, 'SECONDS_OF_A_TABLE', 0)
    seen = []

    class Fake(finished.Fake):
        def __call__(self, command, log):
            path = tmp_path / 'small.json'
            seen.append([bool(row['ours']) for row in json.loads(path.read_text())['rows']] if path.exists() else [])
            return super().__call__(command, log)

    monkeypatch.setattr(finished, 'Fake', Fake)
    assert command()[0] == 0
    first, second = [True, False, False], [True, True, False]
    assert seen == [[], [], first, first, second, second]  # training and evaluation of each row


def test_a_failed_row_does_not_stop_the_others(command, tmp_path, capsys):
    status, said = command(broken='full')
    assert status == 1
    assert [where for _, where in said] == ['full/seed0', 'full/seed0', *['combiner-fixed/seed0'] * 2]
    shown = capsys.readouterr()
    assert 'Photos, Full, seed 0: train failed with exit status 2: error: a pipe burst' in shown.err
    assert '1 of 3 runs are finished' in shown.out
    table = json.loads((tmp_path / 'small.json').read_text())
    assert [bool(row['ours']) for row in table['rows']] == [False, False, True]
    assert command()[0] == 0


def test_only_selected_rows_are_run_and_all_that_is_there_is_in_the_table(command, tmp_path):
    command('--seeds', '2', '--rows', 'combiner-*')
    status, said = command('--rows', 'larger*, photos/full')
    assert status == 0
    assert {where for _, where in said} == {'full/seed0'}
    table = json.loads((tmp_path / 'small.json').read_text())
    assert [row['ours']['seeds'] for row in table['rows']] == [1, 1, 2]


def test_a_signal_stops_it_with_its_number(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs.Processes, '__init__', lambda self: setattr(self, 'received', 2))
    monkeypatch.setattr(runs.Processes, '__enter__', lambda self: self)
    monkeypatch.setattr(runs.Processes, '__exit__', lambda *_: None)
    status, said = command()
    assert (status, len(said)) == (130, 2)
    assert 'the same command resumes' in capsys.readouterr().err
    assert (tmp_path / 'small.md').exists()


def test_dry_run_prints_the_commands_and_runs_nothing(command, tmp_path, capsys):
    command('--rows', 'combiner-fixed')
    capsys.readouterr()
    assert command('--dry_run', '--seeds', '1', '--data_dir', 'my data') == (0, [])
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [line[2] for line in lines] == ['combiner.train', 'combiner.evaluate'] * 2
    assert lines[0][-3:] == ['--config.data.data_dir=my data', '--workdir', str(lines[1][-1])]
    assert lines[2][4] == 'configs/photos.py:attention=full,size=32,scale=quick'


def test_measuring_trains_nothing_and_the_table_shows_it(command, tmp_path, measured, capsys):
    assert command('--measure', '--seeds', '2') == (1, [])
    assert len(measured) == 1
    shown = capsys.readouterr()
    assert 'Photos, Combiner-Fixed, seed 0: MemoryError: small' in shown.err
    assert 'next: ' in shown.out
    assert 'takes up the others' not in shown.out  # the same command would measure again
    (costs,) = json.loads((tmp_path / 'small_costs.json').read_text())
    assert [(row['column'], row['model']) for row in costs['rows']] == [('Photos', 'Full'), ('Larger Photos', 'Full')]
    assert f'| Full | Photos | {0.125 * runner.ROUNDS} | 1,234 | 2.0 |' in (tmp_path / 'small.md').read_text()


def test_measuring_a_row_again_keeps_what_was_measured_of_the_others(command, tmp_path, monkeypatch):
    command('--measure')
    command('--rows', 'photos/full', '--measure')
    again, first = json.loads((tmp_path / 'small_costs.json').read_text())
    timed = [[(row['column'], row['model']) for row in session['rows']] for session in (again, first)]
    assert timed == [[('Photos', 'Full')], [('Larger Photos', 'Full')]]
    assert [row['model'] for row in first['not_measured']] == ['Combiner-Fixed']
    assert json.loads((tmp_path / 'small.json').read_text())['costs'] == [again, first]
    command('--rows', 'photos/full', '--scale', 'cpu', '--measure')  # is of another scale
    other, *kept = json.loads((tmp_path / 'small_costs.json').read_text())
    assert (other['scale'], kept) == ('cpu', [again, first])
    assert json.loads((tmp_path / 'small.json').read_text())['costs'] == [other]


def test_results_of_another_scale_are_not_replaced(command, tmp_path, measured, capsys):
    command('--rows', 'photos/full')
    written = [(tmp_path / name).read_text() for name in ('small.json', 'small.md', 'small_costs.json')]
    for more in ((), ('--measure',)):
        assert command('--scale', 'cpu', *more) == (2, [])
        said = capsys.readouterr().err
        assert f'{tmp_path / "small.json"} has results at scale=quick, which a table at scale=cpu would replace' in said
        assert f'give another --workdir, such as {tmp_path}_cpu' in said
    assert len(measured) == 1
    assert [(tmp_path / name).read_text() for name in ('small.json', 'small.md', 'small_costs.json')] == written
    assert command('--scale', 'cpu', '--rows', 'photos/full', '--dry_run') == (0, [])
    assert 'combiner.train' in capsys.readouterr().out


def test_a_damaged_run_does_not_stop_the_others(command, tmp_path, capsys):
    command()
    (tmp_path / 'small' / 'quick' / 'photos' / 'full' / 'seed0' / runs.EVALUATION).write_text('{"bits_per')
    capsys.readouterr()
    status, said = command('--seeds', '2', '--rows', 'photos/*')
    assert status == 1
    assert {where for _, where in said} == {'full/seed1', 'combiner-fixed/seed1'}
    assert 'Photos, Full, seed 0: ' in capsys.readouterr().err
    table = json.loads((tmp_path / 'small.json').read_text())
    assert [row['ours']['seeds'] for row in table['rows']] == [1, 1, 2]


def test_what_is_done_is_measured_once(command, tmp_path, measured):
    assert command('--rows', 'photos/*')[0] == 0
    assert measured == [['Photos, Full', 'Photos, Combiner-Fixed']]
    (costs,) = json.loads((tmp_path / 'small_costs.json').read_text())
    assert [row['model'] for row in costs['rows']] == ['Full']
    assert costs['not_measured'] == [{'column': 'Photos', 'model': 'Combiner-Fixed', 'wrong': 'MemoryError: small'}]
    command('--rows', 'photos/*', '--seeds', '2')
    assert json.loads((tmp_path / 'small.json').read_text())['costs'] == [costs]
    assert len(measured) == 1
    command()
    assert measured[1:] == [['Photos, Full', 'Larger Photos, Full', 'Photos, Combiner-Fixed']]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('--rows', 'fixd'), "no row matches 'fixd'; known: photos/full, larger-photos/full, photos/combiner-fixed"),
        (('--seeds', '0'), '--seeds=0 must be at least 1'),
        (('--scale', 'huge'), 'invalid choice'),
        (('--measure', '--dry_run'), '--measure runs no commands that --dry_run could print'),
    ],
)
def test_bad_input_is_refused(command, capsys, arguments, message):
    assert command(*arguments) == (2, [])
    assert message in capsys.readouterr().err


def test_rows_that_would_share_a_folder_are_refused():
    with pytest.raises(ValueError, match='would share the folder photos/full'):
        runner.check([*ROWS, finished.row('FULL!')])
    with pytest.raises(ValueError, match="unknown metric 'loss'"):
        runner.check([finished.row('Full', metric='loss')])


@pytest.mark.slow
def test_real_commands(tmp_path):
    """Two steps of the real commands; the second call finds the first row done, and tries the other again."""
    config = tmp_path / 'small.py'
    config.write_text(
        'from configs import photos\n\n\n'
        'def get_config(argument):\n'
        "    config = photos.get_config(','.join(a for a in argument.split(',') if not a.startswith('scale=')))\n"
        '    config.steps = config.run.eval_every = config.run.log_every = 2\n'
        '    config.optimizer.warmup_steps = 1\n'
        '    config.run.eval_examples, config.run.eval_batch_size = 4, 256\n'
        '    return config\n'
    )
    rows = [runner.Row('Fixed', 'Photos', str(config), 'attention=combiner_fixed', 'bits_per_dim', 4.5)]
    rows.append(runner.Row('Wrong', 'Photos', str(config), 'attention=combiner_fixd', 'bits_per_dim'))
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            runner.command(rows, 'small', ['--scale', 'quick', '--workdir', str(tmp_path)])
        assert stopped.value.code == 1
        done, wrong = json.loads((tmp_path / 'small.json').read_text())['rows']
        assert not wrong['ours']
        (run,) = done['runs']
        assert 0 < run['value'] < 9
        assert (run['steps'], run['tokens'], run['device']) == (2, 2 * 8 * 768, finished.ENVIRONMENT['device'])
        assert run['seconds_per_step'] > 0
        assert run['train_peak_memory_mb'] > 100
    assert (tmp_path / 'small.png').exists()
    log = tmp_path / 'small' / 'quick' / 'photos' / 'fixed' / 'seed0' / 'log.txt'
    assert log.read_text().count(f'$ {sys.executable} -m combiner.train') == 1
