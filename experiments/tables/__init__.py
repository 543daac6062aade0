"""One file for each table: `python -m experiments.tables.table1`. A file declares rows; the harness runs them."""
