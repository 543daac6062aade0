"""Draws attention patterns as matrices: direct cells, and cells reached through the summary of a span.

    python scripts/plot_attention.py [--names combiner_fixed,axial] [--length 64] [--columns 8] [--out FILE]

Drawn as the paper's Figure 1, direct attention blue and local expectations yellow, for every mechanism that has a
pattern. Neighbouring spans of a row alternate between two yellows, so that the partition shows.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, '')  # your own modules are where this is started
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # experiments/ is not installed

import combiner
from combiner import cli, messages, paths
from combiner.core import registry
from experiments.harness import pattern_figure


@cli.guarded
def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description='Draws attention patterns.')
    parser.add_argument('--names', default='', help='mechanisms, separated by commas (default: all with a pattern)')
    parser.add_argument('--length', type=int, default=64, help='positions (default: 64)')
    parser.add_argument('--columns', type=int, help='row length of grid mechanisms (default: their own)')
    parser.add_argument('--block', type=int, help='block length of block mechanisms (default: their own)')
    parser.add_argument('--bidirectional', action='store_true', help='every position attends to every other')
    parser.add_argument(
        '--out', type=paths.argument, default=Path('runs/attention.png'), help='default: runs/attention.png'
    )
    args = parser.parse_args()

    hyper = {name: value for name in ('columns', 'block') if (value := getattr(args, name)) is not None}
    names = [name for name in args.names.split(',') if name]
    chosen = names or combiner.names(full_support=True) + combiner.names(full_support=False)
    try:
        for key in hyper:
            if not any(key in registry.hyper_parameters(name) for name in chosen):
                raise ValueError(f'none of {", ".join(chosen)} has a hyper-parameter {key!r}; leave it out')
        patterns = pattern_figure.collect(
            chosen, args.length, causal=not args.bidirectional, hyper=hyper, skip=not names
        )
    except (ValueError, NotImplementedError) as error:
        parser.error(str(error))
    messages.heading(mechanisms=', '.join(chosen), length=args.length)
    direction = 'bidirectional' if args.bidirectional else 'causal'
    heading = f'Attention patterns, {direction}, {args.length} tokens'
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pattern_figure.figure(patterns, heading).savefig(args.out, dpi=180)
    print(f'wrote {args.out}')
    messages.next_steps(f'look at {args.out}')


if __name__ == '__main__':
    main()
