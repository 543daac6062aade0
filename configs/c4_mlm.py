"""Masked language models of C4, 15 % of the tokens masked as in BERT, in perplexity per masked token: Table 5.

    python -m combiner.train --config configs/c4_mlm.py:length=8192 --config.data.data_dir=DATA --workdir DIR
    python -m combiner.evaluate --workdir DIR

Arguments: attention=NAME (or a dotted path, module:Class; with hyper-parameters NAME+block=64),
length=2048|8192|another power of two, that at full scale, scale=full|cpu|quick.
Data: TFDS `c4/en` in DATA, whose validation split is evaluated on; 0.1 % of its training split is held out to validate
on. The first use trains a tokenizer of 32,000 pieces and stores the tokens beside it.
Published, perplexity: 4.552 for the Transformer, 4.809 for Combiner-Axial and 5.170 for Combiner-Fixed at 2,048 tokens,
4.190 and 4.139 for the last two at 8,192; all rows are in experiments/tables/table5.py.
Ours: not run yet.
Hardware: full is meant for 8 accelerators of 80 GB; with fewer, --config.optimizer.accumulation=N computes a step in N
parts. cpu is meant for an hour or less on two CPU cores, quick for a minute or two; they have 4 layers of width 128 and
2 of width 32, a 4th and a 16th of the length and of the blocks, 8,192 and 1,024 tokens a step, 4,096 pieces, and
evaluate on 4,096 and 64 windows.

From the paper: 15 % of the tokens are masked as in BERT.
From the authors' TensorFlow config for text: no dropout, no weight decay, learned positions, the embedding as last
matrix too, biases in all dense layers, LayerNorms and the logits, training and evaluation on joined documents.
Chosen, as both are silent: all else, as for Wiki-40B (configs/wiki40b.py), Combiner-Axial's projected keys included.
Evaluation prints the figure on each document by itself too; each of the two draws masks of its own, once and for all.
BigBird has its own paper's blocks of 64, of which each sees 3 random ones and two global ones, the first and the last,
as in its authors' code. Combiner-Routing has Routing's clusters of 512 tokens in all heads, and none is local (chosen).

    parameters               length=2048  length=8192
    combiner_axial_rowmajor  125,411,072  130,129,664
    others                   111,236,864  115,955,456
"""

from typing import Any

from combiner import config as common


def get_config(argument: str = '') -> Any:
    """Returns the config for an argument such as 'attention=combiner_fixed,length=8192,scale=cpu'."""
    return common.language(argument, task='c4_masked')
