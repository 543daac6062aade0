"""Claims: equal rows but for what is claimed, a sweep that chooses by validation, verdicts that follow intervals."""

import json

import finished
import jax
import pytest

from combiner import build, optim, sharding
from experiments.harness import claim_table, declarations, runner, step_cost
from experiments.harness import run as runs

TABLES = {f'claims_{name}': table for name, table in declarations.claim_tables().items()}
ROWS = [row for table in TABLES.values() for row in table.rows]
RATES = (1e-3, 2e-3, 4e-3)
LENGTH = {'data.options.length', 'data.batch_size', 'run.eval_examples', 'run.eval_batch_size'}


def config_of(row):
    """The row's config at cpu scale."""
    return finished.run(row, 'runs', scale='cpu').config()


def flat(config):
    leaves, _ = jax.tree_util.tree_flatten_with_path(config.to_dict(), is_leaf=lambda x: not isinstance(x, dict))
    return {'.'.join(str(entry.key) for entry in path): value for path, value in leaves}


@pytest.mark.parametrize('row', ROWS, ids=lambda row: '/'.join(runner.names_of(row)[:1]))
def test_rows_can_be_trained(row):
    config = config_of(row)
    task = build.task(config)
    build.model(config, task)
    optim.optimizer(config.optimizer, config.steps)
    build.check_numbers(config, sharding.make_mesh(devices=jax.devices()[:1]))
    assert row.metric in task.metrics
    assert config.steps % config.run.eval_every == 0  # so that the last validation is that of the last step


@pytest.mark.parametrize('table', TABLES.values(), ids=TABLES)
def test_rows_of_a_table_differ_in_attention_only(table):
    first, *others = (flat(config_of(row)) for row in table.rows)
    for config in others:
        differing = {key for key in first.keys() | config.keys() if first.get(key) != config.get(key)}
        differing = {key for key in differing if not key.startswith('model.attention.')}
        assert differing <= (LENGTH if table.rows[0].metric.endswith('perplexity') else set())
        for examples in ('data.batch_size', 'run.eval_examples'):
            assert first[examples] * first.get('data.options.length', 1) == (
                config[examples] * config.get('data.options.length', 1)
            )


@pytest.mark.parametrize('name', TABLES)
def test_claims_are_about_rows(name):
    table = TABLES[name]
    runner.check(table.rows)
    assert table.name == name
    assert len({row.column for row in table.rows}) == 1
    known = {(row.column, row.model) for row in table.rows}
    assert {(claim.column, model) for claim in table.claims for model in (claim.better, claim.worse)} <= known
    assert table.claims or {row.metric for row in table.rows} == {'accuracy'}
    assert table.seeds >= 3 or not table.claims


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
    """Runs the command of two rows, with commands that leave behind what the real ones would."""
    pair = claim_table.Claim('Photographs', 'Combiner-Axial', 'Axial', clearly=True)
    rows = [row for row in TABLES['claims_photographs'].rows if row.model in (pair.better, pair.worse)]
    table = claim_table.ClaimTable('claims_small', tuple(rows), RATES, (pair,), seeds=2)
    monkeypatch.setattr(runs, 'environment', lambda: finished.ENVIRONMENT)
    monkeypatch.setattr(step_cost, 'time_interleaved', lambda configs, rounds: dict.fromkeys(configs, 'not here'))

    def run(*arguments, broken=''):
        fake = Fake(broken)
        monkeypatch.setattr(runs.Processes, '__call__', lambda self, command, log: fake(command, log))
        with pytest.raises(SystemExit) as stopped:
            claim_table.command(table, ['--workdir', str(tmp_path), *arguments])
        return stopped.value.code or 0, [where for module, where in fake.said if module == 'combiner.train']

    return run


def test_the_best_rate_of_the_sweep_gets_the_other_seeds(command, tmp_path, capsys):
    status, trained = command()
    assert status == 0
    assert trained == [*2 * [f'rate-{rate}/seed0' for rate in RATES], *2 * [f'rate-{RATES[1]}/seed1']]
    assert '4 of 4 runs are finished' in capsys.readouterr().out
    assert command() == (0, [])
    found = json.loads((tmp_path / 'claims_small.json').read_text())
    assert [row['rate'] for row in found['sweep']] == 2 * [RATES[1]]
    assert [row['ours']['seeds'] for row in found['rows']] == [2, 2]
    (judged,) = found['claims']
    assert (judged['better']['model'], judged['worse']['model']) == ('Combiner-Axial', 'Axial')
    assert not judged['shown']
    assert (
        '| Photographs | Axial | 5.001 at 0.001, 5 at 0.002, 5.002 at 0.004 | 0.002 |'
        in (tmp_path / 'claims_small.md').read_text()
    )


def test_a_row_whose_sweep_is_not_whole_has_no_result(command, tmp_path):
    status, _ = command(broken='rate-0.004')
    assert status == 1
    found = json.loads((tmp_path / 'claims_small.json').read_text())
    assert [(row['model'], row['runs']) for row in found['rows']] == [('Axial', []), ('Combiner-Axial', [])]
    assert found['claims'] == []
    assert {row['rate'] for row in found['sweep']} == {None}


def test_dry_run_knows_no_seeds_before_the_sweep(command, capsys):
    assert command('--dry_run') == (0, [])
    assert capsys.readouterr().out.count('combiner.train') == 2 * len(RATES)


def test_a_table_without_claims_compares_with_the_most_frequent_class(monkeypatch, tmp_path):
    row = claim_table.Row('Full', 'Photos', 'configs/photos.py', 'attention=full', 'accuracy')
    run = finished.run(row, tmp_path / 'claims_small')
    finished.train(run.workdir, run.config_arguments())
    finished.evaluate(run.workdir, 0.37, 'accuracy')
    monkeypatch.setattr(runs, 'environment', lambda: finished.ENVIRONMENT)
    monkeypatch.setattr(claim_table, 'most_frequent', lambda run: 0.2)
    monkeypatch.setattr(step_cost, 'time_interleaved', lambda configs, rounds: dict.fromkeys(configs, 'not here'))
    with pytest.raises(SystemExit):
        claim_table.command(claim_table.ClaimTable('claims_small', (row,), seeds=1), ['--workdir', str(tmp_path)])
    (judged,) = json.loads((tmp_path / 'claims_small.json').read_text())['claims']
    assert (judged['worse']['mean'], judged['clear']) == (0.2, True)
    assert judged['better']['interval'] == pytest.approx(1.96 * (0.37 * 0.63 / 1853) ** 0.5)
