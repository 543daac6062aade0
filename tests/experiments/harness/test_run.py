import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import finished
import jax
import pytest

from experiments.harness import run as runs


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setattr(runs, 'environment', lambda: finished.ENVIRONMENT)


def python(code):
    return [sys.executable, '-c', textwrap.dedent(code)]


def wait_for(path):
    until = time.monotonic() + 60
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < until, f'{path} was never written'
        time.sleep(0.01)


def test_the_commands_of_a_run(tmp_path):
    run = runs.Run(finished.row('Full'), 'cpu', 3, tmp_path, 'data')
    train, evaluate = run.commands().values()
    assert train[1:] == [
        *('-m', 'combiner.train', '--config', 'configs/photos.py:attention=full,scale=cpu', '--config.seed=3'),
        *('--config.data.data_dir=data', '--workdir', str(tmp_path)),
    ]
    assert evaluate[1:] == ['-m', 'combiner.evaluate', '--workdir', str(tmp_path)]
    plain = runs.Run(finished.row('Full', argument=''), 'quick', 0, tmp_path)
    assert plain.commands()['train'][3:6] == ['--config', 'configs/photos.py:scale=quick', '--config.seed=0']


def test_the_config_of_a_run_is_what_its_command_line_says(tmp_path):
    settings = ('steps=7', 'optimizer.schedule=constant', 'optimizer.learning_rate=0.002')
    row = dataclasses.replace(finished.row('Fixed', argument='attention=fixed'), settings=settings)
    run = runs.Run(row, 'cpu', 3, tmp_path, 'data')
    assert [f'--config.{setting}' for setting in settings] == run.commands()['train'][6:9]
    config = run.config()
    assert (config.seed, config.steps, config.optimizer.learning_rate) == (3, 7, 0.002)
    assert (config.model.attention.name, config.model.layers, config.data.data_dir) == ('fixed', 2, 'data')


def test_what_is_done_is_not_done_again(tmp_path):
    run, fake = finished.run(finished.row('Full'), tmp_path), finished.Fake()
    assert runs.complete(run, fake) is None
    assert runs.complete(run, fake) is None
    assert fake.said == [('combiner.train', 'full/seed0'), ('combiner.evaluate', 'full/seed0')]


def test_what_was_done_with_other_settings_is_not_done(tmp_path):
    run = finished.run(finished.row('Full'), tmp_path)
    runs.complete(run, finished.Fake())
    now = dataclasses.replace(run, row=dataclasses.replace(run.row, settings=('steps=7',)))
    assert run.evaluation
    assert runs.measured(now) is None
    with pytest.raises(ValueError, match='steps: 1200 there, 7 here'):
        runs.complete(now, finished.Fake())
    logged_often = dataclasses.replace(run, row=dataclasses.replace(run.row, settings=('run.log_every=1',)))
    assert logged_often.evaluation == run.evaluation


@pytest.mark.parametrize('changed', [{'step': 100}, {'limit': 16}], ids=str)
def test_what_was_evaluated_otherwise_is_evaluated_again(tmp_path, changed):
    """At a step before the last one, by hand, or on fewer examples; 'limit' is the config's, None, otherwise."""
    run = finished.run(finished.row('Full'), tmp_path)
    runs.complete(run, finished.Fake())
    finished.evaluate(run.workdir, 9.0, **changed)
    assert runs.measured(run) is None
    assert runs.complete(run, finished.Fake()) is None
    assert runs.measured(run)['value'] == 4.0


def test_an_evaluation_of_an_earlier_version_counts_unless_the_row_asks_for_other_examples(tmp_path):
    run = finished.run(finished.row('Full'), tmp_path)
    runs.complete(run, finished.Fake())
    path = run.workdir / runs.EVALUATION
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != 'limit'}))
    assert run.evaluation
    fewer = dataclasses.replace(run, row=dataclasses.replace(run.row, settings=('run.test_examples=16',)))
    assert fewer.evaluation is None


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        (runs.EVALUATION, '{"bits', f'{runs.EVALUATION} is damaged'),
        (runs.EVALUATION, 'null', 'None is not an object'),
        ('config.json', '{"mod', 'is not valid JSON'),
        ('config.json', None, 'it has no config.json'),
    ],
    ids=str,
)
def test_a_damaged_folder_is_the_error_of_its_run(tmp_path, name, content, message):
    run = finished.run(finished.row('Full'), tmp_path)
    runs.complete(run, finished.Fake())
    if content is None:
        (run.workdir / name).unlink()
    else:
        (run.workdir / name).write_text(content)
    assert run.evaluation is None
    assert runs.measured(run) is None
    fake = finished.Fake()
    error = runs.complete(run, fake)
    assert message in error
    assert 'delete' in error
    assert not fake.said


def test_a_stretch_without_a_measured_time_is_passed_over(tmp_path):
    run = finished.run(finished.row('Full'), tmp_path)
    runs.complete(run, finished.Fake())
    before = runs.seconds_of_steps(run.workdir)
    path = run.workdir / 'metrics.jsonl'
    path.write_text('{"step": 1, "tokens_per_second": 0.0}\n' + path.read_text())
    assert [seconds for _, seconds in runs.seconds_of_steps(run.workdir)] == [seconds for _, seconds in before]


def test_a_failure_is_told_in_its_last_line(tmp_path):
    run = finished.run(finished.row('Full'), tmp_path)
    wrong = runs.complete(run, finished.Fake(broken='full'))
    assert wrong == 'train failed with exit status 2: error: a pipe burst'
    assert 'this and that' in (run.workdir / 'log.txt').read_text()
    assert runs.measured(run) is None
    assert runs.complete(run, finished.Fake()) is None


def test_the_reason_of_a_stopped_command_is_told_not_what_to_do_next(tmp_path):
    def stopped(command, log):
        log.write(b"stopped by signal 15 after saving step 7\nnext: python -m combiner.train --workdir 'a b'\n")
        log.flush()
        return runs.Ended(143, 1.0, 1.0)

    wrong = runs.complete(finished.run(finished.row('Full'), tmp_path), stopped)
    assert wrong == 'train failed with exit status 143: stopped by signal 15 after saving step 7'


def test_an_evaluation_without_the_figure_of_the_row_is_a_failure(tmp_path):
    run = finished.run(finished.row('Full', metric='accuracy'), tmp_path)
    assert 'evaluate wrote no accuracy to' in runs.complete(run, finished.Fake())


def test_what_was_measured(tmp_path):
    run = finished.run(finished.row('Full'), tmp_path, seed=1)
    runs.complete(run, finished.Fake())
    found = runs.measured(run)
    assert found['train_minutes'] == pytest.approx((60 + 80) / 60)
    assert found['seconds_per_step'] == pytest.approx(1.5)
    assert (found['seed'], found['value'], found['steps'], found['tokens']) == (1, 4.5, 1200, 1200 * 8 * 768)
    assert found['train_peak_memory_mb'] == 100
    assert found.items() >= finished.ENVIRONMENT.items()


def test_a_training_that_was_finished_before_is_not_recorded(tmp_path, monkeypatch):
    run = finished.run(finished.row('Full'), tmp_path)
    runs.complete(run, finished.Fake())
    (run.workdir / runs.EVALUATION).unlink()
    elsewhere = finished.ENVIRONMENT | {'device': 'slide rule', 'commit': 'def'}
    monkeypatch.setattr(runs, 'environment', lambda: elsewhere)
    assert runs.complete(run, finished.Fake()) is None
    recorded = [(line['command'], line['device']) for line in runs.lines_of(run.workdir / 'commands.jsonl')]
    assert recorded == [('train', 'abacus'), ('evaluate', 'abacus'), ('evaluate', 'slide rule')]
    assert runs.measured(run).items() >= finished.ENVIRONMENT.items()


def test_a_run_that_another_command_made_lacks_only_what_was_not_measured(tmp_path):
    run = finished.run(finished.row('Full'), tmp_path)
    finished.train(run.workdir, run.config_arguments())
    finished.evaluate(run.workdir, 4.0)
    assert not {'train_peak_memory_mb', 'commit'} & runs.measured(run).keys()


def test_memory_is_that_of_the_command(tmp_path):
    """From a fresh process, as a command is counted with at least what the process has that starts it."""
    code = f"""
        import json, sys
        from experiments.harness import run as runs
        with open({str(tmp_path / 'log')!r}, 'wb') as log:
            ended = runs.Processes()([sys.executable, '-c', "data = b'1' * 500_000_000; print('made')"], log)
        print(json.dumps(ended))
    """
    done = subprocess.run(python(code), cwd=runs.ROOT, capture_output=True, text=True, check=True)
    status, seconds, peak_memory_mb = json.loads(done.stdout)
    assert status == 0
    assert 0 < seconds < 60
    assert 500 < peak_memory_mb < 560
    assert (tmp_path / 'log').read_text() == 'made\n'


@pytest.mark.parametrize(
    ('number', 'passed'),
    [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGTERM), (signal.SIGHUP, signal.SIGTERM)],
)
def test_a_signal_is_passed_on_once(tmp_path, number, passed):
    ready = tmp_path / 'ready'
    code = f"""
        import pathlib, signal, time
        received = []
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, lambda number, _: received.append(number))
        pathlib.Path({str(ready)!r}).write_text('ready')
        while not received:
            time.sleep(0.01)
        time.sleep(0.2)
        raise SystemExit(128 + sum(received))
    """

    def send():
        wait_for(ready)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    sender = threading.Thread(target=send)
    with (tmp_path / 'log').open('wb') as log, runs.Processes() as processes:
        sender.start()
        ended = processes(python(code), log)
    sender.join()
    assert ended.status == 128 + passed
    assert processes.received == passed
    assert signal.getsignal(number) == before


def test_two_never_train_into_the_same_folder(tmp_path):
    """Killed in mid-run, the command that it started still has the lock."""
    run = finished.run(finished.row('Full'), tmp_path)
    ready = tmp_path / 'ready'
    run.workdir.mkdir(parents=True)
    with (run.workdir / 'log.txt').open('ab') as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        code = f"import pathlib, time; pathlib.Path({str(ready)!r}).write_text('ready'); time.sleep(60)"
        orphan = subprocess.Popen(python(code), stdout=log)
    try:
        wait_for(ready)
        fake = finished.Fake()
        assert 'another process is training this run' in runs.complete(run, fake)
        assert not fake.said
    finally:
        orphan.kill()
        orphan.wait()
    assert runs.complete(run, fake) is None


def test_a_killed_command_is_told_by_its_signal(tmp_path):
    run = finished.run(finished.row('Full'), tmp_path)

    def execute(command, log):
        return runs.Processes()(python('import os, signal; os.kill(os.getpid(), signal.SIGKILL)'), log)

    assert 'train was killed by SIGKILL' in runs.complete(run, execute)
    (line,) = runs.lines_of(run.workdir / 'commands.jsonl')
    assert (line['status'], line['commit']) == (-9, 'abc')


def test_the_environment_is_that_of_a_process_of_its_own(monkeypatch):
    monkeypatch.undo()
    runs._device.cache_clear()
    found = runs.environment()
    assert found['device'] == 'cpu'
    assert found['jax'] == jax.__version__
    assert found['commit'] == runs.provenance.commit()
    assert json.dumps(found)
