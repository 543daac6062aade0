"""Dense attention and the Combiner variants, one per file; importing this package registers them."""

from combiner.attention import combiner_axial_rowmajor, combiner_fixed, combiner_routing, full

__all__ = ['combiner_axial_rowmajor', 'combiner_fixed', 'combiner_routing', 'full']
