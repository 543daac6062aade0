"""Language models of ImageNet's images at 64×64, 64×64×3 = 12,288 values: Table 1, and Table 2's model of 30 layers.

    python -m combiner.train --config configs/imagenet64.py:layers=12 --config.data.data_dir=DATA --workdir DIR
    python -m combiner.evaluate --workdir DIR

Arguments: attention=NAME (or a dotted path, module:Class; with hyper-parameters NAME+columns=64), layers=N at full
scale, tile=N (cuts images into N×N tiles; 0, as in all rows of the tables, for the scale's: at small 32, else whole
images), scale=full|cpu|small|quick.
Data: TFDS `downsampled_imagenet/64x64` in DATA; 1 % of the training images are held out for validation, and TFDS's
validation images are the test split, as in the papers. `imagenet_resized/64x64` (--config.task=imagenet_resized64) is
another, easier data set: its values must not be compared with the published ones.
Published, bits/dim: 3.42 for Table 2's Combiner-Axial of 30 layers; rows of Table 1: experiments/tables/table1.py.
Ours: not run yet; on tiles, at cpu scale: results/claims_tiles.md.
Hardware: full is for one accelerator of 16 GB or four, by row (see below); with fewer,
--config.optimizer.accumulation=N computes a step in N parts. cpu takes an hour or less on two CPU cores (two to three
for Reformer), quick a minute; they have a third and a sixth of the layers, widths 64 and 32, one image per step, and
evaluate on 200 and 4 images. small is as for CIFAR-10, with 1,200 steps of one tile of 32×32, and evaluates on 276 of
them.

From the paper: width 512, 8 heads, 500,000 steps.
Chosen, as the paper does not say: all else, as for CIFAR-10 (configs/cifar10.py), its batch of 32 included, but for
dropout 0.01 (that of Child et al. on this set), a grid of 64×192 and blocks of 192, and keeping only the inputs of
blocks for the backward pass (remat). Table 2's 30 layers are those of Table 1 (chosen): Child et al. have 48 layers, 16
heads, biases, initial values of their own and 152 million parameters, and the paper's 30 layers are not theirs.
Baselines, as for CIFAR-10, but: Routing, from its authors' code for this set, has three quarters of the heads local (12
of 16, here 6 of 8), and 8 clusters of 2,048 tokens, which overlap. Reformer's chunks of √length are 128, as in its
authors' config for this set, which has 2 rounds of hashing; here 4.

    parameters    layers=6   layers=12   layers=30
    reformer    17,637,888  34,945,536           –
    others      19,210,752  38,091,264  94,732,800

Time of training at full size, computed, as no row has run on an accelerator: the TFLOP of a step by formula, and the
hours of all steps on one chip (on N chips, divide by N), at its published peak times an assumed MFU of 30 %
(`python -m experiments.tables.hours`); ≥ is without the attention, where it has no formula. The smallest slice of v5e
(1, 4, 8 or 16 chips) that holds a step, and the GiB on each chip, as XLA plans it (docs/accelerators.md):

    chip-hours, computed for 30% MFU                TFLOP        v5e        v5p       h100     slice    GiB
    imagenet-64/reformer-6-layers                   ≥41.1        ≥97        ≥41        ≥19   v5e:2x2   10.8
    imagenet-64/performer-6-layers                  ≥44.8       ≥105        ≥45        ≥21   v5e:2x2    6.2
    imagenet-64/logsparse-6-layers                     45        106         45         21   v5e:1x1   12.7
    imagenet-64/combiner-logsparse-6-layers            45        106         45         21   v5e:1x1    7.4
    imagenet-64/fixed-6-layers                       46.7        110         47         22   v5e:1x1   13.2
    imagenet-64/fixed-of-8-columns-6-layers          49.9        117         50         23   v5e:2x2    5.7
    imagenet-64/combiner-fixed-6-layers              46.7        110         47         22   v5e:1x1    7.4
    imagenet-64/axial-6-layers                       46.7        110         47         22   v5e:1x1   14.8
    imagenet-64/combiner-axial-6-layers              49.4        116         50         23   v5e:1x1    8.1
    imagenet-64/combiner-mixture-6-layers            53.1        125         54         25   v5e:1x1   10.5
    imagenet-64/reformer-12-layers                  ≥81.9       ≥193        ≥83        ≥38   v5e:2x2   11.6
    imagenet-64/performer-12-layers                 ≥89.4       ≥210        ≥90        ≥42   v5e:2x2    7.0
    imagenet-64/routing-12-layers                   ≥89.4       ≥210        ≥90        ≥42   v5e:2x2    6.5
    imagenet-64/combiner-mixture-12-layers            106        249        107         50   v5e:1x1   13.0
    imagenet-64/combiner-axial                        246        578        248        115   v5e:2x2    6.0
"""

from typing import Any

from combiner import config as common


def get_config(argument: str = '') -> Any:
    """Returns the config for an argument such as 'attention=combiner_fixed,layers=12,scale=cpu'."""
    args = common.parse(argument, attention='combiner_mixture', layers=6, tile=0, scale='full')
    pick = common.at(args.scale)
    if args.tile and (args.tile < 0 or 64 % args.tile):
        raise ValueError(f'tile={args.tile}: images of 64×64 can be cut into tiles of 1, 2, 4, 8, 16 or 32, or 0: not')
    side = args.tile or pick(64, 64, 64, small=32)

    length = 3 * side**2
    # From its authors' code, where three quarters of the heads are local; on tiles the same fractions of the length.
    routing = {'local_heads': pick(6, 3, 1), 'block': -(-length // 48), 'clusters': 8, 'window': -(-length // 6)}
    # A grid row is a row of pixels with its channels.
    config = common.images(args, row=3 * side, dropout=0.01, published={'routing': routing})
    config.task = 'downsampled_imagenet64'
    config.data.options.tile = side % 64
    config.steps = pick(500_000, 1_500, 20, small=1_200)

    tiles = (64 // side) ** 2  # that replace an image
    config.data.batch_size = pick(32 * tiles, tiles, tiles, small=max(1, 3_072 // length))

    config.model.remat = pick('full', 'none', 'none')

    config.run.eval_every = pick(5_000, 500, 20, small=600)
    config.run.eval_examples = pick(2_000, 16, 1, small=26) * tiles
    config.run.test_examples = pick(None, 200 * tiles, 4 * tiles, small=69 * tiles)
    config.run.eval_batch_size = pick(32, 1, 1) * tiles
    config.run.checkpoint_every = pick(5_000, 500, 20, small=300)
    return config
