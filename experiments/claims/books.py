"""Perplexity per word on books: does twice the context help, at as many tokens a step?

python -m experiments.claims_books --data_dir DIR; how it works, and its options, are those of `experiments.claims`.

At `scale=cpu`: 800 steps of 4,096 tokens, 2 layers of width 64, rotary positions, so that no position is seen more
often at one length than at another, no biases, weight decay 0.01; every document of the test split is read whole, by
itself. Sequences are short because models of this size and training make no use of what is farther away than some dozen
tokens (`experiments.loss_by_position`): what twice the length brings them is half as many tokens near the beginning.
DIR may hold any long texts in the place of PG-19's.
"""

import itertools

from experiments import claims
from experiments.rows import Row
from experiments.verdicts import Claim

TOKENS = 4_096  # of a step
LENGTHS = (32, 64, 128)
PARTS = 4  # of the config's length, that at full scale, has a sequence at scale=cpu
SETTINGS = (
    'steps=800',
    'model.layers=2',
    'model.width=64',
    'model.dropout=0.0',
    'model.bias=none',
    'model.positions=rotary',
    'optimizer.warmup_steps=50',
    'optimizer.weight_decay=0.01',
    'data.options.evaluation=documents',
    'run.eval_every=400',
    'run.checkpoint_every=400',
    'run.test_examples=1000000',
)


def _model(length: int) -> str:
    return f'Combiner-Fixed, {length} tokens'


TABLE = claims.Table(
    'claims_books',
    tuple(
        Row(
            _model(length),
            'Books',
            'configs/pg19.py',
            f'attention=combiner_fixed+block=16,length={PARTS * length}',
            'word_perplexity',
            settings=(
                *SETTINGS,
                f'data.batch_size={TOKENS // length}',
                f'run.eval_examples={32 * TOKENS // length}',
                f'run.eval_batch_size={4 * TOKENS // length}',
            ),
        )
        for length in LENGTHS
    ),
    rates=(8e-3, 1.6e-2),
    claims=tuple(Claim('Books', _model(longer), _model(shorter)) for shorter, longer in itertools.pairwise(LENGTHS)),
)

if __name__ == '__main__':
    claims.command(TABLE)
