"""Writes the parts of the documentation that follow from the code and from results/, between comments in the pages.

python scripts/generate_docs.py
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # experiments/ is not installed

from combiner import cli, messages
from experiments.harness import choosing_tables, config_reference, marked
from experiments.harness.run import ROOT

PAGES = {'docs/choosing.md': choosing_tables.parts, 'docs/configuration.md': config_reference.parts}


@cli.guarded
def main() -> None:
    """Runs the command line."""
    argparse.ArgumentParser(description='Writes the generated parts of the documentation.').parse_args()
    messages.heading(pages=', '.join(PAGES))
    for page, parts in PAGES.items():
        marked.fill(ROOT / page, parts())
        print(f'wrote {page}')
    messages.next_steps(f'git diff {" ".join(PAGES)}')


if __name__ == '__main__':
    main()
