"""Draws a sheet of generated Pathfinder images: a row for each difficulty, both labels side by side.

    python scripts/plot_pathfinder.py [--size 32] [--each 4] [--seed 0] [--out pathfinder.png] [--geometry]

With --geometry the long snakes are drawn over the images, as lines in blue and orange, and the markers as crosses.
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from combiner import cli, messages, paths
from combiner.data.lra import pathfinder

COLOURS = '#3f8fe0', '#e8912d'
LABELS = {0: 'different snakes', 1: 'the same snake'}


def pictures(size: int, difficulty: str, label: int, count: int, seed: int) -> list[pathfinder.Picture]:
    """Generates the first `count` images of a label."""
    settings = pathfinder.parameters(size, difficulty)
    found, index = [], 0
    while len(found) < count:
        picture = pathfinder.generate(np.random.default_rng([seed, index]), settings)
        index += 1
        if picture.label == label:
            found.append(picture)
    return found


def draw(ax: Axes, picture: pathfinder.Picture, geometry: bool) -> None:
    """Draws one image, with `geometry` the long snakes over it."""
    ax.imshow(picture.image, cmap='gray', vmin=0, vmax=255, interpolation='nearest')
    if geometry:
        for snake, colour in zip(picture.snakes, COLOURS, strict=True):
            for ends in snake:
                ax.plot(ends[:, 1], ends[:, 0], color=colour, linewidth=1.2)
        ax.plot(picture.markers[:, 1], picture.markers[:, 0], 'x', color='#d03030', markersize=5)
    ax.set_xticks([])
    ax.set_yticks([])


def figure(size: int, each: int, seed: int, geometry: bool) -> Figure:
    """Draws the sheet: `each` images of each label for every difficulty."""
    side = 1.3 if size <= 64 else 2.2
    difficulties = [difficulty for of_size, difficulty in pathfinder.PADDLES if of_size == size]
    fig = Figure(figsize=(2 * each * side, len(difficulties) * side + 0.4), layout='constrained')
    axes = fig.subplots(len(difficulties), 2 * each, squeeze=False)
    for row, difficulty in enumerate(difficulties):
        axes[row, 0].set_ylabel(difficulty, fontsize=10)
        for label, title in LABELS.items():
            for column, picture in enumerate(pictures(size, difficulty, label, each, seed), label * each):
                draw(axes[row, column], picture, geometry)
            axes[0, label * each].set_title(f'{label}: {title}', fontsize=10, loc='left')
    return fig


@cli.guarded
def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--size', type=int, default=32, choices=pathfinder.SIZES)
    parser.add_argument('--each', type=int, default=4, help='images of each label and difficulty')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--geometry', action='store_true', help='draw the long snakes over the images')
    parser.add_argument('--out', type=paths.argument, default=Path('pathfinder.png'))
    args = parser.parse_args()
    if args.each < 1:
        parser.error(f'--each {args.each}: draw at least one image')
    messages.heading(data=f'Pathfinder {args.size}x{args.size}, seed {args.seed}')
    figure(args.size, args.each, args.seed, args.geometry).savefig(args.out, dpi=150)
    print(f'wrote {args.out}')
    messages.next_steps(f'look at {args.out}')


if __name__ == '__main__':
    main()
