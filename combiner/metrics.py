"""Metrics: sums of steps, and the figures that are computed from them.

In a step, metrics are sums with counts (clu.metrics), so that they add up exactly over devices, micro-batches
and steps. Every name has its unit.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import clu.metrics
import jax
import numpy as np
from flax import struct


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
