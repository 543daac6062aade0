"""Finds what is declared: the only module of the harness that imports tables and claims."""

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from experiments import claims, tables
from experiments.harness.claim_table import ClaimTable
from experiments.harness.row import Row


def table_rows() -> dict[str, tuple[Row, ...]]:
    """Returns the `ROWS` of every table that declares some, by the table's name."""
    return {name: module.ROWS for name, module in _modules(tables) if hasattr(module, 'ROWS')}


def pretrained_rows() -> dict[str, tuple[Row, ...]]:
    """Returns the `PRETRAINED` of every table that declares some: rows of another table, with a warm start."""
    return {name: module.PRETRAINED for name, module in _modules(tables) if hasattr(module, 'PRETRAINED')}


def claim_tables() -> dict[str, ClaimTable]:
    """Returns the `TABLE` of every file of claims, by the file's name."""
    return {name: module.TABLE for name, module in _modules(claims)}


def _modules(package: ModuleType) -> Iterator[tuple[str, Any]]:
    for found in pkgutil.iter_modules(package.__path__):
        yield found.name, importlib.import_module(f'{package.__name__}.{found.name}')
