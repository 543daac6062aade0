"""What is measured, and where it is shown: metrics.jsonl, TensorBoard, and the terminal.

In a step, metrics are sums with counts (clu.metrics), so that they add up exactly over devices, micro-batches
and steps. Every name carries its unit.
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

from combiner import atomic


@struct.dataclass
class Sum(clu.metrics.Metric):
    """A total, such as a number of examples."""

    total: Any

    def merge(self, other: 'Sum') -> 'Sum':
        """Adds."""
        return type(self)(self.total + other.total)

    def compute(self) -> Any:
        """The total itself."""
        return self.total


@struct.dataclass
class TargetMean(clu.metrics.Average):
    """A mean over targets (tokens or classes): the sum of weight · value, with the sum of weights."""

    total: Any
    count: Any


class Figure(NamedTuple):
    """How a result is reported.

    Attributes:
        of: the figure from the totals of nats, targets, words and bytes.
        needs: the totals that it needs, beside nats and `per`.
        text: format of a line.
        per: the total that it divides by; there is no figure where that is zero.
    """

    of: Callable[[dict[str, float]], float]
    needs: tuple[str, ...]
    text: str
    per: str = 'targets'


# Over the totals of an evaluation, targets weighted: bits/dim are nats / (targets · ln 2), as a target is one dimension
# of an image, bits/byte nats / (UTF-8 bytes · ln 2), perplexity exp(nats / targets), and per word exp(nats / words),
# which does not depend on the tokenizer (Rae et al. 2020, of PG-19).
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
    """Metrics of one step: of its sums, gradient norm before clipping, parameter norm, learning rate.

    A step whose batch has no target counts in `empty_batches`.
    """
    return clu.metrics.Collection.create_collection(
        **_of_sums(sums),
        empty_batches=Sum((sums['targets'] == 0).astype(int)),
        gradient_norm=clu.metrics.LastValue(value=gradient_norm),
        parameter_norm=clu.metrics.LastValue(value=parameter_norm),
        learning_rate=clu.metrics.LastValue(value=learning_rate),
    )


def eval_metrics(sums: dict[str, Any]) -> Any:
    """Metrics of one batch's sums."""
    return clu.metrics.Collection.create_collection(**_of_sums(sums))


def _of_sums(sums: dict[str, Any]) -> dict[str, clu.metrics.Metric]:
    """Mean loss_nats per target (weighted), and the sums that there are beside: hits, words, bytes, examples."""
    rest = {name: Sum(value) for name, value in sums.items() if name not in ('nats', 'targets')}
    return {'loss_nats': TargetMean(total=sums['nats'], count=sums['targets']), **rest}


def to_host(collection: Any) -> Any:
    """Waits for a step's metrics; in float64, so that sums over a whole split stay exact."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(collection))


def summarize(collection: Any, figures: Iterable[str], prefix: str = '') -> dict[str, float]:
    """The values of a collection by name, and those of `figures` (names in `FIGURES`) that its sums allow.

    A figure that needs words or bytes can be had from evaluation only, where batches count them. Where no target counts
    there is no loss and no figure; `empty_batches` is there where some batch was empty.
    """
    with np.errstate(invalid='ignore'):  # 0 / 0, where no target counts
        values = {name: float(value) for name, value in collection.compute().items()}
    total = values | {'nats': float(collection.loss_nats.total), 'targets': float(collection.loss_nats.count)}
    for name in figures:
        figure = FIGURES[name]
        if total.get(figure.per) and set(figure.needs) <= set(total):
            values[name] = figure.of(total)
    hidden = {'hits', 'words', 'bytes'}
    hidden |= set() if total['targets'] else {'loss_nats'}
    hidden |= set() if values.get('empty_batches') else {'empty_batches'}
    return {prefix + name: value for name, value in values.items() if name not in hidden}


def headline(values: dict[str, Any], figures: Iterable[str], prefix: str = '') -> str:
    """The first of `figures` that there is a value of, in words: '4.5032 bits/dim', or 'no targets' where none is."""
    name = next((name for name in figures if prefix + name in values), None)
    return 'no targets' if name is None else FIGURES[name].text.format(values[prefix + name])


class Writer:
    """Appends to WORKDIR/metrics.jsonl (an object a line, with 'step') and to WORKDIR/tensorboard.

    Opened at the step that a run continues from: what an interrupted run wrote beyond it is dropped, so that no step
    appears twice. TensorBoard's file is then written anew from metrics.jsonl, as a kill may have cost it its last
    two minutes. Only the first process writes.
    """

    def __init__(self, workdir: str | os.PathLike[str], step: int):
        self.file = self.board = None
        if jax.process_index():
            return
        path = Path(workdir) / 'metrics.jsonl'
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding='utf-8', errors='replace').splitlines() if path.exists() else []
        lines = [line for line in lines if _step(line) <= step]
        atomic.write_text(path, ''.join(f'{line}\n' for line in lines))
        self.file = path.open('a', encoding='utf-8', buffering=1)
        shutil.rmtree(path.parent / 'tensorboard', ignore_errors=True)
        self.board = tensorboardX.SummaryWriter(str(path.parent / 'tensorboard'))
        _forgive(self.board)
        for line in lines:
            self._show(json.loads(line))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one line, and one scalar for each value."""
        if self.file is not None:
            line: dict[str, Any] = {'step': step, **values}
            self.file.write(json.dumps(line) + '\n')
            self._show(line)

    def close(self) -> None:
        """Flushes both."""
        if self.file is not None and self.board is not None:
            self.file.close()
            self.board.close()

    def _show(self, line: dict[str, Any]) -> None:
        if self.board is not None:
            for name in line.keys() - {'step'}:
                self.board.add_scalar(name, line[name], line['step'])


def _forgive(board: tensorboardX.SummaryWriter) -> None:
    """Makes TensorBoard's file one that may fail to be written, as on a full disk, with one warning.

    Its writer is a thread: an error would end that, and training would wait for it for ever.
    """
    writer: Any = board.file_writer  # its types leave out what the writer is made of
    events = writer.event_writer._ev_writer
    failed = False

    def forgiving(write: Callable[..., Any], *args: Any) -> Any:
        nonlocal failed
        try:
            return write(*args)
        except (OSError, ValueError) as error:  # ValueError: it is closed
            if not failed:
                logging.warning("TensorBoard's file ends here (%s); the next start makes it anew", error)
            failed = True

    for name in ('write_event', 'flush', 'close'):
        setattr(events, name, functools.partial(forgiving, getattr(events, name)))


def _step(line: str) -> int | float:
    """The step of a line of metrics.jsonl; infinite for a damaged one, such as a line cut short by a kill."""
    try:
        return json.loads(line)['step']
    except (ValueError, KeyError, TypeError):
        return math.inf


class Progress:
    """A bar with time left and tokens/s on a terminal, plain lines elsewhere; only the first process speaks."""

    def __init__(self, step: int, steps: int, tokens_per_step: int):
        self.step, self.steps, self.tokens_per_step = step, steps, tokens_per_step
        self.started = time.perf_counter()
        self.compiling = True
        self.silent = jax.process_index() != 0
        terminal = sys.stderr.isatty() and not self.silent
        self.bar = tqdm.tqdm(total=steps, initial=step, unit='step', dynamic_ncols=True) if terminal else None

    def advance(self) -> None:
        """One step more was read; the clock starts anew after the first, which compiles."""
        if self.compiling:
            self.compiling = False
            self.step, self.started = self.step + 1, time.perf_counter()
        if self.bar:
            self.bar.update()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time within it (validation, saving) does not count in tokens/s."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began

    def report(self, step: int, figure: str) -> float:
        """Shows a line for `step` with a figure in words; returns tokens_per_second since the last."""
        seconds = time.perf_counter() - self.started
        rate = (step - self.step) * self.tokens_per_step / max(seconds, 1e-9)
        left = (self.steps - step) * seconds / max(step - self.step, 1)
        self.step, self.started = step, time.perf_counter()
        if self.bar:
            self.bar.set_postfix_str(f'{figure}, {rate:,.0f} tokens/s')
        else:
            self.say(
                f'step {step}/{self.steps}: {figure}, {rate:,.0f} tokens/s, {tqdm.tqdm.format_interval(left)} left'
            )
        return rate

    def say(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        if self.bar:
            self.bar.write(text)
        elif not self.silent:
            print(text, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self.bar:
            self.bar.close()
