"""Claims: equal rows but for what is claimed, a sweep that chooses by validation, verdicts that follow intervals."""

import collections
import json

import finished
import jax
import pytest

from combiner import evaluate, optim, sharding, train
from experiments import claims, runner, runs

RATES = claims.RATES['CIFAR-10']
LENGTH = {'data.options.length', 'data.batch_size', 'run.eval_examples'}


def config_of(row):
    """The row's config at cpu scale."""
    return finished.run(row, 'runs', scale='cpu').config()


def flat(config):
    leaves, _ = jax.tree_util.tree_flatten_with_path(config.to_dict(), is_leaf=lambda x: not isinstance(x, dict))
    return {'.'.join(str(entry.key) for entry in path): value for path, value in leaves}


@pytest.mark.parametrize('row', claims.ROWS, ids=lambda row: '/'.join(runner.names_of(row)[:1]))
def test_rows_can_be_trained(row):
    config = config_of(row)
    task = evaluate.task_of(config)
    evaluate.model_of(config, task)
    optim.optimizer(config.optimizer, config.steps)
    train.check_numbers(config, sharding.make_mesh(devices=jax.devices()[:1]))
    assert row.metric in task.metrics
    assert config.steps % config.run.eval_every == 0  # so that the last validation is that of the last step


def test_rows_of_a_column_differ_in_attention_only():
    columns = collections.defaultdict(list)
    for row in claims.ROWS:
        columns[row.column].append(flat(config_of(row)))
    for column, (first, *others) in columns.items():
        for config in others:
            differing = {key for key in first.keys() | config.keys() if first.get(key) != config.get(key)}
            differing = {key for key in differing if not key.startswith('model.attention.')}
            assert differing <= (LENGTH if column == 'Prose' else set())
            assert first['data.batch_size'] * first.get('data.options.length', 1) == (
                config['data.batch_size'] * config.get('data.options.length', 1)
            )


def test_claims_are_about_rows():
    runner.check(claims.ROWS)
    known = {(row.column, row.model) for row in claims.SWEPT}
    assert set(claims.RATES) == {row.column for row in claims.SWEPT}
    assert {(claim.column, model) for claim in claims.CLAIMS for model in (claim.better, claim.worse)} <= known


class Fake(finished.Fake):
    """Trains to a validation figure that is best at the middle rate, where the test figure is the worst."""

    def __call__(self, command, log):
        workdir = command[-1]
        ended = super().__call__(command, log)
        if command[2] == 'combiner.train' and not ended.status:
            rate = float(next(item for item in command if 'learning_rate' in item).partition('=')[2])
            off = abs(rate - RATES[1])
            with open(f'{workdir}/metrics.jsonl', 'w') as file:
                file.write(json.dumps({'step': 50, 'validation_bits_per_dim': 0.1}) + '\n')
                file.write(json.dumps({'step': 100, 'validation_bits_per_dim': 5 + off}) + '\n')
        return ended


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs the command on two rows of CIFAR-10, with commands that leave behind what the real ones would."""
    rows = [row for row in claims.SWEPT if row.column == 'CIFAR-10' and row.model.endswith('Axial')]
    monkeypatch.setattr(claims, 'SWEPT', tuple(rows))
    monkeypatch.setattr(runs, 'environment', lambda: finished.ENVIRONMENT)

    def run(*arguments, broken=''):
        fake = Fake(broken)
        monkeypatch.setattr(runs.Processes, '__call__', lambda self, command, log: fake(command, log))
        stages = {'stages': claims.stages, 'write': claims.write, 'scale': 'cpu', 'seeds': 2}
        with pytest.raises(SystemExit) as stopped:
            runner.command(rows, 'claims', ['--workdir', str(tmp_path), *arguments], **stages)
        return stopped.value.code or 0, [where for module, where in fake.said if module == 'combiner.train']

    return run


def test_the_best_rate_of_the_sweep_gets_the_other_seeds(command, tmp_path, capsys):
    status, trained = command()
    assert status == 0
    assert trained == [*2 * [f'rate-{rate}/seed0' for rate in RATES], *2 * [f'rate-{RATES[1]}/seed1']]
    assert '4 of 4 runs are done' in capsys.readouterr().out
    assert command() == (0, [])
    found = json.loads((tmp_path / 'claims.json').read_text())
    assert [row['rate'] for row in found['sweep']] == 2 * [RATES[1]]
    assert [row['ours']['seeds'] for row in found['rows']] == [2, 2]
    (judged,) = found['claims']
    assert (judged['better']['model'], judged['worse']['model']) == ('Combiner-Axial', 'Axial')
    assert not judged['shown']
    assert (
        '| CIFAR-10 | Axial | 5.001 at 0.001, 5 at 0.002, 5.002 at 0.004 | 0.002 |'
        in (tmp_path / 'claims.md').read_text()
    )


def test_a_row_whose_sweep_is_not_whole_has_no_result(command, tmp_path):
    status, _ = command(broken='rate-0.004')
    assert status == 1
    found = json.loads((tmp_path / 'claims.json').read_text())
    assert (found['rows'], found['claims']) == ([], [])
    assert {row['rate'] for row in found['sweep']} == {None}


def test_dry_run_knows_no_seeds_before_the_sweep(command, capsys):
    assert command('--dry_run') == (0, [])
    assert capsys.readouterr().out.count('combiner.train') == 2 * len(RATES)
