"""Classes by name: the registered ones, and any other by its dotted path."""

import difflib
import importlib
from collections.abc import Callable
from typing import TypeVar

Class = TypeVar('Class', bound=type)


class Registry(dict[str, type]):
    """The registered classes of one kind, by name.

    Args:
        kind: what they are, in error messages, such as 'mechanism'.
        contract: the class from which all are derived.
        path: its public path, in error messages.
    """

    def __init__(self, kind: str, contract: type, path: str):
        super().__init__()
        self._kind, self._contract, self._path = kind, contract, path

    def register(self, name: str) -> Callable[[Class], Class]:
        """Returns a class decorator that registers a class as `name`; it raises ValueError if the name is taken."""

        def add(registered: Class) -> Class:
            if name in self:
                raise ValueError(f'the {self._kind} {name!r} is registered already, as {self[name].__qualname__}')
            self[name] = registered
            return registered

        return add

    def resolve(self, name: str) -> type:
        """Returns a class: of a registered name, or of a dotted path such as `mylab.strided:Strided`.

        Raises:
            ValueError: the name is unknown or no text, or the path does not lead to a class that is derived from the
                contract.
        """
        if not isinstance(name, str):
            raise ValueError(
                f'the {self._kind} must be a registered name or a path package.module:Class, got {name!r}; '
                'its hyper-parameters are keywords'
            )
        if ':' not in name:
            if name not in self:
                nearest = difflib.get_close_matches(name, self, 1)
                hint = f'did you mean {nearest[0]!r}? ' if nearest else ''
                known = ', '.join(sorted(self))
                raise ValueError(f'unknown {self._kind} {name!r}; {hint}Known: {known}; or a path package.module:Class')
            return self[name]
        module, _, attribute = name.partition(':')
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, TypeError, ValueError) as error:  # the last two: a malformed path
            raise ValueError(f'cannot import the {self._kind} {name!r}: {error}; write package.module:Class') from error
        if not (isinstance(found, type) and issubclass(found, self._contract)):
            raise ValueError(f'{name!r} is no subclass of {self._path}; derive it from that class')
        return found
