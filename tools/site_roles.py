"""Cross-references in docstrings, as links of the site: ``:func:`normfuse.fold``` becomes a link to its entry."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

# Where a name that several modules offer has its entry.
PAGES = ("nn", "onnx", "convert", "ops", "optim", "folding", "checkpoint", "plotting")
_ROLE = re.compile(r":(?:class|func|meth|data|mod|attr):`([^`]+)`")


class Roles(griffe.Extension):
    """Replaces the roles in every docstring of the package."""

    def on_package(self, *, pkg: griffe.Module, **rest: Any) -> None:
        griffe.DataclassesExtension().on_package(pkg=pkg, **rest)  # before modules are hidden
        hidden = list(_show_functions(pkg))
        entries = {f"normfuse.{name}" for name in PAGES} | {f"normfuse.{f}" for f in ("load", "save", "fold", "fuse")}
        for page in PAGES:
            for name in pkg[page].exports or ():
                member = pkg[page][str(name)]
                entries.add(f"normfuse.{page}.{name}")
                target = member.final_target if member.is_alias else member
                if target.is_class:
                    entries |= {f"normfuse.{page}.{name}.{method}" for method in target.members if method[0] != "_"}
        for module in (pkg, *hidden):
            _walk(module, entries)


def _show_functions(module: griffe.Module) -> Iterator[griffe.Module]:
    """Where a module and a function in it have one name, and the package offers the function, show that; the module."""
    for name, path in module.imports.items():
        member = module.members.get(name)
        if member is not None and not member.is_alias and member.is_module and path != member.path:
            module.set_member(name, griffe.Alias(name, path, parent=module))
            yield member
    for member in list(module.members.values()):
        if not member.is_alias and member.is_module:
            yield from _show_functions(member)


def _walk(thing: griffe.Object, entries: set[str]) -> None:
    if thing.docstring is not None:
        page = ".".join(thing.path.split(".")[:2])
        own = thing.name if thing.is_class else thing.parent.name if thing.parent is not None else ""
        text = _ROLE.sub(lambda role: _link(role[1], page, own, entries), thing.docstring.value)
        thing.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    for member in thing.members.values():
        if not member.is_alias:
            _walk(member, entries)


def _link(target: str, page: str, own: str, entries: set[str]) -> str:
    text = target.removeprefix("~")
    shown = text.rpartition(".")[2] if target.startswith("~") else text
    short = text.removeprefix("normfuse.")
    options = [text, f"{page}.{text}", f"{page}.{own}.{text}", *(f"normfuse.{other}.{short}" for other in PAGES)]
    found = next((option for option in options if option in entries), None)
    return f"`{shown}`" if found is None else f"[`{shown}`][{found}]"
