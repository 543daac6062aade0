"""Table 4 with a warm start: rows that are first trained on their task's own sequences, without labels.

    python -m experiments.tables.table4_pretrained --data_dir DIR [--rows 'listops/*'] [--scale small] [--seeds 3]

Amos et al. (2023, arXiv 2310.02980) find that this closes most of the gap between mechanisms on the Long Range Arena.
Each row is trained as a masked language model, with the settings and as many steps as afterwards for the classes; the
folder of each run has that training in `pretraining`. The rows are those of Table 4, but all pool by the mean, as a
model without classes has no class token; there are no published values.
"""

from experiments.harness import paper_table
from experiments.harness.lra_rows import lra_rows

PRETRAINED = lra_rows(pretrain='mlm')

if __name__ == '__main__':
    paper_table.command(PRETRAINED, 'table4_pretrained')
