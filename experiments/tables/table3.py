"""Table 3: perplexity of language models on Wiki-40B-En, at equal architecture, by attention and length.

    Wiki-40B  configs/wiki40b.py  8 accelerators of 16 GB per row, 16 for Performer

Rows that the paper does not have: the Transformer at 8,192 tokens, for which the authors ran out of memory (here
attention takes memory that is linear in the length), and Fixed with 8 summary columns, of the 8 to 32 that Child et al.
(2019) advise, where the paper has one set of positions. The paper does not say which of the three axial variants
Combiner-Axial is: here the row-major one with projected keys, as in the authors' config.
"""

from experiments.harness import paper_table
from experiments.harness.text_rows import text_rows

ROWS = text_rows(
    'Wiki-40B',
    'configs/wiki40b.py',
    'perplexity',
    published={
        'Transformer-2k': 17.26,
        'Performer-2k': 19.66,
        'Routing-2k': 20.85,
        'Fixed-2k': 18.04,
        'Fixed-8-columns-2k': None,
        'Combiner-Fixed-2k': 17.70,
        'Axial-2k': 20.82,
        'Combiner-Axial-2k': 17.56,
        'Transformer-8k': None,
        'Combiner-Fixed-8k': 16.60,
        'Combiner-Axial-8k': 16.49,
    },
)

if __name__ == '__main__':
    paper_table.command(ROWS, 'table3')
