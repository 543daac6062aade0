import re
import subprocess
import sys

import pytest

from combiner.data import generate
from combiner.data.lra import generated


def command(*arguments: str) -> list[str]:
    return [sys.executable, '-m', 'combiner.data.generate', *arguments]


def run(*arguments: str) -> str:
    return generate.run(generate.parse(list(arguments)))


def test_a_set_is_generated_verified_and_read(tmp_path, capsys):
    arguments = ('lra_pathfinder32_easy', '--data_dir', str(tmp_path), '--limit', '8', '--workers', '1')
    assert re.search(r'is complete; labels: .*train.*validation.*test', run(*arguments))
    said = capsys.readouterr()
    assert re.match(r'lra_pathfinder32_easy: 8 train, 8 validation, 8 test; about \d+ MB in .*; about', said.out)
    assert '24.0/24.0' in said.err
    assert run(*arguments[:3], '--verify').startswith('3 shards in')
    assert len(generated.open_split('lra_pathfinder32_easy', 'test', tmp_path)) == 8


def test_the_estimate_grows_with_the_set():
    few, many = (generate.estimate(generated.recipe('lra_listops', limit), 0, 1) for limit in (100, 2000))
    assert many[1] == pytest.approx(20 * few[1], rel=0.01)
    one, two = (generate.estimate(generated.recipe('lra_listops'), 0, workers) for workers in (1, 8))
    assert one[1] == two[1] == pytest.approx(150e6, rel=0.25)


def test_a_mistake_is_one_line(tmp_path):
    arguments = ('lra_listops', '--data_dir', str(tmp_path), '--limit', '2', '--workers', '1')
    run(*arguments)
    done = subprocess.run(command(*arguments, '--seed', '1'), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert re.search(r'^error: .*recipe\.json is of another set: seed is 0, not 1; .*$', done.stderr, re.MULTILINE)
    assert 'Traceback' not in done.stderr
    done = subprocess.run(command('lra_list'), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
