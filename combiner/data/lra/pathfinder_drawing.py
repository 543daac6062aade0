"""What a Pathfinder image is made of, drawn once and kept: paddles in whole degrees, and discs.

A stamp is drawn on a canvas `SCALE` times finer and brought down by Pillow's Lanczos filter, which smooths its edges.
Directions are angles in degrees from the column axis towards the row axis: a step of 1 in direction d goes sin(d) rows
down and cos(d) columns to the right.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int, Shaped
from PIL import Image, ImageDraw

SCALE = 2


class Stamp(NamedTuple):
    """Small drawings around one cell, of an odd number of cells to a side.

    Attributes:
        ink: what is seen of it, 0..1; at its brightest exactly 1.
        room: what it keeps free of others, 0..1: the same, wider by the margin.
        wide: where no other one may end, 0..1: the room, wider by the margin once more.
    """

    ink: Float32[np.ndarray, 'side side']
    room: Float32[np.ndarray, 'side side']
    wide: Float32[np.ndarray, 'wide_side wide_side']


def step(degrees: float | int) -> tuple[float, float]:
    """The (row, column) step of length 1 in a direction."""
    return math.sin(math.radians(degrees)), math.cos(math.radians(degrees))


def disc(radius: int) -> Int[np.ndarray, 'cells 2']:
    """(row, column) of all whole cells within `radius` of the origin."""
    return np.argwhere(_is_within(radius, radius)) - radius


@functools.lru_cache(maxsize=2048)
def paddle(degrees: int, length: int, thickness: float, margin: int) -> Stamp:
    """A straight line of `length` cells from the middle cell in a direction.

    Args:
        degrees: direction, 0..359.
        length: from end to end, in cells.
        thickness: of the line, in cells.
        margin: by how many cells its room is wider than the line, on all sides.
    """
    reach = length + math.ceil(thickness) + margin
    side, middle = 2 * reach * SCALE + 1, reach * SCALE
    down, right = step(degrees)
    canvas = Image.new('L', (side, side))
    ends = [(middle, middle), (middle + length * SCALE * right, middle + length * SCALE * down)]
    ImageDraw.Draw(canvas).line(ends, fill=255, width=round(thickness * SCALE))
    fine = np.asarray(canvas) > 0
    room = _shrink(widen(fine, margin * SCALE), reach)
    return Stamp(_shrink(fine, reach), room, widen(np.pad(room, margin), margin))


@functools.lru_cache(maxsize=16)
def marker(radius: float) -> Float32[np.ndarray, 'side side']:
    """A disc around the middle cell, 0..1."""
    reach = math.ceil(radius) + 1
    return _shrink(_is_within(radius * SCALE, reach * SCALE), reach)


def widen(canvas: Shaped[np.ndarray, 'rows columns'], radius: int) -> Shaped[np.ndarray, 'rows columns']:
    """The greatest value within `radius` of every cell; beyond the edges there is nothing."""
    rows, columns = canvas.shape
    padded = np.pad(canvas, radius)
    wide = canvas.copy()
    for row, column in (disc(radius) + radius).tolist():
        np.maximum(wide, padded[row : row + rows, column : column + columns], out=wide)
    return wide


def stamp_on(
    canvas: Float32[np.ndarray, 'rows columns'], drawing: Float32[np.ndarray, 'side side'], row: int, column: int
) -> None:
    """Puts a drawing on a canvas, around a cell, wherever it is the brighter of the two; it must fit."""
    place = canvas[window(drawing, row, column)]
    np.maximum(place, drawing, out=place)


def window(drawing: Float32[np.ndarray, 'side side'], row: int, column: int) -> tuple[slice, slice]:
    """The part of a canvas that a drawing around a cell covers."""
    reach = len(drawing) // 2
    return slice(row - reach, row + reach + 1), slice(column - reach, column + reach + 1)


def _is_within(radius: float | int, reach: int) -> Bool[np.ndarray, 'side side']:
    rows, columns = np.ogrid[-reach : reach + 1, -reach : reach + 1]
    return rows**2 + columns**2 <= radius**2


def _shrink(fine: Bool[np.ndarray, 'fine fine'], reach: int) -> Float32[np.ndarray, 'side side']:
    side = 2 * reach + 1
    # A line of one fine cell comes down to half its brightness: what counts is that all stamps are equally bright.
    coarse = np.asarray(
        Image.fromarray(fine.astype(np.uint8) * 255).resize((side, side), Image.Resampling.LANCZOS), np.float32
    )
    return coarse / coarse.max()
