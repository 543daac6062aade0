"""Bits/dim of crops of photographs: does each Combiner beat the sparse attention that it is built on?

    python -m experiments.claims.photographs

Options and procedure: `experiments.harness.claim_table`. The photographs are embedded. At `scale=cpu`: 800 steps of 8
crops of 16×16×3 values, 2 layers of width 64.
"""

from experiments.harness import claim_table
from experiments.harness.row import Row
from experiments.harness.verdicts import Claim

SETTINGS = (
    'steps=800',
    'optimizer.warmup_steps=50',
    'run.eval_every=200',
    'run.checkpoint_every=400',
    'run.test_examples=500',
)
TABLE = claim_table.ClaimTable(
    'claims_photographs',
    tuple(
        Row(model, 'Photographs', 'configs/photos.py', f'attention={attention}', 'bits_per_dim', settings=SETTINGS)
        for model, attention in claim_table.IMAGE_MODELS.items()
    ),
    rates=(2e-3, 4e-3, 8e-3),
    # On ImageNet 64×64, which the tiles stand for, the paper has equal values for these two.
    claims=(*claim_table.about_images('Photographs'), Claim('Photographs', 'Combiner-Mixture', 'Combiner-Axial')),
)

if __name__ == '__main__':
    claim_table.command(TABLE)
