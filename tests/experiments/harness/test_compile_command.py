"""What scripts/compile.py writes, and when; whole commands are in tests/scripts/test_compile.py."""

import json
import runpy
import sys
from pathlib import Path

import jax
import pytest

from combiner.aot import targets
from experiments.harness import compiling

SCRIPT = Path(__file__).parents[3] / 'scripts' / 'compile.py'


@pytest.fixture
def compiled(monkeypatch):
    """The lengths that are compiled, in turn; the compiler refuses 512."""
    lengths = []

    def attention(asked, *, kernels):
        lengths.append(asked.length)
        if asked.length == 512:
            raise jax.errors.JaxRuntimeError('INTERNAL: no such program\n  deep')
        return {'name': asked.text, 'length': asked.length}

    monkeypatch.setattr(targets.Target, 'devices', lambda self: [])
    monkeypatch.setattr(compiling, 'attention', attention)
    monkeypatch.setattr(compiling, 'describe_attention', str)
    return lengths


def run(monkeypatch, out):
    arguments = ['--attention', 'linear', '--lengths', '128,256,512', '--json', str(out)]
    monkeypatch.setattr(sys, 'argv', ['compile.py', *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name='__main__')
    return stopped.value.code


def test_rows_before_one_that_the_compiler_refuses_are_written(monkeypatch, tmp_path, compiled, capsys):
    out = tmp_path / 'new' / 'found.json'
    assert run(monkeypatch, out) == 1
    assert 'the compiler refuses it: INTERNAL: no such program' in capsys.readouterr().err
    assert [row['length'] for row in json.loads(out.read_text())['attention']] == [128, 256]


@pytest.mark.parametrize(
    ('out', 'message'), [('gs://bucket/x', 'is not a folder of this machine'), ('', 'is a folder')]
)
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_compiled(
    monkeypatch, tmp_path, compiled, capsys, out, message
):
    assert run(monkeypatch, out or tmp_path) == 2
    assert message in capsys.readouterr().err
    assert not compiled
