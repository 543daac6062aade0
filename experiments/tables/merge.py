"""Joins the results of one table that were made on several machines, or of which only the JSON files were kept.

    python -m experiments.tables.merge results/table1.json runs/small/table1.json --out results/table1

It reads the JSON files that the commands of tables and claims write, all of one table and one scale, and writes
OUT.json, OUT.md and OUT.png. The rows are in the table's own order, each with the runs of all files. No run is needed,
and OUT may be one of the files.

The same row and seed may be in several files if the result is the same. If files differ in a result, or in the settings
of a row, such as its learning rate, both values are named, nothing is written, and the exit status is 2. A step of a
row that was timed in several files has the time of the file that timed the most rows: the note below the table says
which rows were timed together, and where.

Where runs lie below a folder of the same name as OUT, the table's command writes OUT.json again from these alone.
"""

from experiments.harness import merging

if __name__ == '__main__':
    merging.command(__doc__)
