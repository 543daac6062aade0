"""Language models of books, PG-19, in perplexity per word: exp(all nats / words between white space).

    python -m combiner.train --config configs/pg19.py:length=8192 --config.data.data_dir=DATA --workdir DIR
    python -m combiner.evaluate --workdir DIR

Arguments: attention=NAME, length=N, scale=full|cpu|small|quick, as for Wiki-40B.
Data: TFDS `pg19` in DATA. The first use trains a tokenizer of 32,000 pieces, and stores it and the tokens in DATA.
Published: nothing by the paper; the rows are this project's (experiments/tables/pg19.py). By others, perplexity per
word: Compressive Transformer 33.6, Routing Transformer 33.2, Perceiver AR 28.9, Transformer-VQ 26.6.
Ours: not run at full scale yet; at scale=small on other books: docs/results.md; with 32 to 128 tokens, at cpu scale:
results/claims_books.md.
Hardware and scales: those of Wiki-40B (configs/wiki40b.py).

Chosen: all settings are those of Wiki-40B, whose card says which of them are the authors'. Evaluation is on the stream
of joined books and, as a second value, on each book separately. Both count the same words.

    parameters               length=2048  length=8192
    combiner_axial_rowmajor  125,411,840  130,130,432
    others                   111,237,632  115,956,224

Time of training at full size, computed, as no row has run on an accelerator: the TFLOP of a step by formula, and the
hours of all steps on one chip (on N chips, divide by N), at its published peak times an assumed MFU of 30 %
(`python -m experiments.tables.hours`); ≥ is without the attention, where it has no formula. The smallest slice of v5e
(1, 4, 8 or 16 chips) that holds a step, and the GiB on each chip, as XLA plans it (docs/accelerators.md):

    chip-hours, computed for 30% MFU                TFLOP        v5e        v5p       h100     slice    GiB
    pg-19/transformer-2k                              202        119         51         24   v5e:2x4   10.5
    pg-19/combiner-fixed-2k                           174        102         44         20   v5e:2x4   11.6
    pg-19/combiner-axial-2k                           178        104         45         21   v5e:2x4   14.1
    pg-19/transformer-8k                              291        171         73         34   v5e:2x4   10.7
    pg-19/combiner-fixed-8k                           175        103         44         20   v5e:2x4   11.7
    pg-19/combiner-axial-8k                           179        105         45         21   v5e:2x4   14.1
"""

from typing import Any

from combiner import config as common


def get_config(argument: str = '') -> Any:
    """Returns the config for an argument such as 'attention=combiner_fixed,length=8192,scale=cpu'."""
    return common.language(argument, task='pg19')
