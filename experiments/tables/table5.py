"""Table 5: perplexity of masked language models on C4, at equal architecture, by attention and length.

    C4  configs/c4_mlm.py  8 accelerators of 80 GB a row

Fixed with 8 summary columns is a new row, as in Table 3. Which of the three axial variants Combiner-Axial is, the
paper's table does not say: here that of Table 3.
"""

from experiments.harness import runner
from experiments.harness.row import Row

_MODELS = (
    # model, attention, length, published
    ('Transformer-2k', 'full', 2048, 4.552),
    ('BigBird-2k', 'bigbird', 2048, 4.696),
    ('Performer-2k', 'performer', 2048, 10.940),
    ('Fixed-2k', 'fixed', 2048, 5.279),
    ('Fixed-8-columns-2k', 'fixed+summary=8', 2048, None),
    ('Combiner-Fixed-2k', 'combiner_fixed', 2048, 5.170),
    ('Axial-2k', 'axial', 2048, 5.370),
    ('Combiner-Axial-2k', 'combiner_axial_rowmajor+key=projected', 2048, 4.809),
    ('Routing-2k', 'routing', 2048, 6.703),
    ('Combiner-Routing-2k', 'combiner_routing', 2048, 6.539),
    ('BigBird-8k', 'bigbird', 8192, 4.542),
    ('Combiner-Axial-8k', 'combiner_axial_rowmajor+key=projected', 8192, 4.190),
    ('Combiner-Fixed-8k', 'combiner_fixed', 8192, 4.139),
)

ROWS = tuple(
    Row(
        model=model,
        column='C4',
        config='configs/c4_mlm.py',
        argument=f'attention={attention},length={length}',
        metric='perplexity',
        published=published,
    )
    for model, attention, length, published in _MODELS
)

if __name__ == '__main__':
    runner.command(ROWS, 'table5')
