"""Bits/dim of tiles of ImageNet's 64×64 images: does each Combiner beat the sparse attention that it is built on?

    python -m experiments.claims.tiles --data_dir DIR

Options and procedure: `experiments.harness.claim_table`. At `scale=cpu`: 1,200 steps of 4 tiles of 16×16×3 values, 2
layers of width 64. DIR may hold any photographs in place of ImageNet's. Bits/dim of tiles must not be compared with
those of whole images: a tile has less context.
"""

from experiments.harness import claim_table
from experiments.harness.row import Row

SETTINGS = (
    'steps=1200',
    'data.batch_size=4',
    'optimizer.warmup_steps=50',
    'run.eval_every=400',
    'run.checkpoint_every=600',
    'run.eval_examples=416',
    'run.eval_batch_size=16',
    'run.test_examples=500',
)
TABLE = claim_table.ClaimTable(
    'claims_tiles',
    tuple(
        Row(
            model,
            'Tiles',
            'configs/imagenet64.py',
            f'attention={attention},tile=16',
            'bits_per_dim',
            settings=SETTINGS,
        )
        for model, attention in claim_table.IMAGE_MODELS.items()
    ),
    rates=(2e-3, 4e-3),
    claims=claim_table.about_images('Tiles'),
)

if __name__ == '__main__':
    claim_table.command(TABLE)
