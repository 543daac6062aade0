"""The rules of the code base that a machine can check, read from the syntax trees."""

import ast
import dataclasses
import inspect
import pickle
import re
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import pytest

from combiner.core import registry
from combiner.core.mechanism import Mechanism

ROOT = Path(__file__).parents[1]
FILES = sorted(path for name in ('combiner', 'configs') for path in (ROOT / name).rglob('*.py'))
COMBINER = [path for path in FILES if path.is_relative_to(ROOT / 'combiner')]
EXPERIMENTS = sorted((ROOT / 'experiments').rglob('*.py'))
DECLARED = ('tables', 'claims', 'figures')

# What each part of combiner may import from combiner, besides itself; '' is combiner/__init__.py.
SHARED = {'patterns', 'costs', 'reference', 'layers'}
MECHANISMS = SHARED | {'ops', 'core'}
TRAINING = {'models', 'data', 'optim', 'losses', 'metrics', 'sharding', 'run', 'cli', 'atomic', 'paths', 'messages'}
ALLOWED = {
    'patterns': set(),
    'named': set(),
    'costs': {'patterns'},
    'reference': {'patterns'},
    'layers': set(),
    'initializers': set(),
    'ops': {'sharding'},  # the tools of mechanisms, which know none
    'kernels': {'costs', 'reference', 'layers', 'ops', 'sharding'},
    'core': SHARED | {'ops', 'kernels', 'sharding', 'named'},
    'attention': MECHANISMS | {'kernels'},
    'baselines': MECHANISMS,
    'functional': MECHANISMS | {'attention', 'baselines', 'sharding'},
    '': {'functional', 'core', 'weights'},
    'oracle': {'patterns', 'reference'},
    'testing': MECHANISMS | {'functional', 'oracle'},
    'transformer': MECHANISMS | {'initializers'},
    'models': MECHANISMS | {'initializers', 'transformer'},
    'paths': set(),
    'atomic': {'paths'},
    'messages': set(),
    'data': {'cli', 'config_flag', 'atomic', 'paths', 'messages'},  # cli and config_flag for its commands
    'optim': set(),
    'losses': set(),
    'sharding': set(),
    'startup': set(),
    'compile_cache': {'paths'},
    'cli': {'paths', 'config_flag', 'compile_cache', 'startup', 'messages'},
    'config_flag': {'paths'},
    'config': {'core'},  # which says what a mechanism has
    'metrics': set(),
    'run': {
        'cli',
        'config',
        'data',
        'sharding',
        'atomic',
        'paths',
        'messages',
    },  # cli runs a command once its processes have joined
    'build': {'models', 'data', 'sharding'},
    'steps': {'data', 'losses', 'metrics', 'optim', 'sharding'},
    'monitoring': {'named', 'aot', 'core', 'data', 'metrics', 'startup', 'atomic', 'paths', 'messages'},
    'evaluate': TRAINING | {'build', 'steps', 'startup'},
    'train': TRAINING | {'build', 'steps', 'startup', 'monitoring'},
    'sample': TRAINING | {'evaluate', 'startup'},
    'weights': {'models', 'core', 'data', 'sharding', 'paths'},
    'model_card': {'metrics', 'paths'},
    'export': {
        '',
        'evaluate',
        'weights',
        'model_card',
        'data',
        'run',
        'sharding',
        'cli',
        'atomic',
        'paths',
        'messages',
    },
    # It compiles them for devices that are not present.
    'aot': TRAINING | {'build', 'steps', 'functional', 'layers', 'core'},
}

NEEDS_TENSORFLOW = {'tensorflow', 'clu.metric_writers', 'clu.periodic_actions'}
EXECUTES_DATA = {'pickle', 'cloudpickle', 'dill', 'joblib', 'marshal', 'shelve'}

FUNCTION_LINES = 60
FILE_LINES = 400
DECLARATION_LINES = 80  # a screen
TOOLS = 13
LINES_WITHOUT_DOCSTRING = 8

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
by_name = pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(ROOT)))
by_name_in_combiner = pytest.mark.parametrize('path', COMBINER, ids=lambda path: str(path.relative_to(ROOT)))
by_name_in_experiments = pytest.mark.parametrize('path', EXPERIMENTS, ids=lambda path: str(path.relative_to(ROOT)))
with_experiments = pytest.mark.parametrize('path', COMBINER + EXPERIMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split('.'))
    return path.with_suffix('.py').exists() or path.is_dir()


def imported_modules(tree: ast.AST, package: str) -> set[str]:
    """Full names of all modules imported anywhere in a file of `package`, also within functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ''
            if node.level:
                parents = package.split('.')[: len(package.split('.')) - node.level + 1]
                module = '.'.join([*parents, module] if module else parents)
            for alias in node.names:
                # `from a import b` imports the module a.b where there is one, else a name out of a.
                submodule = f'{module}.{alias.name}'
                ours = module.partition('.')[0] in ('combiner', 'configs', 'experiments')
                found.add(submodule if not ours or is_module(submodule) else module)
    return found


def imports_of(path: Path) -> set[str]:
    name = module_name(path)
    package = name if path.name == '__init__.py' else name.rpartition('.')[0]
    return imported_modules(ast.parse(path.read_text(encoding='utf-8')), package)


def part(module: str) -> str:
    """The part of combiner that a module of it belongs to: combiner.data.ops is in 'data'."""
    return module.removeprefix('combiner').removeprefix('.').partition('.')[0]


def within(module: str, names: set[str]) -> bool:
    return any(module == name or module.startswith(name + '.') for name in names)


def functions(tree: ast.AST, prefix: str = '') -> list[tuple[str, FunctionNode]]:
    """All functions and methods with dotted names; nested functions are part of the one around them."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, FunctionNode):
            found.append((prefix + node.name, node))
        else:
            found += functions(node, f'{prefix}{node.name}.' if isinstance(node, ast.ClassDef) else prefix)
    return found


def length(node: FunctionNode) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


@pytest.mark.parametrize(
    ('source', 'package', 'expected'),
    [
        ('import combiner.train', 'combiner', {'combiner.train'}),
        ('from combiner import data as d', 'combiner.core', {'combiner.data'}),
        ('from combiner.patterns import Pattern', 'combiner', {'combiner.patterns'}),
        ('from . import data', 'combiner', {'combiner.data'}),
        ('from .. import data', 'combiner.core', {'combiner.data'}),
        ('from ..patterns import Pattern', 'combiner.core', {'combiner.patterns'}),
        ('def f():\n  import pickle', 'combiner', {'pickle'}),
        ('from clu import metric_writers', 'combiner', {'clu.metric_writers'}),
    ],
)
def test_every_form_of_import_is_found(source, package, expected):
    assert imported_modules(ast.parse(source), package) == expected


@by_name_in_combiner
def test_imports_point_one_way(path):
    own = part(module_name(path))
    assert own in ALLOWED, f'say in ALLOWED what the new part {own!r} of combiner may import'
    ours = {part(module) for module in imports_of(path) if within(module, {'combiner'})}
    assert ours - {own} <= ALLOWED[own]


def test_imports_form_no_circle():
    """Also imports within functions, by which a circle could be hidden."""
    imports = {module_name(path): imports_of(path) for path in COMBINER}
    while leaves := {name for name, others in imports.items() if not others & (imports.keys() - {name})}:
        imports = {name: others for name, others in imports.items() if name not in leaves}
    assert not imports, f'these import each other, or one that does: {sorted(imports)}'


def pages(folder: str) -> list[Path]:
    return [path for path in sorted((ROOT / 'combiner' / folder).rglob('*.py')) if path.name != '__init__.py']


@pytest.mark.parametrize('folder', ['attention', 'baselines'])
def test_a_folder_of_mechanisms_holds_one_file_for_each_and_no_other(folder):
    homes = {name: registry.resolve(name).__module__ for name in registry.names()}
    in_attention = {name for name in homes if name == 'full' or name.startswith('combiner_')}
    here = {f'combiner.{folder}.{name}' for name in homes if (name in in_attention) == (folder == 'attention')}
    assert {module_name(path) for path in pages(folder)} == here
    assert all(homes[module.rpartition('.')[2]] == module for module in here)


MIXTURES = {'combiner_mixture': {'combiner_axial_vertical', 'combiner_axial_horizontal'}, 'routing': {'local'}}


@pytest.mark.parametrize('path', pages('attention') + pages('baselines'), ids=lambda path: path.stem)
def test_mechanisms_import_no_other_but_a_mixture_its_parts(path):
    mechanisms = {module_name(page) for page in pages('attention') + pages('baselines')}
    others = {module.rpartition('.')[2] for module in imports_of(path) & mechanisms}
    assert others == MIXTURES.get(path.stem, set())


@pytest.mark.parametrize('name', registry.names())
def test_a_mechanism_is_a_frozen_value_and_no_module(name):
    mechanism = registry.resolve(name)
    assert issubclass(mechanism, Mechanism)
    assert not issubclass(mechanism, nn.Module)
    one, same = (mechanism(causal=mechanism.supported_causal[0], max_length=23) for _ in range(2))
    assert one == same == pickle.loads(pickle.dumps(one))
    assert hash(one) == hash(same)
    assert one != dataclasses.replace(one, max_length=24)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.max_length = 24


def test_the_shared_tools_are_few_and_described():
    tree = ast.parse((ROOT / 'combiner' / 'ops' / '__init__.py').read_text(encoding='utf-8'))
    described = re.findall(r'^(\w+) {2,}\w', ast.get_docstring(tree) or '', re.MULTILINE)
    assert sorted(described) == sorted(path.stem for path in pages('ops'))
    assert len(described) <= TOOLS


@pytest.mark.parametrize('name', registry.names())
def test_optional_inputs_come_in_a_context(name):
    """Every method of a mechanism takes the arguments of the contract, under its names and no others."""
    mechanism = registry.resolve(name)
    for method in ('pattern', 'cost', 'attend', 'init_cache', 'decode_step', 'update_state', 'variables'):
        given, contract = (list(inspect.signature(getattr(cls, method)).parameters) for cls in (mechanism, Mechanism))
        assert given == contract, f'{method} of {name}'


@by_name_in_combiner
def test_combiner_imports_nothing_that_is_built_on_it(path):
    assert not {m for m in imports_of(path) if within(m, {'configs', 'experiments', 'scripts', 'tests'})}


@pytest.mark.parametrize('path', sorted(set(FILES) - set(COMBINER)), ids=module_name)
def test_configs_import_only_what_describes_a_config(path):
    allowed = {'ml_collections', 'combiner.config', *sys.stdlib_module_names}
    assert not {module for module in imports_of(path) if module != 'configs' and not within(module, allowed)}


def test_experiments_are_declarations_and_one_harness():
    folders = {path.name for path in (ROOT / 'experiments').iterdir() if path.is_dir() and path.name != '__pycache__'}
    assert folders == {*DECLARED, 'harness'}
    assert {path.stem for path in (ROOT / 'experiments').glob('*.py')} == {'__init__', 'report'}


@by_name_in_experiments
def test_declarations_fit_a_screen_and_import_the_harness_which_imports_none(path):
    """Only `declarations` imports them, to list all rows."""
    where = path.relative_to(ROOT / 'experiments').parts
    ours = {module for module in imports_of(path) if within(module, {'experiments'})}
    if where[0] == 'harness':
        declared = {f'experiments.{folder}' for folder in DECLARED}
        assert path.stem == 'declarations' or not {module for module in ours if within(module, declared)}
    else:
        assert not {module for module in ours if not within(module, {'experiments.harness'})}
        assert len(path.read_text(encoding='utf-8').splitlines()) <= DECLARATION_LINES


def test_training_and_evaluation_import_neither_the_other():
    for one, other in (('train', 'evaluate'), ('evaluate', 'train')):
        assert other not in ALLOWED[one]
        assert f'combiner.{other}' not in imports_of(ROOT / 'combiner' / f'{one}.py')


@by_name
def test_nothing_needs_tensorflow(path):
    assert not {module for module in imports_of(path) if within(module, NEEDS_TENSORFLOW)}


@by_name
def test_nothing_executes_data(path):
    """A workdir or a data set can come from anyone."""
    assert not {module for module in imports_of(path) if within(module, EXECUTES_DATA)}
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else ''
            assert called not in ('eval', 'exec', 'compile', '__import__'), f'{called} at line {node.lineno}'
            assert 'allow_pickle' not in {word.arg for word in node.keywords}, f'allow_pickle at line {node.lineno}'


@with_experiments
def test_size_ceilings(path):
    source = path.read_text(encoding='utf-8')
    lines = len(source.splitlines())
    assert lines <= FILE_LINES
    for name, node in functions(ast.parse(source)):
        assert length(node) <= FUNCTION_LINES, f'{name} has {length(node)} lines'


@with_experiments
def test_public_functions_have_docstrings(path):
    for name, node in functions(ast.parse(path.read_text(encoding='utf-8'))):
        public = not any(piece.startswith('_') for piece in name.split('.'))
        if public and length(node) > LINES_WITHOUT_DOCSTRING:
            assert ast.get_docstring(node), f'{name} has {length(node)} lines and no docstring'


@by_name_in_combiner
def test_nothing_names_what_is_not_installed_with_it(path):
    """In messages above all; of the configs, which are installed, it names those that there are."""
    source = re.sub(r'https?://\S+', '', path.read_text(encoding='utf-8'))  # addresses name what is elsewhere
    assert not re.findall(r'\b(?:scripts|docs|results|experiments|tests)/\w+', source)
    for name in re.findall(r'\bconfigs/\w+\.py', source):
        assert (ROOT / name).is_file(), name


def test_no_module_loads_tensorflow_even_where_it_is_installed(tmp_path):
    """Runs in a process that has a stand-in for tensorflow, which any import of it would find."""
    (tmp_path / 'tensorflow').mkdir()
    (tmp_path / 'tensorflow' / '__init__.py').touch()
    names = ['combiner', *(module_name(path) for path in COMBINER)]
    program = (
        f'import importlib, sys; sys.path[:0] = {[str(tmp_path), str(ROOT)]}\n'
        f'for name in {names}:\n'
        '    importlib.import_module(name)\n'
        '    assert "tensorflow" not in sys.modules, f"{name} imports tensorflow"\n'
    )
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
