"""Bits/dim on photographs never trained on, by mechanism, at equal architecture, data, steps and seed.

    python -m experiments.tables.photos [--workdir runs/photos] [--names combiner_axial_rowmajor,axial]
        [--results results]

Trains and evaluates configs/photos.py for every mechanism in a process of its own, skipping finished ones, then writes
RESULTS/photos.json and RESULTS/photos.md.
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

import combiner
from combiner import cli, paths
from combiner.core import registry
from experiments.harness.run import train_minutes

CONFIG = 'configs/photos.py'


def run(name: str, workdir: Path) -> dict[str, Any]:
    """Trains and evaluates one mechanism, unless that is done; gives the evaluation with the minutes of training.

    Raises:
        subprocess.CalledProcessError: one of the two failed.
    """
    evaluation = workdir / 'evaluation_test_latest.json'
    if not evaluation.exists():
        command = [sys.executable, '-m']
        config = ['--config', f'{CONFIG}:attention={name}']
        subprocess.run([*command, 'combiner.train', *config, '--workdir', workdir], check=True)
        subprocess.run([*command, 'combiner.evaluate', '--workdir', workdir], check=True)
    result = json.loads(evaluation.read_text(encoding='utf-8'))
    return {'attention': name, **result, 'train_minutes': round(train_minutes(workdir), 2)}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, best first, the codecs among them."""
    lines = [
        (row['bits_per_dim'], f'| `{row["attention"]}` | {row["bits_per_dim"]:.3f} | {row["train_minutes"]:.1f} |')
        for row in rows
    ]
    codecs = {'png': 'PNG', 'webp_lossless': 'WebP, lossless', 'order0_entropy': 'order-0 entropy'}
    lines += [
        (rows[0]['codecs_bits_per_dim'][key], f'| *{name}* | *{rows[0]["codecs_bits_per_dim"][key]:.3f}* | |')
        for key, name in codecs.items()
    ]
    head = ['| attention | bits/dim | minutes of training |', '|---|---|---|']
    return '\n'.join(head + [line for _, line in sorted(lines)])


@cli.guarded
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', type=paths.argument, default=Path('runs/photos'))
    parser.add_argument('--results', type=paths.argument, default=Path('results'))
    causal = ','.join(name for name in combiner.names() if True in registry.resolve(name).supported_causal)
    parser.add_argument('--names', default=causal, help='mechanisms, separated by commas')
    options = parser.parse_args()
    rows = [run(name, options.workdir / name) for name in options.names.split(',')]
    options.results.mkdir(exist_ok=True)
    device = f'{jax.devices()[0].device_kind}, {platform.machine()}'
    document = {'config': CONFIG, 'device': device, 'jax': jax.__version__, 'rows': rows}
    (options.results / 'photos.json').write_text(json.dumps(document, indent=2) + '\n', encoding='utf-8')
    text = (
        f'{rows[0]["dataset"]}, test split of {rows[0]["examples"]:,} crops; {rows[0]["step"]:,} steps of `{CONFIG}`, '
        f'one seed, on {device}.\n\nMade by `python -m experiments.tables.photos`.\n\n{table(rows)}\n'
    )
    (options.results / 'photos.md').write_text(text, encoding='utf-8')
    print(text)


if __name__ == '__main__':
    main()
