"""The parts of a Pathfinder image, drawn once and cached: paddles in whole degrees, and discs.

A stamp is drawn on a canvas that is `SCALE` times finer, and reduced by Pillow's Lanczos filter, which smooths its
edges. Directions are angles in degrees from the column axis towards the row axis: a step of 1 in direction d goes
sin(d) rows down and cos(d) columns to the right.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int, Shaped
from PIL import Image, ImageDraw

SCALE = 2


class Stamp(NamedTuple):
    """Small drawings around one cell, with an odd number of cells per side.

    Attributes:
        ink: the visible part, 0..1; its maximum is exactly 1.
        room: the cells that must be free of other stamps, 0..1: the ink, widened by the margin.
        wide: the cells where no other stamp may end, 0..1: the room, widened by the margin again.
    """

    ink: Float32[np.ndarray, 'side side']
    room: Float32[np.ndarray, 'side side']
    wide: Float32[np.ndarray, 'wide_side wide_side']


def step(degrees: float | int) -> tuple[float, float]:
    """Returns the (row, column) step of length 1 in a direction."""
    return math.sin(math.radians(degrees)), math.cos(math.radians(degrees))


def disc(radius: int) -> Int[np.ndarray, 'cells 2']:
    """Returns (row, column) of all cells within `radius` of the origin."""
    return np.argwhere(_is_within(radius, radius)) - radius


@functools.lru_cache(maxsize=2048)
def paddle(degrees: int, length: int, thickness: float, margin: int) -> Stamp:
    """Draws a straight line of `length` cells from the middle cell in a direction.

    Args:
        degrees: direction, 0..359.
        length: from end to end, in cells.
        thickness: of the line, in cells.
        margin: width of the free room around the line, in cells.
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
    """Draws a disc around the middle cell, 0..1."""
    reach = math.ceil(radius) + 1
    return _shrink(_is_within(radius * SCALE, reach * SCALE), reach)


def widen(canvas: Shaped[np.ndarray, 'rows columns'], radius: int) -> Shaped[np.ndarray, 'rows columns']:
    """Returns the maximum within `radius` of every cell; outside the canvas all is 0."""
    rows, columns = canvas.shape
    padded = np.pad(canvas, radius)
    wide = canvas.copy()
    for row, column in (disc(radius) + radius).tolist():
        np.maximum(wide, padded[row : row + rows, column : column + columns], out=wide)
    return wide


def stamp_on(
    canvas: Float32[np.ndarray, 'rows columns'], drawing: Float32[np.ndarray, 'side side'], row: int, column: int
) -> None:
    """Puts a drawing on a canvas, around a cell, where it is brighter than the canvas; it must fit."""
    region = canvas[window(drawing, row, column)]
    np.maximum(region, drawing, out=region)


def window(drawing: Float32[np.ndarray, 'side side'], row: int, column: int) -> tuple[slice, slice]:
    """Returns the part of a canvas that a drawing around a cell covers."""
    reach = len(drawing) // 2
    return slice(row - reach, row + reach + 1), slice(column - reach, column + reach + 1)


def _is_within(radius: float | int, reach: int) -> Bool[np.ndarray, 'side side']:
    rows, columns = np.ogrid[-reach : reach + 1, -reach : reach + 1]
    return rows**2 + columns**2 <= radius**2


def _shrink(fine: Bool[np.ndarray, 'fine fine'], reach: int) -> Float32[np.ndarray, 'side side']:
    side = 2 * reach + 1
    # Reducing a line of one fine cell halves its brightness; the division makes all stamps equally bright.
    coarse = np.asarray(
        Image.fromarray(fine.astype(np.uint8) * 255).resize((side, side), Image.Resampling.LANCZOS), np.float32
    )
    return coarse / coarse.max()
