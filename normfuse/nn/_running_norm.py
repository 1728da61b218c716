"""What the norms with running statistics share: parameters, statistics of a safe dtype, checkpoints."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops._layout import accumulation_dtype, check_input, check_tensor, to_rows
from ..ops._recompute import State
from ._torch_batch_norms import refuse_update_bn, warn_convert_sync
from ._traced_as_one import Proxy, refuse_script, traced_as_one

if TYPE_CHECKING:
    from typing_extensions import Unpack


def check_count(name: str, value: int, minimum: int) -> None:
    """Raise unless ``value`` is an int of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} has type {type(value).__name__}; give an int of at least {minimum}")
    if value < minimum:
        raise ValueError(f"{name}={value} is not allowed; give an int of at least {minimum}")


def check_fraction(name: str, value: float, share: str = "old") -> None:
    """Raise unless 0 <= value <= 1."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}={value} is not allowed; give a number from 0 to 1 (the share of the {share} value)")


def check_positive(name: str, value: float) -> None:
    """Raise unless ``value`` is a positive finite number."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}={value} is not allowed; give a positive finite number such as 1e-5")


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of the names allowed."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; give {' or '.join(map(repr, allowed))}")


def refuse_negative_counters(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, names: Iterable[str], errors: list[str]
) -> None:
    """Add an error for each counter of ``module`` in ``state_dict`` that is negative, and leave it as it is.

    A kernel takes any number without waiting for it; what a file brings is looked at here.
    """
    for name in names:
        value = state_dict.get(prefix + name)
        if isinstance(value, Tensor) and not value.is_meta and (value < 0).any():
            errors.append(f"{prefix}{name} is {value.flatten().tolist()}; it counts steps and must be at least 0")
            state_dict[prefix + name] = module.get_buffer(name)


def check_width(x: Tensor, channels: int, option: str) -> None:
    """Raise unless ``x`` is a tensor whose last dimension has the channels that ``option`` of its norm says."""
    check_tensor("x", x)
    if x.dim() == 0 or x.shape[-1] != channels:
        raise ValueError(
            f"x of shape {tuple(x.shape)} must have {channels} channels in its last dimension: "
            f"check {option}, or move the channels with x.movedim(1, -1)"
        )


def split_ghosts(x: Tensor, ghost_size: int | None) -> list[int]:
    """Sizes of the ghost batches along the first axis; a rest smaller than ``ghost_size`` joins the last."""
    if not isinstance(x, Tensor) or x.is_nested or x.dim() == 0:
        return [1]  # refused later, with what is wrong
    if ghost_size is None or x.shape[0] < 2 * ghost_size:
        return [x.shape[0]]
    count = x.shape[0] // ghost_size
    return [ghost_size] * (count - 1) + [x.shape[0] - ghost_size * (count - 1)]


class _Group:
    """A process group in the state of a norm: copies share it, a stored norm forgets it, as DDP does."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group

    def __deepcopy__(self, memo: object) -> _Group:
        return self

    def __reduce__(self) -> tuple[type[_Group], tuple[None]]:
        return _Group, (None,)


def _with_inherited_options(norm: type) -> inspect.Signature:
    """The signature with each of ``**options`` by its name, as ``help`` shows it and ``skip_init`` asks for it."""
    index = next(i for i, kind in enumerate(norm.__mro__) if "__init__" in vars(kind))
    _, *own = inspect.signature(vars(norm.__mro__[index])["__init__"]).parameters.values()
    if [p.kind for p in own if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)] != [inspect.Parameter.VAR_KEYWORD]:
        return inspect.Signature(own)
    names = {p.name for p in own}
    inherited = inspect.signature(norm.__mro__[index + 1]).parameters.values()
    options = [p.replace(kind=p.KEYWORD_ONLY) for p in inherited if p.name not in names and p.default is not p.empty]
    return inspect.Signature([*own[:-1], *options])


class ChannelOptions(TypedDict, total=False):
    """What every norm over channels can be built with; their docstrings say more."""

    eps: float
    affine: bool
    channel_dim: int
    ghost_size: int | None
    device: torch.device | str | None
    dtype: torch.dtype | None


class ChannelNorm(nn.Module):
    """Base of the norms whose running statistics are vectors over channels.

    Statistics are buffers of float32, or float64 in a float64 module, whatever dtype the parameters are
    converted to. Options: see :class:`ChannelOptions`.
    """

    __prepare_scriptable__ = refuse_script

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.__signature__ = _with_inherited_options(cls)

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        channel_dim: int = -1,
        ghost_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("num_features", num_features, 1)
        check_positive("eps", eps)
        if isinstance(channel_dim, bool) or not isinstance(channel_dim, int):
            raise TypeError(f"channel_dim={channel_dim!r} is not allowed; give an int such as -1 (last) or 1 (NCHW)")
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype={dtype} is not allowed; give a floating dtype such as torch.float32")
        if ghost_size is not None:
            check_count("ghost_size", ghost_size, 1)
            if channel_dim == 0:
                raise ValueError("ghost_size splits dimension 0, which channel_dim=0 makes the channels; give another")
        self.num_features = num_features
        self.eps = eps
        self.affine = affine
        self.channel_dim = channel_dim
        self.ghost_size = ghost_size
        self.synchronised = False
        self.process_group: ProcessGroup | None = None
        if affine:
            self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
            self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)

    def _register_statistics(
        self,
        statistics: dict[str, tuple[tuple[int, ...], float]],
        counters: dict[str, tuple[int, ...]],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **others: object,
    ) -> None:
        """Register buffers: ``statistics`` maps names to shapes and start values, ``counters`` (int64) to shapes.

        Of the norm's options those that say where and how wide.
        """
        statistics_dtype = accumulation_dtype(dtype or torch.get_default_dtype())
        self._start_values = dict.fromkeys(counters, 0.0)
        for name, (shape, start) in statistics.items():
            self.register_buffer(name, torch.full(shape, start, device=device, dtype=statistics_dtype))
            self._start_values[name] = start
        for name, shape in counters.items():
            self.register_buffer(name, torch.zeros(shape, device=device, dtype=torch.int64))

    def group_to_share_with(self) -> ProcessGroup | None:
        """The processes to share training statistics with, see :func:`normfuse.nn.convert_sync`; None: nobody."""
        if not (self.synchronised and dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD if self.process_group is None else self.process_group
        return group if dist.get_world_size(group) > 1 else None

    def check_input(self, x: Tensor, pad_mask: Tensor | None) -> None:
        """Raise TypeError or ValueError for what the norm does not take."""
        statistic = next(b for b in map(self.get_buffer, self._start_values) if b.is_floating_point())
        check_input(x, self.num_features, self.channel_dim, pad_mask, statistic)

    def rows_to_measure(self, x: Tensor) -> Tensor:
        """The [rows, C] matrix of an input that its statistics are taken of."""
        return to_rows(x, self.channel_dim)

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, var: Tensor, rows: Tensor | None = None) -> None:
        """Replace the forward statistics by those of given rows.

        Args:
            mean: of :meth:`rows_to_measure`, [C].
            var: the same rows' variance [C], biased.
            rows: how many rows they are of, where statistics that training would keep unbiased are to be that; None:
                as they are.
        """
        square = var + mean.square()
        for name in ("running_var", "running_phi", "buffer_x2"):
            if name in self._buffers:
                self._buffers[name].copy_(square)

    def reset_running_stats(self) -> None:
        """Set every statistic and counter back to its value before training."""
        with torch.no_grad():
            for name, start in self._start_values.items():
                self.get_buffer(name).fill_(start)

    def reset_parameters(self) -> None:
        """Set the statistics back and the weight to 1, the bias to 0."""
        self.reset_running_stats()
        if self.affine:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def named_modules(self, *arguments: Any, **options: Any) -> Iterator[tuple[str, nn.Module]]:
        if not torch.compiler.is_compiling():  # which knows no frames
            refuse_update_bn(self)
        return super().named_modules(*arguments, **options)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        if not (self.synchronised or torch.compiler.is_compiling()):
            warn_convert_sync(self)
        return super().named_children()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "process_group": _Group(self.process_group)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "process_group": getattr(state["process_group"], "group", None)})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ChannelNorm:
        before = {name: self._buffers[name] for name in self._start_values}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            # A conversion to bfloat16 or float16 is for parameters: statistics go through at full precision.
            wanted = accumulation_dtype(new.dtype) if old.is_floating_point() else old.dtype
            if new.dtype != wanted:
                self._buffers[name] = old.to(device=new.device, dtype=wanted)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: Any, *args: Any, **kwargs: Any) -> None:
        # The authors' programs keep vectors as [1, C, 1, 1] or [1, 1, C].
        own = {**self._parameters, **self._buffers}
        for name, target in own.items():
            value = state_dict.get(prefix + name)
            if not isinstance(value, Tensor) or target is None:
                continue
            same = [size for size in value.shape if size != 1] == [size for size in target.shape if size != 1]
            if same and value.shape != target.shape:
                value = value.reshape(target.shape)
            if name in self._buffers:
                value = value.to(target.dtype)
            state_dict[prefix + name] = value
        counters = [name for name in self._start_values if own[name].dtype == torch.int64]
        refuse_negative_counters(self, state_dict, prefix, counters, args[-1])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        device = next(
            self.get_buffer(name).device for name in self._start_values.keys() - self._non_persistent_buffers_set
        )
        for name in self._non_persistent_buffers_set & self._start_values.keys():
            if self._buffers[name].is_meta:  # the others have left with assign=True
                self._buffers[name] = torch.zeros_like(self._buffers[name], device=device)

    def _describe(self, *names: str, **others: object) -> str:
        options = {name: getattr(self, name) for name in names}
        shown = {**options, **others, "eps": self.eps, "affine": self.affine, "channel_dim": self.channel_dim}
        if self.ghost_size is not None:
            shown["ghost_size"] = self.ghost_size
        if self.synchronised:
            shown["synchronised"] = True
        return ", ".join([str(self.num_features), *(f"{name}={value!r}" for name, value in shown.items())])


def running_norms(model: nn.Module, purpose: str, for_torch: str = "") -> dict[str, ChannelNorm]:
    """The norms of ``model`` that keep running statistics, by their path; raises ValueError where there is none.

    ``for_torch`` names what does the same for BatchNorms of PyTorch.
    """
    norms = {name or type(norm).__name__: norm for name, norm in model.named_modules() if isinstance(norm, ChannelNorm)}
    if not norms:
        if for_torch and any(isinstance(module, _BatchNorm) for module in model.modules()):
            raise ValueError(
                f"the norms of model, of class {type(model).__name__}, are BatchNorms of PyTorch; use {for_torch}, "
                "or put ours in with normfuse.convert.swap_norms"
            )
        raise ValueError(
            f"model of class {type(model).__name__} has no norm with running statistics {purpose}, such as UnifiedNorm "
            "or MaskedBatchNorm; put them in first, for example with normfuse.convert.swap_norms"
        )
    return norms


def given_to_norm(arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``x``, ``pad_mask`` and ``residual`` of a norm that is called like this: for hooks in front of it."""
    given = {**dict(zip(("x", "pad_mask", "residual"), arguments, strict=False)), **options}
    return given["x"], given.get("pad_mask"), given.get("residual")


def normalised_input(arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """What a norm that is called like this normalises, the residual included, and its padding mask."""
    x, pad_mask, residual = given_to_norm(arguments, options)
    return x if residual is None else x + residual, pad_mask


class RunningOptions(ChannelOptions, total=False):
    """The same for Unified and Power Norm."""

    skip_nonfinite: bool


class RunningNorm(ChannelNorm):
    """Base of Unified and Power Norm: residuals, ghost batches, steps that are rolled back."""

    def __init__(self, num_features: int, *, skip_nonfinite: bool = False, **options: Unpack[ChannelOptions]) -> None:
        super().__init__(num_features, **options)
        self.skip_nonfinite = skip_nonfinite

    def _register_statistics(
        self,
        statistics: dict[str, tuple[tuple[int, ...], float]],
        counters: dict[str, tuple[int, ...]],
        **options: object,
    ) -> None:
        super()._register_statistics(statistics, counters, **options)
        for name in ("skipped_forwards", "skipped_backwards"):
            # Not in state_dict, which is the one that the authors' programs write.
            counter = torch.zeros(1, device=options.get("device"), dtype=torch.int64) if self.skip_nonfinite else None
            self.register_buffer(name, counter, persistent=False)
            if counter is not None:
                self._start_values[name] = 0.0

    def _state(self, kind: type[State]) -> State:
        """The statistics in the form that the operation takes, whose fields have the buffers' names."""
        buffers = self._buffers  # eight attributes of a module take as long as a small kernel
        return kind(*[buffers[name] for name in kind._fields])

    def forward(
        self, x: Tensor, pad_mask: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        if isinstance(x, Proxy):
            return traced_as_one(self, x, pad_mask, residual)
        sizes = split_ghosts(x, self.ghost_size) if self.training else [0]
        if len(sizes) == 1:
            return self._normalise(x, pad_mask, residual)
        if residual is not None:
            s = x + residual
            return self.forward(s, pad_mask), s
        masks = [None] * len(sizes) if pad_mask is None else pad_mask.split(sizes)
        return torch.cat([self._normalise(part, mask, None) for part, mask in zip(x.split(sizes), masks, strict=True)])

    def _normalise(self, x: Tensor, pad_mask: Tensor | None, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _describe(self, *names: str, **others: object) -> str:
        return super()._describe(*names, **others) + (", skip_nonfinite=True" if self.skip_nonfinite else "")
