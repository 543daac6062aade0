"""Writes the tables of the paper, as far as they were run at scale=small, into docs/results.md and the README.

    python -m experiments.tables.page [--results results] [--page docs/results.md] [--readme README.md]

It replaces what is between the markers: on the page all tables and the ranking of photographs, in the README one column
of Table 1. Tables without results are in one list, as not run yet.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from combiner import cli, messages, paths
from experiments.harness import marked, results_page


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
    parser.add_argument('--readme', type=paths.argument, default=Path('README.md'), help='default: %(default)s')
    options = parser.parse_args(arguments)
    messages.heading(results=options.results, page=options.page, readme=options.readme)
    marked.fill(options.page, results_page.parts(options.results))
    marked.fill(options.readme, results_page.readme_parts(options.results))
    messages.next_steps(f'git diff {options.page} {options.readme}')


if __name__ == '__main__':
    main()
