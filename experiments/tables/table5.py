"""Table 5: perplexity of masked language models on C4, at equal architecture, by attention and length.

    C4  configs/c4_mlm.py  8 accelerators of 16 GB per row, 16 for Performer

Fixed with 8 summary columns is a row that the paper does not have, and Combiner-Axial the row-major variant with
projected keys: both as in Table 3.
"""

from experiments.harness import paper_table
from experiments.harness.text_rows import text_rows

ROWS = text_rows(
    'C4',
    'configs/c4_mlm.py',
    'perplexity',
    published={
        'Transformer-2k': 4.552,
        'BigBird-2k': 4.696,
        'Performer-2k': 10.940,
        'Fixed-2k': 5.279,
        'Fixed-8-columns-2k': None,
        'Combiner-Fixed-2k': 5.170,
        'Axial-2k': 5.370,
        'Combiner-Axial-2k': 4.809,
        'Routing-2k': 6.703,
        'Combiner-Routing-2k': 6.539,
        'BigBird-8k': 4.542,
        'Combiner-Axial-8k': 4.190,
        'Combiner-Fixed-8k': 4.139,
    },
)

if __name__ == '__main__':
    paper_table.command(ROWS, 'table5')
