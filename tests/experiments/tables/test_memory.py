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
REFUSED = (  # what libtpu 0.0.52 says
    'RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO '
    'temporaries (80.10G) exceeds available HBM (15.75G). HLO module: jit__lambda.'
)


def test_without_libtpu_it_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(SystemExit, match='2'):
        memory_plan.command([], memory.OUT, None, [])
    assert capsys.readouterr().err.endswith('libtpu, which is not installed: bash scripts/setup.sh tpu-aot\n')


def test_a_refusal_says_how_much_is_needed():
    assert memory_plan.refusal(REFUSED) == {'temporaries_bytes': int(80.1 * 2**30), 'chip_bytes': int(15.75 * 2**30)}
    assert memory_plan.refusal('INTERNAL: a fault') == {}


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
