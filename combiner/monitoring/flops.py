"""The arithmetic that a model needs, by formula: the numerator of a chip's utilisation (MFU, Chowdhery et al. 2022).

A multiplication and an addition are two FLOPs. What counts:

    dense layer     2 · its weights, for each position (projections of attention, feed-forward network, logits, head)
    attention       2 · (width of all queries + of all values), for each term of a softmax and each member of a span
    training step   3 · the forward pass: the backward pass computes the gradients of both factors of each product

What does not count, though a program may compute it: products that are masked afterwards, a forward pass that is
computed again (remat, attention in blocks), and what mechanisms compute besides the terms of their patterns, such as
feature maps, hashes, clusters and projected summaries. A mechanism without a pattern has no formula of its attention;
then its dense layers alone count.
"""

import math
from typing import Any, NamedTuple

from combiner.core import registry
from combiner.core.mechanism import Mechanism
from combiner.data.task import Task

TRAINING = 3  # forward and backward pass, the forward pass being 1
LONGEST_PATTERN = 4096  # above, only a mechanism that knows a closed form of its cost has a formula


class Flops(NamedTuple):
    """FLOPs by formula.

    Attributes:
        dense: of the dense layers.
        attention: of attention between its projections; None if the mechanism has no formula.
    """

    dense: int
    attention: int | None

    @property
    def total(self) -> int:
        """All FLOPs that the formula knows."""
        return self.dense + (self.attention or 0)

    def times(self, factor: int) -> 'Flops':
        """Returns the FLOPs of doing it a number of times."""
        return Flops(self.dense * factor, None if self.attention is None else self.attention * factor)


def attention(mechanism: Mechanism, length: int, width: int, value_width: int | None = None) -> int | None:
    """Returns the FLOPs of a mechanism on one sequence, forward; None if it has no formula.

    Args:
        mechanism: between its projections.
        length: of the sequence.
        width: of all query heads together.
        value_width: of all value heads together; None for `width`.
    """
    if type(mechanism).cost is Mechanism.cost and length > LONGEST_PATTERN:
        return None
    try:
        products = mechanism.cost(length).total
    except NotImplementedError:
        return None
    return 2 * products * (width + (width if value_width is None else value_width))


def forward(config: Any, task: Task) -> Flops:
    """Returns the FLOPs of the forward pass of a config's model on one example."""
    model = config.model.to_dict()
    width, heads, layers = model['width'], model['heads'], model['layers']
    queries = model['qkv_width'] or width
    values = model['value_width'] or queries
    sequences = 2 if task.head == 'dual_encoder' else 1
    length = task.length + (model.get('pool') == 'cls')

    hyper = {key: value for key, value in model['attention'].items() if key != 'name'}
    causal = task.head == 'language_model'
    mechanism = registry.make_mechanism(model['attention']['name'], hyper, causal=causal, max_length=length)
    of_keys = (model['kv_heads'] or heads) / heads
    roles = {'query': queries, 'key': int(queries * of_keys), 'value': int(values * of_keys)}
    projected = sum(roles[role] for role in set(mechanism.projections)) + values
    hidden = int(width * model['mlp_ratio'])
    of_layer = width * (projected + 2 * hidden) * length

    of_attention = attention(mechanism, length, queries, values)
    return Flops(
        2 * (sequences * layers * of_layer + _head_weights(task, width, hidden, length)),
        None if of_attention is None else sequences * layers * of_attention,
    )


def _head_weights(task: Task, width: int, hidden: int, length: int) -> int:
    """Returns the products of weights and inputs after the last block, for one example."""
    if not task.classes:
        return length * width * task.vocab_size
    return (4 * width if task.head == 'dual_encoder' else width) * hidden + hidden * task.classes


def training_step(config: Any, task: Task) -> Flops:
    """Returns the FLOPs of one update of a config's model, on all chips together."""
    return forward(config, task).times(TRAINING * config.data.batch_size)


def tokens(config: Any, task: Task) -> int:
    """Returns the tokens that one update reads."""
    return config.data.batch_size * math.prod(task.input_shape)


def utilization(flops: int | float, seconds: float, chips: int, peak: float) -> float:
    """Returns the share of the peak of all chips that FLOPs in some seconds are (MFU)."""
    return flops / (seconds * chips * peak)


def hours(flops: int | float, steps: int, chips: int, peak: float, mfu: float) -> float:
    """Returns the hours of a training of so many steps, at an assumed utilisation."""
    return steps * flops / (chips * peak * mfu) / 3600
