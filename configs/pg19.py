"""Language models of books, PG-19, in perplexity per word: exp(all nats / words between white space).

    python -m combiner.train --config configs/pg19.py:length=8192 --config.data.data_dir=DATA --workdir DIR
    python -m combiner.evaluate --workdir DIR

Arguments: attention=NAME (or a dotted path, module:Class; with hyper-parameters NAME+block=64),
length=2048|8192|another power of two, that at full scale, scale=full|cpu|quick.
Data: TFDS `pg19` in DATA; the first use trains a tokenizer of 32,000 pieces and stores the tokens beside it.
Published: nothing by the paper; the rows are this project's (experiments/tables/pg19.py). By others, perplexity per
word: Compressive Transformer 33.6, Routing Transformer 33.2, Perceiver AR 28.9, Transformer-VQ 26.6.
Ours: not run yet; with 32 to 128 tokens, at cpu scale: results/claims_books.md.
Hardware: full is meant for 8 accelerators of 80 GB; with fewer, --config.optimizer.accumulation=N computes a step in N
parts. cpu is meant for an hour or less on two CPU cores, quick for a minute or two; they have 4 layers of width 128 and
2 of width 32, a 4th and a 16th of the length and of the blocks, 8,192 and 1,024 tokens a step, 4,096 pieces, and
evaluate on 4,096 and 64 windows.

Chosen: all settings are those of Wiki-40B (configs/wiki40b.py), which says which of them are the authors'; evaluation
on the stream of joined books and, beside it, on each book by itself. The words are the same in both.

    parameters               length=2048  length=8192
    combiner_axial_rowmajor            –  130,130,432
    others                   111,237,632  115,956,224
"""

from typing import Any

from combiner import config as common


def get_config(argument: str = '') -> Any:
    """Returns the config for an argument such as 'attention=combiner_fixed,length=8192,scale=cpu'."""
    return common.language(argument, task='pg19')
