"""Mechanisms by name."""

import dataclasses
import difflib
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from combiner.core.module import Attention

_REGISTRY: dict[str, type[Attention]] = {}


def register(name: str) -> Callable[[type[Attention]], type[Attention]]:
    """Class decorator: makes a mechanism known as `name`."""

    def add(mechanism: type[Attention]) -> type[Attention]:
        if name in _REGISTRY:
            raise ValueError(f'the mechanism {name!r} is registered already, as {_REGISTRY[name].__qualname__}')
        _REGISTRY[name] = mechanism
        return mechanism

    return add


def names(*, full_support: bool | None = None) -> list[str]:
    """Every registered mechanism; with `full_support`, those that do (True) or do not (False) reach everything."""
    return sorted(n for n, cls in _REGISTRY.items() if full_support is None or cls.full_support == full_support)


def resolve(name: str) -> type[Attention]:
    """The class of a mechanism: a registered name, or a dotted path such as `mylab.strided:StridedAttention`.

    Raises:
        ValueError: the name is not known, or the path does not lead to a subclass of `Attention`.
    """
    if ':' not in name:
        if name not in _REGISTRY:
            nearest = difflib.get_close_matches(name, _REGISTRY, 1)
            hint = f'did you mean {nearest[0]!r}? ' if nearest else ''
            known = ', '.join(names())
            raise ValueError(f'unknown mechanism {name!r}; {hint}Known: {known}; or a path package.module:Class')
        return _REGISTRY[name]
    module, _, attribute = name.partition(':')
    try:
        mechanism = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # the last two: of a malformed path
        raise ValueError(f'cannot import the mechanism {name!r}: {error}') from error
    if not (isinstance(mechanism, type) and issubclass(mechanism, Attention)):
        raise ValueError(f'{name!r} is no subclass of combiner.core.module.Attention')
    return mechanism


def hyper_parameters(name: str) -> dict[str, Any]:
    """The hyper-parameters that a mechanism has of its own, with their defaults."""
    frame = {field.name for field in dataclasses.fields(Attention)}
    return {field.name: field.default for field in dataclasses.fields(resolve(name)) if field.name not in frame}


def make(name: str, hyper: dict[str, Any] | None = None, **frame: Any) -> Attention:
    """The module of a mechanism.

    Args:
        name: as for `resolve`.
        hyper: the mechanism's own hyper-parameters.
        **frame: fields of `Attention`: `causal`, `width`, `heads`, ….

    Raises:
        ValueError: the name or a hyper-parameter is not known, or its value is of another type than declared.
    """
    known = hyper_parameters(name)
    mechanism = resolve(name)
    kinds = {field.name: field.type for field in dataclasses.fields(mechanism)}
    hyper = {key: value.item() if isinstance(value, np.generic) else value for key, value in (hyper or {}).items()}
    for key, value in hyper.items():
        if key not in known:
            raise ValueError(f'{name} has no hyper-parameter {key!r}; it has: {", ".join(known) or "none"}')
        if not _is_a(value, kinds[key]):
            kind = getattr(kinds[key], '__name__', kinds[key])
            raise ValueError(f'{name}: {key}={value!r} must be of type {kind}, not {type(value).__name__}')
    return mechanism(**frame, **hyper)


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value is of a type; an integer passes as a float, anything where the hint is no class."""
    try:
        return isinstance(value, kind) or (isinstance(value, int) and isinstance(float(value), kind))
    except TypeError:
        return True
