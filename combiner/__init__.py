"""Combiner: full attention with sparse computation cost (Ren et al., NeurIPS 2021), in JAX and Flax."""

from combiner.functional import attend, attention_fn, names, pattern

__all__ = ['attend', 'attention_fn', 'names', 'pattern']
