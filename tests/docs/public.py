"""The public names of the package, and what their docstrings hold."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MODULES = (
    "normfuse",
    "normfuse.checkpoint",
    "normfuse.convert",
    "normfuse.folding",
    "normfuse.nn",
    "normfuse.onnx",
    "normfuse.ops",
    "normfuse.optim",
    "normfuse.plotting",
    "normfuse.sources",
)
_SECTION = re.compile(r"^(Args|Attributes|Shape|Returns|Raises|Yields|Example|Examples):", re.MULTILINE)
_ENTRY = re.compile(r"^    (\*{0,2}\w+)(?: \([^)]*\))?:", re.MULTILINE)


@dataclass(frozen=True)
class Public:
    """A function, class or method that users call.

    Attributes:
        path: its dotted name.
        thing: the object.
        owner: the class that a method belongs to.
    """

    path: str
    thing: Any
    owner: type | None = None

    @property
    def sections(self) -> dict[str, str]:
        """The text of each section of the docstring, dedented, by its heading; the rest under ``""``."""
        text = inspect.cleandoc(self.thing.__doc__ or "")
        parts = _SECTION.split(text)
        found = {"": parts[0]}
        for heading, body in zip(parts[1::2], parts[2::2], strict=True):
            found[heading.removesuffix("s") if heading == "Examples" else heading] = body
        return found

    @property
    def described(self) -> set[str]:
        """The arguments, or attributes, that the docstring describes."""
        entries = [self.sections.get(heading, "") for heading in ("Args", "Attributes")]
        return {name.lstrip("*") for body in entries for name in _ENTRY.findall(body)}

    @property
    def unknown(self) -> set[str]:
        """Arguments that the docstring describes and that there are not; none where keywords are passed on."""
        if inspect.Parameter.VAR_KEYWORD in {parameter.kind for parameter in self._signature.parameters.values()}:
            return set()
        described = {name.lstrip("*") for name in _ENTRY.findall(self.sections.get("Args", ""))}
        return described - set(self.parameters)

    @property
    def parameters(self) -> list[str]:
        """The names of what it takes."""
        return [name for name in self._signature.parameters if name not in ("self", "cls")]

    @property
    def _signature(self) -> inspect.Signature:
        """As the source has it: a norm's ``__signature__`` names the options that its ``__init__`` passes on."""
        written = vars(self.thing).get("__init__", self.thing) if inspect.isclass(self.thing) else self.thing
        try:
            return inspect.signature(written)
        except ValueError:
            return inspect.Signature()

    @property
    def without_default(self) -> list[str]:
        """Options that no signature shows, because they are passed on, and whose default the docstring leaves out."""
        if not inspect.isclass(self.thing):
            return []
        entries = _ENTRY.split(self.sections.get("Args", ""))
        texts = dict(zip(entries[1::2], entries[2::2], strict=True))
        return [
            name for name, text in texts.items() if name.lstrip("*") not in self.parameters and "default" not in text
        ]

    @property
    def raises(self) -> bool:
        """Whether its own code has a ``raise``; of a class, its ``__init__``."""
        code = (
            inspect.unwrap(self.thing.__dict__.get("__init__", object)) if inspect.isclass(self.thing) else self.thing
        )
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(code))))
        except (OSError, TypeError):
            return False
        return any(isinstance(node, ast.Raise) for node in ast.walk(tree))

    @property
    def returns(self) -> bool:
        """Whether a function gives something back."""
        if inspect.isclass(self.thing):
            return False
        return inspect.signature(self.thing).return_annotation not in (
            None,
            "None",
            "NoReturn",
            inspect.Signature.empty,
        )

    @property
    def _is_record(self) -> bool:
        """Whether it is a class that only keeps what its docstring lists, such as a report."""
        if not inspect.isclass(self.thing) or "Attributes" not in self.sections:
            return False
        return dataclasses.is_dataclass(self.thing) or issubclass(self.thing, tuple)

    def missing(self) -> list[str]:
        """What its docstring lacks, in words."""
        if not (self.thing.__doc__ or "").strip():
            return ["a docstring"]
        if inspect.isclass(self.thing) and issubclass(self.thing, BaseException):
            return []
        lacks = [f"Args: {name}" for name in self.parameters if name not in self.described]
        lacks += [f"an argument {name}" for name in sorted(self.unknown)]
        lacks += [f"the default of {name}" for name in self.without_default]
        if self.returns and "Returns" not in self.sections and "Yields" not in self.sections:
            lacks.append("Returns")
        if self.raises and "Raises" not in self.sections:
            lacks.append("Raises")
        if self.owner is None and not self._is_record and "Example" not in self.sections:
            lacks.append("Example")
        return lacks


def public_names() -> Iterator[Public]:
    """Every function and class of the public modules, and the methods that classes add, each once."""
    seen: set[int] = set()
    for name in MODULES:
        module = importlib.import_module(name)
        for attribute in module.__all__:
            thing = getattr(module, attribute)
            if inspect.ismodule(thing) or not callable(thing) or id(thing) in seen:
                continue
            seen.add(id(thing))
            yield Public(f"{name}.{attribute}", thing)
            if inspect.isclass(thing):
                yield from _methods(f"{name}.{attribute}", thing)


def _methods(path: str, owner: type) -> Iterator[Public]:
    for name, member in vars(owner).items():
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if (
            not name.startswith("_")
            and inspect.isfunction(function)
            and (function.__doc__ or not _inherits(owner, name))
        ):
            yield Public(f"{path}.{name}", function, owner)


def _inherits(owner: type, name: str) -> bool:
    """Whether a method only overrides one that is described elsewhere."""
    return any(getattr(base, name, None) is not None for base in owner.__mro__[1:])
