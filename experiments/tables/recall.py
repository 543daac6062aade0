"""Accuracy of associative recall over distance, by mechanism: how far does each one reach with one layer?

    python -m experiments.tables.recall [--rows 'recall/combiner*'] [--seeds 3] [--workdir runs/recall]
    python -m experiments.figures.recall

Options and procedure: `experiments.harness.runner`; the scale is cpu by default, with three seeds. The data are
generated. Every mechanism has the block, rows or window that it takes by default, but Longformer a window of 64, as
its default of 512 tokens would hold the whole sequence. The table has the mean over all distances, and a column for
each range of distances; the second command draws them.
"""

import combiner
from combiner.core import registry
from experiments.harness import runner
from experiments.harness.row import Row

SIZES = {'longformer': '+window=64'}
ROWS = tuple(
    Row(name, 'Recall', 'configs/recall.py', f'attention={name}{SIZES.get(name, "")}', 'accuracy')
    for name in combiner.names()
    if True in registry.resolve(name).supported_causal
)

if __name__ == '__main__':
    runner.command(ROWS, 'recall', scale='cpu', seeds=3, workdir='runs/recall')
