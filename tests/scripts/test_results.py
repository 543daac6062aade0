"""The script that makes results/ again: it makes all of it, from commands that exist."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / 'scripts' / 'results.sh'
TEXT = SCRIPT.read_text(encoding='utf-8')


@pytest.mark.parametrize('path', sorted((ROOT / 'results').iterdir()), ids=lambda path: path.name)
def test_everything_in_results_is_made(path):
    name = path.stem.removeprefix('claims_')
    assert path.name in TEXT or re.search(rf'-m experiments\.(tables|claims)\.{name}\b', TEXT)


def test_it_calls_what_exists():
    called = re.findall(r'"\$python" (-m )?(\S+)', TEXT)
    assert len(called) > 5
    for as_module, target in called:
        assert importlib.util.find_spec(target) if as_module else (ROOT / target).is_file()


def test_it_says_how_it_is_used():
    done = subprocess.run(['bash', str(SCRIPT)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr == 'usage: bash scripts/results.sh DATA_DIR\n'
