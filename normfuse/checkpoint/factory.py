"""From a name such as ``package.module:Class`` to something that builds a module."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from normfuse.checkpoint.errors import CheckpointError
from normfuse.errors import one_line

_FORM = "package.module:Class"


def parse(text: str) -> tuple[str, list[str]]:
    """Splits ``package.module:Outer.Class`` into its module and attribute path, or raises CheckpointError."""
    module, colon, attribute = text.rpartition(":")
    path = attribute.split(".")
    if not colon or not all(part.isidentifier() for part in [*module.split("."), *path]):
        raise CheckpointError(f"factory {text!r} is not of the form {_FORM!r}")
    return module, path


def recorded(text: str, source: str) -> type[nn.Module]:
    """The nn.Module subclass that a *file* of format 1 names, which the user trusts. Importing its module runs it.

    The import search path is used as it stands: neither the file's folder nor the working directory is added,
    so that a checkpoint cannot bring its own module along. Raises CheckpointError for anything else, with the
    way out.
    """
    way_out = f"give the model yourself: --model {_FORM.replace('Class', 'factory')}"
    module_name, path = parse(text)
    if module_name.partition(".")[0] in sys.stdlib_module_names:
        raise CheckpointError(f"{source} names the factory {text!r}, which is not a module class; {way_out}")
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the imported module is free to fail in its own way
        raise CheckpointError(
            f"{source} names the factory {text!r}, which cannot be imported here ({one_line(error, 120)}); {way_out}"
        ) from error
    for part in path:
        found = getattr(found, part, None)
    if not (inspect.isclass(found) and issubclass(found, nn.Module)):
        what = "does not exist" if found is None else "is not an nn.Module subclass"
        raise CheckpointError(f"{source} names the factory {text!r}, which {what}; {way_out}")
    return found


def given(text: str) -> Callable[..., nn.Module] | nn.Module:
    """What a *person* names with ``--model package.module:factory``: builds a module, or is one.

    The working directory is searched as well. A file may stand for the module, ``folder/net.py:Net``, whose imports are
    searched in its folder. Raises CheckpointError.
    """
    place, colon, attribute = text.rpartition(":")
    is_file = bool(colon) and place.endswith(".py")
    if is_file and not os.path.isfile(place):
        raise CheckpointError(f"--model {text}: there is no file {place}")
    module_name, path = parse(f"file:{attribute}" if is_file else text)
    folder = os.path.dirname(os.path.abspath(place)) if is_file else os.getcwd()
    with on_path(folder):
        try:
            found: Any = _module_in(place) if is_file else importlib.import_module(module_name)
        except (Exception, SystemExit) as error:  # the imported module is free to fail in its own way
            raise CheckpointError(
                f"--model {text}: cannot import {place} ({type(error).__name__}: {one_line(error, 200)})"
            ) from error
    for part in path:
        if not hasattr(found, part):
            raise CheckpointError(f"--model {text}: {getattr(found, '__name__', found)} has no {part!r}")
        found = getattr(found, part)
    if not callable(found):
        raise CheckpointError(
            f"--model {text} is a {type(found).__name__}; give a class or function that builds the model"
        )
    return found


def _module_in(file: str) -> Any:
    """The module in a file, which runs; it is registered, since dataclasses look for their module."""
    name = Path(file).stem
    spec = importlib.util.spec_from_file_location(name if name not in sys.modules else f"_file_{name}", file)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def build(factory: Callable[..., nn.Module], kwargs: Mapping[str, Any], label: str) -> nn.Module:
    """``factory(**kwargs)``, or CheckpointError saying what went wrong and with which arguments."""
    shown = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
    try:
        module = factory(**kwargs)
    except CheckpointError:
        raise
    except (Exception, SystemExit) as error:  # a constructor is free to fail in its own way
        raise CheckpointError(
            f"building {label}({one_line(shown, 120) if shown else ''}) failed: {type(error).__name__}: "
            f"{one_line(error, 200)}; arguments are given with --model-arg name=value"
        ) from error
    if not isinstance(module, nn.Module):
        raise CheckpointError(f"{label} returned a {type(module).__name__}, not an nn.Module")
    return module


@contextmanager
def on_path(folder: str) -> Iterator[None]:
    """Modules are searched in a folder first."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
