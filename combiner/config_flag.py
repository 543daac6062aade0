"""The flag --config of the commands: which file it names, and its mistakes in one line.

The flag itself is ml_collections' (`config_flags.DEFINE_config_file`), which answers mistakes with a traceback.
"""

import difflib
import functools
import importlib.util
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict

from combiner import paths

# Of a traceback: file, number and text of a line.
PLACE = re.compile(r'^  File "(.+)", line (\d+).*(?:\n    (.*))?', re.MULTILINE)


def _config_of(argv: list[str]) -> tuple[int, str]:
    """Returns the index of the argument that names the config, and its value with the part after the colon, or ''."""
    for index, (previous, argument) in enumerate(zip(['', *argv], argv, strict=False)):
        if argument.startswith('--config=') or previous == '--config':
            return index, argument.removeprefix('--config=')
    return 0, ''


def arguments() -> list[str]:
    """Returns the arguments of this command line that give the config, for the command line of another command."""
    given = ['--config', _config_of(sys.argv)[1]]
    for index, argument in enumerate(sys.argv):
        if argument.startswith('--config.'):
            given += sys.argv[index : index + (1 if '=' in argument else 2)]
    return given


def find(argv: list[str]) -> tuple[list[str], Path | None]:
    """Replaces 'configs/…' by the installed config of that name if there is no such file.

    Returns:
        The arguments, with the config's path as `paths.local` returns it, and the installed file, if it is used.

    Raises:
        ValueError: as `paths.local`.
    """
    index, name = _config_of(argv)
    if not name:
        return argv, None
    path, rest = paths.split_config(name)
    installed = None if Path(path).exists() else _installed_configs().get(path)
    flag = '--config=' if argv[index].startswith('--config=') else ''
    return [*argv[:index], f'{flag}{installed or path}{rest}', *argv[index + 1 :]], installed


def _installed_configs() -> dict[str, Path]:
    """Returns the installed configs by their names in the repository, such as 'configs/photos.py'."""
    package = importlib.util.find_spec('combiner.configs')
    folders = package.submodule_search_locations if package else None
    files = sorted(file for folder in folders or () for file in Path(folder).glob('[!_]*.py'))
    return {f'configs/{file.name}': file for file in files}


def check(argv: list[str]) -> None:
    """Checks for mistakes that ml_collections reports with a traceback: a missing config file, an unknown key."""
    name = _config_of(argv)[1]
    if not name:
        return
    path = name.partition(':')[0]
    if not Path(path).is_file():
        own = list(_installed_configs())
        near = difflib.get_close_matches(path, own, 1)
        hint = f'did you mean {near[0]}? ' if near else ''
        known = f'or one of {", ".join(own)}' if own else 'such as configs/photos.py in a checkout'
        raise FileNotFoundError(f'config file {path!r} does not exist; {hint}give the path of your file, {known}')
    if Path(path).suffix != '.py':
        raise ValueError(f'{path!r} is not a Python file; give the path of a config file, such as configs/photos.py')
    try:
        config: Any = flags.FLAGS['config'].parser.parse(name)
    except AttributeError as error:
        if "no attribute 'get_config'" not in str(error):
            raise  # a bug inside the file, which its traceback shows
        raise ValueError(f'{path!r} has no function get_config; give the path of a config file') from None
    keys = set(_keys(config))
    for argument in argv:
        key, _, text = argument.removeprefix('--config.').partition('=')
        if not argument.startswith('--config.'):
            continue
        if key not in keys:
            raise ValueError(_unknown(key, text, config))
        group = functools.reduce(lambda part, name: part[name], key.split('.'), config)
        if isinstance(group, ConfigDict) and not text.lstrip().startswith('{'):
            raise ValueError(_not_a_value(path, key, text, group))


def _keys(config: Any, prefix: str = '') -> Iterator[str]:
    for name, value in config.items():
        yield prefix + name
        if isinstance(value, ConfigDict):
            yield from _keys(value, f'{prefix}{name}.')


def _unknown(key: str, text: str, config: Any) -> str:
    near = difflib.get_close_matches(key, list(_keys(config)), 1)
    part: Any = config
    for name in key.split('.')[:-1]:
        part = part[name] if isinstance(part, ConfigDict) and name in part else config
    hint = f'did you mean config.{near[0]}? ' if near else ''
    group, _, field = key.rpartition('.')
    message = f'unknown config key config.{key}; {hint}known in this group: {", ".join(part)}'
    if group == 'model.attention' and 'name' in part:
        given = f'attention={part["name"]}+{field}={text or "VALUE"}'
        message += f'; a hyper-parameter that the config does not set is part of its argument: {given}'
    return message


def _not_a_value(path: str, key: str, text: str, group: Any) -> str:
    """Returns the message for a group that is set to a value, such as --config.model.attention=full."""
    field = 'name' if 'name' in group else next(iter(group), 'FIELD')
    ways = f'write --config.{key}.{field}={text if field == "name" else "…"}'
    argument = f'{path}:{key.rpartition(".")[2]}={text}'
    try:
        flags.FLAGS['config'].parser.parse(argument)
        ways = f'write --config={argument}, or {ways.removeprefix("write ")}'
    except Exception:  # the file has no such argument, or does not take this value
        logging.debug('no config argument', exc_info=True)
    return f'config.{key}={text}: config.{key} is a group of {", ".join(group)}, not a value; {ways}'


def mistake(error: Exception) -> str:
    """Returns an error that the flag --config raised, as one line.

    ml_collections puts the whole traceback of a config file into the message. Unless the last statement there raises a
    ValueError, which says what to do, the line names the last place outside of the installed packages and this one.
    """
    lines = str(error).strip().splitlines()
    message = lines[-1].removeprefix('ValueError: ')
    frames = PLACE.findall(str(error))
    own = [(file, number) for file, number, _ in frames if not _is_installed(Path(file))]
    if not own or frames[-1][2].startswith('raise ValueError'):
        return message
    file, number = own[-1]
    return f'{message} ({file}, line {number})'


def _is_installed(file: Path) -> bool:
    """Returns whether a file belongs to Python, to an installed package, or to this one."""
    folders = Path(sysconfig.get_path('stdlib')), Path(__file__).parent
    return bool({'site-packages', 'dist-packages'} & set(file.parts)) or any(map(file.is_relative_to, folders))
