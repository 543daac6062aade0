"""The workflows of continuous integration: what they run exists, and they test the versions that setup.py names."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / '.github'
WORKFLOWS = {path.name: yaml.safe_load(path.read_text(encoding='utf-8')) for path in GITHUB.glob('workflows/*.yml')}
JOBS = {(file, name): job for file, workflow in WORKFLOWS.items() for name, job in workflow['jobs'].items()}
STEPS = [(f'{file}:{name}', step) for (file, name), job in JOBS.items() for step in job['steps']]
NEWEST = (ROOT / 'scripts' / 'setup.sh').read_text(encoding='utf-8')


def arguments_of_setup() -> dict:
    """The literal arguments of the call of `setup`; a list that is put together counts by its literal parts."""
    tree = ast.parse((ROOT / 'setup.py').read_text(encoding='utf-8'))
    (call,) = (
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'setup'
    )
    found = {word.arg: word.value for word in call.keywords}
    texts = [node.value for node in ast.walk(found['classifiers']) if isinstance(node, ast.Constant)]
    return {
        'extras': {key.value for key in found['extras_require'].keys},
        'pythons': {text.rpartition(' ')[2] for text in texts if re.search(r':: 3\.\d+$', str(text))},
        'python_requires': found['python_requires'].value,
    }


def matrix() -> list[dict]:
    """The cells of the tests: Python, and the stack as of scripts/setup.sh."""
    return WORKFLOWS['ci.yml']['jobs']['tests']['strategy']['matrix']['include']


def test_every_workflow_is_read():
    assert set(WORKFLOWS) == {'ci.yml', 'nightly.yml'}
    assert {'lint', 'tests', 'docs', 'wheel'} == set(WORKFLOWS['ci.yml']['jobs'])
    assert len(STEPS) >= 10


def test_the_matrix_has_every_supported_python_and_both_sets():
    declared = arguments_of_setup()
    pythons = {cell['python'] for cell in matrix()}
    assert pythons == declared['pythons']
    first, beyond = re.fullmatch(r'>=3\.(\d+),<3\.(\d+)', declared['python_requires']).groups()
    assert pythons == {f'3.{minor}' for minor in range(int(first), int(beyond))}
    for file, name in JOBS:
        for cell in JOBS[file, name].get('strategy', {}).get('matrix', {}).get('include', []):
            suffix = f'-{cell["stack"]}' if cell['stack'] else ''
            header = (ROOT / f'constraints{suffix}.txt').read_text(encoding='utf-8')
            # Each set was made on one Python: the pinned one only serves that.
            assert cell['stack'] or f'Python {cell["python"]};' in header.partition('\n')[0]
    oldest_of_newest = re.search(r'if \[\[ \$stack == newest \]\]; then\n *oldest=(\d+)', NEWEST)[1]
    assert min(int(cell['python'][2:]) for cell in matrix() if cell['stack']) == int(oldest_of_newest)


@pytest.mark.parametrize(('where', 'command'), [(where, step['run']) for where, step in STEPS if 'run' in step])
def test_a_command_runs_what_exists(where, command):
    words = shlex.split(command)
    assert len(command.splitlines()) == 1, f'{where}: put several commands into a script, which can be run here too'
    if words[0] == 'bash':
        assert (ROOT / words[1]).is_file(), f'{where}: no file {words[1]}'
        if words[1] == 'scripts/setup.sh':
            assert set(words[2:]) <= arguments_of_setup()['extras'], f'{where}: no extra {words[2:]}'
    else:
        assert words[:2] == ['.venv/bin/python', '-m'], f'{where}: {command}'
        assert words[2] in ('ruff', 'pyright')


def test_workflows_may_only_read_and_end_by_themselves():
    for workflow in WORKFLOWS.values():
        assert workflow['permissions'] == {'contents': 'read'}
        assert 'github.ref' in workflow['concurrency']['group']
    for where, job in JOBS.items():
        assert 'permissions' not in job
        assert job['timeout-minutes'] <= 350, where


def test_actions_have_a_major_version_and_packages_are_cached():
    for where, step in STEPS:
        if 'uses' in step:
            assert re.fullmatch(r'actions/[\w-]+@v\d+', step['uses']), where
        if step.get('uses', '').startswith('actions/setup-python@'):
            options = step['with']
            assert options['cache'] == 'pip'
            for pattern in options['cache-dependency-path'].split():
                assert list(ROOT.glob(pattern)), f'{where}: no file {pattern}'
        if step.get('uses', '').startswith('actions/checkout@'):
            assert step['with'] == {'persist-credentials': False}


def test_forms_of_issues_are_whole():
    forms = {
        path.name: yaml.safe_load(path.read_text(encoding='utf-8')) for path in GITHUB.glob('ISSUE_TEMPLATE/*.yml')
    }
    assert set(forms.pop('config.yml')) == {'blank_issues_enabled'}
    assert len(forms) >= 3
    for form in forms.values():
        assert form['name']
        assert form['description']
        ids = [part['id'] for part in form['body']]
        assert len(ids) == len(set(ids))
        assert any(part.get('validations', {}).get('required') for part in form['body'])


def test_updates_are_of_a_file_that_exists():
    settings = json.loads((GITHUB / 'renovate.json').read_text(encoding='utf-8'))
    (pattern,) = settings['pip_requirements']['managerFilePatterns']
    found = [path.name for path in ROOT.glob('*.txt') if re.search(pattern.strip('/'), path.name)]
    assert found == ['constraints-newest.txt']
