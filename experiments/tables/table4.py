"""Table 4: accuracy on the Long Range Arena by attention, one column for each task.

    all columns  configs/lra.py  an accelerator of 80 GB per row

Sizes and hyper-parameters are those of the benchmark's code, which on Image and Pathfinder gives most models their own.
Path-X is a column that the paper does not have. Published values are fractions, as accuracy is everywhere here. The
paper's means of the five tasks, in %: Transformer 57.87, Local 49.68, Sparse 57.42, Longformer 56.93, Linformer 53.28,
Reformer 52.61, Sinkhorn 52.76, Synthesizer 55.21, BigBird 57.59, Linear 53.32, Performer 57.35, Combiner-Fixed 58.34,
Combiner-Axial 57.27. The card of configs/lra.py lists the settings of each row, their sources and the deviations.
"""

from experiments.harness import paper_table
from experiments.harness.lra_rows import lra_rows

# In % on ListOps, Text, Retrieval, Image and Pathfinder.
_PUBLISHED = {
    'Transformer': (36.38, 64.27, 57.46, 42.44, 88.81),
    'Local': (15.95, 52.98, 53.39, 41.46, 84.64),
    'Sparse': (35.78, 63.58, 59.59, 44.24, 83.90),
    'Longformer': (36.03, 62.85, 56.89, 42.22, 86.68),
    'Linformer': (35.49, 53.94, 52.27, 38.56, 86.17),
    'Reformer': (36.30, 56.10, 53.40, 38.07, 79.18),
    'Sinkhorn': (34.20, 61.20, 53.83, 41.23, 73.36),
    'Synthesizer': (36.50, 61.68, 54.67, 41.61, 81.61),
    'BigBird': (37.08, 64.02, 59.29, 40.83, 86.75),
    'Linear': (17.15, 65.90, 53.09, 42.34, 88.13),
    'Performer': (36.00, 65.40, 53.82, 42.77, 88.76),
    'Combiner-Fixed': (36.65, 64.99, 59.81, 41.67, 88.59),
    'Combiner-Axial': (36.15, 64.36, 56.10, 41.33, 88.43),
}
ROWS = lra_rows(_PUBLISHED)

if __name__ == '__main__':
    paper_table.command(ROWS, 'table4')
