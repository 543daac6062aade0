"""Sizes of a kernel over blocks and their summaries, and what a TPU's vector memory must hold for it.

A kernel visits the tiles of a sequence in order; a tile is some whole blocks. Causal, or if one tile holds the whole
sequence, one phase makes a tile's summaries and attends from its positions. Otherwise a position needs the summaries of
later tiles: the first phase makes all summaries, and keeps the sequence in vector memory for the second.
"""

import dataclasses

import jax.numpy as jnp

LANES = 128
TABLE_ROWS = 8  # a table is written in whole groups of as many rows
TILE = 512  # least positions of a tile of a long sequence, so that the cost of a step is small
VMEM = 60 * 2**20  # bytes of vector memory; TPU v5p and v7x have 64 MiB, v5e and v6e 128 MiB
ROWS_OF_A_REGISTER = {jnp.dtype(jnp.float32): 8, jnp.dtype(jnp.bfloat16): 16}  # the types of a kernel


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes of one kernel.

    Attributes:
        batch: sequences.
        length: positions of a sequence.
        heads: heads of a sequence.
        head_width: width of a head, before its lanes are padded.
        block: positions of a block.
        causal: whether a position attends to itself and earlier positions only.
        pool: `max` or `mean`.
        packed: whether there are several documents in a sequence.
        dtype: of queries, keys and values.
        interpret: whether to run the kernel in the interpreter of Pallas.
    """

    batch: int
    length: int
    heads: int
    head_width: int
    block: int
    causal: bool
    pool: str
    packed: bool
    dtype: str
    interpret: bool

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
    def lane_groups(self) -> int:
        """Returns the number of groups of heads that share lanes."""
        return -(-self.heads // self.shared_by)

    @property
    def tile_blocks(self) -> int:
        """Returns the number of blocks of a tile."""
        blocks, count = TABLE_ROWS, -(-self.length // self.block)
        while blocks * self.block < TILE or blocks * self.block % LANES:
            blocks *= 2
        return min(blocks, count)

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
        """Returns the number of blocks of all tiles, which are the rows of a table of summaries."""
        return self.tiles * self.tile_blocks

    @property
    def padded_length(self) -> int:
        """Returns the number of positions of all tiles."""
        return self.tiles * self.tile

    @property
    def phases(self) -> int:
        """Returns the number of times that the tiles are visited."""
        return 1 if self.causal or self.tiles == 1 else 2

    @property
    def sides(self) -> int:
        """Returns the number of summaries of a block: two if earlier and later positions share other documents."""
        return 2 if self.packed and not self.causal else 1

    @property
    def table(self) -> tuple[int, int, int]:
        """Returns the shape of a table of summaries."""
        return self.sides, self.blocks, self.lanes

    @property
    def unroll(self) -> bool:
        """Returns whether the blocks of a tile are unrolled, so that the compiler can interleave them."""
        return not self.interpret and self.tile_blocks <= TABLE_ROWS

    @property
    def kept(self) -> int:
        """Returns the number of positions that are kept in vector memory from one phase to the next."""
        return self.padded_length if self.phases == 2 else 0

    @property
    def vmem(self) -> int:
        """Returns an estimate of the bytes of vector memory for the backward pass, which needs more than the forward.

        Seven arrays of tiles in two buffers each, the gradients of a tile, two tables with their gradients, the logits
        of a block with their gradients, and of two phases the whole sequence.
        """
        size = jnp.dtype(self.dtype).itemsize
        table = self.sides * self.blocks * self.lanes
        logits = self.block * (self.block + self.sides * self.blocks + 2 * LANES)
        tiles = self.tile * self.lanes * (7 * 2 * size + 3 * 4) + 6 * 4 * self.tile * self.lanes
        return tiles + table * (2 * 2 * size + 2 * 4) + 8 * 4 * logits + self.kept * self.lanes * (3 * size + 3 * 4)
