"""The pages of docs/: generated parts are as the code and results/ are, and the glossary names what exists."""

import functools
import importlib
import re
from pathlib import Path

import pytest

from combiner.config import base
from experiments.harness import choosing_tables, config_reference

ROOT = Path(__file__).parents[1]
DOCS = ROOT / 'docs'
GENERATED = {'choosing.md': choosing_tables, 'configuration.md': config_reference}
GLOSSARY = (DOCS / 'glossary.md').read_text(encoding='utf-8')
LISTED = re.compile(r'\[([\w/]+\.py)\]\(\.\./([\w/]+\.py)\)(?:: (`[\w.]+`(?:, `[\w.]+`)*))?')
ENTRIES = sorted({(path, names or '') for path, _, names in LISTED.findall(GLOSSARY)})


@pytest.mark.parametrize('page', GENERATED)
def test_generated_parts_are_those_of_code_and_results(page):
    text = (DOCS / page).read_text(encoding='utf-8')
    for name, part in GENERATED[page].parts().items():
        found = re.search(rf'<!-- {name} -->\n\n(.*?)\n\n<!-- /{name} -->', text, re.DOTALL)
        assert found, f'{page} has no comments <!-- {name} -->'
        assert found[1] == part, f'{name} of {page} is old: python scripts/generate_docs.py'


def test_every_field_of_a_config_has_a_meaning():
    names = {name for name, _, _ in config_reference.fields(base())}
    assert names - {'model.attention.name'} <= set(config_reference.meanings())


def test_the_navigation_has_every_page():
    pages = re.findall(r'^ +- [^:\n]+: ([\w/]+\.md)$', (ROOT / 'mkdocs.yml').read_text(encoding='utf-8'), re.MULTILINE)
    assert sorted(pages) == sorted(path.name for path in DOCS.glob('*.md'))


@pytest.mark.parametrize(('path', 'names'), ENTRIES)
def test_the_glossary_names_what_exists(path, names):
    module = importlib.import_module('.'.join(Path(path).with_suffix('').parts))
    for name in re.findall(r'`([\w.]+)`', names):
        owner, _, last = name.rpartition('.')
        holder = functools.reduce(getattr, owner.split('.') if owner else [], module)
        assert hasattr(holder, last) or last in getattr(holder, '__annotations__', {}), f'{path} has no {name}'
    assert ROOT / path == Path(module.__file__)


def test_the_glossary_has_every_combiner_and_links_where_it_says():
    for path, target, _ in LISTED.findall(GLOSSARY):
        assert path == target
    for path in (ROOT / 'combiner' / 'attention').glob('combiner_*.py'):
        assert f'`{path.stem}`' in GLOSSARY
    assert len(ENTRIES) > 20
