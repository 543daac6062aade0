"""Measures whether a language model uses distant tokens: its loss, in nats per target, by position.

    python -m experiments.tables.loss_by_position --workdir DIR [--split test] [--examples N] [--parameters latest]
        [--data_dir DIR]

The loss of a model that uses distant tokens falls with the position until the end. Where the loss is flat, a longer
sequence only lowers the share of positions near the beginning. Positions are grouped in ranges that double: 0, 1, 2-3,
4-7, ….
"""

from experiments.harness import loss_by_position

if __name__ == '__main__':
    loss_by_position.command(__doc__)
