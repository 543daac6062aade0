"""Runs a method of a module as one compiled program, also where nothing around it is compiled.

JAX compiles a loop again for every new function object, and mechanisms make such functions in every call. So callers of
a mechanism put one `jax.jit` around it. Its cache compares values: the mechanism or the module (both are equal if their
fields are) and the `circumstances`. These programs are `inline`: they leave no trace within a larger program.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from flax.core.scope import DenyList, LazyRng

from combiner.ops import chunking


class Circumstances(NamedTuple):
    """Facts that, with its arguments, decide how a mechanism is computed."""

    target: chunking.Target
    chunk_logits: int


def circumstances() -> Circumstances:
    """Returns the current circumstances."""
    return Circumstances(chunking.target(), chunking.CHUNK_LOGITS)


def run(module: nn.Module, method: str, *args: Any, unread: dict[str, Any], **options: Any) -> Any:
    """Runs a method of a bound Linen module as one program, with the module's variables and random keys.

    Args:
        module: a module with a scope, which receives the changes of its collections.
        method: its name. It takes `options`, which are compiled in, by keyword.
        *args: arrays, and trees of arrays.
        unread: default values for fields that the method does not read, so that they do not lead to more programs.
        **options: values that can be hashed.
    """
    scope: Any = module.scope
    rngs = {name: _next(scope, name) for name in scope.rngs}
    alone = module.clone(parent=None, name=None, **unread)
    static = (alone, method, _hashable_filter(scope.mutable), tuple(sorted(options.items())), circumstances())
    result, changed = _program(static, module.variables, rngs, args)
    for collection, variables in changed.items():
        for name, value in variables.items():
            module.put_variable(collection, name, value)
    return result


@partial(jax.jit, static_argnums=0, inline=True)
def _program(static: tuple[Any, ...], variables: Any, rngs: dict[str, LazyRng], args: tuple[Any, ...]) -> Any:
    module, method, mutable, options, _ = static
    return module.apply(variables, *args, method=method, rngs=rngs, mutable=mutable, **dict(options))


def _hashable_filter(mutable: Any) -> Any:
    """Returns Flax's filter of the mutable collections, never a bare False: `apply` then returns another shape."""
    if isinstance(mutable, DenyList):
        return DenyList(_hashable_filter(mutable.deny))
    if mutable is False:
        return ()
    return mutable if mutable is True or isinstance(mutable, str) else tuple(sorted(mutable))


def _next(scope: Any, name: str) -> LazyRng:
    """Returns a stream of random keys for one run: the scope's own for the first, others for later ones."""
    run_before = scope.rng_counters[name]
    scope.rng_counters[name] += 1
    return LazyRng.create(scope.rngs[name], *([run_before] if run_before else []))
