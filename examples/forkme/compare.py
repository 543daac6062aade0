"""Trains the config with several attentions, and prints a table of how well and how fast they learn.

    python compare.py [--steps 200] [ATTENTION ...]

Runs that are finished are not trained again.
"""

import argparse
import json
from pathlib import Path

import config as mine

from combiner import evaluate, train


def tokens_per_second(workdir):
    """Returns the median speed of the training steps."""
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    speeds = sorted(line['tokens_per_second'] for line in lines if line.get('tokens_per_second'))
    return speeds[len(speeds) // 2]


def main():
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('attentions', nargs='*', default=['mylab.past:WholePast', 'full'], help='names or paths')
    parser.add_argument('--steps', type=int, default=200)
    options = parser.parse_args()
    rows = []
    for attention in options.attentions:
        workdir = Path('runs', f'{attention.replace(":", ".")}-{options.steps}')
        train.train(mine.get_config(f'attention={attention},steps={options.steps}'), workdir)
        rows.append((attention, evaluate.evaluate(workdir)['bits_per_dim'], tokens_per_second(workdir)))
    print(f'\n| attention | bits/dim after {options.steps} steps | tokens/s of training |\n|---|---|---|')
    for attention, score, speed in sorted(rows, key=lambda row: row[1]):
        print(f'| `{attention}` | {score:.3f} | {speed:,.0f} |')


if __name__ == '__main__':
    main()
