"""Table 1: bits/dim of images, at equal architecture, by attention.

    CIFAR-10     configs/cifar10.py     an accelerator of 16 GB per row
    ImageNet-64  configs/imagenet64.py  1 to 4 accelerators of 16 GB per row

Rows without a value in the paper (Reformer on CIFAR-10, Routing on ImageNet-64) are run all the same. Fixed has one
summary column, as the paper compares one set of positions; the row with 8 columns, of the 8 to 32 that Child et al.
(2019) advise, is this project's. Axial attends to its own grid row and column. The paper does not say which of the
three axial variants Combiner-Axial is: here the row-major one.
"""

from experiments.harness import paper_table
from experiments.harness.row import Row

_MODELS = (
    # model, attention, layers, published: CIFAR-10, ImageNet-64
    ('Reformer', 'reformer', 6, None, 3.740),
    ('Performer', 'performer', 6, 3.335, 3.719),
    ('Logsparse', 'logsparse', 6, 4.253, 4.351),
    ('Combiner-Logsparse', 'combiner_logsparse', 6, 3.366, 3.795),
    ('Fixed', 'fixed', 6, 3.408, 3.696),
    ('Fixed of 8 columns', 'fixed+summary=8', 6, None, None),
    ('Combiner-Fixed', 'combiner_fixed', 6, 3.321, 3.654),
    ('Axial', 'axial', 6, 3.666, 4.032),
    ('Combiner-Axial', 'combiner_axial_rowmajor', 6, 3.050, 3.585),
    ('Combiner-Mixture', 'combiner_mixture', 6, 3.040, 3.585),
    ('Reformer', 'reformer', 12, None, 3.710),
    ('Performer', 'performer', 12, 3.310, 3.636),
    ('Routing', 'routing', 12, 2.950, None),
    ('Combiner-Mixture', 'combiner_mixture', 12, 2.885, 3.504),
)

ROWS = tuple(
    Row(
        model=f'{model}, {layers} layers',
        column=column,
        config=config,
        argument=f'attention={attention},layers={layers}',
        metric='bits_per_dim',
        published=published,
    )
    for model, attention, layers, cifar10, imagenet64 in _MODELS
    for column, config, published in (
        ('CIFAR-10', 'configs/cifar10.py', cifar10),
        ('ImageNet-64', 'configs/imagenet64.py', imagenet64),
    )
)

if __name__ == '__main__':
    paper_table.command(ROWS, 'table1')
