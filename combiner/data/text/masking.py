"""Masked language modelling as in BERT (Devlin et al. 2019, section 3.1)."""

import numpy as np
from jaxtyping import Bool, Float32, Int32

SHARE = 0.15  # of the countable tokens
_MASKED = 0.8  # of these
_RANDOM = 0.1


def mask_tokens(
    tokens: Int32[np.ndarray, ' length'],
    countable: Bool[np.ndarray, ' length'],
    generator: np.random.Generator,
    *,
    mask_id: int,
    ordinary: range,
) -> tuple[Int32[np.ndarray, ' length'], Float32[np.ndarray, ' length']]:
    """Hides tokens that a model then has to tell.

    Of the countable tokens, round(15 %) are drawn, at least one where there is any, each set equally likely. Of these,
    each on its own, 80 % become the mask, 10 % an ordinary token, any of them equally likely, and 10 % stay.

    Args:
        tokens: the originals, which are the targets.
        countable: what may be drawn; padding, ends of documents and the like may not.
        generator: where the draw comes from; the result follows from its state and the other arguments.
        mask_id: id of the mask.
        ordinary: ids that stand for text.

    Returns:
        The tokens to read, and weights of 1 for the tokens that were drawn, 0 for the others.

    Raises:
        ValueError: ordinary is empty or skips ids, or tokens and countable differ in shape.
    """
    if not ordinary or ordinary.step != 1:
        raise ValueError(f'{ordinary} is not a range of one or more consecutive ids of ordinary tokens')
    if tokens.shape != countable.shape:
        raise ValueError(f'countable has shape {countable.shape}, not {tokens.shape} as the tokens')
    positions = np.flatnonzero(countable)
    count = min(len(positions), max(1, round(SHARE * len(positions))))
    drawn = generator.choice(positions, count, replace=False)
    fate = generator.random(count)
    others = generator.integers(ordinary.start, ordinary.stop, count, np.int32)
    inputs = tokens.copy()
    inputs[drawn] = np.where(fate < _MASKED, mask_id, np.where(fate < _MASKED + _RANDOM, others, tokens[drawn]))
    weights = np.zeros(tokens.shape, np.float32)
    weights[drawn] = 1
    return inputs, weights
