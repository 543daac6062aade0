"""What the commands share: the user's mistakes become one line and exit status 2, not a traceback.

Output goes wherever a command was started: characters that an output's encoding lacks are escaped, a closed stream is
replaced by one that discards, and a closed pipe ends a command quietly, with the status of SIGPIPE. Where results
cannot be written (a full disk behind a redirection) a command ends with status 1; where messages cannot, it goes on
without them.
"""

import contextlib
import difflib
import functools
import importlib.util
import io
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from logging import INFO, WARNING, LogRecord, root
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

from absl import app, flags, logging
from ml_collections import ConfigDict

from combiner import paths

P = ParamSpec('P')
T = TypeVar('T')


class _OutputError(Exception):
    """The standard output could not be written; no OSError, so that nobody takes it for a file of theirs."""


class _Descriptor(io.FileIO):
    """A standard stream's file descriptor, which says of its errors that they are its own; of messages it has none."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            if self.fileno() == 1:
                raise _OutputError(error.strerror) from None
            return len(data)


def run(main: Callable[[], None]) -> NoReturn:
    """Parses the command line, runs `main` and exits with its status.

    0: done. 1: training diverged, or a fault of the program (with its traceback). 2: bad input, in one line
    (--verbosity=1 adds where it was raised). 130 and 143: stopped by Ctrl-C or SIGTERM after saving. 141: the pipe
    that it wrote to was closed.
    """
    _be_the_main_module(main.__module__)

    def checked(_: object) -> None:
        try:
            main()
        except FloatingPointError as error:
            fail(str(error), 1)
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            if isinstance(error, ValueError) and not _told_by_us(error):
                raise
            logging.debug('raised here', exc_info=True)
            fail(_message(error), 2)

    with terminal():
        app.run(checked, flags_parser=_parse)
        raise SystemExit


def guarded(main: Callable[P, T]) -> Callable[P, T]:
    """Makes the main function of a command that has its own parser run within `terminal`.

    What cannot be read or written ends it with one line and status 2, Ctrl-C with status 130.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with terminal():
            try:
                return main(*args, **kwargs)
            except BrokenPipeError:
                raise
            except OSError as error:
                fail(_message(error), 2)
            except KeyboardInterrupt:
                fail('stopped by Ctrl-C', 128 + signal.SIGINT)

    return run


@contextlib.contextmanager
def terminal() -> Iterator[None]:
    """Makes the standard streams usable, and ends the command where its output goes nowhere.

    Raises:
        SystemExit: with 141, the reader of a pipe is gone; with 1, the output could not be written.
    """
    for number, name in enumerate(('stdin', 'stdout', 'stderr')):
        _make_usable(number, name)
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except _OutputError as error:
        _discard(1)
        fail(f'the output could not be written ({error})', 1)
    except BrokenPipeError:
        if not any(map(_is_broken, (1, 2))):
            raise
        # What is still in the buffers would be written when the interpreter ends, with a complaint.
        for number in (1, 2):
            _discard(number)
        raise SystemExit(128 + signal.SIGPIPE) from None


def _make_usable(number: int, name: str) -> None:
    """Opens a closed stream on the null device, and lets one escape what its encoding lacks."""
    try:
        os.fstat(number)
    except OSError:
        _discard(number)  # else the next file that is opened, a checkpoint, would get what is written to the stream
    stream = getattr(sys, name)
    if stream is None:
        setattr(sys, name, open(os.devnull, 'w' if number else 'r', encoding='utf-8', errors='replace'))  # noqa: SIM115
        return
    if number and getattr(stream, 'errors', None) in ('strict', 'surrogateescape') and hasattr(stream, 'reconfigure'):
        stream.reconfigure(errors='backslashreplace')
    if number and stream is getattr(sys, f'__{name}__') and isinstance(stream, io.TextIOWrapper):
        setattr(sys, name, _on_own_descriptor(number, stream))
        handlers: list[Any] = [*root.handlers, logging.get_absl_handler().python_handler]
        for handler in handlers:  # absl, too, recognises by its stream a handler that it is to replace
            if getattr(handler, 'stream', None) is stream:
                handler.stream = getattr(sys, name)


def _on_own_descriptor(number: int, stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """The same stream as that of the interpreter, buffered or not, on a `_Descriptor`."""
    with contextlib.suppress(OSError):
        stream.flush()
    raw: Any = _Descriptor(number, 'w', closefd=False)
    return io.TextIOWrapper(
        raw if isinstance(stream.buffer, io.RawIOBase) else io.BufferedWriter(raw),
        stream.encoding,
        stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _is_broken(number: int) -> bool:
    """Whether the reader of a pipe or socket is gone."""
    poll = select.poll()
    poll.register(number, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _discard(number: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != number:
        os.dup2(null, number)
        os.close(null)


def _message(error: Exception) -> str:
    """An error as one line; of a full disk with the way out."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is None and error.strerror:
        text = error.strerror
    if paths.is_full(error) and ';' not in text:
        text += '; make room and start the same command again'
    return text


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
        fail(str(error).strip().splitlines()[-1].removeprefix('ValueError: '), 2)
    if flags.FLAGS['verbosity'].using_default_value:
        flags.FLAGS.verbosity = logging.INFO
        logging.get_absl_handler().addFilter(_worth_showing)
    if installed:
        logging.info('there is no such file here, so the config is the one that came with combiner: %s', installed)
    if rest[1:]:
        fail(f'unexpected argument {rest[1]!r}; flags are written --name=value', 2)
    return rest


def _worth_showing(record: LogRecord) -> bool:
    """Of what is not even a warning, only what this project says: Orbax says something of every file.

    Nor the warnings of two libraries that users can do nothing about: that a run is read without being written to, and
    that images could be decoded faster. Nor of a full disk: its error is shown in one line.
    """
    if not _is_ours(record.pathname) and paths.is_full(record.exc_info[1] if record.exc_info else None):
        return False
    chatty = {'orbax', 'tensorflow_datasets'} & set(Path(record.pathname).parts)
    return record.levelno > (WARNING if chatty else INFO) or _is_ours(record.pathname)


def _config_of(argv: list[str]) -> tuple[int, str]:
    """Which argument names the config, and what it names, with the argument after the colon; '' where there is none."""
    for index, (previous, argument) in enumerate(zip(['', *argv], argv, strict=False)):
        if argument.startswith('--config=') or previous == '--config':
            return index, argument.removeprefix('--config=')
    return 0, ''


def _find_config(argv: list[str]) -> tuple[list[str], Path | None]:
    """Puts the project's own config in the place of 'configs/…' where there is no such file.

    Returns:
        The arguments, with the config's path as `paths.local` makes it, and the file that was put there or None.

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


def fail(message: str, status: int) -> NoReturn:
    """Ends the command with a line that says why, and a status."""
    with contextlib.suppress(BrokenPipeError):
        print(f'error: {message}', file=sys.stderr)
    raise SystemExit(status)
