"""Times attention and `jax.nn.dot_product_attention` in turn in one process, for ratios on a busy machine.

    python scripts/bench.py [--names combiner_fixed,full] [--lengths 4096] [--what core,layer] [--dtype bfloat16]
        [--out bench.json]
    python scripts/bench.py data [CONFIG …] [--data_dir DIR]       the input pipeline: experiments/harness/data_bench.py
    python scripts/bench.py packed [--names NAME,…]                packed rows: experiments/harness/packed_bench.py
    python scripts/bench.py saving [CONFIG …]                      checkpoints: experiments/harness/save_bench.py
    python scripts/bench.py loop [CONFIG]                          the training loop: experiments/harness/loop_bench.py

For each mechanism and length, both for forward and for forward with backward (the output and the gradients of all
inputs): milliseconds (median), speed-up over dense, temporaries in MB (as XLA plans them), and seconds to compile. Then
for each mechanism the exponent of the growth of time with length, the smallest power of two at which it is as fast as
dense, and its share of the machine's peak at the longest length.

The input is one batch row of random numbers, float32 or with --dtype bfloat16. On a GPU, bfloat16 adds dense attention
by the fused kernel of cuDNN, `dense+implementation=cudnn`; speed-ups are over `dense`, which JAX computes by XLA.

`core` is attention on given q, k and v; `layer` is the module with its projections, of width heads × head_width.
Hyper-parameters are the defaults unless the name sets them: `combiner_axial_rowmajor+key=token`. Mechanisms that cannot
run (those with parameters, without a layer; those without a causal form, without --bidirectional) are skipped with a
message.

The peak is the fastest of many large matrix products of the same type, run between the others in the same process. The
share of the peak, at a mechanism's median time, counts only the arithmetic that the mechanism needs: for each term of a
softmax and each member of a span (`Mechanism.cost`) one product of head width with a key and one with a value, twice
that again for backward, and the four projections of a layer. Products that are masked afterwards do not count: dense
causal attention reaches half the peak at most. XLA's own count includes them, and counts the body of a loop once.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, '')  # your own modules are where this is started
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # experiments/ is not installed

import combiner
from combiner import cli, messages, paths
from combiner.core import registry
from experiments.harness import bench_tables, data_bench, errors, loop_bench, packed_bench, save_bench
from experiments.harness.bench_tables import CUDNN, DENSE, PASSES
from experiments.harness.timing import (
    ARITHMETIC,
    Peak,
    Shape,
    compiled,
    environment,
    mechanism,
    medians,
    needed_flop,
    to_time,
    write_json,
)

QUADRATIC = (DENSE, 'full')
WHATS = ('core', 'layer')
DTYPES = ('float32', 'bfloat16')


def measure(names: list[str], what: str, shape: Shape, repeats: int, peak: Peak) -> list[dict[str, Any]]:
    """Returns a row for each mechanism that can run."""
    programs, flop = {}, {}
    for name in names:
        try:
            mechanism, function, inputs = to_time(name, what, shape)
            programs |= {(name, each): program for each, program in compiled(function, inputs).items()}
            flop[name] = needed_flop(mechanism, what, shape)
        except (ValueError, RuntimeError) as error:  # the latter where the compiler or cuDNN refuses
            print(f'{name} at length {shape.length:,} skipped: {errors.lines(error)[0]}', file=sys.stderr)
    seconds = medians(programs, repeats, peak.try_again)
    rows = []
    for name in flop:
        row: dict[str, Any] = {'what': what, 'name': name, 'length': shape.length}
        for each in PASSES:
            program, median, dense = programs[name, each], seconds[name, each], seconds.get((DENSE, each))
            row[f'{each}_ms'] = round(1e3 * median, 3)
            row[f'{each}_times_faster'] = dense and round(dense / median, 2)
            row[f'{each}_temporaries_mb'] = round(program.temporaries_mb, 1)
            row[f'{each}_compile_s'] = round(program.compile_seconds, 2)
            row[f'{each}_needed_gflops'] = flop[name] and round(flop[name] * ARITHMETIC[each] / median / 1e9, 3)
        rows.append(row)
    return rows


def with_form(names: list[str], *, causal: bool) -> list[str]:
    """Returns the mechanisms with a causal form, or a bidirectional one; prints which are skipped.

    Raises:
        ValueError: a name, a hyper-parameter or its value is wrong.
    """
    found = []
    for name in names:
        plain = name.partition('+')[0]
        takes = plain == DENSE or causal in registry.resolve(plain).supported_causal
        mechanism(name, causal=takes == causal)
        if takes:
            found.append(name)
        else:
            form, option = ('causal', 'with') if causal else ('bidirectional', 'without')
            print(f'{name} skipped: it has no {form} form; measure it {option} --bidirectional', file=sys.stderr)
    return found


def parse() -> argparse.Namespace:
    """Parses the command line; names, lengths and whats are lists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    alone = ','.join(name for name in combiner.names() if not registry.resolve(name).requires)
    parser.add_argument('--names', default=alone, help='mechanisms, separated by commas')
    parser.add_argument('--lengths', default='4096', help='sequence lengths, separated by commas')
    parser.add_argument('--what', default='core', help='core, layer or both, separated by a comma (default: core)')
    parser.add_argument('--heads', type=int, default=8)
    parser.add_argument('--head_width', type=int, default=64)
    parser.add_argument('--dtype', choices=DTYPES, default=DTYPES[0], help='of the input (default: %(default)s)')
    parser.add_argument('--bidirectional', action='store_true')
    parser.add_argument('--repeats', type=int, default=9)
    parser.add_argument('--dense_up_to', type=int, default=8192, help='longest length of dense attention and full')
    parser.add_argument('--fit_from', type=int, default=1, help='shortest length in the fit of the growth')
    parser.add_argument('--peak_size', type=int, help='rows of the matrices whose product is the peak')
    parser.add_argument('--out', type=paths.argument, help='write JSON there')
    options = parser.parse_args()
    fused = [CUDNN] if options.dtype == 'bfloat16' and jax.default_backend() == 'gpu' else []
    options.names, options.what = [DENSE, *fused, *options.names.split(',')], options.what.split(',')
    try:
        options.lengths = sorted(map(int, options.lengths.split(',')))
        if unknown := set(options.what) - set(WHATS):
            raise ValueError(f'unknown --what {", ".join(sorted(unknown))}; choose from {", ".join(WHATS)}')
        options.names = with_form(options.names, causal=not options.bidirectional)
    except ValueError as error:
        parser.error(str(error))
    return options


@cli.guarded
def main() -> None:
    """Runs the command line."""
    others = {
        'data': data_bench.main,
        'packed': packed_bench.main,
        'saving': save_bench.main,
        'loop': loop_bench.main,
    }
    if sys.argv[1:] and sys.argv[1] in others:
        others[sys.argv[1]](sys.argv[2:])
        messages.next_steps('python scripts/bench.py --help  # what else can be measured')
        return
    options = parse()
    peak = Peak(options.peak_size or (2048 if jax.default_backend() == 'cpu' else 8192), options.dtype)
    settings = {**environment(), 'batch': 1, 'heads': options.heads, 'head_width': options.head_width}
    settings |= {'dtype': options.dtype, 'causal': not options.bidirectional, 'repeats': options.repeats}
    messages.heading(device=settings['device'], mechanisms=', '.join(options.names), lengths=options.lengths)
    rows, summary = [], []
    for what in options.what:
        print('', f'Attention {what}:', '', *bench_tables.HEAD, sep='\n')
        for length in options.lengths:
            shape = Shape(length, options.heads, options.head_width, not options.bidirectional, options.dtype)
            too_long = QUADRATIC if length > options.dense_up_to else ()
            names = [name for name in options.names if name.partition('+')[0] not in too_long]
            for row in measure(names, what, shape, options.repeats, peak):
                rows.append(row)
                print(bench_tables.line(row), flush=True)
            summary = list(bench_tables.summarise(rows, options.fit_from, peak.gflops))
            if options.out:  # after every length, as a long one may not finish
                found = {'peak_gflops': round(peak.gflops, 1), 'rows': rows, 'summary': summary}
                write_json(options.out, {**settings, **found})
    for what in options.what:
        heading = f'Attention {what}, peak {peak.gflops:,.0f} GFLOP/s:'
        print('', heading, '', bench_tables.summary_table(summary, what), sep='\n')
    drawn = f'python scripts/plot_bench.py {options.out}' if options.out else ''
    messages.next_steps(drawn or 'the same command with --out FILE.json, whose figures scripts/plot_bench.py draws')


if __name__ == '__main__':
    main()
