"""Draws attention patterns as matrices of queries and keys: direct cells blue, local expectations yellow."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

import combiner
from combiner import messages, paths
from combiner.core import registry
from combiner.patterns import Mixture, Pattern

NOTHING, DIRECT, SPAN, NEXT_SPAN = range(4)
CLUSTERS = 4
COLORS = ('#f4f5f7', '#2f6fb7', '#f6c445', '#fbe08d')


def classes(pattern: Pattern) -> np.ndarray:
    """Returns the class of every cell [query, key]: NOTHING, DIRECT, or SPAN and NEXT_SPAN alternating along a row."""
    kinds = np.full(pattern.direct.shape, NOTHING)
    for query, used in enumerate(pattern.uses):
        spans = sorted((span for span in pattern.spans[used] if span.any()), key=np.argmax)
        for index, span in enumerate(spans):
            kinds[query, span] = (SPAN, NEXT_SPAN)[index % 2]
    kinds[pattern.direct] = DIRECT
    return kinds


def draw(ax: Axes, title: str, pattern: Pattern) -> None:
    """Draws one panel: the matrix under its title and its cost."""
    ax.imshow(classes(pattern), cmap=ListedColormap(COLORS), vmin=0, vmax=len(COLORS) - 1, interpolation='nearest')
    ax.set_title(title, fontsize=11, fontweight='bold', loc='left', pad=18)
    terms, members = pattern.cost()
    subtitle = f'{terms:,} softmax terms' + (f' + {members:,} span members' if members else '')
    ax.text(0, 1.03, subtitle, transform=ax.transAxes, fontsize=8.5, color='#555555')
    ticks = np.arange(0, pattern.length, math.ceil(pattern.length / 4))
    ax.set(xticks=ticks, yticks=ticks)
    ax.tick_params(length=2, labelsize=8, colors='#555555')
    ax.spines[:].set_color('#c5c9d0')


def parts_by_title(title: str, pattern: Pattern | Mixture) -> dict[str, Pattern]:
    """Returns a pattern by its title; of a mixture each part, by `title, 1 of 2` and so on."""
    if isinstance(pattern, Pattern):
        return {title: pattern}
    return {f'{title}, {number} of {len(pattern.parts)}': part for number, part in enumerate(pattern.parts, 1)}


def figure(found: dict[str, Pattern | Mixture], heading: str) -> Figure:
    """Draws panels by title in a grid of up to three columns, with one legend; a mixture has a panel for each part."""
    patterns = {key: part for title, pattern in found.items() for key, part in parts_by_title(title, pattern).items()}
    columns = min(3, len(patterns))
    rows = math.ceil(len(patterns) / columns)
    fig = Figure(figsize=(3.3 * columns, 3.7 * rows + 0.9), layout='constrained')
    axes = fig.subplots(rows, columns, squeeze=False)
    for ax in axes.flat[len(patterns) :]:
        ax.axis('off')
    for ax, (title, pattern) in zip(axes.flat, patterns.items(), strict=False):
        draw(ax, title, pattern)
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


def collect(
    names: Sequence[str], length: int, *, causal: bool, hyper: dict[str, int], skip: bool = False
) -> dict[str, Pattern | Mixture]:
    """Returns the patterns of mechanisms by name; each takes its own hyper-parameters out of `hyper`.

    Args:
        names: mechanisms.
        length: positions.
        causal: whether a position attends only to itself and to earlier ones.
        hyper: hyper-parameters.
        skip: whether to leave out mechanisms without a pattern in this direction.

    Raises:
        ValueError: a name, the length or a value is wrong.
        NotImplementedError: a mechanism has no pattern, and `skip` is false.
    """
    patterns = {}
    for name in names:
        if skip and causal not in registry.resolve(name).supported_causal:
            continue
        known = registry.hyper_parameters(name)
        taken = {key: value for key, value in hyper.items() if key in known}
        try:
            patterns[name] = combiner.pattern(name, length, causal=causal, **taken)
        except NotImplementedError:
            if not skip:
                raise
    return patterns


def panels(names: Sequence[str], length: int, *, causal: bool = True) -> dict[str, Pattern | Mixture]:
    """Returns the panels of a figure by title, `(A) name` and so on, for the mechanisms that have a pattern.

    Rows of grids and blocks have `√length` positions; nodes of trees have the square root of that as children.
    Mechanisms that cluster their input are drawn with random clusters. A letter belongs to a place in `names`, whether
    the earlier ones are drawn or not.

    Raises:
        ValueError: the length is less than 1.
    """
    if length < 1:
        raise ValueError(f'length must be at least 1, got {length}')
    side = round(math.sqrt(length))
    sizes = {'block': side, 'columns': side, 'branch': max(2, round(math.sqrt(side)))}
    registered = [name for name in names if name in combiner.names()]
    found = collect(registered, length, causal=causal, hyper=sizes, skip=True)
    for name in registered:
        if hasattr(registry.resolve(name), 'pattern_for'):
            clusters = np.random.default_rng(0).integers(CLUSTERS, size=length)
            mechanism: Any = registry.make_mechanism(name, {'clusters': CLUSTERS}, causal=causal)
            found[name] = mechanism.pattern_for(clusters)
    return {f'({chr(ord("A") + place)}) {name}': found[name] for place, name in enumerate(names) if name in found}


def command(names: Sequence[str], heading: str, description: str | None, out: str) -> None:
    """Runs the command line of a figure."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--length', type=int, default=64, help='positions (default: 64)')
    parser.add_argument('--bidirectional', action='store_true', help='every position attends to every other')
    parser.add_argument('--out', type=paths.argument, default=Path(out), help=f'default: {out}')
    options = parser.parse_args()
    try:
        patterns = panels(names, options.length, causal=not options.bidirectional)
    except ValueError as error:
        parser.error(str(error))
    messages.heading(mechanisms=', '.join(names), length=options.length)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    direction = 'bidirectional' if options.bidirectional else 'causal'
    figure(patterns, f'{heading}, {direction}, {options.length} tokens').savefig(options.out, dpi=180)
    print(f'wrote {options.out}')
    messages.next_steps(f'look at {options.out}')
