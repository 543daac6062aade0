"""My first run: a Transformer of one layer on 16×16 crops of photographs, 768 tokens each.

    combiner-train --config config.py --workdir runs/mine
    combiner-train --config config.py:attention=full --workdir runs/full
    combiner-train --config config.py:steps=600 --workdir runs/longer --config.optimizer.learning_rate=2e-3

Arguments: attention=NAME (a registered name or a path module:Class, with hyper-parameters NAME+block=24), steps=N.
Data: inside the installed package; nothing to download.
"""

from combiner import config as common


def get_config(argument=''):
    """Returns the config for an argument such as 'attention=full,steps=600'."""
    args = common.parse(argument, attention='mylab.past:WholePast', steps=200)
    config = common.base()  # every field with its default: print(config) shows them
    config.task = 'photos16'
    config.steps = args.steps

    config.data.batch_size = 4
    config.model.layers, config.model.width, config.model.heads = 1, 32, 2
    config.model.positions = 'image'
    config.model.tied = False
    config.model.attention = common.attention(args.attention, row=48)  # a row of pixels: `block=48`

    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_steps = min(20, args.steps // 2)

    config.run.log_every = 20
    config.run.eval_every = config.run.checkpoint_every = min(100, args.steps)
    config.run.eval_examples = 32
    config.run.test_examples = 64
    return config
