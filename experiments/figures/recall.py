"""Draws the accuracy of associative recall over distance, one line for each mechanism.

    python -m experiments.figures.recall [--table results/recall.json] [--out docs/images/recall.png]

The table is that of `experiments.tables.recall`.
"""

from experiments.harness import recall_figure

if __name__ == '__main__':
    recall_figure.command(__doc__)
