"""Combiner: full attention with sparse computation cost (Ren et al., NeurIPS 2021), in JAX and Flax."""

from typing import TYPE_CHECKING, Any

from combiner.core.mechanism import Mechanism
from combiner.core.module import Attention
from combiner.functional import attend, attention_fn, names, pattern

if TYPE_CHECKING:
    from combiner.weights import load

__all__ = ['Attention', 'Mechanism', 'attend', 'attention_fn', 'load', 'names', 'pattern']

__version__ = '0.2.0'


def __getattr__(name: str) -> Any:
    """Imports `load` when it is used first: the models that it builds need more than the attentions do."""
    if name == 'load':
        from combiner.weights import load

        return load
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
