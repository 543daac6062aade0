"""Dense attention and the Combiner variants, one per file; importing this package registers them."""

from combiner.attention import (
    combiner_axial_horizontal,
    combiner_axial_rowmajor,
    combiner_axial_vertical,
    combiner_fixed,
    combiner_logsparse,
    combiner_mixture,
    combiner_routing,
    combiner_tree,
    full,
)

__all__ = [
    'combiner_axial_horizontal',
    'combiner_axial_rowmajor',
    'combiner_axial_vertical',
    'combiner_fixed',
    'combiner_logsparse',
    'combiner_mixture',
    'combiner_routing',
    'combiner_tree',
    'full',
]
