"""Plans of rows for TPUs: the command without libtpu, and results/memory.json compared with rows, configs and cards."""

import importlib
import importlib.util
import json
from pathlib import Path

import pytest

from experiments.harness import declarations, memory_plan, runner
from experiments.tables import memory

DOCUMENT = json.loads((Path(__file__).parents[3] / memory.OUT).read_text(encoding='utf-8'))
PLANS = DOCUMENT['plans']
ROWS = {runner.names_of(row)[0]: row for rows in declarations.table_rows().values() for row in rows}


def test_without_libtpu_it_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(SystemExit, match='2'):
        memory_plan.command([], memory.OUT, None, [])
    assert capsys.readouterr().err.endswith('libtpu, which is not installed: bash scripts/setup.sh tpu-aot\n')


def test_plans_of_other_versions_are_not_continued(tmp_path):
    path = tmp_path / 'memory_plan.json'
    versions = dict.fromkeys(memory_plan.VERSIONS, '1')
    assert memory_plan.read(path, versions) == []
    path.write_text(json.dumps({**versions, 'plans': [{}]}))
    assert memory_plan.read(path, versions) == [{}]
    with pytest.raises(ValueError, match='give another --out'):
        memory_plan.read(path, versions | {'libtpu': '2'})


@pytest.mark.parametrize('plan', PLANS, ids=lambda plan: f'{plan["row"]}-{plan["topology"]}')
def test_a_plan_is_of_a_row_as_its_config_is_and_stands_on_its_card(plan):
    row = ROWS[plan['row']]
    assert memory_plan.settings(memory_plan.config_of(row)).items() <= plan.items()
    card = importlib.import_module(row.config.removesuffix('.py').replace('/', '.')).__doc__
    assert memory_plan.line(plan) in card.splitlines()
