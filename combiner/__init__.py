"""Combiner: full attention with sparse computation cost."""
