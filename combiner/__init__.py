"""Combiner: full attention with sparse computation cost (Ren et al., NeurIPS 2021), in JAX and Flax."""

from combiner.core.mechanism import Mechanism
from combiner.core.module import Attention
from combiner.functional import attend, attention_fn, names, pattern

__all__ = ['Attention', 'Mechanism', 'attend', 'attention_fn', 'names', 'pattern']

__version__ = '0.2.0'
