"""Generates a data set of the Long Range Arena.

    python -m combiner.data.generate NAME --data_dir DIR [--seed 0] [--workers CORES] [--limit N] [--verify]

NAME is lra_listops, lra_listops_short, lra_pathfinder12_easy, lra_pathfinder16_easy, or lra_pathfinderSIZE_DIFFICULTY
with 32, 64, 128 or 256 and easy, intermediate or hard. Path-X is lra_pathfinder128_hard. The set is written to
DIR/combiner_lra/NAME. If it is stopped, the same command continues. The number of workers changes only the time.
"""

import argparse
import os
import time
import zlib

import tqdm

from combiner import cli, messages, paths
from combiner.data import records
from combiner.data.lra import generated

_SAMPLE = 24  # records that are generated first, to estimate the time
_ON_DISK = 250  # approximate bytes that a shard adds to each compressed record


def estimate(recipe: records.Recipe, seed: int, workers: int) -> tuple[float, float]:
    """Estimates the seconds that a set takes and its size in bytes, from a few of its records."""
    few = dict.fromkeys(recipe.counts, _SAMPLE // len(recipe.counts))
    recipe.encode(seed, 0)  # the first record fills caches
    start = time.perf_counter()
    numbers = recipe.arrange(seed, few, map)
    found = [recipe.encode(seed, number) for split in numbers.values() for number in split.tolist()]
    scale = sum(recipe.counts.values()) / len(found)
    seconds = scale * (time.perf_counter() - start) / workers
    return seconds, scale * sum(_ON_DISK + len(zlib.compress(record)) for record in found)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', choices=generated.NAMES, metavar='NAME')
    parser.add_argument('--data_dir', type=paths.argument, required=True, help='folder of the data sets')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--workers', type=int, default=os.cpu_count() or 1, help='processes (default: one a core)')
    parser.add_argument('--limit', type=int, help='maximum number of records per split')
    parser.add_argument('--verify', action='store_true', help='only compare a set with its checksums')
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> str:
    """Generates or verifies a set, and returns a line that describes it.

    Raises:
        FileNotFoundError: --verify of a set that does not exist.
        ValueError: see `records.write` and `records.verify`.
    """
    recipe = generated.recipe(args.name, args.limit)
    folder = generated.folder(args.name, args.data_dir)
    if args.verify:
        return f'{records.verify(folder, recipe)} shards in {folder} match their checksums'
    total = sum(recipe.counts.values())
    seconds, size = estimate(recipe, args.seed, args.workers)
    counts = ', '.join(f'{count:,} {split}' for split, count in recipe.counts.items())
    print(f'{args.name}: {counts}; about {size / 1e6:,.0f} MB in {folder};', end=' ')
    print(f'about {seconds / 60:,.0f} minutes with {args.workers} processes', flush=True)
    with tqdm.tqdm(total=total, unit='records', unit_scale=True) as bar:
        way_out = 'make room and repeat the command, which keeps complete shards'
        with paths.full_disk_explained(folder, 'the set', size, way_out):
            manifest = records.write(folder, recipe, args.seed, args.workers, bar.update)
    labels = {split: part['labels'] for split, part in manifest['splits'].items()}
    return f'{folder} is complete; labels: {labels}'


@cli.guarded
def main() -> None:
    """Runs the command line."""
    args = parse()
    try:
        messages.heading(data=args.name, processes=args.workers)
        print(run(args))
        messages.next_steps(messages.training(generated.config(args.name), data_dir=args.data_dir))
    except ValueError as error:
        cli.fail(str(error), 2)


if __name__ == '__main__':
    main()
