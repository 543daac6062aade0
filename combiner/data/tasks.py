"""The table of tasks: every data set of the paper's tables, by name."""

import difflib
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from combiner.data import image_tasks, lra_tasks, recall, text_tasks
from combiner.data.task import Task

# Name -> function that returns the task; its keyword arguments are the task's options, `config.data.options`.
TASKS = {**image_tasks.TASKS, **text_tasks.TASKS, **lra_tasks.TASKS, **recall.TASKS}


def resolve(name: str) -> Callable[..., Task]:
    """Returns the function that makes a task, by its name in `TASKS`, or by a path `package.module:NAME`.

    A path leads to the entry NAME of the dictionary `TASKS` of that module: a config, which may come from anyone, can
    call no other function.

    Raises:
        ValueError: the name is unknown, the module cannot be imported, or it has no such entry.
    """
    if ':' not in name:
        known = TASKS
    else:
        module, _, name = name.partition(':')
        try:
            known = importlib.import_module(module).TASKS
        except (ImportError, AttributeError, TypeError, ValueError) as error:  # the last two: a malformed path
            raise ValueError(f'cannot import the task {module}:{name}, an entry of {module}.TASKS: {error}') from error
    if name not in known:
        nearest = difflib.get_close_matches(name, known, 1)
        hint = f'did you mean {nearest[0]!r}? ' if nearest else ''
        raise ValueError(f'unknown task {name!r}; {hint}known: {", ".join(known)}; or a path package.module:NAME')
    return known[name]


def make(name: str, /, **options: Any) -> Task:
    """Returns the task with this name, or path, and these options.

    Raises:
        ValueError: the name or an option is unknown, or an option has a bad value.
    """
    function = resolve(name)
    known = inspect.signature(function).parameters
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f'task {name!r} has no option {", ".join(unknown)}; it has: {", ".join(known) or "none"}')
    return function(**options)
