"""Functions that the commands share: a user's mistake gives one line and exit status 2, not a traceback.

Commands work with any standard streams. Characters that an encoding lacks are escaped, a closed stream is replaced by
the null device, and a closed pipe ends a command without a message, with the status of SIGPIPE. If results cannot be
written (e.g. redirected to a full disk), a command ends with status 1; if messages cannot, it continues without them.
"""

import argparse
import contextlib
import functools
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

from combiner import config_flag, messages, paths

P = ParamSpec('P')
T = TypeVar('T')


class _OutputError(Exception):
    """The standard output could not be written; not an OSError, so that it is not reported as an error of a file."""


class _Descriptor(io.FileIO):
    """The file descriptor of a standard stream: errors become `_OutputError` on stdout and are ignored on stderr."""

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

    0: success. 1: training diverged, or a bug of the program (with its traceback). 2: bad input, in one line
    (--verbosity=1 adds the traceback). 130 and 143: stopped by Ctrl-C or SIGTERM, training after saving. 141: the
    reader of the output's pipe is gone.
    """
    _act_as_main_module(main.__module__)

    def checked(_: object) -> None:
        try:
            from combiner import compile_cache, startup  # after --help, as they import JAX

            compile_cache.enable()
            startup.begin()
            main()
        except FloatingPointError as error:
            fail(str(error), 1)
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            if isinstance(error, ValueError) and not _raised_by_us(error):
                raise
            logging.debug('raised here', exc_info=True)
            fail(_message(error), 2)
        except KeyboardInterrupt:
            import jax

            if jax.distributed.is_initialized():  # ends without waiting for the others, see `processes.run`
                raise
            _interrupted()

    with terminal():
        app.run(checked, flags_parser=_parse)
        raise SystemExit


def guarded(main: Callable[P, T]) -> Callable[P, T]:
    """Wraps the main function of a command that has its own parser: runs it within `terminal`.

    An OSError ends the command with one line and status 2, Ctrl-C with status 130.
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
                _interrupted()

    return run


def _interrupted() -> NoReturn:
    fail(f'stopped by Ctrl-C; to start again: {messages.same_command()}', 128 + signal.SIGINT)


@contextlib.contextmanager
def terminal() -> Iterator[None]:
    """Makes the standard streams usable, and ends the command if its output cannot be written.

    Raises:
        SystemExit: with 141 if the reader of a pipe is gone; with 1 if the output could not be written otherwise.
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
        fail(f'the output could not be written ({error}); make room, or send it elsewhere', 1)
    except BrokenPipeError:
        if not any(map(_is_broken, (1, 2))):
            raise
        # Otherwise the interpreter would write the buffers when it ends, and print an error.
        for number in (1, 2):
            _discard(number)
        raise SystemExit(128 + signal.SIGPIPE) from None


def _make_usable(number: int, name: str) -> None:
    """Opens a closed stream on the null device; makes an open one escape characters that its encoding lacks."""
    try:
        os.fstat(number)
    except OSError:
        _discard(number)  # otherwise the output would go to the next opened file, such as a checkpoint
    stream = getattr(sys, name)
    if stream is None:
        setattr(sys, name, open(os.devnull, 'w' if number else 'r', encoding='utf-8', errors='replace'))  # noqa: SIM115
        return
    if number and getattr(stream, 'errors', None) in ('strict', 'surrogateescape') and hasattr(stream, 'reconfigure'):
        stream.reconfigure(errors='backslashreplace')
    if number and stream is getattr(sys, f'__{name}__') and isinstance(stream, io.TextIOWrapper):
        setattr(sys, name, _reopen(number, stream))
        handlers: list[Any] = [*root.handlers, logging.get_absl_handler().python_handler]
        for handler in handlers:  # absl, too, recognises the handlers that it replaces by their streams
            if getattr(handler, 'stream', None) is stream:
                handler.stream = getattr(sys, name)


def _reopen(number: int, stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """Returns a stream like the interpreter's, buffered or not, on a `_Descriptor`."""
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
    """Returns whether the reader of a pipe or socket is gone."""
    poll = select.poll()
    poll.register(number, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _discard(number: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != number:
        os.dup2(null, number)
        os.close(null)


def _message(error: Exception) -> str:
    """Returns an error as one line; for a full disk, with the way out."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is None and error.strerror:
        text = error.strerror
    if paths.is_full(error) and ';' not in text:
        text += '; make room and start the same command again'
    return text


def _act_as_main_module(name: str) -> None:
    """Makes an installed command, such as combiner-train, behave like `python -m combiner.train`.

    It can import the user's modules from the working directory; --help shows its description and flags.
    """
    if name == '__main__':
        return
    if not sys.flags.safe_path:
        sys.path.insert(0, str(Path.cwd()))
    sys.modules['__main__'].__doc__ = sys.modules[name].__doc__
    for flag in flags.FLAGS.get_flags_for_module(name):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def _help(program: str) -> str:
    """Returns the description of a command and its own flags, in the form of argparse."""
    parser = argparse.ArgumentParser(
        description=sys.modules['__main__'].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,
        epilog='--helpfull shows the flags of the libraries too.',
        add_help=False,
    )
    for flag in flags.FLAGS.get_key_flags_for_module(program):
        kind: Any = {'action': 'store_true'} if flag.boolean else {'metavar': flag.name.upper()}
        default = '' if flag.default in (None, '', False) else f' (default: {flag.default})'
        parser.add_argument(f'--{flag.name}', help=f'{flag.help}{default}'.replace('%', '%%'), **kind)
    return parser.format_help().lstrip()


def _parse(argv: list[str]) -> list[str]:
    if {'--help', '-h', '-help', '-?'} & set(argv[1:]):
        print(_help(argv[0]))
        raise SystemExit
    if '--helpfull' in argv[1:]:
        app.usage(writeto_stdout=True)
        raise SystemExit
    installed = None
    try:
        if 'config' in flags.FLAGS:
            argv, installed = config_flag.find(argv)
            config_flag.check(argv)
        rest = flags.FLAGS(argv)
    except (flags.Error, OSError, TypeError, ValueError) as error:
        fail(config_flag.mistake(error), 2)
    if flags.FLAGS['verbosity'].using_default_value:
        flags.FLAGS.verbosity = logging.INFO
        logging.get_absl_handler().addFilter(_worth_showing)
    if installed:
        logging.info('there is no such file here, so the config is the one installed with combiner: %s', installed)
    if rest[1:]:
        fail(f'unexpected argument {rest[1]!r}; flags are written --name=value', 2)
    return rest


def _worth_showing(record: LogRecord) -> bool:
    """Filters log records: hides messages below warnings of other packages (Orbax logs every file).

    It also hides warnings of Orbax and TFDS that users cannot act on: a run is opened read-only, images could be
    decoded faster. And it hides other packages' records of a full disk, which is reported in one line.
    """
    if not _is_ours(record.pathname) and paths.is_full(record.exc_info[1] if record.exc_info else None):
        return False
    chatty = {'orbax', 'tensorflow_datasets'} & set(Path(record.pathname).parts)
    return record.levelno > (WARNING if chatty else INFO) or _is_ours(record.pathname)


def _raised_by_us(error: BaseException) -> bool:
    """Returns whether this package raised an error: a ValueError of other code is a bug and keeps its traceback."""
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    return _is_ours(frames[-1])


def _is_ours(path: str) -> bool:
    return Path(path).is_relative_to(Path(__file__).parent)


def fail(message: str, status: int) -> NoReturn:
    """Prints an error message of one line and exits with a status."""
    with contextlib.suppress(BrokenPipeError):
        print(f'error: {message}', file=sys.stderr)
    raise SystemExit(status)
