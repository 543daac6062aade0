"""Masked language models of C4, 15 % of the tokens masked as in BERT, in perplexity per masked token: Table 5.

    python -m combiner.train --config configs/c4_mlm.py:length=8192 --config.data.data_dir=DATA --workdir DIR
    python -m combiner.evaluate --workdir DIR

Arguments: attention=NAME, length=N, scale=full|cpu|small|quick, as for Wiki-40B.
Data: TFDS `c4/en` in DATA. Its validation split is the test split here; 0.1 % of its training split is held out for
validation. The first use trains a tokenizer of 32,000 pieces, and stores it and the tokens in DATA.
Published, perplexity: 4.552 for the Transformer, 4.809 for Combiner-Axial and 5.170 for Combiner-Fixed at 2,048 tokens,
4.190 and 4.139 for the last two at 8,192; all rows: experiments/tables/table5.py.
Ours: not run at full scale yet; most rows at scale=small on the embedded prose: docs/results.md.
Hardware and scales: those of Wiki-40B (configs/wiki40b.py); at scale=small the masked text is the embedded prose, as C4
can only be prepared on a cluster (docs/data.md), and learning rates are 0.004 and 0.008: 0.016 is too high.

From the paper: 15 % of the tokens are masked as in BERT.
From the authors' TensorFlow config for text: no dropout, no weight decay, learned positions, output weights tied to the
embedding, biases in all dense layers (but those of projected keys), LayerNorms and the logits, training and evaluation
on joined documents. Chosen, as neither says: all else, as for Wiki-40B, including Combiner-Axial's projected keys.
Evaluation prints a second perplexity, of each document separately; the masks of the two differ, and each are drawn once
and for all. BigBird has its own paper's blocks of 64; each attends to 3 random ones and to two global ones, the first
and the last, as in its authors' code. Combiner-Routing has Routing's clusters of 512 tokens in all heads, no head is
local (chosen).

    parameters               length=2048  length=8192
    combiner_axial_rowmajor  125,411,072  130,129,664
    others                   111,236,864  115,955,456

Time of training at full size, computed, as no row has run on an accelerator: the TFLOP of a step by formula, and the
hours of all steps on one chip (on N chips, divide by N), at its published peak times an assumed MFU of 30 %
(`python -m experiments.tables.hours`); ≥ is without the attention, where it has no formula. The smallest slice of v5e
(1, 4, 8 or 16 chips) that holds a step, and the GiB on each chip, as XLA plans it (docs/accelerators.md):

    chip-hours, computed for 30% MFU                TFLOP        v5e        v5p       h100     slice    GiB
    c4/transformer-2k                                 232        136         58         27   v5e:2x4   10.6
    c4/bigbird-2k                                     190        112         48         22   v5e:2x4   12.7
    c4/performer-2k                                  ≥172       ≥101        ≥43        ≥20   v5e:4x4   11.4
    c4/fixed-2k                                       176        104         44         21   v5e:2x4   10.6
    c4/fixed-8-columns-2k                             179        105         45         21   v5e:2x4   10.6
    c4/combiner-fixed-2k                              176        104         44         21   v5e:2x4   11.6
    c4/axial-2k                                       176        104         44         21   v5e:2x4   10.6
    c4/combiner-axial-2k                              180        106         45         21   v5e:2x4   14.1
    c4/routing-2k                                    ≥172       ≥101        ≥43        ≥20   v5e:2x4   10.6
    c4/combiner-routing-2k                            198        117         50         23   v5e:2x4   11.2
    c4/bigbird-8k                                     191        112         48         22   v5e:2x4   11.7
    c4/combiner-axial-8k                              181        107         46         21   v5e:2x4   14.1
    c4/combiner-fixed-8k                              178        104         45         21   v5e:2x4   11.7
"""

from typing import Any

from combiner import config as common


def get_config(argument: str = '') -> Any:
    """Returns the config for an argument such as 'attention=combiner_fixed,length=8192,scale=cpu'."""
    config = common.language(argument, task='c4_masked')
    if common.parse(argument, attention='combiner_fixed', length=2048, scale='full').scale == 'small':
        config.task = 'prose_masked'
        config.optimizer.learning_rate = 4e-3
    return config
