import math

import jax.numpy as jnp
import numpy as np
import pytest

from combiner import metrics


def test_sums_with_counts_merge_exactly():
    parts = [
        metrics.to_host(metrics.eval_metrics({name: jnp.array(x) for name, x in sums.items()}))
        for sums in [
            {'nats': 6.0, 'targets': 2, 'hits': 1, 'words': 2, 'bytes': 9, 'examples': 2},
            {'nats': 1.0, 'targets': 8, 'hits': 3, 'words': 3, 'bytes': 26, 'examples': 2},
        ]
    ]
    values = metrics.summarize(parts[0].merge(parts[1]), metrics.FIGURES, 'validation_')
    assert values == {
        'validation_loss_nats': 0.7,
        'validation_examples': 4,
        'validation_bits_per_dim': pytest.approx(0.7 / math.log(2)),
        'validation_perplexity': pytest.approx(math.exp(0.7)),
        'validation_word_perplexity': pytest.approx(math.exp(7 / 5)),
        'validation_bits_per_byte': pytest.approx(7 / 35 / math.log(2)),
        'validation_accuracy': 0.4,
    }


def test_figures_whose_sums_are_missing_are_left_out():
    measured = metrics.to_host(metrics.eval_metrics({'nats': jnp.float32(3e4), 'targets': jnp.float32(2)}))
    figures = ('word_perplexity', 'perplexity', 'accuracy')
    values = metrics.summarize(measured, figures)
    assert values == {'loss_nats': 15000.0, 'perplexity': math.inf}
    assert metrics.headline(values, figures) == 'perplexity inf'


def test_train_metrics_average_the_loss_and_keep_the_last_of_the_rest():
    first, second = (
        metrics.to_host(
            metrics.train_metrics({'nats': jnp.float32(nats), 'targets': jnp.float32(count)}, *map(jnp.float32, rest))
        )
        for nats, count, *rest in [(8, 4, 1, 2, 3), (2, 1, 5, 6, 7)]
    )
    values = metrics.summarize(first.merge(second), ('bits_per_dim',))
    assert {name: round(value, 5) for name, value in values.items()} == {
        'loss_nats': 2.0,
        'gradient_norm': 5.0,
        'parameter_norm': 6.0,
        'learning_rate': 7.0,
        'bits_per_dim': round(2 / math.log(2), 5),
    }


def test_to_host_sums_in_float64():
    large, small = (
        metrics.to_host(metrics.eval_metrics({'nats': jnp.float32(nats), 'targets': jnp.float32(1)}))
        for nats in (2**24, 1)
    )
    total = large.merge(small)
    assert total.loss_nats.total == np.float64(2**24 + 1)
