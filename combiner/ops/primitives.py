"""Rules that primitives for tangents share: the derivative, and the transposes that JAX asks for."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad
from jaxtyping import Array


def differentiate(function: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    """Computes `jax.jvp` of a function of arrays; integer and boolean arrays have no tangent."""
    smooth = [i for i, x in enumerate(primals) if jnp.issubdtype(x.dtype, jnp.inexact)]

    def of_smooth(*values: Array) -> Any:
        arguments = list(primals)
        for i, value in zip(smooth, values, strict=True):
            arguments[i] = value
        return function(*arguments)

    changes = [ad.instantiate_zeros(tangents[i]) for i in smooth]
    return jax.jvp(of_smooth, tuple(primals[i] for i in smooth), tuple(changes))


def wanted(transposed: Sequence[Array], arguments: Sequence[Any]) -> list[Array | None]:
    """Returns the transposes of the arguments that JAX asks for; None for arguments with a known value."""
    return [one if ad.is_undefined_primal(x) else None for one, x in zip(transposed, arguments, strict=True)]
