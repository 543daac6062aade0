"""Traces of training steps, for `--profile=FROM:TO`."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from combiner import paths


def parse(text: str) -> range:
    """Returns the steps of `FROM:TO`, both included; none for ''.

    Raises:
        ValueError: it has another form, or the steps do not rise from 1.
    """
    if not text:
        return range(0)
    found = re.fullmatch(r'(\d+):(\d+)', text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f'--profile={text}: write the first and the last step to trace as FROM:TO, such as 10:12')
    return range(int(found[1]), int(found[2]) + 1)


def check(steps: range, last: int, workdir: paths.AnyPath) -> None:
    """Refuses steps that a training cannot trace.

    Args:
        steps: to trace; none for an empty range.
        last: step of the training.
        workdir: of the run.

    Raises:
        ValueError: the training ends before the last of the steps, or the workdir is not on this machine.
    """
    if steps and steps[-1] > last:
        raise ValueError(
            f'--profile={steps[0]}:{steps[-1]}: the training ends with step {last}; trace steps up to that one'
        )
    if steps and not isinstance(workdir, Path):
        raise ValueError(f'--profile needs a --workdir on this machine, not {workdir}; give a local folder')


class Profile:
    """A trace of some steps, written below a folder when the last of them is done.

    Args:
        steps: to trace; without any, nothing is done.
        step: from which the training continues.
        folder: the trace is written to plugins/profile below it.
        say: prints a line.
    """

    def __init__(self, steps: range, step: int, folder: paths.AnyPath, say: Callable[[str], None]) -> None:
        if steps and steps[-1] <= step:
            say(f'the steps of --profile={steps[0]}:{steps[-1]} are done: nothing is traced')
        self.steps = range(max(steps.start, step + 1), steps.stop)
        self.step, self.folder, self.say = step, folder, say
        self.tracing = False

    def trace(self, take_step: Callable[[], Any]) -> Any:
        """Takes the next step, traced or not; returns its result."""
        self.step += 1
        if self.step not in self.steps:
            return take_step()
        if not self.tracing:
            jax.profiler.start_trace(str(self.folder))
            self.tracing = True
        with jax.profiler.StepTraceAnnotation('train', step_num=self.step):
            result = take_step()
        if self.step == self.steps[-1]:
            jax.block_until_ready(result)
            self.close()
        return result

    def close(self) -> None:
        """Writes the trace, also of fewer steps than were asked for."""
        if self.tracing:
            self.tracing = False
            jax.profiler.stop_trace()
            self.say(f'traced steps {self.steps[0]} to {self.step}: {self.folder}')
