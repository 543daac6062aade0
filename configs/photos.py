"""Crops of real photographs as sequences of pixel values: 16×16×3 (768 tokens) or 32×32×3 (3,072 tokens).

    python -m combiner.train --config configs/photos.py:attention=combiner_axial_rowmajor --workdir DIR
    python -m combiner.evaluate --workdir DIR

Arguments: attention=NAME (or a dotted path, module:Class; with hyper-parameters NAME+key=projected),
size=16|32, layers=N (0 for as many as the scale has), scale=cpu|quick|full.
Data: photographs inside scikit-image and scikit-learn, split by photograph; nothing to download.
Expected: 4.50 bits/dim on the two test photographs with the defaults (133,696 parameters); on the same crops PNG needs
5.60 and lossless WebP 4.53. Other mechanisms: results/photos.md. The paper has no such row; all settings are this
project's choice.
Hardware: cpu, the default, is the quickstart: about 3 minutes on 2 CPU cores with size 16 and 2 layers of width 64.
quick takes a minute or less, with 1 layer of width 32 and 64 crops to evaluate on. full has the architecture of Table 1
(configs/cifar10.py) and needs an accelerator; it was not run yet.

Time of training at full size, computed, as no row has run on an accelerator: the TFLOP of a step by formula, and the
hours of all steps on one chip, at its published peak times an assumed MFU of 30 % (`python -m
experiments.tables.hours`); ≥ is without the attention, where it has no formula:

    chip-hours, computed for 30% MFU                TFLOP        v5e        v5p       h100     slice    GiB
    photographs/axial                                2.83        0.3        0.1       0.05         –      –
    photographs/combiner-axial-horizontal            2.88        0.3        0.1       0.05         –      –
    photographs/combiner-axial-rowmajor              2.87        0.3        0.1       0.05         –      –
    photographs/combiner-axial-vertical              2.88        0.3        0.1       0.05         –      –
    photographs/combiner-fixed                       2.83        0.3        0.1       0.05         –      –
    photographs/combiner-logsparse                   2.81        0.3        0.1       0.05         –      –
    photographs/combiner-mixture                     2.92        0.3        0.1       0.05         –      –
    photographs/combiner-routing                     3.13        0.3        0.1       0.06         –      –
    photographs/combiner-tree                        2.83        0.3        0.1       0.05         –      –
    photographs/compressed                           2.85        0.3        0.1       0.05         –      –
    photographs/fixed                                2.83        0.3        0.1       0.05         –      –
    photographs/full                                 3.15        0.3        0.1       0.06         –      –
    photographs/linear                               ≥2.8       ≥0.3       ≥0.1      ≥0.05         –      –
    photographs/local                                2.82        0.3        0.1       0.05         –      –
    photographs/logsparse                            2.81        0.3        0.1       0.05         –      –
    photographs/longformer                           3.11        0.3        0.1       0.06         –      –
    photographs/performer                            ≥2.8       ≥0.3       ≥0.1      ≥0.05         –      –
    photographs/reformer                            ≥2.57       ≥0.2       ≥0.1      ≥0.05         –      –
    photographs/routing                              ≥2.8       ≥0.3       ≥0.1      ≥0.05         –      –
    photographs/sinkhorn                             ≥2.8       ≥0.3       ≥0.1      ≥0.05         –      –
    photographs/strided                              2.85        0.3        0.1       0.05         –      –
    photographs/synthesizer                         ≥2.34       ≥0.2      ≥0.09      ≥0.04         –      –
"""

from typing import Any

from combiner import config as common


def get_config(argument: str = '') -> Any:
    """Returns the config for an argument such as 'attention=combiner_fixed,size=32,layers=6'."""
    args = common.parse(argument, attention='combiner_axial_rowmajor', size=16, layers=0, scale='cpu')
    if args.size not in (16, 32):
        raise ValueError(f'size={args.size}: the photographs come as crops of size 16 or 32')

    pick = common.at(args.scale)

    config = common.base()
    config.task = f'photos{args.size}'
    config.steps = pick(20_000, 1_200, 30)

    config.data.batch_size = pick(32, 8, 4)

    config.model.layers = args.layers or pick(6, 2, 1)
    config.model.width = pick(512, 64, 32)
    config.model.heads = pick(8, 4, 2)
    config.model.mlp_ratio = 4.0
    config.model.dropout = pick(0.1, 0.0, 0.0)
    config.model.positions = 'image'
    config.model.tied = False
    config.model.dtype = pick('bfloat16', 'float32', 'float32')
    config.model.attention = common.attention(args.attention, row=3 * args.size)  # a row of pixels with its channels

    config.optimizer.learning_rate = pick(3.5e-4, 4e-3, 4e-3)
    config.optimizer.warmup_steps = pick(500, 50, 5)
    config.optimizer.weight_decay = 0.01
    config.optimizer.ema_decay = pick(0.999, 0.99, 0.99)  # averages the last 100 steps or so (full: 1,000)

    config.run.log_every = pick(100, 20, 10)
    config.run.eval_every = pick(1_000, 300, 30)
    config.run.eval_examples = pick(256, 64, 16)
    config.run.test_examples = pick(None, None, 64)
    config.run.checkpoint_every = pick(1_000, 300, 30)
    return config
