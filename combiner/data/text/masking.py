"""Masked language modelling as in BERT (Devlin et al. 2019, section 3.1)."""

import numpy as np
from jaxtyping import Bool, Float32, Int32

SHARE = 0.15  # of the countable tokens is chosen
_MASKED = 0.8  # of the chosen tokens becomes the mask
_RANDOM = 0.1  # of the chosen tokens becomes a random token


def mask_tokens(
    tokens: Int32[np.ndarray, ' length'],
    countable: Bool[np.ndarray, ' length'],
    generator: np.random.Generator,
    *,
    mask_id: int,
    ordinary: range,
) -> tuple[Int32[np.ndarray, ' length'], Float32[np.ndarray, ' length']]:
    """Replaces random tokens, which a model then has to predict.

    It chooses round(15 %) of the countable tokens uniformly, at least one if there is any. Each chosen token
    independently becomes the mask (80 %), a uniformly random ordinary token (10 %), or stays (10 %).

    Args:
        tokens: the originals, which are the targets.
        countable: True for tokens that may be chosen; False for padding, ends of documents and the like.
        generator: of the random numbers; its state and the other arguments determine the result.
        mask_id: id of the mask.
        ordinary: ids of text.

    Returns:
        The model's input tokens, and weights: 1 for chosen tokens, 0 for others.

    Raises:
        ValueError: ordinary is empty or skips ids, or tokens and countable differ in shape.
    """
    if not ordinary or ordinary.step != 1:
        raise ValueError(f'ordinary={ordinary} must be a range of one or more consecutive ids')
    if tokens.shape != countable.shape:
        raise ValueError(f'countable has shape {countable.shape}, but must have the shape {tokens.shape} of tokens')
    positions = np.flatnonzero(countable)
    count = min(len(positions), max(1, round(SHARE * len(positions))))
    chosen = generator.choice(positions, count, replace=False)
    fate = generator.random(count)
    others = generator.integers(ordinary.start, ordinary.stop, count, np.int32)
    inputs = tokens.copy()
    inputs[chosen] = np.where(fate < _MASKED, mask_id, np.where(fate < _MASKED + _RANDOM, others, tokens[chosen]))
    weights = np.zeros(tokens.shape, np.float32)
    weights[chosen] = 1
    return inputs, weights
