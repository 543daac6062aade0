"""The paper's Figure 1: sparse attention patterns, and the Combiner version of each.

    python -m experiments.figures.figure1 [--length 64] [--bidirectional] [--out docs/images/figure1.png]

Above, the sparse patterns; below, the same direct positions (blue), with local expectations (yellow) for all other
positions, on a grid with rows, or with blocks, of √length positions. A Combiner version leaves out the last column of
each block of the sparse pattern: the summary of the block takes its place.
"""

from combiner import cli
from experiments.harness import pattern_figure

PANELS = ('fixed', 'logsparse', 'axial', 'combiner_fixed', 'combiner_logsparse', 'combiner_axial_vertical')


@cli.guarded
def main() -> None:
    """Runs the command line."""
    pattern_figure.command(PANELS, 'Sparse attention and its Combiner versions', __doc__, 'docs/images/figure1.png')


if __name__ == '__main__':
    main()
