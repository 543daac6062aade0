"""Writes the tables of the paper, as far as they were run at scale=small, into docs/results.md.

    python -m experiments.tables.page [--results results] [--page docs/results.md]

It replaces what is between the markers of each table; a table without results is said not to be run yet.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from combiner import cli, messages, paths
from experiments.harness import results_page


@cli.guarded
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog='python -m experiments.tables.page',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--results', type=paths.argument, default=Path('results'), help='default: %(default)s')
    parser.add_argument('--page', type=paths.argument, default=Path('docs/results.md'), help='default: %(default)s')
    options = parser.parse_args(arguments)
    messages.heading(results=options.results, page=options.page)
    results_page.write(options.results, options.page)
    messages.next_steps(f'git diff {options.page}')


if __name__ == '__main__':
    main()
