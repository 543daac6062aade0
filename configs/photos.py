"""Crops of real photographs as sequences of pixel values: 16×16×3 (768 tokens) or 32×32×3 (3,072 tokens).

    python -m combiner.train --config configs/photos.py:attention=combiner_axial_rowmajor --workdir DIR
    python -m combiner.evaluate --workdir DIR

Arguments: attention=NAME (or a dotted path, module:Class; with hyper-parameters NAME+columns=96+key=projected),
size=16|32, layers=N.
Data: photographs inside scikit-image and scikit-learn, split by photograph; nothing to download.
Expected: 4.50 bits/dim on the two test photographs with the defaults (133,696 parameters), where PNG needs 5.60 and
lossless WebP 4.53 on the same crops; the other mechanisms: results/photos.md. The paper has no such row.
Time: the defaults (size 16, 2 layers of width 64) are the quickstart: about 3 minutes on 2 CPU cores.
"""

from typing import Any

from configs import common


def get_config(argument: str = '') -> Any:
    """The config for an argument such as 'attention=combiner_fixed,size=32,layers=6'."""
    args = common.parse(argument, attention='combiner_axial_rowmajor', size=16, layers=2)
    if args.size not in (16, 32):
        raise ValueError(f'size={args.size}: the photographs come as crops of size 16 or 32')

    config = common.base()
    config.task = f'photos{args.size}'
    config.steps = 1200

    config.data.batch_size = 8

    config.model.layers = args.layers
    config.model.width = 64
    config.model.heads = 4
    config.model.mlp_ratio = 4.0
    config.model.positions = 'image'
    config.model.tied = False
    config.model.attention = common.attention(args.attention, row=3 * args.size)  # a row of pixels with its channels

    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 0.01
    config.optimizer.ema_decay = 0.99  # averages the last 100 steps or so

    config.run.log_every = 20
    config.run.eval_every = 300
    config.run.checkpoint_every = 300
    return config
