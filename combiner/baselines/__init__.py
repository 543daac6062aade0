"""The mechanisms that Combiner is compared with, one per file; importing this package registers them."""

from combiner.baselines import (
    axial,
    bigbird,
    compressed,
    fixed,
    local,
    logsparse,
    longformer,
    reformer,
    routing,
    sinkhorn,
    strided,
    transient_global,
)

__all__ = [
    'axial',
    'bigbird',
    'compressed',
    'fixed',
    'local',
    'logsparse',
    'longformer',
    'reformer',
    'routing',
    'sinkhorn',
    'strided',
    'transient_global',
]
