"""Language models of CIFAR-10's images, 32×32×3 = 3,072 values: Table 1, and Table 2's model of 128 layers.

    python -m combiner.train --config configs/cifar10.py:layers=12 --config.data.data_dir=DATA --workdir DIR
    python -m combiner.evaluate --workdir DIR

Arguments: attention=NAME (or a dotted path, module:Class; with hyper-parameters NAME+columns=64), layers=N at full
scale, architecture=combiner|sparse_transformer, scale=full|cpu|small|quick.
Data: TFDS `cifar10` in DATA: 48,000 images for training and 2,000 for validation, as Child et al. (2019); its test
images for evaluation.
Published, bits/dim: 2.77 for Table 2's Combiner-Axial of 128 layers; rows of Table 1: experiments/tables/table1.py.
Ours: not run at full scale yet; at scale=small on stand-ins: docs/results.md.
Hardware: full is for one accelerator of 16 GB or more (see below) and keeps only the inputs of blocks for the backward
pass (remat); with less memory, --config.optimizer.accumulation=N computes a step in N parts. cpu takes an hour or less
on two CPU cores (two to three for Reformer), quick a minute; they have a third and a sixth of the layers
(sparse_transformer: a 16th and a 64th), widths 64 and 32, and evaluate on 1,000 and 16 images. small is one setting for
all rows, made for minutes on one CPU core: a third of the layers, width 64 with 4 heads, 2,400 steps of 2 tiles of
16×16 (a row of the grid is one of the tile; Routing's blocks and clusters shrink with the length; Reformer hashes
once), learning rates of 0.002 and 0.004, evaluation on 1,000 tiles; for sparse_transformer, in one to two hours, 8
layers of width 128 and 6,000 steps of 8 tiles.

From the paper: width 512, 8 heads, 500,000 steps of 32 images.
Chosen, as the paper does not say: all else. As in Child et al. (chosen): 5,000 steps of warm-up and then cosine decay,
clipping at 1.0, weight decay 0.01, learned embeddings of row, column and channel, and no dropout on the sum of the
embeddings. Ours (chosen): initial values, learning rate 3.5e-4 (theirs for CIFAR-10), β = (0.9, 0.95), no biases, a
feed-forward network of 4 times the width, dropout 0.1, bfloat16. A grid row is a row of pixels with its channels
(32×96, chosen), and so is a block. Combiner-Axial is the row-major one with attended keys (chosen). The chunks of
Reformer and the clusters of Routing, as published, depend on later tokens: their likelihoods are slightly too good.
Baselines. Routing, from its authors' code for CIFAR-10: half the heads (here 4 of 8) local, in blocks of 256 that
attend to the block before too, the others with 6 clusters of 512 tokens; theirs has width 1,024 and dropout 0.3. Fixed:
one summary column, as the paper's comparison has one set of positions; the row with 8 columns has the fewest of the 8
to 32 that Child et al. advise. Reformer: 4 rounds of hashing (its paper's Table 4 has 1 to 8) and chunks of √length =
64 (chosen). Performer: 256 softmax features, the multiple of the head width 64 nearest to 64·ln 64, from its paper,
drawn once (chosen).
Axial and Logsparse are the direct positions of the Combiners of their names.
Table 2 has the architecture of Child et al.: width 256, 2 heads, feed-forward network and projections of half the size,
dropout 0.25, learning rate 3.5e-4, 120 epochs in batches of 32 (chosen). Like theirs, it halves only the projections of
queries and keys, initialises weights with standard deviation 0.125/√fan-in, and has 59 million parameters, 0.4 % of
them biases, which all layers have (chosen).

    parameters    layers=6   layers=12  layers=128
    reformer    17,605,120  34,912,768           –
    others      19,177,984  38,058,496  59,197,184

Time of training at full size, computed, as no row has run on an accelerator: the TFLOP of a step by formula, and the
hours of all steps on one chip (on N chips, divide by N), at its published peak times an assumed MFU of 30 %
(`python -m experiments.tables.hours`); ≥ is without the attention, where it has no formula. The smallest slice of v5e
(1, 4, 8 or 16 chips) that holds a step, and the GiB on each chip, as XLA plans it (docs/accelerators.md):

    chip-hours, computed for 30% MFU                TFLOP        v5e        v5p       h100     slice    GiB
    cifar-10/reformer-6-layers                      ≥10.3        ≥24        ≥10       ≥4.8   v5e:1x1   11.4
    cifar-10/performer-6-layers                     ≥11.2        ≥26        ≥11       ≥5.2   v5e:1x1    6.2
    cifar-10/logsparse-6-layers                      11.2         26         11        5.3   v5e:1x1    3.4
    cifar-10/combiner-logsparse-6-layers             11.3         26         11        5.3   v5e:1x1    2.0
    cifar-10/fixed-6-layers                          11.4         27         12        5.4   v5e:1x1    3.1
    cifar-10/fixed-of-8-columns-6-layers             11.8         28         12        5.5   v5e:1x1    3.9
    cifar-10/combiner-fixed-6-layers                 11.4         27         12        5.4   v5e:1x1    2.1
    cifar-10/axial-6-layers                          11.4         27         12        5.4   v5e:1x1    3.8
    cifar-10/combiner-axial-6-layers                 11.8         28         12        5.5   v5e:1x1    2.2
    cifar-10/combiner-mixture-6-layers               12.2         29         12        5.7   v5e:1x1    2.8
    cifar-10/reformer-12-layers                     ≥20.5        ≥48        ≥21       ≥9.6   v5e:1x1   12.2
    cifar-10/performer-12-layers                    ≥22.3        ≥53        ≥23        ≥10   v5e:1x1    7.2
    cifar-10/routing-12-layers                      ≥22.3        ≥53        ≥23        ≥10   v5e:1x1    4.7
    cifar-10/combiner-mixture-12-layers              24.4         57         25         11   v5e:1x1    3.7
    cifar-10/combiner-axial                          39.2         33         14        6.6   v5e:1x1    7.9
"""

from typing import Any

from combiner import config as common

ARCHITECTURES = ('combiner', 'sparse_transformer')


def get_config(argument: str = '') -> Any:
    """Returns the config for an argument such as 'attention=combiner_fixed,layers=12,scale=cpu'."""
    args = common.parse(argument, attention='combiner_mixture', layers=6, architecture='combiner', scale='full')
    if args.architecture not in ARCHITECTURES:
        raise ValueError(f'architecture={args.architecture}: choose {" or ".join(ARCHITECTURES)}')
    pick = common.at(args.scale)

    side = pick(32, 32, 32, small=16)
    # Of its authors' code; on tiles the same fractions of the length.
    window = side**2 // 2
    routing = {'local_heads': pick(4, 2, 1), 'block': window // 2, 'clusters': 6, 'window': window}
    # A grid row is a row of pixels with its channels.
    config = common.images(args, row=3 * side, dropout=0.1, published={'routing': routing})
    config.task = 'cifar10'
    config.data.options.tile = side % 32
    config.steps = pick(500_000, 2_000, 30, small=2_400)

    config.data.batch_size = pick(32, 4, 2, small=2)

    config.model.remat = pick('full', 'none', 'none')

    config.run.eval_every = pick(5_000, 500, 30, small=1_200)
    config.run.eval_examples = pick(2_000, 64, 4, small=400)
    config.run.test_examples = pick(None, 1_000, 16)
    config.run.eval_batch_size = pick(32, 4, 2, small=16)
    config.run.checkpoint_every = pick(5_000, 500, 30, small=600)

    if args.architecture == 'sparse_transformer':
        config.steps = pick(48_000 // 32 * 120, 2_000, 30, small=6_000)
        config.data.batch_size = pick(32, 4, 2, small=8)
        config.model.layers = -(-args.layers // pick(1, 16, 64))
        config.model.width = pick(256, 64, 32, small=128)
        config.model.heads = 2
        config.model.qkv_width = config.model.width // 2
        config.model.value_width = config.model.width
        config.model.bias = 'all'
        config.model.mlp_ratio = 2.0
        config.model.dropout = pick(0.25, 0.0, 0.0)
        config.model.initialization = 'sparse_transformer'
        config.optimizer.learning_rate = pick(3.5e-4, 4e-3, 4e-3, small=1e-3)
        config.optimizer.warmup_steps = pick(5_000, 100, 5, small=200)
    return config
