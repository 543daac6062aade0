"""Language models of the English Wikipedia, Wiki-40B-En, in perplexity per SentencePiece token: Table 3.

    python -m combiner.train --config configs/wiki40b.py:length=8192 --config.data.data_dir=DATA --workdir DIR
    python -m combiner.evaluate --workdir DIR

Arguments: attention=NAME (or a dotted path, module:Class; with hyper-parameters NAME+block=64), length=N, a power of
two such as 2048 or 8192, at full scale, scale=full|cpu|small|quick.
Data: TFDS `wiki40b/en` in DATA. The first use trains a tokenizer of 32,000 pieces, and stores it and the tokens in
DATA.
Published, perplexity: 17.26 for the Transformer, 17.56 for Combiner-Axial and 17.70 for Combiner-Fixed at 2,048 tokens,
16.49 and 16.60 for the last two at 8,192; all rows: experiments/tables/table3.py.
Ours: not run at full scale yet; at scale=small on stand-ins: docs/results.md.
Hardware: full is for 8 accelerators of 16 GB, Performer for 16 (see below); with fewer,
--config.optimizer.accumulation=N computes a step in N parts. cpu takes an hour or less on two CPU cores, quick a minute
or two; they have 4 layers of width 128 and 2 of width 32, a 4th and a 16th of the length and of the blocks, 8,192 and
1,024 tokens per step, 4,096 pieces, and evaluate on 4,096 and 64 windows. small is one setting for all rows of a table,
made for minutes on one CPU core: 2,400 steps of 2,048 tokens (the Transformer's perplexity is 6 % lower than after half
as many steps of twice the tokens), 2 layers of width 64 with 4 heads, an 8th of the length, blocks and clusters, 1,024
pieces, rotary positions, as learned ones need more training at the greater length, and learning rates of 0.008 and
0.016.

From the paper and the authors' TensorFlow config: 12 layers of width 768 with 12 heads, 125,000 steps of 128 sequences,
AdamW, learning rate 3e-4 after 10,000 steps of warm-up and then cosine decay to 0, clipping at 1.0, blocks of 128,
bfloat16, 32,000 pieces; from that config alone: no dropout, none on attention weights either, no weight decay, learned
positions, output weights tied to the embedding, biases in all dense layers (but those of projected keys), LayerNorms
and the logits, and documents joined one after the other, for training and for evaluation.
Chosen, as neither says: a block keeps the results of its dense layers for the backward pass (remat, dots: the shortest
roofline of the three for combiner_fixed on eight chips of v5p); 32 sequences at 8,192 tokens, for the same number of
tokens per step; β = (0.9, 0.95), grid rows of 128, a feed-forward network of 4 times the width with GELU, initial
values. Combiner-Axial is the row-major one with projected keys, as in the authors' config, which makes it larger than
the others.
Baselines. Routing, from its authors' code for WikiText-103 (the paper does not describe its row): half the heads local,
in blocks of 256 that attend to the block before too, the others with clusters of 512 tokens, 4 at 2,048; as published,
its clusters depend on later tokens. Fixed: one summary column, as the paper's comparison has one set of positions; the
row with 8 columns has the fewest of the 8 to 32 that Child et al. advise (at small 8 of the 16 positions of a block).
Performer: 256 softmax features, from its paper, drawn once (chosen).
Evaluation cuts the stream of joined documents into windows that do not overlap. It prints a second perplexity, of each
document cut separately (evaluation=documents): there only documents longer than 2,048 tokens can profit from 8,192.

    parameters               length=2048  length=8192
    combiner_axial_rowmajor  125,411,840  130,130,432
    others                   111,237,632  115,956,224

Time of training at full size, computed, as no row has run on an accelerator: the TFLOP of a step by formula, and the
hours of all steps on one chip (on N chips, divide by N), at its published peak times an assumed MFU of 30 %
(`python -m experiments.tables.hours`); ≥ is without the attention, where it has no formula. The smallest slice of v5e
(1, 4, 8 or 16 chips) that holds a step, and the GiB on each chip, as XLA plans it (docs/accelerators.md):

    chip-hours, computed for 30% MFU                TFLOP        v5e        v5p       h100     slice    GiB
    wiki-40b/transformer-2k                           202        119         51         24   v5e:2x4   10.5
    wiki-40b/performer-2k                            ≥172       ≥101        ≥43        ≥20   v5e:4x4   11.8
    wiki-40b/routing-2k                              ≥172       ≥101        ≥43        ≥20   v5e:2x4   10.5
    wiki-40b/fixed-2k                                 174        102         44         20   v5e:2x4   10.5
    wiki-40b/fixed-8-columns-2k                       176        103         44         21   v5e:2x4   10.5
    wiki-40b/combiner-fixed-2k                        174        102         44         20   v5e:2x4   11.6
    wiki-40b/axial-2k                                 174        102         44         20   v5e:2x4   10.5
    wiki-40b/combiner-axial-2k                        178        104         45         21   v5e:2x4   14.1
    wiki-40b/transformer-8k                           291        171         73         34   v5e:2x4   10.7
    wiki-40b/combiner-fixed-8k                        175        103         44         20   v5e:2x4   11.7
    wiki-40b/combiner-axial-8k                        179        105         45         21   v5e:2x4   14.1
"""

from typing import Any

from combiner import config as common


def get_config(argument: str = '') -> Any:
    """Returns the config for an argument such as 'attention=combiner_fixed,length=8192,scale=cpu'."""
    return common.language(argument, task='wiki40b')
