"""What refusals have in common, and how names are listed. Needs no torch: a command can refuse before it loads one."""

from __future__ import annotations

from collections.abc import Sequence


class NormfuseError(ValueError):
    """Base of everything that normfuse refuses.

    The message is one line: the argument, the problem, and what to do.

    Attributes:
        advice: options of the command that get past the refusal, as they are typed: ``("--trust",)``. The command
            prints itself with them.
    """

    def __init__(self, message: str, *, advice: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.advice = tuple(advice)


def check_kind(name: str, value: object, allowed: type | tuple[type, ...], way_out: str) -> None:
    """TypeError unless the argument `name` is of a kind that is allowed; `way_out` says in words what to give."""
    if not isinstance(value, allowed):
        raise TypeError(f"{name} is of type {type(value).__name__}; give {way_out}")


def one_line(error: BaseException | str, limit: int = 400) -> str:
    """The first sentences of an error on a single line of at most ``limit`` printable characters."""
    # A file may put a terminal's control codes into its names.
    text = "".join(character if character.isprintable() else " " for character in str(error)[: 4 * limit])
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def some_of(names: Sequence[str], shown: int = 3) -> str:
    """``a, b, c and 9 more``."""
    listed = ", ".join(names[:shown])
    return listed if len(names) <= shown else f"{listed} and {len(names) - shown} more"


def joined_names(weights: Sequence[str]) -> str:
    """``mlp.0.weight, mlp.0.bias`` as ``mlp.0.{weight,bias}``: names as short as they can be told."""
    members: dict[str, list[str]] = {}
    for weight in weights:
        module, _, name = weight.rpartition(".")
        members.setdefault(module, []).append(name)
    names = [
        ".".join(filter(None, (module, own[0] if len(own) == 1 else "{" + ",".join(own) + "}")))
        for module, own in members.items()
    ]
    return some_of(names, 2)
