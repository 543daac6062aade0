"""The table of tasks: every data set of the paper's tables, by name."""

import difflib
import inspect
from typing import Any

from combiner.data import image_tasks, lra_tasks, recall, text_tasks
from combiner.data.task import Task

# Name -> function that returns the task; its keyword arguments are the task's options, `config.data.options`.
TASKS = {**image_tasks.TASKS, **text_tasks.TASKS, **lra_tasks.TASKS, **recall.TASKS}


def make(name: str, /, **options: Any) -> Task:
    """Returns the task with this name and these options.

    Raises:
        ValueError: the name or an option is unknown, or an option has a bad value.
    """
    if name not in TASKS:
        nearest = difflib.get_close_matches(name, TASKS, 1)
        hint = f'did you mean {nearest[0]!r}? ' if nearest else ''
        raise ValueError(f'unknown task {name!r}; {hint}known: {", ".join(TASKS)}')
    known = inspect.signature(TASKS[name]).parameters
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f'task {name!r} has no option {", ".join(unknown)}; it has: {", ".join(known) or "none"}')
    return TASKS[name](**options)
