"""Accuracy on the Long Range Arena's ListOps: does every Combiner learn it?

python -m experiments.claims_listops --data_dir DIR; how it works, and its options, are those of `experiments.claims`.

At `scale=cpu`, but for 400 steps with a cosine schedule and no dropout: 8 expressions a step, 2 layers of width 64.
"""

from experiments import claims
from experiments.rows import Row

SETTINGS = (
    'steps=400',
    'optimizer.schedule=cosine',
    'optimizer.warmup_steps=50',
    'model.dropout=0.0',
    'run.eval_every=100',
    'run.test_examples=2000',
)
TABLE = claims.Table(
    'claims_listops',
    tuple(
        Row(model, 'ListOps', 'configs/lra.py', f'task=listops,attention={attention}', 'accuracy', settings=SETTINGS)
        for model, attention in claims.COMBINERS.items()
    ),
    seeds=1,
)

if __name__ == '__main__':
    claims.command(TABLE)
