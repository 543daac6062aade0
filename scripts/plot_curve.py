"""Draws the learning curve of a run from its metrics.jsonl.

    python scripts/plot_curve.py --workdir DIR [--out FILE]

Bits/dim of training (raw faint, smoothed bold) and validation over steps. If the run was evaluated on the test split,
also that result and, as dashed lines, the bits/dim of PNG, WebP and the order-0 entropy on its images. Models of text
and classifiers have no bits/dim.
"""

import argparse
import json
import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from combiner import cli, messages, paths

YARDSTICKS = {'order0_entropy': 'order-0 entropy', 'png': 'PNG', 'webp_lossless': 'lossless WebP'}
BLUE, ORANGE, GREY = '#2f6fb7', '#d9822b', '#7a808a'


def series(lines: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps and values of a metric, from the lines that have it."""
    found = [(line['step'], line[name]) for line in lines if name in line]
    steps, values = np.array(found, float).reshape(-1, 2).T
    return steps, values


def smooth(values: np.ndarray, reach: int = 3) -> np.ndarray:
    """Returns the mean over up to `reach` neighbours on either side, weighted by nearness; as long as `values`."""
    window = np.concatenate([np.arange(1, reach + 1), np.arange(reach + 1, 0, -1)])
    padded = len(values) + 2 * reach
    total = np.convolve(values, window)[reach : padded - reach]
    return total / np.convolve(np.ones(len(values)), window)[reach : padded - reach]


def draw_yardsticks(ax: Axes, bits_per_dim: dict[str, float]) -> None:
    """Draws a dashed line for each codec, labelled at the right edge; labels that would overlap move up."""
    ax.margins(y=0.08)
    for value in bits_per_dim.values():
        ax.axhline(value, color=GREY, linestyle='--', linewidth=1)
    low, high = ax.get_ylim()
    height = -math.inf
    for key, value in sorted(bits_per_dim.items(), key=lambda item: item[1]):
        height = max((value - low) / (high - low), height + 0.055)
        label = f'{YARDSTICKS.get(key, key)} {value:.2f}'
        ax.text(1.01, height, label, transform=ax.transAxes, va='center', fontsize=9, color=GREY)


def figure(lines: list[dict[str, Any]], evaluation: dict[str, Any]) -> Figure:
    """Draws the curve; `evaluation` is the result that `combiner.evaluate` wrote, or {}."""
    fig = Figure(figsize=(8, 4.2), layout='constrained')
    ax = fig.subplots()
    steps, values = series(lines, 'bits_per_dim')
    ax.plot(steps, values, color=BLUE, alpha=0.25, linewidth=1)
    ax.plot(steps, smooth(values), color=BLUE, linewidth=2, label='training (smoothed)')
    validation = series(lines, 'validation_bits_per_dim')
    ax.plot(*validation, 'o-', color=ORANGE, markersize=5, linewidth=1.2, label='validation')
    if evaluation:
        score = evaluation['bits_per_dim']
        ax.plot(
            evaluation['step'],
            score,
            '*',
            color='black',
            markersize=12,
            label=f'test, {score:.2f}',
            clip_on=False,
        )
    draw_yardsticks(ax, evaluation.get('codecs_bits_per_dim', {}))
    ax.set_xlabel('step')
    ax.set_ylabel('bits/dim')
    ax.set_xlim(left=0)
    ax.grid(axis='y', color='#e6e8ec', linewidth=0.8)
    ax.spines[['top', 'right']].set_visible(False)
    ax.legend(loc='upper right', facecolor='white', framealpha=1, edgecolor='none')
    ax.set_title(evaluation.get('dataset', ''), loc='left', fontsize=11)
    return fig


@cli.guarded
def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description='Draws the learning curve of a run.')
    parser.add_argument('--workdir', type=paths.argument, required=True, help='folder of the run')
    parser.add_argument('--out', type=paths.argument, help='default: curve.png in the workdir')
    args = parser.parse_args()

    metrics = args.workdir / 'metrics.jsonl'
    if not metrics.exists():
        parser.error(f'{metrics} does not exist: train first, python -m combiner.train --workdir {args.workdir} …')
    text = metrics.read_text(encoding='utf-8')
    whole = text[: text.rfind('\n') + 1]  # a running training may be in the middle of a line
    lines = [json.loads(line) for line in whole.splitlines()]
    if not any('bits_per_dim' in line for line in lines):
        if any('loss_nats' in line for line in lines):
            parser.error(
                f'{metrics} holds no bits_per_dim, which only models of images have; experiments.report draws the '
                'validation of the runs of a table, and a tracker (docs/trackers.md) that of any run'
            )
        parser.error(f'{metrics} holds no bits_per_dim yet: train for longer')
    messages.heading(data=metrics)
    evaluated = args.workdir / 'evaluation_test_latest.json'
    evaluation = json.loads(evaluated.read_text(encoding='utf-8')) if evaluated.exists() else {}
    out = args.out or args.workdir / 'curve.png'
    figure(lines, evaluation).savefig(out, dpi=180)
    print(f'wrote {out}')
    messages.next_steps(f'look at {out}')


if __name__ == '__main__':
    main()
