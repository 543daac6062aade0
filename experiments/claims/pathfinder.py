"""Accuracy on a small Pathfinder: does every Combiner learn it?

    python -m combiner.data.generate lra_pathfinder16_easy --data_dir DIR --limit 6000
    python -m experiments.claims.pathfinder --data_dir DIR

Options and procedure: `experiments.harness.claim_table`. At `scale=cpu`: 3,000 steps of 32 images of 16×16, 2 layers of
width 32. Each of the 6,000 images is read 16 times. The distance between the markers predicts most labels of this set
(combiner/data/lra/pathfinder.py), so an accuracy above chance does not prove that contours are followed.
"""

from experiments.harness import claim_table
from experiments.harness.row import Row

SETTINGS = (
    'steps=3000',
    'data.batch_size=32',
    'data.options.black_is_padding=true',
    'model.layers=2',
    'model.heads=4',
    'model.qkv_width=32',
    'model.mlp_ratio=2.0',
    'model.positions=image',
    'model.dropout=0.0',
    'optimizer.learning_rate=1e-3',
    'optimizer.clip_norm=1.0',
    'run.log_every=50',
    'run.eval_every=1000',
    'run.eval_examples=1000',
    'run.eval_batch_size=100',
    'run.checkpoint_every=1000',
    'run.test_examples=2000',
)
TABLE = claim_table.ClaimTable(
    'claims_pathfinder',
    tuple(
        Row(
            model,
            'Pathfinder 16×16',
            'configs/lra.py',
            f'task=pathfinder,difficulty=easy,size=16,attention={attention}',
            'accuracy',
            settings=SETTINGS,
        )
        for model, attention in claim_table.COMBINERS.items()
    ),
    seeds=1,
)

if __name__ == '__main__':
    claim_table.command(TABLE)
