"""Sizes of the kernels of Combiner-Mixture, and what a TPU's vector memory must hold for them.

A kernel visits tiles of whole rows of the grid, or tiles of a few neighbouring columns with all rows. No tile needs
another one. The grid is padded to whole tiles of rows.

Positions attend in groups of rows or columns that together fill the lanes of a register: the product of a group with
itself holds those of its lines.
"""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp

from combiner.kernels.tpu.plan import ROWS_OF_A_REGISTER, TABLE_ROWS, Plan, with_gap
from combiner.layers import LANES

TILE_GROUPS = 8  # groups of a tile of rows; twice as many are one tile
UNROLLED = 1024  # positions


class Lines(NamedTuple):
    """The rows or columns of tiles.

    Attributes:
        length: positions of a line.
        lines: of a group.
        groups: of a tile.
        tiles: of a sequence.
    """

    length: int
    lines: int
    groups: int
    tiles: int

    @property
    def group(self) -> int:
        """Returns the number of positions of a group."""
        return self.lines * self.length


def _group_of(length: int, most: int) -> int:
    """Returns how many lines together fill the lanes of a register, a power of two."""
    return min(most, 2 ** int(math.log2(max(1, LANES // length))))


@dataclasses.dataclass(frozen=True)
class MixturePlan(Plan):
    """The sizes of the kernels; a block is a row of the grid.

    Attributes:
        joint: whether all terms are in one softmax; if not, the result is the mean of two.
    """

    joint: bool = False

    @property
    def given(self) -> bool:
        """Returns whether the kernels are given the summaries: never."""
        return False

    @property
    def by_row(self) -> Lines:
        """Returns the lines of a tile of rows."""
        unit = _group_of(self.block, LANES)
        least = max(TABLE_ROWS, unit)
        groups = -(-self.length // (self.block * least)) * least // unit
        most = TILE_GROUPS * (1 if self.interpret else 2)
        size = groups if groups <= most else TILE_GROUPS
        return Lines(self.block, unit, size, -(-groups // size))

    @property
    def by_column(self) -> Lines:
        """Returns the lines of a tile of columns."""
        unit = _group_of(self.blocks, self.width)
        return Lines(self.blocks, unit, self.width // unit, self.block // self.width)

    @property
    def tile_blocks(self) -> int:
        """Returns the number of rows of a tile of rows."""
        return self.by_row.groups * self.by_row.lines

    @property
    def width(self) -> int:
        """Returns the number of columns of a tile of columns: as many as a register has rows."""
        return ROWS_OF_A_REGISTER[jnp.dtype(self.dtype)]

    @property
    def pitch(self) -> int:
        """Returns the distance of rows in the arrays by which a tile of columns changes between rows and columns."""
        return with_gap(self.width)

    @property
    def sides(self) -> int:
        """Returns the number of vertical spans that a position attends to in another column: above, and below."""
        return 1 if self.causal else 2

    @property
    def padded(self) -> bool:
        """Returns whether there are cells of the grid beyond the end of a sequence."""
        return self.padded_length > self.length

    def unrolled_of(self, count: int, positions: int) -> int:
        """Returns how many of some rows or groups, each of some positions, are unrolled, to be interleaved."""
        return 1 if self.interpret else math.gcd(count, max(1, UNROLLED // max(positions, LANES)))

    @property
    def needed_memory(self) -> int:
        """Returns an estimate of the bytes of vector memory for the backward pass, which needs the most.

        In a tile of columns: arrays in two buffers each, the arrays by which it changes between rows and columns, and
        two of the gradient of pooling. In a tile of rows: arrays in two buffers each. And some arrays of logits.
        """
        size, sides = jnp.dtype(self.dtype).itemsize, self.sides
        of_columns = self.blocks * self.lanes * self.width
        turned = self.blocks * self.lanes * self.pitch * (6 + 2 * sides) + 2 * of_columns
        columns = 2 * size * (14 + 2 * sides) * of_columns + 4 * turned + _logits(self.by_column, size)
        return max(columns, 2 * size * (11 + 4 * sides) * self.tile * self.lanes + _logits(self.by_row, size))


def _logits(lines: Lines, size: int) -> int:
    """Returns the bytes of some arrays of the logits of a group: products in float32 need more of them."""
    return 4 * 3 * size**2 * lines.group * max(lines.group, LANES)
