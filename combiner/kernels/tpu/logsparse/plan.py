"""Sizes of the kernel for Combiner-Logsparse; a block of the plan is a chunk of positions.

Two sibling nodes of `2^t` positions meet where the right one begins, at a position that is an odd multiple of `2^t`. So
every position of a chunk but the first is the meeting point of exactly one pair, whose size is its lowest set bit. The
nodes of one side of all levels in a chunk therefore are one array with a row for each position. In the same way, spans
of whole chunks are a table with a row for each chunk.
"""

import math

import jax.numpy as jnp

from combiner.kernels.tpu.plan import TABLE_ROWS, Plan
from combiner.layers import LANES

UNROLLED = 2  # chunks
ROWS = 16  # spans of whole chunks are padded to whole registers of either type


class SiblingPlan(Plan):
    """The sizes of one kernel."""

    @property
    def sides(self) -> int:
        """Returns whether positions attend to left siblings only, or to both."""
        return 1 if self.causal else 2

    @property
    def tile_blocks(self) -> int:
        """Returns the number of chunks of a tile."""
        return self._sizes[0]

    @property
    def unrolled(self) -> int:
        """Returns the number of chunks of a tile that are unrolled together: few, as a chunk takes long."""
        return 1 if self.interpret else math.gcd(self.tile_blocks, UNROLLED)

    @property
    def node_levels(self) -> int:
        """Returns the number of levels of nodes in a chunk, with that of positions."""
        return self.block.bit_length() - 1

    @property
    def span_levels(self) -> int:
        """Returns the number of levels of spans of whole chunks."""
        return (self.blocks - 1).bit_length()

    @property
    def spans(self) -> int:
        """Returns the number of spans of a chunk, one at each level, in whole registers."""
        return -(-(self.span_levels + 1) // ROWS) * ROWS

    @property
    def keys(self) -> int:
        """Returns the number of keys of a chunk: nodes of each side, and spans."""
        return self.sides * self.block + self.spans

    @property
    def span_table(self) -> tuple[int, int, int]:
        """Returns the shape of a table of the spans of whole chunks."""
        return self.sides, max(TABLE_ROWS, 1 << self.span_levels), self.lanes

    @property
    def needed_memory(self) -> int:
        """Returns an estimate of the bytes of vector memory for the backward pass, which needs more than the forward.

        Seven arrays of tiles in two buffers each; 8 tables in two buffers each, and 2; the arrays of a chunk; and of
        two phases the whole sequence.
        """
        size = jnp.dtype(self.dtype).itemsize
        sides, rows, lanes = self.span_table
        table = 4 * sides * rows * lanes
        chunk = 4 * self.block * (lanes * (8 + 3 * self.node_levels) + 6 * max(LANES, self.keys))
        if size == 4:  # exact products have several parts: compiled for a TPU v4, 15 MiB in all instead of 9
            chunk *= 4
        kept = 0 if self.causal else max(self.kept, self.tile) * lanes * 2 * (size + 4)
        return self.tile * lanes * 7 * 2 * size + 18 * table + chunk + kept
