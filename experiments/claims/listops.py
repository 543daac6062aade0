"""Accuracy on the Long Range Arena's ListOps: what does every Combiner learn of it?

    python -m experiments.claims.listops --data_dir DIR

Options and procedure: `experiments.harness.claim_table`. At `scale=cpu`, but for 400 steps with a cosine schedule and
without dropout: 8 expressions per step, 2 layers of width 64.
"""

from experiments.harness import claim_table
from experiments.harness.row import Row

SETTINGS = (
    'steps=400',
    'optimizer.schedule=cosine',
    'optimizer.warmup_steps=50',
    'model.dropout=0.0',
    'run.eval_every=100',
    'run.test_examples=2000',
)
TABLE = claim_table.ClaimTable(
    'claims_listops',
    tuple(
        Row(model, 'ListOps', 'configs/lra.py', f'task=listops,attention={attention}', 'accuracy', settings=SETTINGS)
        for model, attention in claim_table.COMBINERS.items()
    ),
    seeds=1,
)

if __name__ == '__main__':
    claim_table.command(TABLE)
