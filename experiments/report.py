"""Writes one page of all that the commands of tables and claims left in a folder.

    python -m experiments.report --workdir runs/tables [--out runs/tables/report.html]

It shows the tables with their learning curves, and of each run the samples (samples.png or .txt, by `combiner.sample`)
and the attention maps (by `experiments.figures.attention_map`). Files that are damaged are named on the page.

The page is one file that loads nothing. Its tables can be sorted, its curves show their values where the reader points,
and a slider chooses the layer and the head of an attention map; without JavaScript, and on paper, everything is there
too. It follows the light or dark mode of the reader's system.
"""

from experiments.harness.report import page

if __name__ == '__main__':
    page.command(__doc__)
