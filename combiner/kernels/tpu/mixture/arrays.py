"""The arrays of the kernels of Combiner-Mixture, and their block specs.

A field holds an array, its block spec, or in a kernel a reference to the tile of it that a step visits.

Letters: `b` batch, `g` groups of heads that share lanes, `r` rows and `c` columns of the grid, `e` lanes, `x` kinds of
numbers for each head that shares lanes, `n` tiles, `m` groups of a tile, `t` positions of a group.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Shaped

from combiner.kernels.tpu.layout import from_lanes, to_lanes
from combiner.kernels.tpu.mixture.plan import Lines, MixturePlan


class Pair(NamedTuple):
    """Keys and values of summaries, one for each cell, or their gradients: like `Tokens`; of vertical spans by side."""

    k: Any
    v: Any


class Masks(NamedTuple):
    """Which cells are positions, and then which have a summary with members: horizontal, or vertical by side.

    Attributes:
        rows: positions and vertical spans, `[b, n, 1 + sides, m, t]`.
        columns: positions and horizontal spans, `[b, n, 2, m, t]`.
    """

    rows: Any
    columns: Any


def to_grid(x: Float[Array, 'b l h d'], plan: MixturePlan) -> Float[Array, 'b ... e']:
    """Puts positions into the cells of the grid: `[b, g, r, c, e]`, or of narrow heads `[b, r, c, g·e]`."""
    x = to_lanes(jnp.pad(x, ((0, 0), (0, plan.padded_length - plan.length), (0, 0), (0, 0))), plan)
    return x.reshape(*x.shape[:-2], plan.blocks, plan.block, x.shape[-1])


def from_grid(x: Float[Array, 'b ... e'], plan: MixturePlan) -> Float[Array, 'b l h d']:
    """Inverts `to_grid`."""
    return from_lanes(x.reshape(*x.shape[:-3], -1, x.shape[-1]), plan)


def make_masks(plan: MixturePlan, valid: Bool[Array, 'b l'] | None) -> Masks | None:
    """Returns the masks; None if every cell that is ever reached is a position."""
    if valid is None and (plan.causal or not plan.padded):
        return None
    valid = jnp.ones((plan.batch, plan.length), bool) if valid is None else valid
    valid = jnp.pad(valid, ((0, 0), (0, plan.padded_length - plan.length)))
    inside = valid.reshape(-1, plan.blocks, plan.block).astype(jnp.int32)
    until = jnp.cumsum(inside, axis=1)
    vertical = [until - inside, until[:, -1:] - until][: plan.sides]
    horizontal = inside.sum(axis=2, keepdims=True) - inside
    by_column = jnp.stack([inside, horizontal], axis=1).swapaxes(2, 3)
    return Masks(_to_tiles(jnp.stack([inside, *vertical], axis=1), plan.by_row), _to_tiles(by_column, plan.by_column))


def _to_tiles(x: Shaped[Array, '*b x i j'], lines: Lines) -> Shaped[Array, '*b n x m t']:
    """Puts numbers of the positions of lines into the groups of tiles."""
    return jnp.moveaxis(x.reshape(*x.shape[:-2], lines.tiles, lines.groups, lines.group), -4, -3)


def transpose_numbers(x: Float[Array, 'b g n x m t'], before: Lines, after: Lines) -> Float[Array, 'b g o x i u']:
    """Changes numbers of the positions from rows to columns or back."""
    x = jnp.moveaxis(x, -4, -3)
    return _to_tiles(x.reshape(*x.shape[:3], after.length, before.length).swapaxes(3, 4), after)


def shape_of_numbers(plan: MixturePlan, kinds: int, lines: Lines) -> tuple[int, ...]:
    """Returns the shape of an array of some kinds of numbers of every head and position."""
    return plan.batch, plan.lane_groups, lines.tiles, kinds * plan.shared_by, lines.groups, lines.group


def tile_of_cells(plan: MixturePlan, *, by_row: bool) -> pl.BlockSpec:
    """Returns the block spec of arrays like tokens; in a kernel, a reference is `[r, c, e]`."""
    rows, columns = (plan.tile_blocks, plan.block) if by_row else (plan.blocks, plan.width)

    def at(b: Any, g: Any, tile: Any) -> tuple[Any, ...]:
        cells = (tile, 0) if by_row else (0, tile)
        return (b, *cells, g) if plan.narrow else (b, g, *cells, 0)

    leading = (None,) if plan.narrow else (None, None)
    return pl.BlockSpec((*leading, rows, columns, plan.lanes), at)


def tile_of_numbers(x: Any) -> pl.BlockSpec | None:
    """Returns the block spec of numbers `[b, g, n, x, m, t]`, or of masks, which have no axis `g`; None for None."""
    if x is None:
        return None
    if len(x.shape) == 5:
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, g, tile: (b, tile, 0, 0, 0))
    return pl.BlockSpec((None, None, None, *x.shape[3:]), lambda b, g, tile: (b, g, tile, 0, 0, 0))
