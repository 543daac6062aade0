"""Mechanisms by name."""

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, get_args, get_origin

import numpy as np

from combiner import named
from combiner.core.mechanism import COUNTS, SIZES, Mechanism

_REGISTRY = named.Registry('mechanism', Mechanism, 'combiner.Mechanism')


def register(name: str) -> Callable[[type[Mechanism]], type[Mechanism]]:
    """Returns a class decorator that registers a mechanism as `name`."""
    return _REGISTRY.register(name)


def names(*, full_support: bool | None = None) -> list[str]:
    """Returns the registered names; with `full_support`, of mechanisms that reach all (True) or do not (False)."""
    return sorted(n for n, cls in _REGISTRY.items() if full_support is None or cls.full_support == full_support)


def resolve(name: str) -> type[Mechanism]:
    """Returns the class of a mechanism: a registered name, or a dotted path such as `mylab.strided:Strided`.

    Raises:
        ValueError: the name is unknown, or the path does not lead to a subclass of `Mechanism`.
    """
    return _REGISTRY.resolve(name)


def hyper_parameters(name: str) -> dict[str, Any]:
    """Returns the own hyper-parameters of a mechanism, with their defaults."""
    of_all = {field.name for field in dataclasses.fields(Mechanism)}
    return {field.name: field.default for field in dataclasses.fields(resolve(name)) if field.name not in of_all}


def make_mechanism(
    name: str, hyper: Mapping[str, Any] | None = None, *, causal: bool = True, max_length: int | None = None
) -> Mechanism:
    """Makes a mechanism.

    Args:
        name: as for `resolve`.
        hyper: the mechanism's own hyper-parameters.
        causal: see `Mechanism`.
        max_length: see `Mechanism`.

    Raises:
        ValueError: the name or a hyper-parameter is unknown, or its value is of another type than declared.
    """
    known = hyper_parameters(name)
    mechanism = resolve(name)
    integers: dict[Any, Any] = dict(zip(COUNTS, SIZES, strict=True))
    kinds = {field.name: integers.get(field.type, field.type) for field in dataclasses.fields(mechanism)}
    kinds = {key: get_args(kind)[0] if get_origin(kind) is Annotated else kind for key, kind in kinds.items()}
    hyper = {key: value.item() if isinstance(value, np.generic) else value for key, value in (hyper or {}).items()}
    for key, value in hyper.items():
        if key not in known:
            raise ValueError(f'{name} has no hyper-parameter {key!r}; it has: {", ".join(known) or "none"}')
        if not _is_a(value, kinds[key]):
            kind = kinds[key].__name__ if isinstance(kinds[key], type) else kinds[key]
            raise ValueError(f'{name}: {key}={value!r} must be of type {kind}, not {type(value).__name__}')
    return mechanism(causal=causal, max_length=max_length, **hyper)


def _is_a(value: Any, kind: Any) -> bool:
    """Returns whether a value is of a type, whatever it contains.

    An integer passes as a float, lists and tuples as each other, likewise dictionaries, any value if the hint is no
    class.
    """
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_is_a(value, one) for one in typing.get_args(kind))
    kind = typing.get_args(kind)[0] if origin is typing.Annotated else origin or kind
    try:
        return (
            isinstance(value, kind)
            or (type(value) is int and isinstance(float(value), kind))  # no bool, which is an int too
            or (isinstance(value, list | tuple) and kind in (list, tuple))
            or (isinstance(value, Mapping) and issubclass(kind, Mapping))
        )
    except TypeError:
        return True
