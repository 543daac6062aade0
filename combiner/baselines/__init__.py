"""The mechanisms that Combiner is compared with, one per file; importing this package registers them."""

from combiner.baselines import (
    axial,
    bigbird,
    compressed,
    fixed,
    linear,
    linformer,
    local,
    logsparse,
    longformer,
    performer,
    reformer,
    routing,
    sinkhorn,
    strided,
    synthesizer,
    transient_global,
)

__all__ = [
    'axial',
    'bigbird',
    'compressed',
    'fixed',
    'linear',
    'linformer',
    'local',
    'logsparse',
    'longformer',
    'performer',
    'reformer',
    'routing',
    'sinkhorn',
    'strided',
    'synthesizer',
    'transient_global',
]
