"""Pure numpy transformations between records and what a model reads."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, Int32, UInt8


def image_to_tokens(
    image: UInt8[np.ndarray, '*batch rows columns channels'],
) -> Int32[np.ndarray, '*batch length']:
    """Flattens images row by row, the channels of a pixel side by side: one token 0..255 per value."""
    *batch, rows, columns, channels = image.shape
    return image.reshape(*batch, rows * columns * channels).astype(np.int32)


def tokens_to_image(
    tokens: Int[np.ndarray, '*batch length'], shape: tuple[int, int, int]
) -> UInt8[np.ndarray, '*batch rows columns channels']:
    """Inverts `image_to_tokens`; `shape` is (rows, columns, channels).

    Raises:
        ValueError: the shape does not hold the length, or a token is not in 0..255.
    """
    *batch, length = tokens.shape
    if math.prod(shape) != length:
        raise ValueError(f'an image of shape {shape} has {math.prod(shape)} values, not {length} tokens')
    if tokens.size and not 0 <= tokens.min() <= tokens.max() <= 255:
        raise ValueError(f'image tokens lie in 0..255, got {tokens.min()}..{tokens.max()}')
    return tokens.reshape(*batch, *shape).astype(np.uint8)


def weigh_tokens(tokens: Int32[np.ndarray, ' length']) -> dict[str, np.ndarray]:
    """Makes an example in which every token counts: `tokens` and float32 `weights` of ones."""
    weights: Float32[np.ndarray, ' length'] = np.ones(tokens.shape, np.float32)
    return {'tokens': tokens, 'weights': weights}


def image_language_model(record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Turns a record's uint8 `image` into the example of a language model over its values."""
    return weigh_tokens(image_to_tokens(record['image']))
