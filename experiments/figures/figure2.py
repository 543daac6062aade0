"""The paper's Figure 2: partitions of the positions that an axial pattern does not reach directly, and others.

    python -m experiments.figures.figure2 [--length 64] [--bidirectional] [--out docs/images/figure2.png]

Direct positions are blue, local expectations yellow, on a grid with rows of √length positions. The paper's figure has
the first three panels. Combiner-Routing, which computes its partition from its input, is drawn for random clusters.
"""

from combiner import cli
from experiments.harness import pattern_figure

PAPERS_PANELS = ('combiner_axial_vertical', 'combiner_axial_horizontal', 'combiner_axial_rowmajor')
PANELS = (*PAPERS_PANELS, 'combiner_mixture', 'combiner_tree', 'combiner_routing')


@cli.guarded
def main() -> None:
    """Runs the command line."""
    pattern_figure.command(PANELS, 'Combiner-Axial and other partitions', __doc__, 'docs/images/figure2.png')


if __name__ == '__main__':
    main()
