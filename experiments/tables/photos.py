"""Bits/dim on photographs never trained on, by mechanism, at equal architecture, data, steps and seed.

    python -m experiments.tables.photos [--names combiner_axial_rowmajor,axial] [--workdir runs/photos]
        [--results results]

Options and procedure: `experiments.harness.ranking`. The photographs are embedded. Each row takes some minutes on two
CPU cores.
"""

import combiner
from combiner.core import registry
from experiments.harness import ranking

TABLE = ranking.Ranking(
    name='photos',
    column='Photographs',
    config='configs/photos.py',
    metric='bits_per_dim',
    mechanisms=tuple(name for name in combiner.names() if True in registry.resolve(name).supported_causal),
)

if __name__ == '__main__':
    ranking.command(TABLE)
