"""Plans the training step of full-size rows on TPUs that need not be present: the memory that it takes on each chip.

    python -m experiments.tables.memory [--rows PATTERN,…] [--topology v5e:1x1] [--out results/memory.json]

Each step is compiled ahead of time, as `combiner.train` compiles it, by libtpu (`bash scripts/setup.sh tpu-aot`),
without data or arrays, for all chips of the topology, over which the config's mesh splits the batch: v5e:1x1 is a chip
of 16 GiB, v6e:1x1 one of 32, v5p:1x1x1 one of 95, v5e:2x4 eight. The plan is XLA's, for one chip; the compiler refuses
a step whose temporaries do not fit, and reports their size. A plan is not a run: it leaves out what a runtime adds, and
says nothing of other accelerators.

A pattern is that of a file name, for COLUMN/MODEL, COLUMN or MODEL, as in the commands of the other tables:
`--rows 'cifar-10/*-12-layers'`. Plans are added to the file one by one and are not computed again, so that the same
command resumes an interrupted one.
"""

import jax

from experiments.harness import declarations, memory_plan

OUT = 'results/memory.json'


def main() -> None:
    """Runs the command line."""
    rows = [row for rows in declarations.table_rows().values() for row in rows]
    memory_plan.command(rows, OUT, __doc__)


if __name__ == '__main__':
    jax.config.update('jax_platforms', 'cpu')  # leaves an accelerator of this machine alone
    main()
