"""Writes one page of all that the commands of tables and claims left in a folder.

    python -m experiments.report --workdir runs/tables [--out runs/tables/report.html]

It shows the tables with their learning curves, and of each run the samples (samples.png, by `combiner.sample`) and the
attention maps (attention_map_LAYER_IMAGE.png, by `experiments.figures.attention_map`). The page needs no other file:
pictures are embedded. It follows the light or dark mode of the reader's system.
"""

from experiments.harness import report

if __name__ == '__main__':
    report.command(__doc__)
