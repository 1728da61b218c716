"""Old public names: they work as before, and warn once with the name to use instead."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


def deprecated_names(module: str, new_names: Mapping[str, str]) -> Callable[[str], Any]:
    """Make a ``__getattr__`` for a module whose public names have changed.

    The first use of an old name warns; from then on it is an ordinary attribute of the module.

    Args:
        module: the module's ``__name__``.
        new_names: the new name for each old one; both belong to the module.

    Returns:
        A function that takes an attribute's name and raises AttributeError if it is not among the old names.
    """

    def get(name: str) -> Any:
        if name not in new_names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new = new_names[name]
        warnings.warn(f"{module}.{name} is now {module}.{new}", DeprecationWarning, stacklevel=2)
        found = getattr(sys.modules[module], new)
        setattr(sys.modules[module], name, found)
        return found

    return get


def deprecated_attribute(old: str, new: str) -> property:
    """Make a property that gives another attribute of the same object, and warns."""

    def get(self: Any) -> Any:
        warnings.warn(f"{type(self).__name__}.{old} is now .{new}", DeprecationWarning, stacklevel=2)
        return getattr(self, new)

    get.__doc__ = f"Deprecated: use ``{new}``."
    return property(get)


def deprecated_arguments(**new_names: str) -> Callable[[_Function], _Function]:
    """Make a decorator that passes keyword arguments on under their new names, and warns.

    Args:
        new_names: the new name for each old one.
    """

    def decorate(function: _Function) -> _Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old in new_names.keys() & kwargs.keys():
                new = new_names[old]
                message = f"{function.__name__}(): argument {old!r} is now {new!r}"
                if new in kwargs:
                    raise TypeError(f"{message}; pass only that one")
                warnings.warn(message, DeprecationWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate
