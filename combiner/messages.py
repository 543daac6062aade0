"""The first and the last lines that a command prints: what it is about to do, and what to do next."""

import os
import shlex
import sys
from pathlib import Path


def heading(**facts: object) -> None:
    """Prints one line for each fact that is known, such as device, config, data, parameters and time."""
    _print(*(f'{name.replace("_", " ")}: {fact}' for name, fact in facts.items() if fact not in ('', None)))


def next_steps(*steps: str) -> None:
    """Prints what can be done next, as the last lines: commands to copy; none that is ''."""
    known = [step for step in steps if step]
    _print(*(f'{"      " if number else "next: "}{step}' for number, step in enumerate(known)))


def module_command(module: str, *arguments: object) -> str:
    """Returns the command line of a module, such as `python -m combiner.evaluate --workdir DIR`."""
    return shlex.join(['python', '-m', module, *map(str, arguments)])


def training(*config: str, data_dir: str | os.PathLike[str] | None = None) -> str:
    """Returns the command that trains with a config, of one or several arguments, in a workdir still to be named."""
    data = [] if data_dir is None else [f'--config.data.data_dir={data_dir}']
    return module_command('combiner.train', '--config', *config, *data, '--workdir', 'DIR')


def same_command() -> str:
    """Returns the command line of this process, to copy."""
    interpreter, *rest = sys.orig_argv or [sys.executable]
    if rest[:1] == sys.argv[:1] and not rest[0].endswith('.py'):  # an installed command, such as combiner-train
        return shlex.join([Path(rest[0]).name, *rest[1:]])
    return shlex.join([interpreter, *rest])


def duration(seconds: float) -> str:
    """Formats a duration with a suitable unit."""
    for unit, length in (('days', 86_400), ('hours', 3600), ('minutes', 60)):
        if seconds >= 2 * length:
            return f'{seconds / length:.0f} {unit}'
    return f'{seconds:.0f} seconds'


def _print(*lines: str) -> None:
    print(*lines, sep='\n', end='\n' if lines else '', flush=True)
