"""The generated data sets by name: ListOps and Pathfinder of the Long Range Arena.

A record of ListOps is a line as in the benchmark's own files. A record of Pathfinder is a PNG, 8 bits grey, with its
label in a text chunk named `label`; image viewers can show it.
"""

import dataclasses
import functools
import io
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int64
from PIL import Image, PngImagePlugin

from combiner import paths
from combiner.data.lra import listops, pathfinder
from combiner.data.records import GeneratedSplit, Recipe

FOLDER = 'combiner_lra'  # in the data directory
LISTOPS_COUNTS = {'train': 96_000, 'validation': 2_000, 'test': 2_000}
PATHFINDER_COUNTS = {'train': 160_000, 'validation': 20_000, 'test': 20_000}
# Permitted numbers of tokens of the expressions of a set.
LISTOPS = {'lra_listops': listops.LENGTHS, 'lra_listops_short': listops.SHORT_LENGTHS}
NAMES = (
    *LISTOPS,
    *(f'lra_pathfinder{size}_{difficulty}' for size, difficulty in pathfinder.PADDLES),
)


def recipe(name: str, limit: int | None = None) -> Recipe:
    """Returns the recipe of a set, with at most `limit` records per split.

    With a limit, a Pathfinder split has the first records of the whole split; ListOps, which is shuffled before it is
    split, has other records.

    Raises:
        ValueError: the name is unknown, or the limit is below 1.
    """
    if name not in NAMES:
        raise ValueError(f'unknown generated set {name!r}; known: {", ".join(NAMES)}')
    if limit is not None and limit < 1:
        raise ValueError(f'limit {limit} gives no records; give at least 1, or no limit for all')
    if name in LISTOPS:
        return _listops(name, _limited(LISTOPS_COUNTS, limit))
    size, _, difficulty = name.removeprefix('lra_pathfinder').partition('_')
    settings = pathfinder.parameters(int(size), difficulty)
    return Recipe(
        name=name,
        version='1',
        parameters=dataclasses.asdict(settings),
        counts=_limited(PATHFINDER_COUNTS, limit),
        arrange=_in_order,
        encode=functools.partial(_encode_pathfinder, settings),
        decode=read_png,
    )


def config(name: str) -> str:
    """Returns the config, with its argument, that trains on a set."""
    if name in LISTOPS:
        return 'configs/lra.py:task=listops' if name == 'lra_listops' else 'configs/lra.py:task=listops,scale=small'
    size, _, difficulty = name.removeprefix('lra_pathfinder').partition('_')
    scale = ',scale=small' if int(size) in pathfinder.OWN_SIZES else ''
    return f'configs/lra.py:task=pathfinder,size={size},difficulty={difficulty}{scale}'


def folder(name: str, data_dir: str | os.PathLike[str]) -> paths.AnyPath:
    """Returns the folder of a set in a data directory."""
    return paths.parse(data_dir, 'data directory') / FOLDER / name


def open_split(name: str, split: str, data_dir: str | os.PathLike[str]) -> GeneratedSplit:
    """Opens a split of a generated set.

    Returns:
        A source of `{'source': str, 'label': int, 'key': str}` for ListOps, and of
        `{'image': uint8 [size, size], 'label': int, 'key': str}` for Pathfinder.

    Raises:
        FileNotFoundError: the set has not been generated, or a shard is missing.
        ValueError: see `GeneratedSplit`; or the name is unknown.
    """
    return GeneratedSplit(folder(name, data_dir), recipe(name), split)


def write_png(picture: pathfinder.Picture) -> bytes:
    """Returns a Pathfinder image as a PNG that contains its label."""
    text = PngImagePlugin.PngInfo()
    text.add_text('label', str(picture.label))
    file = io.BytesIO()
    Image.fromarray(picture.image).save(file, 'PNG', pnginfo=text)
    return file.getvalue()


def read_png(record: bytes) -> dict[str, Any]:
    """Inverts `write_png`.

    Returns:
        `{'image': uint8 [size, size], 'label': int}`.

    Raises:
        ValueError: the record is not such a PNG.
    """
    try:
        with Image.open(io.BytesIO(record), formats=['PNG']) as file:
            image, label = np.array(file), file.info.get('label')
    except (OSError, SyntaxError) as error:
        raise ValueError(f'not a PNG: {error}') from None
    if label not in ('0', '1') or image.dtype != np.uint8 or image.ndim != 2:
        raise ValueError(f'not a grey PNG with the label 0 or 1: {image.dtype} {image.shape}, label {label!r}')
    return {'image': image, 'label': int(label)}


def _limited(counts: Mapping[str, int], limit: int | None) -> dict[str, int]:
    return {split: count if limit is None else min(count, limit) for split, count in counts.items()}


def _listops(name: str, counts: Mapping[str, int]) -> Recipe:
    lengths = LISTOPS[name]
    parameters = {
        'max_depth': listops.MAX_DEPTH,
        'max_arguments': listops.MAX_ARGUMENTS,
        'shortest': lengths[0],
        'longest': lengths[-1],
    }
    arrange = functools.partial(listops.arrange, lengths=lengths)
    encode = functools.partial(_encode_listops, lengths)
    return Recipe(name, '1', parameters, counts, arrange, encode, _decode_listops)


def _encode_listops(lengths: range, seed: int, index: int) -> bytes:
    tokens = listops.generate(seed, index, lengths)
    return listops.write_line(listops.write_source(tokens), listops.evaluate(tokens)).encode()


def _decode_listops(record: bytes) -> dict[str, Any]:
    return listops.read_line(record.decode(), 'of ListOps')


def _encode_pathfinder(settings: pathfinder.Parameters, seed: int, index: int) -> bytes:
    rng = np.random.default_rng([seed, settings.size, settings.contour_length, index])
    return write_png(pathfinder.generate(rng, settings))


def _in_order(
    seed: int, counts: Mapping[str, int], in_parallel: Callable[..., Iterable]
) -> dict[str, Int64[np.ndarray, ' n']]:
    """Numbers the records of each split from the end of the whole split before it."""
    del seed, in_parallel
    starts = np.cumsum([0, *PATHFINDER_COUNTS.values()])
    return {split: start + np.arange(count) for start, (split, count) in zip(starts, counts.items(), strict=False)}
