"""What the commands share: the user's mistakes become one line and exit status 2, not a traceback."""

import difflib
import functools
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from logging import INFO, WARNING, LogRecord
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict


def run(main: Callable[[], None]) -> NoReturn:
    """Parses the command line, runs `main` and exits with its status.

    0: done. 1: training diverged, or a fault of the program (with its traceback). 2: bad input, in one line
    (--verbosity=1 adds where it was raised). 130 and 143: stopped by Ctrl-C or SIGTERM after saving.
    """
    _be_the_main_module(main.__module__)

    def guarded(_: object) -> None:
        try:
            main()
        except FloatingPointError as error:
            _fail(str(error), 1)
        except (ValueError, OSError) as error:
            if isinstance(error, ValueError) and not _told_by_us(error):
                raise
            logging.debug('raised here', exc_info=True)
            _fail(str(error), 2)

    app.run(guarded, flags_parser=_parse)
    raise SystemExit


def _be_the_main_module(name: str) -> None:
    """Makes an installed command, such as combiner-train, the equal of `python -m combiner.train`.

    The user's own modules are found in the working directory; --help shows what the command is for, and its flags.
    """
    if name == '__main__':
        return
    if not sys.flags.safe_path:
        sys.path.insert(0, str(Path.cwd()))
    sys.modules['__main__'].__doc__ = sys.modules[name].__doc__
    for flag in flags.FLAGS.get_flags_for_module(name):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def _parse(argv: list[str]) -> list[str]:
    installed = None
    try:
        if 'config' in flags.FLAGS:
            argv, installed = _find_config(argv)
            _check_config(argv)
        rest = flags.FLAGS(argv)
    except (flags.Error, OSError, TypeError, ValueError) as error:
        # ml_collections puts the whole traceback of a config file into its message.
        _fail(str(error).strip().splitlines()[-1].removeprefix('ValueError: '), 2)
    if flags.FLAGS['verbosity'].using_default_value:
        flags.FLAGS.verbosity = logging.INFO
        logging.get_absl_handler().addFilter(_worth_showing)
    if installed:
        logging.info('there is no such file here, so the config is the one that came with combiner: %s', installed)
    if rest[1:]:
        _fail(f'unexpected argument {rest[1]!r}; flags are written --name=value', 2)
    return rest


def _worth_showing(record: LogRecord) -> bool:
    """Of what is not even a warning, only what this project says: Orbax says something of every file.

    Nor the warnings of two libraries that users can do nothing about: that a run is read without being written to, and
    that images could be decoded faster.
    """
    chatty = {'orbax', 'tensorflow_datasets'} & set(Path(record.pathname).parts)
    return record.levelno > (WARNING if chatty else INFO) or _is_ours(record.pathname)


def _config_of(argv: list[str]) -> tuple[int, str]:
    """Which argument names the config, and what it names, with the argument after the colon; '' where there is none."""
    for index, (previous, argument) in enumerate(zip(['', *argv], argv, strict=False)):
        if argument.startswith('--config=') or previous == '--config':
            return index, argument.removeprefix('--config=')
    return 0, ''


def _find_config(argv: list[str]) -> tuple[list[str], Path | None]:
    """Puts the project's own config in the place of 'configs/NAME.py' where there is no such file.

    Returns:
        The arguments, and the file that was put there or None.
    """
    index, name = _config_of(argv)
    path, colon, rest = name.partition(':')
    installed = _installed_configs().get(path)
    if installed is None or Path(path).exists():
        return argv, None
    flag = '--config=' if argv[index].startswith('--config=') else ''
    return [*argv[:index], f'{flag}{installed}{colon}{rest}', *argv[index + 1 :]], installed


def _installed_configs() -> dict[str, Path]:
    """The project's own configs, under the names that they have in its repository: 'configs/photos.py'."""
    package = importlib.util.find_spec('combiner.configs')
    folders = package.submodule_search_locations if package else None
    files = sorted(file for folder in folders or () for file in Path(folder).glob('[!_]*.py'))
    return {f'configs/{file.name}': file for file in files}


def _check_config(argv: list[str]) -> None:
    """Checks what ml_collections answers with a traceback: a missing config file, an unknown key."""
    name = _config_of(argv)[1]
    if not name:
        return
    path = name.partition(':')[0]
    if not Path(path).is_file():
        own = list(_installed_configs())
        near = difflib.get_close_matches(path, own, 1)
        hint = f'did you mean {near[0]}? ' if near else ''
        known = f'or one of {", ".join(own)}' if own else 'such as configs/photos.py in a checkout'
        raise FileNotFoundError(f'config file {path!r} does not exist; {hint}give the path of a file of yours, {known}')
    if Path(path).suffix != '.py':
        raise ValueError(f'{path!r} is no config file: it is no Python file; give a path such as configs/photos.py')
    try:
        config: Any = flags.FLAGS['config'].parser.parse(name)
    except AttributeError as error:
        if "no attribute 'get_config'" not in str(error):
            raise  # a fault inside the file, which its traceback shows
        raise ValueError(f'{path!r} is no config file: it has no function get_config') from None
    keys = set(_keys(config))
    for argument in argv:
        key, _, text = argument.removeprefix('--config.').partition('=')
        if not argument.startswith('--config.'):
            continue
        if key not in keys:
            raise ValueError(_unknown(key, config))
        group = functools.reduce(lambda part, name: part[name], key.split('.'), config)
        if isinstance(group, ConfigDict) and not text.lstrip().startswith('{'):
            raise ValueError(_not_a_value(path, key, text, group))


def _keys(config: Any, prefix: str = '') -> Iterator[str]:
    for name, value in config.items():
        yield prefix + name
        if isinstance(value, ConfigDict):
            yield from _keys(value, f'{prefix}{name}.')


def _unknown(key: str, config: Any) -> str:
    near = difflib.get_close_matches(key, list(_keys(config)), 1)
    part: Any = config
    for name in key.split('.')[:-1]:
        part = part[name] if isinstance(part, ConfigDict) and name in part else config
    hint = f'did you mean config.{near[0]}? ' if near else ''
    return f'unknown config key config.{key}; {hint}known beside it: {", ".join(part)}'


def _not_a_value(path: str, key: str, text: str, group: Any) -> str:
    """What to write in place of --config.model.attention=full."""
    field = 'name' if 'name' in group else next(iter(group), 'FIELD')
    ways = f'write --config.{key}.{field}={text if field == "name" else "…"}'
    argument = f'{path}:{key.rpartition(".")[2]}={text}'
    try:
        flags.FLAGS['config'].parser.parse(argument)
        ways = f'write --config={argument}, or {ways.removeprefix("write ")}'
    except Exception:  # the file has no such argument, or does not take this value
        logging.debug('no config argument', exc_info=True)
    return f'config.{key}={text}: config.{key} is a group of {", ".join(group)}, not a value; {ways}'


def _told_by_us(error: BaseException) -> bool:
    """Whether this project's own checks raised it: a ValueError from deeper down is a fault and keeps its traceback."""
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    return _is_ours(frames[-1])


def _is_ours(path: str) -> bool:
    return Path(path).is_relative_to(Path(__file__).parent)


def _fail(message: str, status: int) -> NoReturn:
    print(f'error: {message}', file=sys.stderr)
    raise SystemExit(status)
