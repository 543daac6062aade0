"""Sizes of a kernel over the rows and columns of a grid, and what a TPU's vector memory must hold for it.

A tile is some whole rows of the grid. Within a row, positions attend in groups of rows that together fill the lanes of
a register: the product of a group with itself holds those of its rows. The summaries of all rows stay in vector memory,
by column.
"""

import dataclasses
import math

import jax.numpy as jnp

from combiner.kernels.tpu.plan import Plan, with_gap
from combiner.layers import LANES

TILE_ROWS = (128, 64, 32, 16)  # rows of a tile; more rows make larger products


@dataclasses.dataclass(frozen=True)
class GridPlan(Plan):
    """The sizes of one kernel; a block is a row of the grid.

    Attributes:
        attended: whether the key of a summary is a local expectation; if not, it is the key of its token.
        backward: whether these are the sizes of the backward pass, which has smaller tiles if memory is short.
    """

    attended: bool = True
    backward: bool = False

    def for_backward(self) -> 'GridPlan':
        """Returns the sizes of the backward pass."""
        return dataclasses.replace(self, backward=True)

    @property
    def given(self) -> bool:
        """Returns whether the kernel is given the summaries: never, as it pools none."""
        return False

    @property
    def rows(self) -> int:
        """Returns the number of rows of the grid."""
        return -(-self.length // self.block)

    @property
    def group_rows(self) -> int:
        """Returns the number of rows of a group, a power of two."""
        return 2 ** int(math.log2(max(1, LANES // self.block)))

    @property
    def group(self) -> int:
        """Returns the number of positions of a group."""
        return self.group_rows * self.block

    @property
    def most_rows(self) -> int:
        """Returns the number of rows of the largest tile."""
        return next(size for size in reversed(TILE_ROWS) if size >= min(self.rows, TILE_ROWS[0]))

    @property
    def tile_blocks(self) -> int:
        """Returns the number of rows of a tile: the most that vector memory holds; in the interpreter the fewest."""
        # Of several tiles each has whole registers of groups, unless it is the whole table.
        smaller = [size for size in TILE_ROWS if 8 * self.group_rows <= size < self.most_rows]
        sizes = [self.most_rows, *smaller]
        fitting = [size for size in sizes if self.memory_with(size) <= self.memory]
        return sizes[-1] if self.interpret or not fitting else fitting[0]

    @property
    def blocks(self) -> int:
        """Returns the number of rows of a table of summaries; of tiles of each pass, some may be beyond the end."""
        return -(-self.rows // self.most_rows) * self.most_rows

    @property
    def written_rows(self) -> int:
        """Returns how many rows of a table the tiles of the forward pass write: all rows of the grid, or more."""
        forward = dataclasses.replace(self, backward=False)
        return forward.tiles * forward.tile_blocks

    @property
    def siblings(self) -> int:
        """Returns the number of summaries of a column."""
        return self.blocks

    @property
    def tile_groups(self) -> int:
        """Returns the number of groups of a tile."""
        return self.tile_blocks // self.group_rows

    @property
    def padded_length(self) -> int:
        """Returns the number of positions of all rows of the table."""
        return self.blocks * self.block

    @property
    def pitch(self) -> int:
        """Returns the distance of rows in the arrays by which a tile changes between rows and columns."""
        return with_gap(self.block)

    @property
    def phases(self) -> int:
        """Returns the number of times that the tiles are visited."""
        return 1 if self.causal else 2

    @property
    def summaries(self) -> tuple[int, int, int, int]:
        """Returns the shape of a table of summaries."""
        return self.sides, self.block, self.blocks, self.lanes

    def unrolled_of(self, count: int) -> int:
        """Returns how many of some groups or columns are unrolled together, so that the compiler interleaves them."""
        return 1 if self.interpret else math.gcd(count, 2 if self.backward else 4)

    def memory_with(self, tile_blocks: int) -> int:
        """Returns an estimate of the bytes of vector memory for tiles of some number of rows.

        The arrays of a tile in two buffers each, the arrays by which a tile changes between rows and columns, the
        tables (with their gradients), and the logits of a column and of a group.
        """
        size, pairs = jnp.dtype(self.dtype).itemsize, 2 * self.sides
        tile, turned_tile = (tile_blocks * width * self.lanes for width in (self.block, self.pitch))
        buffered, turned = (8, 5 + pairs) if self.backward else (4 + pairs, 4 + pairs)
        tables = pairs * self.padded_length * self.lanes * (size + 4 * self.backward)
        logits = tile_blocks * self.sides * self.blocks + self.group * (self.group + LANES)
        return 2 * size * buffered * tile + 4 * turned * turned_tile + tables + 12 * 4 * logits
