"""Table 3: perplexity of language models on Wiki-40B-En, at equal architecture, by attention and length.

    Wiki-40B  configs/wiki40b.py  8 accelerators of 80 GB a row

The Transformer at 8,192 tokens, which ran out of memory for the authors, is a new row: attention here takes memory that
is linear in the length. So is Fixed with 8 summary columns, of the 8 to 32 that Child et al. (2019) advise: the paper's
has one set of positions. Which of the three axial variants Combiner-Axial is, the paper's table does not say: here the
row-major one with projected keys, as in the authors' config.
"""

from experiments.harness import runner
from experiments.harness.row import Row

_MODELS = (
    # model, attention, length, published
    ('Transformer-2k', 'full', 2048, 17.26),
    ('Performer-2k', 'performer', 2048, 19.66),
    ('Routing-2k', 'routing', 2048, 20.85),
    ('Fixed-2k', 'fixed', 2048, 18.04),
    ('Fixed-8-columns-2k', 'fixed+summary=8', 2048, None),
    ('Combiner-Fixed-2k', 'combiner_fixed', 2048, 17.70),
    ('Axial-2k', 'axial', 2048, 20.82),
    ('Combiner-Axial-2k', 'combiner_axial_rowmajor+key=projected', 2048, 17.56),
    ('Transformer-8k', 'full', 8192, None),
    ('Combiner-Fixed-8k', 'combiner_fixed', 8192, 16.60),
    ('Combiner-Axial-8k', 'combiner_axial_rowmajor+key=projected', 8192, 16.49),
)

ROWS = tuple(
    Row(
        model=model,
        column='Wiki-40B',
        config='configs/wiki40b.py',
        argument=f'attention={attention},length={length}',
        metric='perplexity',
        published=published,
    )
    for model, attention, length, published in _MODELS
)

if __name__ == '__main__':
    runner.command(ROWS, 'table3')
