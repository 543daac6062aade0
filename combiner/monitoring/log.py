"""The log of a training: what its steps and validations measure, in the workdir and on the console."""

import math
from typing import Any

from jax.sharding import Mesh

from combiner import messages, metrics, startup
from combiner.data.task import Task
from combiner.monitoring import metering
from combiner.monitoring.progress import Progress
from combiner.monitoring.writer import Writer


def check_finite(step: int, measured: Any) -> None:
    """Checks the metrics of a step.

    Raises:
        FloatingPointError: loss, gradient or parameters are not finite; the message has the step and the values.
    """
    values = metrics.summarize(measured, ())
    names = ('loss_nats', 'gradient_norm', 'parameter_norm')
    found = {name: values[name] for name in names if name in values}  # a batch without targets has no loss
    if not all(map(math.isfinite, found.values())):
        found = ', '.join(f'{name} {value:g}' for name, value in found.items())
        raise FloatingPointError(
            f'training diverged at step {step}: {found}; the last checkpoint is from before. '
            'Lower optimizer.learning_rate, lengthen warmup_steps or set clip_norm, in a new --workdir'
        )


class Log:
    """The metrics of steps and validations, written to the workdir and to the console.

    Args:
        config: of the run.
        task: of the config.
        mesh: of the devices.
        start: the step that the run starts or resumes from.
        writer: of the run.
    """

    def __init__(self, config: Any, task: Task, mesh: Mesh, start: int, writer: Writer) -> None:
        self.config, self.task, self.writer = config, task, writer
        self.meter = metering.Meter(config, task, mesh, writer.seconds)
        self.progress = Progress(start, config.steps, self.meter.tokens)
        self._window = None  # metrics of the steps since the last line
        self._warned_of_empty = False

    def expected_time(self, step: int) -> str:
        """Returns how long the steps after `step` take, if an earlier command has measured their speed; else ''."""
        rate, left = self.writer.tokens_per_second, self.config.steps - step
        if not rate or not left:
            return ''
        seconds = left * self.meter.tokens / rate
        return f'about {messages.duration(seconds)} for the other {left:,} steps, at the speed measured before'

    def step(self, step: int, measured: Any) -> None:
        """Waits for the metrics of a step and checks them; every `run.log_every` steps, writes their means.

        Raises:
            FloatingPointError: see `check_finite`.
        """
        measured = metrics.to_host(measured)
        check_finite(step, measured)
        if measured.empty_batches.total and not self._warned_of_empty:
            self._warned_of_empty = True
            self.say(f'step {step}: no target of the batch counts, so it changed nothing; see empty_batches')
        if line := startup.report('first step'):
            self.say(line)
        self._window = measured if self._window is None else self._window.merge(measured)
        self.progress.advance()
        if step % self.config.run.log_every == 0 or step == self.config.steps:
            self.line(step)

    def line(self, step: int) -> None:
        """Writes the means of the steps since the last line, up to `step`; without any, nothing.

        It comes before every save too: so each step is in one line, wherever a command stops and another continues.
        """
        if self._window is None:
            return
        values = metrics.summarize(self._window, self.task.metrics)
        count, rate = self.progress.measure(step)
        costs = self.meter.measure(count, rate)
        self.progress.report(metrics.headline(values, self.task.metrics), rate, metering.text(costs))
        speed = {'tokens_per_second': rate} if rate else {}  # none of a first step, which compiles
        self.writer.write(step, {**values, **speed, **costs})
        self._window = None

    def validation(self, step: int, values: dict[str, float]) -> float | None:
        """Writes the values of a validation; returns its loss, None if no target counts.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        loss = values.get('validation_loss_nats')
        if loss is not None and not math.isfinite(loss):
            raise FloatingPointError(
                f'validation_loss_nats {loss} at step {step}; the last checkpoint is from before. '
                'Lower optimizer.learning_rate, in a new --workdir'
            )
        self.writer.write(step, values)
        self.say(f'step {step}: validation {metrics.headline(values, self.task.metrics, "validation_")}')
        return loss

    def say(self, text: str) -> None:
        """Writes a line to the console."""
        self.progress.say(text)
