"""The mechanisms that Combiner is compared with, one per file; importing this package registers them."""

from combiner.baselines import axial, fixed, local, logsparse, longformer, routing, strided

__all__ = ['axial', 'fixed', 'local', 'logsparse', 'longformer', 'routing', 'strided']
