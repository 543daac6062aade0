"""The common parts of config files: the argument after the colon, the default of every field, Tables 1 and 3.

A config file is a Python file, anywhere, with a function `get_config(argument)` that changes the result of `base()`.
"""

import difflib
import re
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from ml_collections import ConfigDict, config_dict

from combiner.core import registry

# A mechanism with a hyper-parameter of one of these names gets a row of the data as its grid row, block or stride.
ROW_SIZES = ('columns', 'block', 'stride')

# The paper's size; a smaller one of the same kind, for a CPU; one for all rows of a table, some minutes each on one CPU
# core; a tiny one, to check that it runs.
SCALES = ('full', 'cpu', 'small', 'quick')
_AS_CPU = object()
# At the scale small Reformer hashes once: with the 4 rounds of others, its rows would take longer than any other.
ONE_ROUND = {'reformer': {'rounds': 1}}

WORDS = {'true': True, 'false': False, 'none': None}
INTEGER = re.compile(r'-?\d+')
DECIMAL = re.compile(r'-?(\d+\.?\d*|\.\d+)(e-?\d+)?', re.IGNORECASE)


def at(scale: str) -> Callable[..., Any]:
    """Returns a function that picks the value of this scale: `pick(full, cpu, quick, small=…)`.

    Without `small`, that scale has the value of cpu.

    Raises:
        ValueError: the scale is unknown.
    """
    if scale not in SCALES:
        raise ValueError(f'scale={scale}: choose {", ".join(SCALES)}')

    def pick(full: Any, cpu: Any, quick: Any, small: Any = _AS_CPU) -> Any:
        return {'full': full, 'cpu': cpu, 'quick': quick, 'small': cpu if small is _AS_CPU else small}[scale]

    return pick


def parse(argument: str, **defaults: Any) -> SimpleNamespace:
    """Parses 'name=value,name=value' into the types of `defaults`; a missing name keeps its default.

    Raises:
        ValueError: an argument without '=', an unknown or repeated name, or a value of the wrong type.
    """
    values = {}
    for item in filter(None, (argument or '').split(',')):
        name, separator, text = item.partition('=')
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, 1)
            hint = f'did you mean {near[0]!r}? ' if near else ''
            raise ValueError(f'unknown config argument {name!r}; {hint}known: {", ".join(defaults)}')
        if not separator or name in values:
            raise ValueError(f'config argument {item!r}: give each argument once, as {name}=VALUE')
        kind = type(defaults[name])
        try:
            values[name] = {'true': True, 'false': False}[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            raise ValueError(f'config argument {item!r}: expected {name}={kind.__name__}') from None
    return SimpleNamespace(**(defaults | values))


def mechanism(text: str) -> tuple[str, dict[str, Any]]:
    """Returns the name and the hyper-parameters of a mechanism, from 'NAME' or 'NAME+hyper=value+…'.

    A value is an integer, a decimal number such as `0.9` or `1e-3`, `true`, `false` or `none` (in any case), or text.
    With `none`, a size for which the config has a value is chosen by the mechanism.

    Raises:
        ValueError: a part has another form, or a hyper-parameter is given twice.
    """
    name, *given = text.split('+')
    hyper: dict[str, Any] = {}
    for item in given:
        key, separator, value = item.partition('=')
        if not separator:
            raise ValueError(f'attention {text!r}: write NAME+HYPER=VALUE, got {item!r}')
        if key in hyper:
            raise ValueError(f'attention {text!r}: give {key} once')
        hyper[key] = _value(value)
    return name, hyper


def _value(text: str) -> Any:
    """Returns the value of a hyper-parameter that is given as text."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    if INTEGER.fullmatch(text):
        return int(text)
    return float(text) if DECIMAL.fullmatch(text) else text


def attention(text: str, row: int | None = None, published: Mapping[str, Mapping[str, Any]] | None = None) -> Any:
    """Returns the `attention` part; `text` is as for `mechanism`.

    Where the sequences have rows of `row` tokens, a mechanism (also one of a dotted path) gets that number for each of
    its `ROW_SIZES`; elsewhere it has its own defaults, which follow from the length. `published` values of a mechanism
    override these, and the text overrides both.

    Args:
        text: the mechanism and its hyper-parameters.
        row: tokens of a row.
        published: hyper-parameters of a mechanism's authors for such data, by the mechanism's name.

    Raises:
        ValueError: there are rows, and the mechanism is unknown.
    """
    name, hyper = mechanism(text)
    known = {} if row is None else registry.hyper_parameters(name)
    rows = {size: row for size in ROW_SIZES if size in known}
    # Joined before they are a ConfigDict, whose fields keep their types.
    return ConfigDict({'name': name, **rows, **(published or {}).get(name, {}), **hyper})


def attention_dropout(text: str, rate: float) -> float:
    """Returns the rate, or 0.0 for a mechanism without weights to drop; `text` is as for `mechanism`.

    Raises:
        ValueError: the mechanism is unknown.
    """
    return rate if registry.resolve(mechanism(text)[0]).supports_dropout else 0.0


def base() -> Any:
    """Returns every field, with defaults; a config file changes the fields that its data set needs."""
    config = ConfigDict()
    config.task = ''  # name of a task in combiner/data/tasks.py, or the path of another, package.module:NAME
    config.seed = 0  # of initial values, order of the data, masks and dropout
    config.steps = 0  # of the whole training
    config.init_from = config_dict.placeholder(str)  # workdir of a finished run whose backbone is the start

    config.data = ConfigDict()  # what is read
    config.data.batch_size = 8  # examples of a step, over all devices and processes
    config.data.data_dir = config_dict.placeholder(str)  # folder of a prepared data set; embedded ones need none
    config.data.options = ConfigDict()  # of the task
    config.model = ConfigDict()  # the Transformer; its head (language model, classifier, …) follows from the task
    config.model.layers = 2  # blocks of attention and feed-forward network
    config.model.width = 64  # of the input and output of a block
    config.model.heads = 4  # query heads
    config.model.kv_heads = config_dict.placeholder(int)  # fewer key heads than heads; None for as many
    config.model.qkv_width = config_dict.placeholder(int)  # of all heads together; None for the model's width
    config.model.value_width = config_dict.placeholder(int)  # of all heads together; None for qkv_width
    config.model.bias = 'none'  # which biases there are; or mlp, or all: also of attention, LayerNorm and logits
    config.model.mlp_ratio = 4.0  # hidden width of the feed-forward network over width
    config.model.dropout = 0.0  # at the end of each residual branch
    config.model.attention_dropout = 0.0  # of the joint weights of positions and summaries
    config.model.mlp_dropout = 0.0  # inside the feed-forward network
    config.model.embedding_dropout = config_dict.placeholder(float)  # of the sum of the embeddings; None for dropout
    config.model.positions = 'learned'  # position embeddings; or sinusoid, image (one for each axis), or rotary
    config.model.initialization = 'default'  # of the parameters; or sparse_transformer (Child et al. 2019)
    config.model.embedding_std = config_dict.placeholder(float)  # of tokens at first; None: see initialization
    config.model.remat = 'none'  # kept for the backward pass: none (all), dots (dense layers) or full (inputs)
    config.model.scan = True  # compile one block and loop over it; compile time does not grow with layers
    config.model.dtype = 'float32'  # of the computation; or bfloat16; parameters are always float32
    config.model.attention = ConfigDict({'name': 'full'})  # a mechanism's name and its hyper-parameters

    config.optimizer = ConfigDict()  # how a step changes the parameters
    config.optimizer.name = 'adamw'  # the update rule; or adam
    config.optimizer.learning_rate = 1e-3  # the highest, after the warm-up
    config.optimizer.schedule = 'cosine'  # of the learning rate after the warm-up; or rsqrt, or constant
    config.optimizer.warmup_steps = 0  # in which the learning rate rises linearly
    config.optimizer.weight_decay = 0.0  # decoupled; not of norms, scales, biases and embeddings; adamw only
    config.optimizer.b1 = 0.9  # decay of the mean of gradients
    config.optimizer.b2 = 0.95  # decay of the mean of their squares
    config.optimizer.eps = 1e-8  # added to the root of that mean
    config.optimizer.clip_norm = 1.0  # of all gradients together; 0 = off
    config.optimizer.accumulation = 1  # micro-batches a step
    config.optimizer.ema_decay = 0.0  # of a moving average of the parameters; 0 = off

    config.mesh = ConfigDict()  # how devices share the work; the product is the number of devices
    config.mesh.data = -1  # devices over which a batch is split; -1: all remaining devices
    config.mesh.fsdp = 1  # devices over which the batch is split, and the weights by width
    config.mesh.model = 1  # devices over which the weights are split by heads, hidden units and vocabulary
    config.mesh.context = 1  # devices over which a sequence is cut

    config.run = ConfigDict()  # how often a run logs, validates and saves; may differ when it is continued
    config.run.log_every = 10  # steps from one line of metrics to the next
    config.run.eval_every = 100  # steps from one validation to the next
    config.run.eval_examples = 64  # of the validation split
    config.run.test_examples = config_dict.placeholder(int)  # of a split, in evaluation; None for all
    config.run.eval_batch_size = 32  # over all devices and processes
    config.run.checkpoint_every = 100  # steps from one checkpoint to the next
    return config


def images(
    args: SimpleNamespace, *, row: int, dropout: float, published: Mapping[str, Mapping[str, Any]] | None = None
) -> Any:
    """Returns the settings of Table 1, for images; the config file sets the task, the length and the intervals.

    Args:
        args: `attention`, `scale`, and the `layers` at full scale, of which cpu and small have a third, quick a sixth.
        row: values in a row of an image, its channels included: a row of every grid, and a block.
        dropout: rate at full scale.
        published: as of `attention`.

    Raises:
        ValueError: the scale is unknown.
    """
    pick = at(args.scale)
    config = base()

    config.model.layers = -(-args.layers // pick(1, 3, 6))
    config.model.width = pick(512, 64, 32)
    config.model.heads = pick(8, 4, 2)
    config.model.mlp_ratio = 4.0
    config.model.dropout = pick(dropout, 0.0, 0.0)
    config.model.embedding_dropout = 0.0  # as Child et al.: at the end of residual branches only
    config.model.positions = 'image'
    config.model.tied = False
    config.model.dtype = pick('bfloat16', 'float32', 'float32')
    small = ONE_ROUND if args.scale == 'small' else {}
    config.model.attention = attention(args.attention, row=row, published={**(published or {}), **small})

    config.optimizer.learning_rate = pick(3.5e-4, 4e-3, 4e-3, small=2e-3)
    config.optimizer.warmup_steps = pick(5_000, 100, 5, small=50)
    config.optimizer.weight_decay = 0.01

    config.run.log_every = pick(100, 20, 10)
    return config


def published_for_text(length: int, part: int, heads: int) -> dict[str, dict[str, int]]:
    """Returns the settings of mechanisms' authors for text, a `part`-th of them in sequences a `part`-th as long.

    For BigBird, blocks of 64. For Routing, from its code for WikiText-103: half the heads local, in blocks of 256, and
    clusters of 512 tokens, as many as such clusters fill a sequence. Combiner-Routing has these clusters in all heads.
    """
    window = 512 // part
    clusters = max(1, length // window)
    return {
        'bigbird': {'block': 64 // part},
        'routing': {'local_heads': heads // 2, 'block': 256 // part, 'clusters': clusters, 'window': window},
        'combiner_routing': {'clusters': clusters, 'block': window},
    }


def language(argument: str, task: str) -> Any:
    """Returns the config of a language model, masked or not, with the settings of Table 3.

    Args:
        argument: of the config, `attention=NAME,length=N,scale=NAME`: the length at full scale, of which cpu, small
            and quick take a 4th, an 8th and a 16th.
        task: name of the task.

    Raises:
        ValueError: see `parse` and `at`, or the length does not divide.
    """
    args = parse(argument, attention='combiner_fixed', length=2048, scale='full')
    pick = at(args.scale)
    part = pick(1, 4, 16, small=8)
    length, rest = divmod(args.length, part)
    tokens = pick(262_144, 8_192, 1_024, small=2_048)  # of a step: 128 sequences of 2,048
    if rest or not 2 <= length <= tokens or tokens % length:
        raise ValueError(f'length={args.length}: choose a power of two from {2 * part} to {tokens * part}')

    config = base()
    config.task = task
    config.steps = pick(125_000, 1_500, 30, small=2_400)

    config.data.batch_size = tokens // length
    config.data.options.length = length
    config.data.options.vocab_size = pick(32_000, 4_096, 4_096, small=1_024)
    config.data.options.documents = 'joined'
    config.data.options.stride = 0
    config.data.options.evaluation = 'stream'

    config.model.layers = pick(12, 4, 2, small=2)
    config.model.width = pick(768, 128, 32, small=64)
    config.model.heads = pick(12, 4, 2)
    # Learned positions need more training at the greater length, which small models do not get.
    config.model.positions = pick('learned', 'learned', 'learned', small='rotary')
    config.model.dropout = 0.0
    config.model.bias = 'all'
    config.model.tied = True
    config.model.remat = pick('dots', 'none', 'none')
    config.model.dtype = pick('bfloat16', 'float32', 'float32')
    published = published_for_text(length, part, config.model.heads)
    config.model.attention = attention(args.attention, row=128 // part, published=published)

    config.optimizer.learning_rate = pick(3e-4, 3e-3, 3e-3, small=8e-3)
    config.optimizer.warmup_steps = pick(10_000, 200, 5, small=50)
    config.optimizer.weight_decay = 0.0

    config.run.log_every = pick(100, 20, 10)
    config.run.eval_every = pick(5_000, 250, 30, small=1_200)
    config.run.eval_examples = pick(1_048_576, 131_072, 4_096) // length
    config.run.test_examples = pick(None, 4_096, 64, small=None)
    config.run.eval_batch_size = pick(65_536, 8_192, 1_024) // length
    config.run.checkpoint_every = pick(5_000, 250, 30, small=600)
    return config
