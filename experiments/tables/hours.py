"""Computes the hours that the full-size rows take on accelerators, at an assumed utilisation (MFU), and their memory.

    python -m experiments.tables.hours [--rows PATTERN,…] [--mfu 0.3]
    python -m experiments.tables.hours --write

For each row it prints the TFLOP of a training step, by the formula of `combiner.monitoring.flops`, and the hours that
one chip takes for all steps at its published peak times the assumed MFU: on N chips, divide by N. Nothing is run: a
small model, or one that is bound by the memory, reaches less. `≥` marks rows whose attention has no formula. Then
comes the smallest slice of v5e that holds a step, and the memory that each of its chips then holds, as the compiler
plans it; `–` for a row that `python scripts/compile.py --report` has not compiled. `--write` writes the table with the
default MFU to the headers of the configs.
"""

from experiments.harness import declarations, training_hours


def main() -> None:
    """Runs the command line."""
    rows = [row for rows in declarations.table_rows().values() for row in rows]
    training_hours.command(rows, __doc__)


if __name__ == '__main__':
    main()
