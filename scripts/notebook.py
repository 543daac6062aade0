"""Runs a notebook in an empty folder, and writes its outputs into it, without what differs from machine to machine.

    python scripts/notebook.py [FILE] [--out FILE]

By default it runs examples/combiner.ipynb. Run it again after each change of the notebook.
"""

import argparse
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from combiner import atomic, cli, messages, paths

NOTEBOOK = Path(__file__).parents[1] / 'examples' / 'combiner.ipynb'
METADATA = {
    'kernelspec': {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'},
    'language_info': {'name': 'python'},
}
SECONDS = 600  # for a cell


def execute(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """Runs all cells from the first, in a new kernel with this working directory; returns the notebook with outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised an error.
    """
    resources = {'metadata': {'path': str(folder)}}
    options = {'timeout': SECONDS, 'resources': resources, 'record_timing': False, 'coalesce_streams': True}
    return stripped(NotebookClient(notebook, kernel_name='python3', **options).execute())


def stripped(notebook: NotebookNode) -> NotebookNode:
    """Returns the notebook without the versions of the kernel, and without the metadata of cells and outputs."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
        for output in cell.get('outputs', []):
            if 'metadata' in output:
                output.metadata = nbformat.from_dict({})
    return notebook


@cli.guarded
def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'notebook', nargs='?', type=paths.argument, default=NOTEBOOK, help='default: examples/combiner.ipynb'
    )
    parser.add_argument('--out', type=paths.argument, help='default: the notebook itself')
    options = parser.parse_args()
    out = options.out or options.notebook
    messages.heading(notebook=options.notebook)
    with tempfile.TemporaryDirectory() as folder:
        notebook = execute(nbformat.reads(options.notebook.read_text(encoding='utf-8'), as_version=4), Path(folder))
    atomic.write_text(out, nbformat.writes(notebook) + '\n')
    print(f'wrote {out}')
    messages.next_steps(f'git diff {out}')


if __name__ == '__main__':
    main()
