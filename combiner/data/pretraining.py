"""Self-supervised training on the sequences of a classification, without labels (Amos et al. 2023, arXiv 2310.02980).

A task with `pretrain=mlm` predicts masked tokens from both sides, one with `pretrain=causal` each token from the tokens
before it. `combiner.run.warm_start` then gives the backbone to the classifier.

Of all sequences 15 % of the tokens are masked, as in BERT: a deviation, as the paper masks 50 % of images, 15 % of text
and 10 % of ListOps.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from combiner.data.task import Example, Task
from combiner.data.text import masking

KINDS = ('none', 'mlm', 'causal')


def unlabelled(record: Mapping[str, Any], transform: Callable[[Mapping[str, Any]], Example]) -> Example:
    """Returns an example whose targets are the tokens themselves (of a pair, the first sequence's), not padding."""
    example = transform(record)
    tokens, valid = (example[name].reshape(-1, example[name].shape[-1])[0] for name in ('tokens', 'valid'))
    return {'tokens': tokens, 'valid': valid, 'targets': tokens, 'weights': valid.astype(np.float32)}


def mask(example: Example, generator: np.random.Generator, ordinary: range) -> Example:
    """Masks some of the tokens with weights as in BERT; afterwards only the chosen tokens have weights."""
    tokens, weights = masking.mask_tokens(
        example['tokens'], example['weights'] > 0, generator, mask_id=ordinary.stop, ordinary=ordinary
    )
    return example | {'tokens': tokens, 'weights': weights}


def pretraining(task: Task, kind: str, padding: bool) -> Task:
    """Returns the task of a kind on the sequences of a classification.

    The mask is a token after all others; a classifier that starts from such a model leaves it out.

    Args:
        task: the classification.
        kind: one of `KINDS`; for 'none', the task itself is returned.
        padding: whether token 0 is padding.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f'unknown pretrain={kind!r}; choose {", ".join(KINDS)}')
    if kind == 'none':
        return task
    masked = kind == 'mlm'
    ordinary = range(int(padding), task.vocab_size)
    return dataclasses.replace(
        task,
        dataset=f'{task.dataset}, without labels, pretrain={kind}',
        transform=functools.partial(unlabelled, transform=task.transform),
        vocab_size=task.vocab_size + masked,
        head='masked_language_model' if masked else 'language_model',
        metrics=('perplexity',),
        classes=0,
        randomise=functools.partial(mask, ordinary=ordinary) if masked else None,
        context='both sides' if masked else 'the tokens before it',
    )
