"""Classifiers of the Long Range Arena (Tay et al. 2021), in accuracy: Table 4, and Path-X.

    python -m combiner.train --config configs/lra.py:task=pathfinder --config.data.data_dir=DATA --workdir DIR
    python -m combiner.evaluate --workdir DIR

Arguments: task=listops|text|retrieval|image|pathfinder|pathx, attention=NAME (or a dotted path, module:Class; with
hyper-parameters NAME+block=64), difficulty=easy|intermediate|hard of pathfinder (Table 4's is intermediate), and its
size=32|64|128|256 (Table 4's is 32) or 12|16 (ours, easy only), pretrain=mlm|causal (the same sequences without labels;
then --config.init_from=WORKDIR of that run starts a classifier from its backbone), scale=full|cpu|small|quick.
Data: in DATA, see docs/data.md. ListOps and Pathfinder are generated, Text and Image are TFDS `imdb_reviews` and
`cifar10`, Retrieval is the release's files. --config.data.options.files=release reads the release's ListOps and
Pathfinder; --config.data.options.black_is_padding=true masks the black background of images, as the benchmark does.
Published, accuracy in % on ListOps, Text, Retrieval, Image, Pathfinder: Transformer 36.38, 64.27, 57.46, 42.44, 88.81;
Combiner-Fixed 36.65, 64.99, 59.81, 41.67, 88.59; all rows: experiments/tables/table4.py. Chance: 10, 50, 50, 10, 50.
Ours: not run at full scale yet; at the scales small and cpu: docs/results.md.
Hardware: full is for one accelerator of 80 GB, Path-X as below; with less, --config.optimizer.accumulation=N splits it.
cpu takes an hour or less on two CPU cores, quick a minute or two: at most 2 layers of width 64 with 4 heads and 1 of
width 32 with 2, 16,384 (on images 32,768) and 4,096 tokens per step, texts cut at 1,000 and 256 bytes, Path-X at 64×64
and 32×32, no dropout of attention weights, and 4,000 and 32 examples to evaluate on. Expressions of ListOps have the
same length at any scale but small. small is one setting for all models, made for minutes on one CPU core: 2 layers of
width 32 (ListOps: 64), 4 heads, pooling by mean, no dropout, clipping at 1.0, a cosine schedule, two rates; 11 to 63
tokens of ListOps, 500 bytes of texts, Image at 16×16, an easy Pathfinder of 12×12 without its background, with rotary
positions, as it learns nothing with others (docs/results.md). The windows of Longformer and BigBird's blocks shrink
with the sequences (ListOps: to a 32nd, Text: 8th, Image: 4th, Pathfinder: 7th), other blocks and Sparse's summaries
with the root of the length, as Combiner's blocks do; ranks, features and Reformer's one round are the benchmark's. On
Pathfinder the global positions of Longformer and BigBird are mostly background, which is not read. 2,000 test examples.

From the benchmark: biases in the feed-forward network alone, dropout inside of it, and token embeddings N(0, 1), these
three at full scale only (the last on small ListOps and Pathfinder too); all sizes, rates, schedules, steps, batches and
dropout, for each task and, on Image and Pathfinder, for each of its models; Adam with β = (0.9, 0.98), ε = 1e-9 and
decoupled weight decay; pooling, positions, and a class head with a hidden layer as wide as the feed-forward network's.
Its warm-up on Retrieval is longer than the training, which ends at 5/8 of the peak; here too.
Chosen, as the paper does not say: Combiner has the base settings of each task; its axial form is the row-major one with
attended keys. Its blocks and rows are the mechanism's defaults, but on images grid rows are those of the image (on
Image shifted by one, as the class token comes first). Path-X has no dropout of attention weights, which would take
memory that is quadratic in the length. Only the inputs of blocks are kept for the backward pass (remat).
Mechanisms follow the benchmark's code; where that differs from a mechanism's own paper, they follow the paper. Local:
blocks of 50 on texts, 64 on images. Sparse: Child et al.'s fixed pattern in blocks of 50, of which all positions attend
to the last 10; causal there, bidirectional here. Sinkhorn: blocks as Local's. Linformer: rank 16, one projection of
keys and values for all heads of a layer (its config of Text says 32, which does not reach the encoder). BigBird: blocks
of 64, the first and the last one global, 3 random ones. Longformer: a window of 512; no global position there, here the
first, which is the class token on ListOps, Text and Retrieval. Performer: the ReLU kernel with 256 features, here of
random directions, drawn once, which theirs leaves out; on ListOps the softmax kernel, theirs with 2 features, here with
256, as in its paper for heads of this width. Reformer: one round of hashing and chunks of 10 positions there, here 4
rounds and chunks of √length (chosen). Synthesizer: random scores on Image and Pathfinder, elsewhere two factors of rank
32, the rank of their code, which adds products of queries and keys to them by default. Path-X, for which it has the
Transformer alone: with the base sizes, otherwise as Pathfinder, but Synthesizer's factors (chosen). Linear and
Performer have no attention weights to drop.
Deviations from the benchmark: projections are initialised as in all models here, Xavier uniform there; with sinusoidal
positions, embeddings are √width times N(0, 1/width); the class token is initialised like the embeddings, there with
zeros; embeddings and norms have no weight decay; dropout of attention weights acts on the joint softmax, in the
authors' code on the summaries alone; the cosine begins after the warm-up; Text is validated on a tenth of the training
reviews.

    parameters   task=listops  task=text  task=retrieval  task=image  task=pathfinder  task=pathx
    full            8,943,626  3,484,418       1,086,850     248,074           26,242     537,858
    local           8,943,626  3,484,418       1,086,850     247,818           54,018     537,858
    fixed           8,943,626  3,484,418       1,086,850     248,074           13,570     537,858
    longformer      8,943,626  3,484,418       1,086,850     445,962           17,794     537,858
    linformer       9,071,690  3,740,482       1,342,914     264,474           29,954     800,002
    reformer        7,895,050  3,222,274       1,021,314     145,290           49,922     537,346
    sinkhorn       10,079,530  3,831,826       1,195,666      53,787           24,770     542,994
    synthesizer    10,944,522  7,057,154       5,052,802   8,636,690        8,434,434   2,633,986
    bigbird         8,943,626  3,484,418       1,086,850     248,074           87,298     537,858
    linear          8,943,626  3,484,418       1,086,850     248,074          115,714     537,858
    performer       8,943,626  3,484,418       1,086,850     248,074          115,714     537,858
    others          8,943,626  3,484,418       1,086,850      52,170           13,570     537,858

Time of training at full size, computed, as no row has run on an accelerator: the TFLOP of a step by formula, and the
hours of all steps on one chip (on N chips, divide by N), at its published peak times an assumed MFU of 30 %
(`python -m experiments.tables.hours`); ≥ is without the attention, where it has no formula. The smallest slice of v5e
(1, 4, 8 or 16 chips) that holds a step, and the GiB on each chip, as XLA plans it (docs/accelerators.md), for
Path-X alone. Narrow models reach less:

    chip-hours, computed for 30% MFU                TFLOP        v5e        v5p       h100     slice    GiB
    listops/transformer                              6.37        0.1       0.06       0.03         –      –
    text/transformer                                 8.71        0.8        0.4        0.2         –      –
    retrieval/transformer                             7.5        0.2       0.08       0.04         –      –
    image/transformer                                0.31       0.05       0.02       0.01         –      –
    pathfinder/transformer                          0.464        0.1       0.06       0.03         –      –
    path-x/transformer                               3.32        7.8        3.4        1.6   v5e:1x1    9.2
    listops/local                                     3.3       0.08       0.03       0.02         –      –
    text/local                                        2.5        0.2        0.1       0.05         –      –
    retrieval/local                                  1.29       0.03       0.01      0.006         –      –
    image/local                                     0.116       0.02      0.008      0.004         –      –
    pathfinder/local                                0.129       0.04       0.02      0.008         –      –
    path-x/local                                   0.0387       0.09       0.04       0.02   v5e:1x1    2.6
    listops/sparse                                   3.92       0.09       0.04       0.02         –      –
    text/sparse                                      3.74        0.4        0.2       0.07         –      –
    retrieval/sparse                                 2.53       0.06       0.03       0.01         –      –
    image/sparse                                    0.151       0.02       0.01      0.005         –      –
    pathfinder/sparse                               0.037       0.01      0.005      0.002         –      –
    path-x/sparse                                   0.692        1.6        0.7        0.3   v5e:2x2   11.9
    listops/longformer                               3.98       0.09       0.04       0.02         –      –
    text/longformer                                   3.2        0.3        0.1       0.06         –      –
    retrieval/longformer                             1.99       0.05       0.02      0.009         –      –
    image/longformer                                0.775        0.1       0.05       0.03         –      –
    pathfinder/longformer                           0.116       0.03       0.01      0.007         –      –
    path-x/longformer                               0.129        0.3        0.1       0.06   v5e:1x1    7.5
    listops/linformer                               ≥3.22      ≥0.08      ≥0.03      ≥0.02         –      –
    text/linformer                                  ≥2.42       ≥0.2       ≥0.1      ≥0.05         –      –
    retrieval/linformer                             ≥1.21      ≥0.03      ≥0.01     ≥0.006         –      –
    image/linformer                                ≥0.103      ≥0.02     ≥0.007     ≥0.003         –      –
    pathfinder/linformer                          ≥0.0129     ≥0.004     ≥0.002    ≥0.0008         –      –
    path-x/linformer                              ≥0.0258      ≥0.06      ≥0.03      ≥0.01   v5e:1x1    1.2
    listops/reformer                                ≥2.82      ≥0.07      ≥0.03      ≥0.01         –      –
    text/reformer                                   ≥2.22       ≥0.2      ≥0.09      ≥0.04         –      –
    retrieval/reformer                              ≥1.11      ≥0.03      ≥0.01     ≥0.005         –      –
    image/reformer                                ≥0.0903      ≥0.01     ≥0.006     ≥0.003         –      –
    pathfinder/reformer                           ≥0.0902      ≥0.03      ≥0.01     ≥0.005         –      –
    path-x/reformer                               ≥0.0225      ≥0.05      ≥0.02      ≥0.01   v5e:1x1   13.6
    listops/sinkhorn                                ≥3.22      ≥0.08      ≥0.03      ≥0.02         –      –
    text/sinkhorn                                   ≥2.42       ≥0.2       ≥0.1      ≥0.05         –      –
    retrieval/sinkhorn                              ≥1.21      ≥0.03      ≥0.01     ≥0.006         –      –
    image/sinkhorn                                ≥0.0129     ≥0.002    ≥0.0009    ≥0.0004         –      –
    pathfinder/sinkhorn                           ≥0.0387      ≥0.01     ≥0.005     ≥0.002         –      –
    path-x/sinkhorn                               ≥0.0258      ≥0.06      ≥0.03      ≥0.01   v5e:1x1    5.0
    listops/synthesizer                             ≥2.42      ≥0.06      ≥0.02      ≥0.01         –      –
    text/synthesizer                                ≥2.01       ≥0.2      ≥0.08      ≥0.04         –      –
    retrieval/synthesizer                           ≥1.01      ≥0.02      ≥0.01     ≥0.005         –      –
    image/synthesizer                             ≥0.0774      ≥0.01     ≥0.005     ≥0.003         –      –
    pathfinder/synthesizer                        ≥0.0773      ≥0.02      ≥0.01     ≥0.005         –      –
    path-x/synthesizer                            ≥0.0193      ≥0.05      ≥0.02     ≥0.009   v5e:1x1    1.1
    listops/bigbird                                  4.18        0.1       0.04       0.02         –      –
    text/bigbird                                      3.4        0.3        0.1       0.06         –      –
    retrieval/bigbird                                2.19       0.05       0.02       0.01         –      –
    image/bigbird                                   0.219       0.04       0.02      0.007         –      –
    pathfinder/bigbird                               0.67        0.2       0.08       0.04         –      –
    path-x/bigbird                                  0.154        0.4        0.2       0.07   v5e:1x1   10.6
    listops/linear                                  ≥3.22      ≥0.08      ≥0.03      ≥0.02         –      –
    text/linear                                     ≥2.42       ≥0.2       ≥0.1      ≥0.05         –      –
    retrieval/linear                                ≥1.21      ≥0.03      ≥0.01     ≥0.006         –      –
    image/linear                                   ≥0.103      ≥0.02     ≥0.007     ≥0.003         –      –
    pathfinder/linear                              ≥0.206      ≥0.06      ≥0.03      ≥0.01         –      –
    path-x/linear                                 ≥0.0258      ≥0.06      ≥0.03      ≥0.01   v5e:1x1    1.3
    listops/performer                               ≥3.22      ≥0.08      ≥0.03      ≥0.02         –      –
    text/performer                                  ≥2.42       ≥0.2       ≥0.1      ≥0.05         –      –
    retrieval/performer                             ≥1.21      ≥0.03      ≥0.01     ≥0.006         –      –
    image/performer                                ≥0.103      ≥0.02     ≥0.007     ≥0.003         –      –
    pathfinder/performer                           ≥0.206      ≥0.06      ≥0.03      ≥0.01         –      –
    path-x/performer                              ≥0.0258      ≥0.06      ≥0.03      ≥0.01   v5e:1x1    6.7
    listops/combiner-fixed                           3.37       0.08       0.03       0.02         –      –
    text/combiner-fixed                              2.62        0.2        0.1       0.05         –      –
    retrieval/combiner-fixed                         1.41       0.03       0.01      0.007         –      –
    image/combiner-fixed                           0.0194      0.003      0.001     0.0006         –      –
    pathfinder/combiner-fixed                      0.0193      0.006      0.002      0.001         –      –
    path-x/combiner-fixed                          0.0773        0.2       0.08       0.04   v5e:1x1    4.7
    listops/combiner-axial                           3.42       0.08       0.03       0.02         –      –
    text/combiner-axial                              2.71        0.3        0.1       0.05         –      –
    retrieval/combiner-axial                         1.51       0.04       0.02      0.007         –      –
    image/combiner-axial                           0.0226      0.004      0.002     0.0007         –      –
    pathfinder/combiner-axial                      0.0225      0.007      0.003      0.001         –      –
    path-x/combiner-axial                           0.103        0.2        0.1       0.05   v5e:1x1    6.1
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

from combiner import config as common


class Sizes(NamedTuple):
    """Layers, heads, and widths: of the model, of all heads together, of feed-forward network and class head."""

    layers: int
    heads: int
    width: int
    qkv_width: int
    mlp_width: int


class Training(NamedTuple):
    """Schedule, the rate that it multiplies (not always the peak), warm-up, batch, steps, and validation interval."""

    schedule: str
    rate: float
    warmup_steps: int
    batch_size: int
    steps: int
    eval_every: int


class Settings(NamedTuple):
    """The benchmark's settings of a task."""

    task: str
    sizes: Sizes
    training: Training
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    dropout: float = 0.1
    attention_dropout: float = 0.1
    pool: str = 'cls'
    positions: str = 'sinusoid'


TASKS = {
    'listops': Settings(
        'lra_listops', Sizes(4, 8, 512, 512, 1024), Training('rsqrt', 0.05, 1_000, 32, 5_000, 50), weight_decay=0.1
    ),
    'text': Settings(
        'lra_text', Sizes(4, 4, 256, 256, 1024), Training('rsqrt', 0.05, 8_000, 32, 20_000, 100), weight_decay=0.1
    ),
    'retrieval': Settings(
        'lra_retrieval', Sizes(4, 4, 128, 128, 512), Training('rsqrt', 0.05, 8_000, 32, 5_000, 100), weight_decay=0.1
    ),
    'image': Settings(
        'lra_image',
        Sizes(1, 1, 32, 32, 64),
        Training('cosine', 5e-4, 175, 256, 35_000, 175),
        dropout=0.3,
        attention_dropout=0.2,
        positions='learned',
    ),
    'pathfinder': Settings(
        'lra_pathfinder', Sizes(1, 2, 32, 16, 32), Training('cosine', 1e-3, 312, 512, 62_400, 312), pool='mean'
    ),
    'pathx': Settings(
        'lra_pathfinder',
        Sizes(1, 2, 32, 16, 32),
        Training('cosine', 1e-3, 2_500, 64, 500_000, 2_500),
        clip_norm=1.0,
        attention_dropout=0.0,
        pool='mean',
        positions='learned',
    ),
}

# Settings that the benchmark gives to single models.
MODELS: dict[str, dict[str, dict[str, Any]]] = {
    'image': {
        'full': {'sizes': Sizes(1, 8, 128, 64, 128)},
        'linear': {'sizes': Sizes(1, 8, 128, 64, 128)},
        'linformer': {'sizes': Sizes(1, 8, 128, 64, 128)},
        'performer': {'sizes': Sizes(1, 8, 128, 64, 128)},
        'fixed': {'sizes': Sizes(1, 8, 128, 64, 128)},
        'synthesizer': {'sizes': Sizes(1, 8, 128, 64, 128)},
        'local': {'sizes': Sizes(1, 2, 128, 64, 128), 'pool': 'mean'},
        'longformer': {'sizes': Sizes(4, 4, 128, 64, 128), 'pool': 'mean'},
        'reformer': {'sizes': Sizes(4, 8, 64, 32, 64)},
        'bigbird': {'sizes': Sizes(1, 4, 128, 64, 128)},
        'sinkhorn': {'weight_decay': 0.7, 'dropout': 0.1},
    },
    'pathfinder': {
        'full': {'sizes': Sizes(4, 4, 32, 16, 32), 'dropout': 0.2},
        'local': {'sizes': Sizes(2, 4, 64, 32, 64)},
        'fixed': {'sizes': Sizes(1, 8, 32, 16, 32), 'dropout': 0.2},
        'longformer': {'sizes': Sizes(2, 2, 32, 16, 32)},
        'linformer': {'sizes': Sizes(1, 2, 32, 16, 32), 'dropout': 0.2},
        'reformer': {'sizes': Sizes(2, 8, 64, 32, 64), 'dropout': 0.2},
        'sinkhorn': {'sizes': Sizes(2, 4, 32, 16, 64), 'dropout': 0.2},
        'synthesizer': {'sizes': Sizes(2, 4, 64, 32, 64), 'dropout': 0.2},
        'bigbird': {'sizes': Sizes(4, 2, 64, 32, 64), 'dropout': 0.2},
        'linear': {'sizes': Sizes(1, 2, 128, 64, 128), 'dropout': 0.2},
        'performer': {'sizes': Sizes(1, 8, 128, 64, 128), 'dropout': 0.2},
    },
}


class Small(NamedTuple):
    """The settings of a task at the small scale, for all models; sequences have a `part`-th of their full length."""

    part: int
    width: int
    batch_size: int
    steps: int
    rate: float
    positions: str
    embedding_std: float | None = None


SMALL = {
    'listops': Small(32, 64, 32, 1_500, 2e-3, 'rotary', 1.0),
    'text': Small(8, 32, 16, 1_500, 2e-3, 'rotary'),
    'retrieval': Small(8, 32, 8, 1_500, 2e-3, 'rotary'),
    'image': Small(4, 32, 32, 2_000, 2e-3, 'image'),
    'pathfinder': Small(7, 32, 32, 2_800, 2e-3, 'rotary', 1.0),
    'pathx': Small(16, 32, 8, 3_000, 1e-3, 'image'),
}


def get_config(argument: str = '') -> Any:
    """Returns the config for an argument such as 'task=pathfinder,attention=combiner_fixed,scale=cpu'."""
    args = common.parse(
        argument, task='listops', attention='combiner_fixed', difficulty='', size=0, pretrain='none', scale='full'
    )
    if args.task not in TASKS:
        raise ValueError(f'task={args.task}: choose {", ".join(TASKS)}')
    for name in ('difficulty', 'size'):
        if getattr(args, name) and args.task != 'pathfinder':
            raise ValueError(f'{name}={getattr(args, name)}: only task=pathfinder has one, not {args.task}')
    pick = common.at(args.scale)
    small, settings = SMALL[args.task], _settings(args)

    config = common.base()
    config.task = settings.task
    training = settings.training
    config.steps = pick(training.steps, 2_000, 30, small=small.steps)

    options, length, row = _options(args)
    config.data.options.update(options)
    config.data.options.pretrain = args.pretrain
    sequences = 2 if args.task == 'retrieval' else 1
    tokens = pick(training.batch_size * length * sequences, 32_768 if row else 16_384, 4_096)  # per step
    config.data.batch_size = pick(*3 * [max(1, tokens // (length * sequences))], small=small.batch_size)

    sizes = settings.sizes
    config.model.layers = min(sizes.layers, pick(sizes.layers, 2, 1))
    config.model.width = min(sizes.width, pick(sizes.width, 64, 32))
    config.model.heads = min(sizes.heads, pick(sizes.heads, 4, 2))
    config.model.qkv_width = config.model.width * sizes.qkv_width // sizes.width
    config.model.mlp_ratio = sizes.mlp_width / sizes.width
    config.model.dropout = settings.dropout
    config.model.mlp_dropout = pick(settings.dropout, 0.0, 0.0)  # off where results/ were made
    config.model.bias = pick('mlp', 'none', 'none')
    config.model.embedding_std = pick(1.0, None, None, small=small.embedding_std)
    # Off at CPU scales, where it would make memory and time of full attention quadratic in the length.
    weights_dropout = pick(settings.attention_dropout, 0.0, 0.0)
    config.model.attention_dropout = common.attention_dropout(args.attention, weights_dropout)
    if args.pretrain == 'none':
        config.model.pool = settings.pool
    else:
        config.model.tied = True
    config.model.positions = settings.positions
    config.model.remat = pick('full', 'none', 'none')
    config.model.attention = _attention(args, row)

    # At step s the benchmark's rate is rate · min(1, s / warmup) / √max(s, warmup), with its peak at s = warmup, or at
    # the last step if that comes first.
    rise = min(training.warmup_steps, training.steps - 1)
    peak = training.rate * rise / training.warmup_steps**1.5 if training.schedule == 'rsqrt' else training.rate
    config.optimizer.learning_rate = pick(peak, 2e-3, 2e-3, small=small.rate)
    config.optimizer.schedule = pick(*3 * [training.schedule], small='cosine')
    config.optimizer.warmup_steps = pick(rise, 100, 5)
    config.optimizer.weight_decay = settings.weight_decay
    config.optimizer.b2 = 0.98
    config.optimizer.eps = 1e-9
    config.optimizer.clip_norm = settings.clip_norm

    config.run.log_every = pick(50, 20, 10)
    config.run.eval_every = pick(training.eval_every, 200, 30, small=small.steps // 4)
    config.run.eval_examples = pick(2_000, 256, 8, small=1_000)
    config.run.test_examples = pick(None, 4_000, 32, small=2_000)
    config.run.eval_batch_size = config.data.batch_size
    config.run.checkpoint_every = pick(1_000, 200, 30, small=small.steps // 4)
    return config


def _settings(args: SimpleNamespace) -> Settings:
    """Returns the benchmark's settings of the task, with those of the model, or of the small scale."""
    if args.scale != 'small':
        return TASKS[args.task]._replace(**MODELS.get(args.task, {}).get(common.mechanism(args.attention)[0], {}))
    small = SMALL[args.task]
    sizes = Sizes(2, 4, small.width, small.width, 2 * small.width)
    return TASKS[args.task]._replace(sizes=sizes, dropout=0.0, clip_norm=1.0, pool='mean', positions=small.positions)


def _attention(args: SimpleNamespace, row: int | None) -> Any:
    """Returns the attention; at the small scale, the benchmark's windows and blocks are smaller.

    Windows, and the blocks of BigBird's windows, shrink with the length, as they would otherwise hold whole sequences;
    other blocks, and the summaries in them, with its root, as Combiner's blocks do.
    """
    if args.scale != 'small':
        return common.attention(args.attention, row=row)
    attention = common.attention(args.attention, row=row, published=common.ONE_ROUND)
    name, given = common.mechanism(args.attention)
    part = SMALL[args.task].part
    for size, number in ({'window': 512} | given if name == 'longformer' else given).items():  # 512: the benchmark's
        if size in ('window', 'block', 'summary'):
            whole = size == 'window' or name == 'bigbird'
            attention[size] = max(1, number // part if whole else round(number / part**0.5))
    return attention


def _options(args: SimpleNamespace) -> tuple[dict[str, Any], int, int | None]:
    """Returns the options of a task, the length of its sequences, and the length of a row of its images or None."""
    task, pick = args.task, common.at(args.scale)
    if task == 'listops':  # its expressions have the same length at any scale
        short = {'length': 64, 'files': 'generated', 'expressions': 'short'}
        long = {'length': 2_000, 'files': 'generated', 'expressions': 'benchmark'}
        options = pick(long, long, long, small=short)
        return options, options['length'], None
    if task in ('text', 'retrieval'):
        length = pick(4_000, 1_000, 256, small=500)
        return {'length': length} | ({'validation': 'held_out'} if task == 'text' else {}), length, None
    of_images = {'black_is_padding': False}
    if task == 'image':
        size = pick(32, 32, 32, small=16)
        return {**of_images, 'size': size}, size * size, size
    of_drawings = {**of_images, 'files': 'generated'}
    if task == 'pathfinder':
        size = args.size or pick(32, 32, 32, small=12)
        difficulty = args.difficulty or ('easy' if size < 32 else 'intermediate')
        # On so few pixels, those that are not drawn on would be most of what is averaged.
        ink = pick(*3 * [of_drawings], small={**of_drawings, 'black_is_padding': True})
        return {**ink, 'size': size, 'difficulty': difficulty}, size * size, size
    size = pick(128, 64, 32, small=32)
    return {**of_drawings, 'size': size, 'difficulty': 'hard'}, size * size, size
