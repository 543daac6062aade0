"""Draws the measurements of scripts/bench.py: time over length, one line for each mechanism.

    python scripts/plot_bench.py results/bench.json [--what core] [--out docs/images/bench.png]

Forward on the left, forward with backward on the right, both axes logarithmic. Dense attention is black; mechanisms
with full support have solid lines, all others dashed ones.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # experiments/ is not installed

from combiner import cli, messages, paths
from experiments.harness.bench_tables import PASSES
from experiments.harness.length_figure import LABEL_INCHES, draw, measured_on

TITLES = dict(zip(PASSES, ('Forward', 'Forward and backward'), strict=True))


def figure(document: dict[str, Any], what: str) -> Figure:
    """Draws both panels.

    Raises:
        ValueError: there is no measurement of `what`.
    """
    rows = [row for row in document['rows'] if row['what'] == what]
    if not rows:
        raise ValueError(f'no rows of {what!r} were measured; choose --what core or layer, as in the measurement')
    panel = max(4.0, LABEL_INCHES * len({row['name'] for row in rows}))  # inches
    fig = Figure(figsize=(13, panel + 1.3), layout='constrained')
    for ax, each in zip(fig.subplots(1, 2), PASSES, strict=True):
        draw(ax, rows, f'{each}_ms', LABEL_INCHES / panel)
        ax.set_title(TITLES[each], loc='left', fontsize=11)
        ax.set_ylabel('milliseconds')
    fig.suptitle(f'Time of attention ({what}): {measured_on(document)}', x=0.01, ha='left', fontsize=11)
    return fig


@cli.guarded
def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('measured', type=paths.argument, help='JSON file that scripts/bench.py --out wrote')
    parser.add_argument('--what', default='core', help='core or layer (default: core)')
    parser.add_argument(
        '--out', type=paths.argument, default=Path('docs/images/bench.png'), help='default: docs/images/bench.png'
    )
    options = parser.parse_args()
    try:
        drawn = figure(json.loads(options.measured.read_text(encoding='utf-8')), options.what)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    messages.heading(data=options.measured)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(options.out, dpi=150)
    print(f'wrote {options.out}')
    messages.next_steps(f'look at {options.out}')


if __name__ == '__main__':
    main()
