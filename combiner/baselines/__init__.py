"""The mechanisms that Combiner is compared with, one per file; importing this package registers them."""

from combiner.baselines import (
    axial,
    fixed,
    linear,
    linformer,
    logsparse,
    performer,
    reformer,
    routing,
    sinkhorn,
    synthesizer,
)

__all__ = [
    'axial',
    'fixed',
    'linear',
    'linformer',
    'logsparse',
    'performer',
    'reformer',
    'routing',
    'sinkhorn',
    'synthesizer',
]
