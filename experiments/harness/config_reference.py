"""The reference of configs in Markdown, read from the code: every field, every option of a task, every config file."""

import dataclasses
import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import docstring_parser
from ml_collections import ConfigDict

from combiner import config as common
from combiner import models
from combiner.data import tasks
from experiments.harness import marked
from experiments.harness.run import ROOT

FIELD = re.compile(r'^ +config\.([\w.]+) = .*?(?:  # (.*))?$', re.MULTILINE)
GROUPS = ('data', 'model', 'optimizer', 'mesh', 'run')
HEADS = (models.LanguageModel, models.MaskedLanguageModel, models.Encoder)  # whose fields a config of theirs may set


def meanings() -> dict[str, str]:
    """Returns what each field and each group means, by its dotted name: the comments of `combiner.config.base`.

    Raises:
        ValueError: a field has no comment.
    """
    found = dict(FIELD.findall(inspect.getsource(common.base)))
    if missing := [name for name, meaning in found.items() if not meaning]:
        raise ValueError(f'combiner/config.py: no comment says what {", ".join(missing)} means')
    return found


def fields(config: Any, prefix: str = '') -> Iterator[tuple[str, str, Any]]:
    """Yields the dotted name, the type and the value of every field."""
    for name in config:
        value = config[name]
        if isinstance(value, ConfigDict) and value:
            yield from fields(value, f'{prefix}{name}.')
        else:
            yield prefix + name, config.get_type(name).__name__, value


def field_table(group: str) -> str:
    """Returns the fields of a group in Markdown; '' for those of no group."""
    lines, of_all = [], {name: (kind, value) for name, kind, value in fields(common.base())}
    for name, meaning in meanings().items():
        if name in GROUPS or (name.partition('.')[0] if '.' in name else '') != group:
            continue
        kind, value = of_all.get(name, ('group', common.base().model.attention.to_dict()))
        lines.append([f'`{name}`', 'group' if kind == 'ConfigDict' else kind, shown(value), meaning])
    if group == 'model':
        lines += [[f'`model.{name}`', kind, shown(value), meaning] for name, kind, value, meaning in head_fields()]
    return marked.table(['field', 'type', 'default', 'meaning'], lines)


def head_fields() -> Iterator[tuple[str, str, Any, str]]:
    """Yields the fields of the head of a model that config files set: name, type, default, meaning."""
    names = {name for module in config_files().values() for name, _, _ in fields(module.get_config('').model)}
    names -= {name for name, _, _ in fields(common.base().model)}
    for name in sorted(name for name in names if '.' not in name):
        owners = [head for head in HEADS if name in {field.name for field in dataclasses.fields(head)}]
        meaning = dict(parameter for owner in owners[0].__mro__ for parameter in documented(owner))[name]
        default = getattr(owners[0], name)
        yield name, type(default).__name__, default, f'of {", ".join(f"`{one.__name__}`" for one in owners)}: {meaning}'


def documented(subject: Any) -> list[tuple[str, str]]:
    """Returns the names and the meanings of what a docstring documents, each in one line."""
    parsed = docstring_parser.parse(inspect.getdoc(subject) or '', docstring_parser.DocstringStyle.GOOGLE)
    return [(each.arg_name, ' '.join((each.description or '').split()).rstrip('.')) for each in parsed.params]


def shown(value: Any) -> str:
    """Returns a value in Markdown."""
    empty = value == '' or isinstance(value, ConfigDict)
    return '' if empty else f'`{value}`'


def option_table() -> str:
    """Returns the options of every task in Markdown; tasks of one function are together."""
    names: dict[Any, list[str]] = {}
    for name, make in tasks.TASKS.items():
        names.setdefault(make.func if isinstance(make, functools.partial) else make, []).append(name)
    lines = []
    for function, those in names.items():
        meaning = dict(documented(function))
        for option, parameter in inspect.signature(tasks.TASKS[those[0]]).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY:
                who = ', '.join(f'`{name}`' for name in those)
                lines.append([f'`{option}`', who, shown(parameter.default), meaning[option]])
    return marked.table(['option', 'of the tasks', 'default', 'meaning'], lines)


def config_files() -> dict[str, ModuleType]:
    """Returns the modules of the config files, by path."""
    paths = [path for path in sorted((ROOT / 'configs').glob('*.py')) if path.stem != '__init__']
    return {path.relative_to(ROOT).as_posix(): importlib.import_module(f'configs.{path.stem}') for path in paths}


def arguments(module: ModuleType) -> dict[str, Any]:
    """Returns the arguments of a config file with their defaults."""
    found: dict[str, Any] = {}
    parse = common.parse

    def recorded(argument: str, **defaults: Any) -> SimpleNamespace:
        found.update(defaults)
        return parse(argument, **defaults)

    with mock.patch.object(common, 'parse', recorded):
        module.get_config('')
    return found


def file_section(path: str, module: ModuleType) -> str:
    """Returns a config file in Markdown: its purpose, its arguments, and the fields that it sets, at each scale."""
    defaults = ', '.join(f'`{name}={value}`' for name, value in arguments(module).items())
    before = {name: value for name, _, value in fields(common.base())}
    scales = {scale: {n: v for n, _, v in fields(module.get_config(f'scale={scale}'))} for scale in common.SCALES}
    names = list(dict.fromkeys(name for found in scales.values() for name in found))
    lines = []
    for name in names:
        values = [found.get(name) for found in scales.values()]
        if any(value != before.get(name) for value in values):
            lines.append([f'`{name}`', *(shown(value) for value in values)])
    purpose = (module.__doc__ or '').partition('\n')[0]
    stem = Path(path).name
    table = marked.table(['field', *common.SCALES], lines)
    return f'### {stem}\n\n{purpose}\n\nFile: [{path}](../{path}). Arguments: {defaults}.\n\n{table}'


def parts() -> dict[str, str]:
    """Returns the parts of the page, by name."""
    groups = {name: field_table(name) for name in ('', *GROUPS)}
    files = [file_section(path, module) for path, module in config_files().items()]
    return {
        **{f'fields {name}'.strip(): table for name, table in groups.items()},
        'options': option_table(),
        'files': '\n\n'.join(files),
    }
