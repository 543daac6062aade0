"""Compiles a training step, or an attention alone, for accelerators that need not be present, and states its cost.

    python scripts/compile.py --config configs/cifar10.py:layers=12 --target v5e:4x4 [--config.x.y=VALUE …]
    python scripts/compile.py --attention combiner_fixed,full --lengths 512,4096 --target v5e [--backward]
    python scripts/compile.py --report [--lengths 512,4096] [--rows 'cifar-10/*']

Targets: v5e:4x4, v6e:2x2, v5p:2x2x1, h100:8, a100:8, or a name alone for one chip. TPUs need `bash scripts/setup.sh
tpu-aot`, GPUs `bash scripts/setup.sh gpu-aot`.

The first form compiles the real training step of a config and prints, for each chip: memory, and whether it fits;
arithmetic; traffic of the memory; collectives; and the time below which a step cannot be at the chip's published peaks.
The second compiles attentions in bfloat16 and compares their traffic with the least: q, k, v (and do) read, o (and dq,
dk, dv) written, once; with `--module` it compiles the module around each of them, with its projections and gradients,
without and with rotary positions. The third fills results/compile.json, the tables of docs/accelerators.md and its
picture; it keeps what is finished, so that it can be stopped and started again. Nothing is run: a program that compiles
for a chip may still fail on it, or take longer than any time here.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = '512,1024,4096,16384,65536'  # of docs/accelerators.md
# The options that each kind of call uses, by the option that chooses it; around a module, gradients are always taken.
USED = {
    'config': {'target', 'json'},
    'report': {'lengths', 'rows', 'tables'},
    'attention': {'target', 'json', 'lengths', 'backward', 'bidirectional', 'packed', 'implementation', 'module'}
    | {'schedule', 'tokens', 'heads', 'head_width'},
}
NOT_AROUND_A_MODULE = {'backward', 'packed', 'schedule'}


def parse() -> argparse.Namespace:
    """Parses the command line; imports nothing heavy, so that --help is fast."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--config', help='config file, with its arguments after a colon')
    what.add_argument('--attention', help='mechanisms, NAME or NAME+hyper=value, separated by commas')
    what.add_argument('--report', action='store_true', help='fill the results, the tables and the picture')
    parser.add_argument('--target', default='v5e', help='chips to compile for (default: %(default)s)')
    parser.add_argument('--json', help='write the result there')
    alone = parser.add_argument_group('attention alone')
    alone.add_argument('--lengths', default=LENGTHS, help='separated by commas (default: %(default)s)')
    alone.add_argument('--backward', action='store_true', help='with the gradients of q, k and v')
    alone.add_argument('--bidirectional', action='store_true', help='instead of causal')
    alone.add_argument('--packed', action='store_true', help='with documents, which do not attend to each other')
    alone.add_argument('--implementation', default='', help='names, separated by commas (default: all on the target)')
    alone.add_argument('--module', action='store_true', help='the module around it instead; without and with rotary')
    alone.add_argument('--schedule', action='store_true', help='read the static schedule of TPU kernels: minutes')
    alone.add_argument('--tokens', type=int, default=65536, help='of all sequences together (default: %(default)s)')
    alone.add_argument('--heads', type=int, default=8, help='default: %(default)s')
    alone.add_argument('--head_width', type=int, default=128, help='default: %(default)s')
    report = parser.add_argument_group('report')
    report.add_argument('--rows', default='', help="patterns of the tables' rows (default: all rows; none: no row)")
    report.add_argument('--tables', action='store_true', help='compile nothing: write tables and picture again')
    options, rest = parser.parse_known_args()
    options.settings = [argument for argument in rest if argument.startswith('--config.')]
    if unknown := [argument for argument in rest if argument not in options.settings]:
        parser.error(f'unrecognized arguments: {" ".join(unknown)}')
    if options.settings and not options.config:
        parser.error(f'{options.settings[0]} needs --config')
    kind = next(name for name in USED if getattr(options, name))
    used = USED[kind] - NOT_AROUND_A_MODULE if options.module else USED[kind]
    for name in vars(options).keys() - used - {kind, 'settings'}:
        if getattr(options, name) != parser.get_default(name):
            by = 'module' if name in USED[kind] else kind
            parser.error(f'--{name} has no effect with --{by}: leave it out')
    return options


def main() -> None:
    """Runs the command line."""
    options = parse()
    sys.path.insert(0, '')  # your own modules are where this is started
    sys.path.insert(0, str(ROOT))  # experiments/ is not installed
    from experiments.harness import compile_command  # after --help, as it imports JAX

    compile_command.command(options)


if __name__ == '__main__':
    main()
