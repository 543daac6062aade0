"""Perplexity per word on books: does twice the context help, at as many tokens per step?

    python -m experiments.claims.books --data_dir DIR

Options and procedure: `experiments.harness.claim_table`. At `scale=cpu`: 800 steps of 4,096 tokens, 2 layers of width
64, no biases, weight decay 0.01, and rotary positions, so that no position is trained more often at one length than at
another. Every document of the test split is read whole and separately. Sequences are short because models of this size
and training use only the last few dozen tokens (`experiments.tables.loss_by_position`): twice the length halves the
share of tokens near a beginning, and does no more. DIR may hold any long texts in place of PG-19's.
"""

import itertools

from experiments.harness import claim_table
from experiments.harness.row import Row
from experiments.harness.verdicts import Claim

TOKENS = 4_096  # per step
LENGTHS = (32, 64, 128)
PARTS = 4  # the config's length at full scale over that at scale=cpu
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


TABLE = claim_table.ClaimTable(
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
    claim_table.command(TABLE)
