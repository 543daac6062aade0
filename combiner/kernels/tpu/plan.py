"""Sizes of a kernel over blocks and their summaries, and what a TPU's vector memory must hold for it.

A kernel visits the tiles of a sequence in order; a tile is some whole blocks. Causal, or if one tile holds the whole
sequence, one phase makes a tile's summaries and attends from its positions. Otherwise a position needs the summaries of
later tiles: the first phase makes all summaries, and keeps the sequence in vector memory for the second.

Summaries that are given (see `kernels.summaries`) need no phase of their own.

Summaries have levels: of blocks, of rows of them, and so on. A block sees, at every level, the row that holds itself.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp

from combiner.layers import LANES

TABLE_ROWS = 8  # a table is written in whole groups of as many rows
TILE = 512  # least positions of a tile of a long sequence, so that the cost of a step is small
MIB = 2**20
# Vector memory by the start of the name of a device, without 4 MiB for the compiler; TPU v5p and v7x have 64 MiB.
VECTOR_MEMORY = {'TPU v5 lite': 124, 'TPU v5e': 124, 'TPU v6': 124, 'TPU v4': 12, 'TPU v3': 12, 'TPU v2': 12, '': 60}
SCALAR_MEMORY = {'TPU v3': 2**14, 'TPU v2': 2**14, '': 2**20}  # in bytes
ROWS_OF_A_REGISTER = {jnp.dtype(jnp.float32): 8, jnp.dtype(jnp.bfloat16): 16}  # the types of a kernel


def of_device(sizes: Mapping[str, int], device: str) -> int:
    """Returns the size of a device, of those by the start of its name, the more special ones first."""
    return next(size for start, size in sizes.items() if device.startswith(start))


def with_gap(positions: int) -> int:
    """Returns the distance of rows of some positions in an array by which a tile changes between rows and columns.

    Vector memory has banks: a column is read 8 positions at once if the distance is a multiple of 4 but not of 8.
    """
    return positions + 4


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes of one kernel.

    Attributes:
        name: of the mechanism.
        batch: sequences.
        length: positions of a sequence.
        heads: heads of a sequence.
        head_width: width of a head, before its lanes are padded.
        block: positions of a block.
        causal: whether a position attends to itself and earlier positions only.
        pool: `max` or `mean`; '' if the kernel is given the summaries.
        levels: levels of summaries.
        packed: whether there are several documents in a sequence.
        dtype: of queries, keys and values.
        device: name of the device, for its vector memory.
        interpret: whether to run the kernel in the interpreter of Pallas.
        repeats: query heads of each key head.
    """

    name: str
    batch: int
    length: int
    heads: int
    head_width: int
    block: int
    causal: bool
    pool: str
    levels: int
    packed: bool
    dtype: str
    device: str
    interpret: bool
    repeats: int = 1

    @property
    def given(self) -> bool:
        """Returns whether the kernel is given the summaries."""
        return not self.pool

    @property
    def padded_width(self) -> int:
        """Returns the width of a head with padding: 32, 64, or a multiple of 128."""
        narrow = [width for width in (32, 64) if width >= self.head_width]
        return narrow[0] if narrow else -(-self.head_width // LANES) * LANES

    @property
    def lanes(self) -> int:
        """Returns the lanes of a tile: at least 128."""
        return max(LANES, self.padded_width)

    @property
    def shared_by(self) -> int:
        """Returns the number of heads that share the lanes of a tile."""
        return self.lanes // self.padded_width

    @property
    def narrow(self) -> bool:
        """Returns whether heads are narrower than a register: the layout of arrays depends on it (see `layout`)."""
        return self.padded_width < LANES

    @property
    def lane_groups(self) -> int:
        """Returns the number of groups of key heads that share lanes; each has `repeats` such groups of query heads."""
        return -(-self.heads // self.repeats // self.shared_by)

    @property
    def tile_blocks(self) -> int:
        """Returns the number of blocks of a tile: as many as the work of a step needs, or as the memory can hold."""
        return next((blocks for blocks in self._sizes if self.memory_with(blocks) <= self.memory), self._sizes[-1])

    @property
    def _sizes(self) -> list[int]:
        """Returns the numbers of blocks that a tile can have, the best first."""
        blocks, count = TABLE_ROWS, -(-self.length // self.block)
        while blocks * self.block < TILE or blocks * self.block % LANES:
            blocks *= 2
        whole = count if self.levels == 1 else -(-count // TABLE_ROWS) * TABLE_ROWS
        halves = [blocks // 2**i for i in range(1, blocks.bit_length()) if blocks % 2**i == 0]
        return [min(blocks, whole), *(half for half in halves if half < whole and half * self.block % LANES == 0)]

    @property
    def shares_rows(self) -> bool:
        """Returns whether several tiles write their summaries into one group of rows of a table."""
        return self.tiles > 1 and self.tile_blocks % TABLE_ROWS > 0

    @property
    def tile(self) -> int:
        """Returns the number of positions of a tile."""
        return self.tile_blocks * self.block

    @property
    def tiles(self) -> int:
        """Returns the number of tiles of a sequence."""
        return -(-self.length // self.tile)

    @property
    def blocks(self) -> int:
        """Returns the number of blocks of all tiles."""
        return self.tiles * self.tile_blocks

    @property
    def siblings(self) -> int:
        """Returns the number of summaries in a row: one row of all blocks, or rows as long as a block."""
        return self._row_with(self.tile_blocks)

    def _row_with(self, tile_blocks: int) -> int:
        """Returns `siblings` for tiles of some number of blocks; a row is of whole groups of rows of a table."""
        if self.levels > 1:
            return self.block
        tiles = -(-self.length // (tile_blocks * self.block))
        return tile_blocks if tiles == 1 else -(-tiles * tile_blocks // TABLE_ROWS) * TABLE_ROWS

    def table_rows(self, level: int) -> int:
        """Returns the number of rows of summaries at a level, from 0 for those of blocks."""
        count = self.blocks
        for _ in range(level + 1):
            count = -(-count // self.siblings)
        return count

    @property
    def padded_length(self) -> int:
        """Returns the number of positions of all tiles."""
        return self.tiles * self.tile

    @property
    def phases(self) -> int:
        """Returns the number of times that the tiles are visited."""
        return 1 if self.causal or self.given or self.tiles == 1 else 2

    @property
    def sides(self) -> int:
        """Returns the number of summaries of a block: two if earlier and later positions share other documents."""
        return 2 if self.packed and not self.causal else 1

    def table(self, level: int) -> tuple[int, int, int]:
        """Returns the shape of a table of the summaries of a level."""
        return self.sides, self.table_rows(level) * self.siblings, self.lanes

    @property
    def scale(self) -> float:
        """Returns the factor of queries."""
        return self.head_width**-0.5

    @property
    def unrolled(self) -> int:
        """Returns the number of blocks of a tile that are unrolled together, so that the compiler interleaves them."""
        if self.interpret:
            return 1
        return self.tile_blocks if self.tile_blocks <= TABLE_ROWS else math.gcd(self.tile_blocks, TABLE_ROWS)

    @property
    def kept(self) -> int:
        """Returns the number of positions that are kept in vector memory from one phase to the next."""
        return self.padded_length if self.phases == 2 else 0

    @property
    def memory(self) -> int:
        """Returns the bytes of vector memory of the device."""
        return MIB * of_device(VECTOR_MEMORY, self.device)

    @property
    def needed_memory(self) -> int:
        """Returns an estimate of the bytes of vector memory for the kernels."""
        return self.memory_with(self.tile_blocks)

    def memory_with(self, tile_blocks: int) -> int:
        """Returns an estimate of the bytes of vector memory for the backward pass, which needs more than the forward.

        Seven arrays of tiles in two buffers each, the gradients of a tile, the tables with their gradients, the logits
        of a block with their gradients, and of two phases the whole sequence. Of several query heads of a key head,
        all tables, and in two phases all queries, and the sums of the gradients of the key head. Of given tables, the
        gradients are written, and so in two buffers too.
        """
        size, tile = jnp.dtype(self.dtype).itemsize, tile_blocks * self.block
        kinds, buffers = 2 if self.levels == 1 or self.given else 3, 2 if self.given else 1
        tiles, siblings = -(-self.length // tile), self._row_with(tile_blocks)
        rows, count = 0, tiles * tile_blocks
        for _ in range(self.levels):
            count = -(-count // siblings)
            rows += count * siblings
        tables = kinds * self.repeats * self.sides * rows * self.lanes
        logits = self.block * (self.block + self.sides * self.levels * siblings + 2 * LANES)
        kept = 0 if self.causal or self.given or tiles == 1 else tiles * tile
        arrays = tile * self.lanes * (7 * 2 * size + 3 * 4) + 6 * 4 * tile * self.lanes
        arrays += 2 * 4 * tile * self.lanes if self.repeats > 1 else 0
        of_kept = (2 + self.repeats) * size + 3 * self.repeats * 4
        return arrays + tables * (2 * size + 4 * buffers) + 8 * 4 * logits + kept * self.lanes * of_kept
