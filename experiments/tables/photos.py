"""Bits/dim on photographs never trained on, by mechanism, at equal architecture, data, steps and seed.

    python -m experiments.tables.photos [--rows 'photographs/*axial*'] [--workdir runs/photos]

Options and procedure: `experiments.harness.runner`; the scale is cpu by default. The photographs are embedded. Each row
takes some minutes on two CPU cores. `experiments.tables.page` ranks the rows, with image codecs, in docs/results.md.
"""

import combiner
from combiner.core import registry
from experiments.harness import runner
from experiments.harness.row import Row

ROWS = tuple(
    Row(name, 'Photographs', 'configs/photos.py', f'attention={name}', 'bits_per_dim')
    for name in combiner.names()
    if True in registry.resolve(name).supported_causal
)

if __name__ == '__main__':
    runner.command(ROWS, 'photos', scale='cpu', workdir='runs/photos')
