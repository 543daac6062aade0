"""PG-19: perplexity per word of language models of books, by attention and length.

    PG-19  configs/pg19.py  8 accelerators of 80 GB a row

The paper has no such table. Others have published: Compressive Transformer 33.6, Routing Transformer 33.2, Perceiver AR
28.9, Transformer-VQ 26.6.
"""

from experiments.harness import runner
from experiments.harness.row import Row

_MODELS = (
    ('Transformer-2k', 'full', 2048),
    ('Transformer-8k', 'full', 8192),
    ('Combiner-Fixed-8k', 'combiner_fixed', 8192),
    ('Combiner-Axial-8k', 'combiner_axial_rowmajor+key=projected', 8192),
)

ROWS = tuple(
    Row(
        model=model,
        column='PG-19',
        config='configs/pg19.py',
        argument=f'attention={attention},length={length}',
        metric='word_perplexity',
    )
    for model, attention, length in _MODELS
)

if __name__ == '__main__':
    runner.command(ROWS, 'pg19')
