"""Real English prose, the documentation inside Python and the installed packages, as SentencePiece tokens.

    python -m combiner.train --config configs/text.py:attention=combiner_fixed --workdir DIR
    python -m combiner.evaluate --workdir DIR

Arguments: task=lm|mlm (language model, or masked language model), attention=NAME (or a dotted path, module:Class; with
hyper-parameters NAME+block=32), length=N, vocab_size=N, documents=joined|packed|cropped, layers=N.
"""

from typing import Any

from configs import common

TASKS = {'lm': 'prose', 'mlm': 'prose_masked'}


def get_config(argument: str = '') -> Any:
    """The config for an argument such as 'task=mlm,attention=combiner_fixed,length=1024'."""
    args = common.parse(
        argument,
        task='lm',
        attention='combiner_fixed',
        length=512,
        vocab_size=4096,
        documents='joined',
        layers=4,
    )
    if args.task not in TASKS:
        raise ValueError(f'task={args.task}: choose {" or ".join(TASKS)}')

    config = common.base()
    config.task = TASKS[args.task]
    config.steps = 1000

    config.data.batch_size = max(1, 8192 // args.length)  # the same number of tokens a step at any length
    config.data.options.length = args.length
    config.data.options.vocab_size = args.vocab_size
    config.data.options.documents = args.documents

    config.model.layers = args.layers
    config.model.width = 128
    config.model.heads = 4
    config.model.dropout = 0.1
    config.model.tied = True
    config.model.attention = common.attention(args.attention)

    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.weight_decay = 0.1

    config.run.log_every = 20
    config.run.eval_every = 250
    config.run.checkpoint_every = 250
    return config
