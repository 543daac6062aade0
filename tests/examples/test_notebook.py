"""The notebook runs from its first cell to its last, and is committed with its outputs."""

import importlib.util
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / 'examples' / 'combiner.ipynb'
LINES = 32  # of a cell: a screen
LINK = re.compile(r'\]\(([^)#]+)[^)]*\)')


def load_script():
    spec = importlib.util.spec_from_file_location('notebook_script', ROOT / 'scripts' / 'notebook.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == 'code']


def kinds(cell):
    """What a cell shows: text, pictures and so on."""
    return sorted({kind for output in cell.outputs for kind in output.get('data', {output.output_type: ''})})


def test_it_is_committed_as_the_script_leaves_it(committed):
    nbformat.validate(committed)
    assert [cell.execution_count for cell in code(committed)] == list(range(1, len(code(committed)) + 1))
    before = nbformat.writes(committed)
    assert nbformat.writes(load_script().stripped(committed)) == before
    assert before.rstrip() == NOTEBOOK.read_text(encoding='utf-8').rstrip()


def test_its_outputs_show_pictures_and_no_error_warning_or_path(committed):
    shown = [output for cell in code(committed) for output in cell.outputs]
    pictures = [output for output in shown if 'image/png' in output.get('data', {})]
    assert len(pictures) >= 5
    for output in shown:
        assert output.output_type != 'error'
        assert output.get('name') != 'stderr', output.text
        text = output.get('text', '') + output.get('data', {}).get('text/plain', '')
        assert not re.search(r'(?<![\w/.:])/(?:\w+/)+\w+|\w:\\', text), text  # an absolute path


def test_it_reads_as_a_page(committed):
    assert committed.cells[0].source.startswith('# ')
    assert '%pip install' in code(committed)[0].source
    assert sum('%pip' in cell.source for cell in committed.cells) == 1
    for cell in committed.cells:
        assert len(cell.source.splitlines()) <= LINES
        for target in LINK.findall(cell.source) if cell.cell_type == 'markdown' else []:
            assert (NOTEBOOK.parent / target).is_file(), target


def test_it_runs(committed, tmp_path):
    """From an empty folder, in which it leaves its runs; no cell raises an error, and each shows what it shows here."""
    run = load_script().execute(nbformat.read(NOTEBOOK, as_version=4), tmp_path)
    for cell, before in zip(code(run), code(committed), strict=True):
        streams = [output.text for output in cell.outputs if output.output_type == 'stream']
        assert kinds(cell) == kinds(before), f'{cell.source}\nprinted {streams}'
        if 'testing.check(' in cell.source:
            assert cell.outputs == before.outputs
    assert (tmp_path / 'runs' / 'notebook' / 'samples.png').is_file()
