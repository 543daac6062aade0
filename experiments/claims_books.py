"""Perplexity per word on books: does a longer context help, at as many tokens a step?

python -m experiments.claims_books --data_dir DIR; how it works, and its options, are those of `experiments.claims`.

At `scale=cpu`: 1,000 steps of 4,096 tokens, 2 layers of width 64. DIR may hold any long texts in the place of PG-19's.
"""

import itertools

from experiments import claims
from experiments.rows import Row
from experiments.verdicts import Claim

TOKENS = 4_096  # of a step
LENGTHS = (64, 128, 256)
PARTS = 4  # of the config's length, that at full scale, has a sequence at scale=cpu
SETTINGS = (
    'steps=1000',
    'model.layers=2',
    'model.width=64',
    'model.dropout=0.0',
    'model.positions=rotary',
    'optimizer.warmup_steps=50',
    'run.eval_every=500',
    'run.checkpoint_every=500',
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
                f'run.eval_examples={16 * TOKENS // length}',
                f'run.eval_batch_size={2 * TOKENS // length}',
                f'run.test_examples={64 * TOKENS // length}',
            ),
        )
        for length in LENGTHS
    ),
    rates=(4e-3, 8e-3),
    claims=tuple(Claim('Books', _model(longer), _model(shorter)) for shorter, longer in itertools.pairwise(LENGTHS)),
)

if __name__ == '__main__':
    claims.command(TABLE)
