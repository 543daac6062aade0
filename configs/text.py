"""Language models of English prose, the documentation in Python and the installed packages, as SentencePiece tokens.

    python -m combiner.train --config configs/text.py:attention=combiner_fixed --workdir DIR
    python -m combiner.evaluate --workdir DIR

Arguments: task=lm|mlm (language model, or masked language model), attention=NAME (or a dotted path, module:Class; with
hyper-parameters NAME+block=32), length=N and layers=N (0 for those of the scale), vocab_size=N,
documents=joined|packed|cropped, scale=cpu|quick|full.
Data: embedded; the first use trains the tokenizer. The paper has no such row; all settings are this project's choice.
Hardware: cpu, the default, is for two CPU cores: 4 layers of width 128, 512 tokens. quick takes a minute or two: 2
layers of width 32, 128 tokens, 64 windows to evaluate on. full has the architecture of Table 3 (configs/wiki40b.py) and
2,048 tokens, and needs an accelerator; it was not run yet.
Validation and the first result of evaluation are of each document separately (evaluation=documents); the second result
is of the stream of documents.
"""

from typing import Any

from combiner import config as common

TASKS = {'lm': 'prose', 'mlm': 'prose_masked'}


def get_config(argument: str = '') -> Any:
    """Returns the config for an argument such as 'task=mlm,attention=combiner_fixed,length=1024'."""
    args = common.parse(
        argument,
        task='lm',
        attention='combiner_fixed',
        length=0,
        vocab_size=4096,
        documents='joined',
        layers=0,
        scale='cpu',
    )
    if args.task not in TASKS:
        raise ValueError(f'task={args.task}: choose {" or ".join(TASKS)}')

    pick = common.at(args.scale)
    length = args.length or pick(2_048, 512, 128)

    config = common.base()
    config.task = TASKS[args.task]
    config.steps = pick(10_000, 1_000, 30)

    tokens = pick(65_536, 8_192, 1_024)  # per step, at any length
    config.data.batch_size = max(1, tokens // length)
    config.data.options.length = length
    config.data.options.vocab_size = args.vocab_size
    config.data.options.documents = args.documents
    config.data.options.stride = 0
    config.data.options.evaluation = 'documents'

    config.model.layers = args.layers or pick(12, 4, 2)
    config.model.width = pick(768, 128, 32)
    config.model.heads = pick(12, 4, 2)
    config.model.dropout = 0.1
    config.model.tied = True
    config.model.dtype = pick('bfloat16', 'float32', 'float32')
    config.model.attention = common.attention(args.attention)

    config.optimizer.learning_rate = pick(3e-4, 3e-3, 3e-3)
    config.optimizer.warmup_steps = pick(1_000, 100, 5)
    config.optimizer.weight_decay = 0.1

    config.run.log_every = pick(100, 20, 10)
    config.run.eval_every = pick(1_000, 250, 30)
    config.run.eval_examples = pick(64, 64, 16)
    config.run.test_examples = pick(None, None, 64)
    config.run.checkpoint_every = pick(1_000, 250, 30)
    return config
