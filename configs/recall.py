"""Associative recall (Arora et al. 2023) over chosen distances: how far does a mechanism reach?

    python -m combiner.train --config configs/recall.py:attention=combiner_fixed --workdir DIR
    python -m combiner.evaluate --workdir DIR

Arguments: attention=NAME (or a dotted path, module:Class; with hyper-parameters NAME+block=16), length=N (0 for that of
the scale), pairs=N in a sequence, layers=N, scale=cpu|quick|full.
Data: generated from a seed while training reads it; nothing to download. Keys are 4 to length - 2 tokens from their
pairs; evaluation has a result for every doubling of the distance.
Published: nothing for Combiner; the task is that of Arora et al. (2023), with a key and its value in one token.
Ours, % of the values, three seeds (docs/results.md has all 22 attentions, by distance): full 100.0, combiner_mixture
99.1, combiner_fixed 90.7, combiner_tree 82.8, combiner_logsparse 76.1, local 49.8, fixed 26.8, logsparse 6.5. Chance:
one of 16 values, or one of the 8 of the sequence.
Hardware: cpu, the default, takes two minutes or so on one CPU core with 256 tokens and one layer of width 64; quick
takes seconds, with 64 tokens and a layer of width 32, and learns nothing; full has 1,024 tokens and width 128, and was
not run yet.
One layer, so that what a mechanism cannot reach, it cannot reach through another position either. All settings are this
project's choice.

Time of training at full size, computed, as no row has run on an accelerator: the TFLOP of a step by formula, and the
hours of all steps on one chip, at its published peak times an assumed MFU of 30 % (`python -m
experiments.tables.hours`); ≥ is without the attention, where it has no formula:

    chip-hours, computed for 30% MFU                TFLOP        v5e        v5p       h100     slice    GiB
    recall/axial                                   0.0951      0.004      0.002     0.0009         –      –
    recall/combiner-axial-horizontal               0.0997      0.005      0.002     0.0009         –      –
    recall/combiner-axial-rowmajor                 0.0975      0.005      0.002     0.0009         –      –
    recall/combiner-axial-vertical                 0.0997      0.005      0.002     0.0009         –      –
    recall/combiner-fixed                          0.0952      0.004      0.002     0.0009         –      –
    recall/combiner-logsparse                      0.0929      0.004      0.002     0.0009         –      –
    recall/combiner-mixture                         0.104      0.005      0.002      0.001         –      –
    recall/combiner-routing                         0.114      0.005      0.002      0.001         –      –
    recall/combiner-tree                           0.0952      0.004      0.002     0.0009         –      –
    recall/compressed                              0.0967      0.005      0.002     0.0009         –      –
    recall/fixed                                   0.0951      0.004      0.002     0.0009         –      –
    recall/full                                     0.143      0.007      0.003      0.001         –      –
    recall/linear                                 ≥0.0919     ≥0.004     ≥0.002    ≥0.0009         –      –
    recall/local                                   0.0951      0.004      0.002     0.0009         –      –
    recall/logsparse                               0.0925      0.004      0.002     0.0009         –      –
    recall/longformer                              0.0982      0.005      0.002     0.0009         –      –
    recall/performer                              ≥0.0919     ≥0.004     ≥0.002    ≥0.0009         –      –
    recall/reformer                               ≥0.0854     ≥0.004     ≥0.002    ≥0.0008         –      –
    recall/routing                                ≥0.0919     ≥0.004     ≥0.002    ≥0.0009         –      –
    recall/sinkhorn                               ≥0.0919     ≥0.004     ≥0.002    ≥0.0009         –      –
    recall/strided                                 0.0966      0.005      0.002     0.0009         –      –
    recall/synthesizer                             ≥0.079     ≥0.004     ≥0.002    ≥0.0007         –      –
"""

from typing import Any

from combiner import config as common


def get_config(argument: str = '') -> Any:
    """Returns the config for an argument such as 'attention=combiner_fixed,length=512'."""
    args = common.parse(argument, attention='combiner_fixed', length=0, pairs=8, layers=1, scale='cpu')
    pick = common.at(args.scale)
    length = args.length or pick(1_024, 256, 64)

    config = common.base()
    config.task = 'recall'
    config.steps = pick(10_000, 2_000, 30)

    tokens = pick(65_536, 4_096, 1_024)  # per step, at any length
    config.data.batch_size = max(1, tokens // length)
    config.data.options.length = length
    config.data.options.pairs = args.pairs
    config.data.options.keys = 16
    config.data.options.values = 16

    config.model.layers = args.layers
    config.model.width = pick(128, 64, 32)
    config.model.heads = pick(4, 2, 2)
    config.model.tied = False
    config.model.attention = common.attention(args.attention)

    config.optimizer.learning_rate = pick(1e-3, 3e-3, 3e-3)
    config.optimizer.warmup_steps = pick(500, 100, 5)
    config.optimizer.weight_decay = 0.1

    config.run.log_every = pick(100, 20, 10)
    config.run.eval_every = pick(1_000, 500, 30)
    config.run.eval_examples = pick(256, 128, 16)
    config.run.test_examples = pick(None, 1_000, 64)
    config.run.checkpoint_every = pick(1_000, 500, 30)
    return config
