"""Dense attention and the Combiner variants, one per file; importing this package registers them."""

from combiner.attention import axial_rowmajor, fixed, full

__all__ = ['axial_rowmajor', 'fixed', 'full']
