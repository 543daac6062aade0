"""PG-19: perplexity per word of language models of books, by attention and length.

    PG-19  configs/pg19.py  8 accelerators of 16 GB per row

The paper has no such table. Published by others: Compressive Transformer 33.6, Routing Transformer 33.2, Perceiver AR
28.9, Transformer-VQ 26.6.
"""

from experiments.harness import paper_table
from experiments.harness.text_rows import text_rows

MODELS = (
    *('Transformer-2k', 'Combiner-Fixed-2k', 'Combiner-Axial-2k'),
    *('Transformer-8k', 'Combiner-Fixed-8k', 'Combiner-Axial-8k'),
)
ROWS = text_rows('PG-19', 'configs/pg19.py', 'word_perplexity', published=dict.fromkeys(MODELS))

if __name__ == '__main__':
    paper_table.command(ROWS, 'pg19')
