"""The paper's Figure 3: time and memory of attention over length.

    python -m experiments.figures.figure3 [--names full,performer,…|all] [--lengths 1024,2048,…,65536] [--seconds 30]
        [--gigabytes 8] [--core] [--causal] [--out docs/images/figure3.png]

Forward pass, float32, one sequence, 8 heads of 64, the module with its projections. Time is the median of the runs,
memory the sum of input, output and temporaries, as XLA plans them. `dense` is JAX's own attention. A line ends before
the length that would need more than `--gigabytes`, or, extrapolated from its last two points, more than `--seconds`;
the command reports which. The measurements are written to a JSON file of the same name as the picture.
"""

from experiments.harness import length_cost

PAPERS = ('full', 'performer', 'bigbird', 'combiner_fixed', 'combiner_axial_rowmajor')
LENGTHS = tuple(1024 << doubling for doubling in range(7))


def main() -> None:
    """Runs the command line."""
    length_cost.command(PAPERS, LENGTHS, __doc__, 'docs/images/figure3.png')


if __name__ == '__main__':
    main()
