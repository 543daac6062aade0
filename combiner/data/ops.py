"""Pure numpy functions between records and a model's inputs."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, UInt8


def image_to_tokens(
    image: UInt8[np.ndarray, '*batch rows columns channels'],
) -> Int32[np.ndarray, '*batch length']:
    """Flattens images row by row, all channels of a pixel in sequence: one token 0..255 per value."""
    *batch, rows, columns, channels = image.shape
    return image.reshape(*batch, rows * columns * channels).astype(np.int32)


def tokens_to_image(
    tokens: Int[np.ndarray, '*batch length'], shape: tuple[int, ...]
) -> UInt8[np.ndarray, '*batch rows columns channels']:
    """Inverts `image_to_tokens`; `shape` is (rows, columns, channels).

    Raises:
        ValueError: the shape does not fit the length, or a token is not in 0..255.
    """
    *batch, length = tokens.shape
    if math.prod(shape) != length:
        raise ValueError(f'an image of shape {shape} has {math.prod(shape)} values, not {length} tokens')
    if tokens.size and not 0 <= tokens.min() <= tokens.max() <= 255:
        raise ValueError(f'image tokens lie in 0..255, got {tokens.min()}..{tokens.max()}')
    return tokens.reshape(*batch, *shape).astype(np.uint8)


def language_model(tokens: Int32[np.ndarray, ' length']) -> dict[str, np.ndarray]:
    """Returns an example in which every token is a target of weight 1."""
    weights: Float32[np.ndarray, ' length'] = np.ones(tokens.shape, np.float32)
    return {'tokens': tokens, 'targets': tokens, 'weights': weights}


def image_language_model(record: Mapping[str, Any], shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Converts a record's uint8 `image` of this shape to an example of a language model over its values.

    Raises:
        ValueError: the image has another shape or type; the message has the record's key.
    """
    return language_model(image_to_tokens(_checked(record, shape)))


def image_classification(
    record: Mapping[str, Any], shape: tuple[int, int], black_is_padding: bool = False
) -> dict[str, np.ndarray]:
    """Converts a record's uint8 `image` (grey of this shape, or RGB) and `label` to an example of its grey values.

    Colours become grey by luma, `0.299 R + 0.587 G + 0.114 B` (Rec. 601), rounded. With `black_is_padding`, values of 0
    are padding, as in the Long Range Arena's own code, which thus masks the background of its drawings.

    Raises:
        ValueError: the image has another shape or type; the message has the record's key.
    """
    colours = record['image'].ndim == 3
    image = _checked(record, (*shape, 3) if colours else shape)
    if colours:
        image = np.rint(image @ np.array([0.299, 0.587, 0.114]))
    tokens = image.reshape(-1).astype(np.int32)
    return classification(tokens, tokens > 0 if black_is_padding else np.ones(tokens.shape, bool), record['label'])


def shrunk(record: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Returns the record with its square image reduced to `size` rows and columns, by the mean of whole blocks.

    Raises:
        ValueError: the sides are not equal, or no multiple of `size`.
    """
    image = record['image']
    rows, columns = image.shape[:2]
    if rows != columns or size < 1 or rows % size:
        raise ValueError(
            f'record {record["key"]!r} holds an image of {rows}x{columns}; size={size} must divide its sides'
        )
    blocks = image.reshape(size, rows // size, size, rows // size, *image.shape[2:])
    return {**record, 'image': np.rint(blocks.mean(axis=(1, 3))).astype(np.uint8)}


def byte_classification(record: Mapping[str, Any], length: int) -> dict[str, np.ndarray]:
    """Converts a record's `text` (bytes) and `label` to an example of at most `length` bytes by `byte_tokens`."""
    return classification(*byte_tokens(record['text'], length), record['label'])


def byte_pair_classification(record: Mapping[str, Any], length: int) -> dict[str, np.ndarray]:
    """Converts a record's `text1`, `text2` and `label` to an example of two sequences by `byte_tokens`."""
    tokens, valid = zip(*(byte_tokens(record[name], length) for name in ('text1', 'text2')), strict=True)
    return classification(np.stack(tokens), np.stack(valid), record['label'])


def byte_tokens(text: bytes, length: int) -> tuple[Int32[np.ndarray, ' length'], Bool[np.ndarray, ' length']]:
    """Returns tokens `byte + 1` of the first `length` bytes, padded with 0, and a mask: False for padding."""
    tokens = np.frombuffer(text[:length], np.uint8).astype(np.int32) + 1
    return pad(tokens, length)


def pad(
    tokens: Int32[np.ndarray, ' count'], length: int
) -> tuple[Int32[np.ndarray, ' length'], Bool[np.ndarray, ' length']]:
    """Pads tokens with 0; returns them and a mask: False for padding."""
    return np.pad(tokens, (0, length - len(tokens))), np.arange(length) < len(tokens)


def classification(
    tokens: Int32[np.ndarray, '*length'], valid: Bool[np.ndarray, '*length'], label: int
) -> dict[str, np.ndarray]:
    """Returns an example whose only target is a class."""
    return {
        'tokens': tokens,
        'valid': valid,
        'targets': np.array(label, np.int32),
        'weights': np.array(1, np.float32),
    }


def _checked(record: Mapping[str, Any], shape: tuple[int, ...]) -> UInt8[np.ndarray, '...']:
    image = record['image']
    if image.shape != shape or image.dtype != np.uint8:
        found, expected = ('x'.join(map(str, each)) for each in (image.shape, shape))
        raise ValueError(f'record {record["key"]!r} holds an image of {image.dtype} {found}; expected uint8 {expected}')
    return image
