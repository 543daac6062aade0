"""Draws attention patterns as matrices: what is reached directly, and what through the summary of a span.

    python scripts/plot_attention.py [--names combiner_fixed,axial] [--length 64] [--columns 8] [--out FILE]

The picture of the paper's Figure 1, direct attention blue and local expectation yellow, for every mechanism
that has a pattern. Neighbouring spans of a row alternate between two yellows, so that the partition shows.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

import combiner
from combiner.attention import registry
from combiner.patterns import Pattern

NOTHING, DIRECT, SPAN, NEXT_SPAN = range(4)
COLORS = ('#f4f5f7', '#2f6fb7', '#f6c445', '#fbe08d')


def classes(pattern: Pattern) -> np.ndarray:
    """What every cell [query, key] is: NOTHING, DIRECT, or SPAN and NEXT_SPAN in turn along a row."""
    kinds = np.full(pattern.direct.shape, NOTHING)
    for query, used in enumerate(pattern.uses):
        spans = sorted((span for span in pattern.spans[used] if span.any()), key=np.argmax)
        for turn, span in enumerate(spans):
            kinds[query, span] = (SPAN, NEXT_SPAN)[turn % 2]
    kinds[pattern.direct] = DIRECT
    return kinds


def draw(ax: Axes, name: str, pattern: Pattern) -> None:
    """One panel: the matrix under its mechanism's name, and its cost."""
    ax.imshow(classes(pattern), cmap=ListedColormap(COLORS), vmin=0, vmax=len(COLORS) - 1, interpolation='nearest')
    ax.set_title(name, fontsize=11, fontweight='bold', loc='left', pad=18)
    terms, members = pattern.cost()
    subtitle = f'{terms:,} softmax terms' + (f' + {members:,} span members' if members else '')
    ax.text(0, 1.03, subtitle, transform=ax.transAxes, fontsize=8.5, color='#555555')
    ticks = np.arange(0, pattern.length, math.ceil(pattern.length / 4))
    ax.set(xticks=ticks, yticks=ticks)
    ax.tick_params(length=2, labelsize=8, colors='#555555')
    ax.spines[:].set_color('#c5c9d0')


def figure(patterns: dict[str, Pattern], heading: str) -> Figure:
    """All panels in a grid of up to three columns, with one legend."""
    columns = min(3, len(patterns))
    rows = math.ceil(len(patterns) / columns)
    fig = Figure(figsize=(3.3 * columns, 3.7 * rows + 0.9), layout='constrained')
    axes = fig.subplots(rows, columns, squeeze=False)
    for ax in axes.flat[len(patterns) :]:
        ax.axis('off')
    for ax, (name, pattern) in zip(axes.flat, patterns.items(), strict=False):
        draw(ax, name, pattern)
    for ax in axes[:, 0]:
        ax.set_ylabel('query position (tokens)', fontsize=9)
    for index in range(max(0, len(patterns) - columns), len(patterns)):
        axes.flat[index].set_xlabel('key position (tokens)', fontsize=9)
    fig.suptitle(heading, fontsize=12, x=0.01, ha='left')
    handles = [
        Patch(color=COLORS[DIRECT], label='direct'),
        Patch(color=COLORS[SPAN], label='local expectation of a span'),
        Patch(color=COLORS[NEXT_SPAN], label='… of the next span'),
    ]
    fig.legend(handles=handles, loc='outside lower center', ncols=3, frameon=False, fontsize=9)
    return fig


def collect(names: Sequence[str], length: int, causal: bool, hyper: dict[str, int]) -> dict[str, Pattern]:
    """The patterns of the named mechanisms, or all there are; each takes what it knows of `hyper`.

    Raises:
        ValueError: a hyper-parameter that none of the mechanisms knows, or a bad name, length or value.
        NotImplementedError: a named mechanism has no pattern.
    """
    chosen = names or combiner.names(full_support=True) + combiner.names(full_support=False)
    known = {name: registry.hyper_parameters(name) for name in chosen}
    for key in hyper:
        if not any(key in own for own in known.values()):
            raise ValueError(f'none of {", ".join(chosen)} has a hyper-parameter {key!r}')
    patterns = {}
    for name, own in known.items():
        try:
            patterns[name] = combiner.pattern(
                name, length, causal=causal, **{key: value for key, value in hyper.items() if key in own}
            )
        except NotImplementedError:
            if names:
                raise
    return patterns


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description='Draws attention patterns.')
    parser.add_argument('--names', default='', help='mechanisms, separated by commas (default: all with a pattern)')
    parser.add_argument('--length', type=int, default=64, help='positions (default: 64)')
    parser.add_argument('--columns', type=int, help='row length of grid mechanisms (default: their own)')
    parser.add_argument('--block', type=int, help='block length of block mechanisms (default: their own)')
    parser.add_argument('--bidirectional', action='store_true', help='every position sees every other')
    parser.add_argument('--out', type=Path, default=Path('runs/attention.png'), help='default: runs/attention.png')
    args = parser.parse_args()

    hyper = {name: value for name in ('columns', 'block') if (value := getattr(args, name)) is not None}
    names = [name for name in args.names.split(',') if name]
    try:
        patterns = collect(names, args.length, not args.bidirectional, hyper)
    except (ValueError, NotImplementedError) as error:
        parser.error(str(error))
    direction = 'bidirectional' if args.bidirectional else 'causal'
    heading = f'Attention patterns, {direction}, {args.length} tokens'
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure(patterns, heading).savefig(args.out, dpi=180)
    print(f'wrote {args.out}')


if __name__ == '__main__':
    main()
