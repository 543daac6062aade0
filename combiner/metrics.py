"""Metrics, and their output to metrics.jsonl, TensorBoard and the terminal.

In a step, metrics are sums with counts (clu.metrics), so that they add up exactly over devices, micro-batches
and steps. Every name has its unit.
"""

import contextlib
import functools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import clu.metrics
import jax
import numpy as np
import tensorboardX
import tqdm
from absl import logging
from flax import struct

from combiner import atomic, mirror, paths


@struct.dataclass
class Sum(clu.metrics.Metric):
    """A total, such as a number of examples."""

    total: Any

    def merge(self, other: 'Sum') -> 'Sum':
        """Adds two totals."""
        return type(self)(self.total + other.total)

    def compute(self) -> Any:
        """Returns the total."""
        return self.total


@struct.dataclass
class TargetMean(clu.metrics.Average):
    """A mean over targets (tokens or classes): the sum of weight · value, divided by the sum of weights."""

    total: Any
    count: Any


class Figure(NamedTuple):
    """The definition of a reported figure, such as bits/dim.

    Attributes:
        compute: computes the figure from the totals, by name.
        needs: names of the required totals, besides nats and `per`.
        text: format of the figure in a line of text.
        per: name of the total that it divides by; if this total is zero, there is no figure.
    """

    compute: Callable[[dict[str, float]], float]
    needs: tuple[str, ...]
    text: str
    per: str = 'targets'


# Computed from the totals of an evaluation, with weighted targets. A target of an image is one dimension, so bits/dim
# are nats / (targets · ln 2). Perplexity per word does not depend on the tokenizer (Rae et al. 2020, for PG-19).
FIGURES = {
    'accuracy': Figure(lambda total: total['hits'] / total['targets'], ('hits',), 'accuracy {:.2%}'),
    'bits_per_dim': Figure(lambda total: total['nats'] / total['targets'] / math.log(2), (), '{:.4f} bits/dim'),
    'perplexity': Figure(lambda total: _exp(total['nats'] / total['targets']), (), 'perplexity {:.4f}'),
    'word_perplexity': Figure(
        lambda total: _exp(total['nats'] / total['words']), (), 'perplexity per word {:.4f}', 'words'
    ),
    'bits_per_byte': Figure(
        lambda total: total['nats'] / total['bytes'] / math.log(2), (), '{:.4f} bits/byte', 'bytes'
    ),
}


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def train_metrics(sums: dict[str, Any], gradient_norm: Any, parameter_norm: Any, learning_rate: Any) -> Any:
    """Returns the metrics of one training step: its sums, gradient norm before clipping, parameter norm, learning rate.

    `empty_batches` counts the steps whose batch has no target.
    """
    return clu.metrics.Collection.create_collection(
        **_of_sums(sums),
        empty_batches=Sum((sums['targets'] == 0).astype(int)),
        gradient_norm=clu.metrics.LastValue(value=gradient_norm),
        parameter_norm=clu.metrics.LastValue(value=parameter_norm),
        learning_rate=clu.metrics.LastValue(value=learning_rate),
    )


def eval_metrics(sums: dict[str, Any]) -> Any:
    """Returns the metrics of the sums of one batch."""
    return clu.metrics.Collection.create_collection(**_of_sums(sums))


def _of_sums(sums: dict[str, Any]) -> dict[str, clu.metrics.Metric]:
    """Returns loss_nats, the weighted mean loss per target, and the other sums: hits, words, bytes, examples."""
    rest = {name: Sum(value) for name, value in sums.items() if name not in ('nats', 'targets')}
    return {'loss_nats': TargetMean(total=sums['nats'], count=sums['targets']), **rest}


def to_host(collection: Any) -> Any:
    """Waits for the metrics of a step and returns them in float64, so that sums over a whole split stay exact."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(collection))


def summarize(collection: Any, figures: Iterable[str], prefix: str = '') -> dict[str, float]:
    """Returns the values of a collection by name, and the `figures` (names in `FIGURES`) that its sums allow.

    Figures that need words or bytes exist only in evaluation, where batches count them. Without targets there is no
    loss and no figure. `empty_batches` is returned only if it is not 0.
    """
    with np.errstate(invalid='ignore'):  # 0 / 0, where no target counts
        values = {name: float(value) for name, value in collection.compute().items()}
    total = values | {'nats': float(collection.loss_nats.total), 'targets': float(collection.loss_nats.count)}
    for name in figures:
        figure = FIGURES[name]
        if total.get(figure.per) and set(figure.needs) <= set(total):
            values[name] = figure.compute(total)
    hidden = {'hits', 'words', 'bytes'}
    hidden |= set() if total['targets'] else {'loss_nats'}
    hidden |= set() if values.get('empty_batches') else {'empty_batches'}
    return {prefix + name: value for name, value in values.items() if name not in hidden}


def headline(values: dict[str, Any], figures: Iterable[str], prefix: str = '') -> str:
    """Returns the first available figure as text: '4.5032 bits/dim'; 'no targets' if there is none."""
    name = next((name for name in figures if prefix + name in values), None)
    return 'no targets' if name is None else FIGURES[name].text.format(values[prefix + name])


class Writer:
    """A writer that appends to WORKDIR/metrics.jsonl (one object per line, with 'step') and to WORKDIR/tensorboard.

    It removes the lines after `step`, from which the run continues, so that no step appears twice. It then writes
    TensorBoard's file again from metrics.jsonl, because a kill may have lost its last two minutes. Only the first
    process writes.

    For a workdir in a cloud store, both are written to a local folder and copied from it (see `mirror.Mirror`). If the
    lines of a checkpoint's steps are there before the checkpoint is (`flush`), a kill loses only lines of steps that
    are taken again.
    """

    def __init__(self, workdir: str | os.PathLike[str], step: int):
        self.file = self.board = self._mirror = None
        self.seconds = 0.0, 0.0  # in steps, and in all, of the commands before, as their last lines have them
        if jax.process_index():
            return
        run = paths.parse(workdir, 'workdir')
        path = run / 'metrics.jsonl'
        lines = paths.content(path).splitlines() if path.exists() else []
        in_all = max((_seconds(line, 'seconds_in_all') for line in lines), default=0.0)
        lines = [line for line in lines if _step(line) <= step]
        self.seconds = max((_seconds(line, 'seconds_in_steps') for line in lines), default=0.0), in_all
        if isinstance(run, Path):
            folder = run
            folder.mkdir(parents=True, exist_ok=True)
        else:
            self._mirror = mirror.Mirror(run)
            folder = self._mirror.folder
            (run / 'tensorboard').rmtree(missing_ok=True)
        atomic.write_text(folder / 'metrics.jsonl', ''.join(f'{line}\n' for line in lines))
        self.file = (folder / 'metrics.jsonl').open('a', encoding='utf-8', buffering=1)
        shutil.rmtree(folder / 'tensorboard', ignore_errors=True)
        self.board = tensorboardX.SummaryWriter(str(folder / 'tensorboard'))
        _ignore_write_errors(self.board)
        for line in lines:
            self._show(json.loads(line))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one line to metrics.jsonl and one scalar per value to TensorBoard."""
        if self.file is not None:
            line: dict[str, Any] = {'step': step, **values}
            self.file.write(json.dumps(line) + '\n')
            self._show(line)

    def flush(self) -> None:
        """Copies both files to the cloud store of the workdir; does nothing for a local one, which has them already.

        Raises:
            Exception: of the store, if it cannot be written.
        """
        if self._mirror is not None and self.board is not None:
            self.board.flush()
            self._mirror.copy()

    def close(self) -> None:
        """Closes both files; raises as `flush`."""
        if self.file is not None and self.board is not None:
            self.file.close()
            self.board.close()
        if self._mirror is not None:
            self._mirror.close()

    def _show(self, line: dict[str, Any]) -> None:
        if self.board is not None:
            for name in line.keys() - {'step'}:
                self.board.add_scalar(name, line[name], line['step'])


def _ignore_write_errors(board: tensorboardX.SummaryWriter) -> None:
    """Turns write errors of TensorBoard's file, such as a full disk, into one warning.

    An error would end TensorBoard's writer thread, and training would wait for it forever.
    """
    writer: Any = board.file_writer  # its attributes are not in its types
    events = writer.event_writer._ev_writer
    failed = False

    def ignoring(write: Callable[..., Any], *args: Any) -> Any:
        nonlocal failed
        try:
            return write(*args)
        except (OSError, ValueError) as error:  # ValueError: it is closed
            if not failed:
                logging.warning("TensorBoard's file ends here (%s); the next start writes it again", error)
            failed = True

    for name in ('write_event', 'flush', 'close'):
        setattr(events, name, functools.partial(ignoring, getattr(events, name)))


def _step(line: str) -> int | float:
    """Returns the step of a line of metrics.jsonl; infinity for a damaged line, such as one cut off by a kill."""
    try:
        return json.loads(line)['step']
    except (ValueError, KeyError, TypeError):
        return math.inf


def _seconds(line: str, name: str) -> float:
    """Returns a value of a line of metrics.jsonl; 0.0 if it has none."""
    try:
        return float(json.loads(line)[name])
    except (ValueError, KeyError, TypeError):
        return 0.0


class Progress:
    """A progress bar with time left and tokens/s on a terminal, lines of text elsewhere; only in the first process."""

    def __init__(self, step: int, steps: int, tokens_per_step: int):
        self.step, self.steps, self.tokens_per_step = step, steps, tokens_per_step
        self.started = time.perf_counter()
        self.compiling = True
        self.silent = jax.process_index() != 0
        terminal = sys.stderr.isatty() and not self.silent
        self.bar = tqdm.tqdm(total=steps, initial=step, unit='step', dynamic_ncols=True) if terminal else None

    def advance(self) -> None:
        """Counts one more step; after the first step, which compiles, it restarts the clock."""
        if self.compiling:
            self.compiling = False
            self.step, self.started = self.step + 1, time.perf_counter()
        if self.bar:
            self.bar.update()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time within the block (validation, saving) from tokens/s."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began

    def measure(self, step: int) -> tuple[int, float]:
        """Returns the number of steps since the last call, up to `step`, and their tokens per second."""
        count, seconds = step - self.step, time.perf_counter() - self.started
        self.step, self.started = step, time.perf_counter()
        return count, count * self.tokens_per_step / max(seconds, 1e-9)

    def report(self, figure: str, rate: float, more: str = '') -> None:
        """Shows the last measured step with a figure as text, tokens per second, and more text.

        Args:
            figure: of the step.
            rate: tokens per second; 0 if there is none yet, as of a first step, which compiles.
            more: text at the end.
        """
        speed = f'{figure}, {rate:,.0f} tokens/s{more}' if rate else f'{figure}{more}'
        if self.bar:
            self.bar.set_postfix_str(speed)
            return
        left = (self.steps - self.step) * self.tokens_per_step / rate if rate else None
        interval = '' if left is None else f', {tqdm.tqdm.format_interval(left)} left'
        self.say(f'step {self.step}/{self.steps}: {speed}{interval}')

    def say(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        if self.bar:
            self.bar.write(text)
        elif not self.silent:
            print(text, flush=True)

    def close(self) -> None:
        """Ends the bar and leaves it on the terminal."""
        if self.bar:
            self.bar.close()
