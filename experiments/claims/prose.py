"""Perplexity on prose: do the Combiners beat the sparse attention that they are built on?

    python -m experiments.claims.prose

Options and procedure: `experiments.harness.claim_table`. The prose is embedded. At `scale=cpu`: 600 steps of 4,096
tokens, 2 layers of width 64.
"""

from experiments.harness import claim_table
from experiments.harness.row import Row
from experiments.harness.verdicts import Claim

SETTINGS = (
    'steps=600',
    'model.width=64',
    'optimizer.warmup_steps=50',
    'run.eval_every=150',
    'run.checkpoint_every=300',
)
MODELS = {
    'Fixed': ('fixed+block=32', 512),
    'Combiner-Fixed': ('combiner_fixed+block=32', 512),
    'Axial': ('axial+columns=32', 512),
    'Combiner-Axial': ('combiner_axial_rowmajor+columns=32', 512),
    'Combiner-Fixed, half the length': ('combiner_fixed+block=32', 256),
}
TABLE = claim_table.ClaimTable(
    'claims_prose',
    tuple(
        Row(
            model,
            'Prose',
            'configs/text.py',
            f'attention={attention},length={length},layers=2',
            'perplexity',
            settings=(*SETTINGS, f'data.batch_size={4_096 // length}', f'run.eval_examples={32_768 // length}'),
        )
        for model, (attention, length) in MODELS.items()
    ),
    rates=(2e-3, 4e-3, 8e-3),
    claims=(
        Claim('Prose', 'Combiner-Fixed', 'Fixed'),
        Claim('Prose', 'Combiner-Axial', 'Axial'),
        Claim('Prose', 'Combiner-Fixed', 'Combiner-Fixed, half the length'),
    ),
)

if __name__ == '__main__':
    claim_table.command(TABLE)
