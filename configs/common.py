"""What every config shares: the argument after the colon, and the default of every field."""

import difflib
from types import SimpleNamespace
from typing import Any

from ml_collections import ConfigDict, config_dict

# Mechanisms that lay the sequence on a grid take the length of a row, those with blocks that of a block, those with a
# stride that of a stride.
GRID = (
    'axial',
    'combiner_axial_horizontal',
    'combiner_axial_rowmajor',
    'combiner_axial_vertical',
    'combiner_mixture',
)
BLOCKS = (
    'bigbird',
    'combiner_fixed',
    'combiner_routing',
    'compressed',
    'fixed',
    'local',
    'routing',
    'sinkhorn',
    'transient_global',
)
STRIDES = ('strided',)


def parse(argument: str, **defaults: Any) -> SimpleNamespace:
    """Parses 'name=value,name=value' into the types of `defaults`; what is not given keeps its default.

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
    """The name and the hyper-parameters of a mechanism, from 'NAME' or 'NAME+hyper=value+…'.

    A value is a whole number, `true` or `false` (in any case), or text.

    Raises:
        ValueError: a part is not written so, or a hyper-parameter is given twice.
    """
    name, *given = text.split('+')
    hyper: dict[str, Any] = {}
    for item in given:
        key, separator, value = item.partition('=')
        if not separator:
            raise ValueError(f'attention {text!r}: write NAME+HYPER=VALUE, got {item!r}')
        if key in hyper:
            raise ValueError(f'attention {text!r}: give {key} once')
        whole = int(value) if value.lstrip('-').isdigit() else value
        hyper[key] = {'true': True, 'false': False}.get(value.lower(), whole)
    return name, hyper


def attention(text: str, row: int | None = None) -> Any:
    """The `attention` part; `text` is as for `mechanism`.

    Where the sequences have rows of `row` tokens, mechanisms with rows, blocks or strides get them of that length
    unless the text says otherwise; elsewhere their own defaults, which follow from the length.
    """
    name, hyper = mechanism(text)
    config = ConfigDict({'name': name})
    if row is not None:
        for names, field in ((GRID, 'columns'), (BLOCKS, 'block'), (STRIDES, 'stride')):
            if name in names:
                config[field] = row
    for key, value in hyper.items():
        config[key] = value
    return config


def base() -> Any:
    """Every field there is, with defaults; a config file sets what is particular to its data set."""
    config = ConfigDict()
    config.task = ''
    config.seed = 0
    config.steps = 0

    config.data = ConfigDict()
    config.data.batch_size = 8  # over all devices and processes
    config.data.data_dir = config_dict.placeholder(str)  # where a prepared data set lies; embedded ones need none
    config.data.options = ConfigDict()  # of the task, see the functions in combiner/data/tasks.py

    config.model = ConfigDict()
    config.model.layers = 2
    config.model.width = 64
    config.model.heads = 4
    config.model.kv_heads = config_dict.placeholder(int)  # fewer key heads than heads; None for as many
    config.model.qkv_width = config_dict.placeholder(int)  # of all heads together; None for the model's width
    config.model.mlp_ratio = 4.0
    config.model.dropout = 0.0
    config.model.attention_dropout = 0.0
    config.model.positions = 'learned'
    config.model.remat = False
    config.model.scan = True
    config.model.dtype = 'float32'  # of the computation; parameters are always float32
    config.model.attention = ConfigDict({'name': 'full'})

    config.optimizer = ConfigDict()
    config.optimizer.name = 'adamw'
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = 'cosine'
    config.optimizer.warmup_steps = 0
    config.optimizer.weight_decay = 0.0
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.95
    config.optimizer.clip_norm = 1.0  # 0 = off
    config.optimizer.accumulation = 1  # micro-batches a step
    config.optimizer.ema_decay = 0.0  # 0 = off

    config.mesh = ConfigDict()
    config.mesh.data = -1  # all devices that remain
    config.mesh.fsdp = 1
    config.mesh.model = 1

    # How often to look at the run, not what it computes: these may differ when it is continued.
    config.run = ConfigDict()
    config.run.log_every = 10
    config.run.eval_every = 100
    config.run.eval_examples = 64
    config.run.eval_batch_size = 32
    config.run.checkpoint_every = 100
    return config
