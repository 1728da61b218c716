"""One norm per domain around shared weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..ops._layout import check_tensor
from ._running_norm import check_count
from ._traced_as_one import Proxy, refuse_script, traced_as_one


class DomainSplitNorm(nn.Module):
    """A separate copy of a norm for every domain (split batch normalisation, Xie et al., 2020, arXiv 1911.09665).

    In training a batch holds the domains one after another, in equal parts; each part goes through its norm. In
    evaluation every sample goes through the norm of the chosen ``domain``. Only that norm is exported, and it folds
    like the norm it was copied from.

    Args:
        norm: the pretrained norm; it is copied.
        num_domains: at least 1.
        domain: the domain that evaluation uses, from 0 on; :func:`choose_domain` sets it in a whole model.

    Shape:
        x: what ``norm`` takes, its first dimension a multiple of ``num_domains`` in training. Further arguments are
        passed on, tensors split like x.

    Raises:
        TypeError, ValueError: an option is not allowed, or a batch cannot be split.

    Example:
        >>> from normfuse.nn import DomainSplitNorm
        >>> norm = DomainSplitNorm(nn.BatchNorm1d(8), num_domains=2)
        >>> norm(torch.randn(6, 8)).shape  # the first three samples are of domain 0
        torch.Size([6, 8])
    """

    __prepare_scriptable__ = refuse_script

    def __init__(self, norm: nn.Module, num_domains: int = 2, domain: int = 0) -> None:
        super().__init__()
        check_count("num_domains", num_domains, 1)
        self.norms = nn.ModuleList(copy.deepcopy(norm) for _ in range(num_domains))
        self.domain = domain

    @property
    def domain(self) -> int:
        """The domain that evaluation uses."""
        return self._domain

    @domain.setter
    def domain(self, domain: int) -> None:
        check_count("domain", domain, 0)
        if domain >= len(self.norms):
            raise ValueError(f"domain={domain} does not exist; give one from 0 to {len(self.norms) - 1}")
        self._domain = domain

    def forward(self, x: Tensor, *others: Tensor | None, **named: Tensor | None) -> Tensor:
        if isinstance(x, Proxy):
            return traced_as_one(self, x, *others, **named)
        if not self.training:
            return self.norms[self.domain](x, *others, **named)
        count = len(self.norms)
        check_tensor("x", x)
        if x.dim() == 0 or x.shape[0] % count:
            raise ValueError(
                f"x of shape {tuple(x.shape)} holds {x.shape[0] if x.dim() else 0} samples, which {count} domains "
                "cannot share equally; put the same number of samples of every domain into a batch"
            )
        parts = zip(*(_split(value, count) for value in (x, *others)), strict=True)
        more = [{name: _split(value, count)[i] for name, value in named.items()} for i in range(count)]
        calls = zip(self.norms, parts, more, strict=True)
        return torch.cat([norm(*part, **by_name) for norm, part, by_name in calls])

    def extra_repr(self) -> str:
        return f"domain={self.domain}"


def _split(value: Tensor | None, count: int) -> tuple[Tensor | None, ...]:
    return (None,) * count if value is None else value.tensor_split(count)


def choose_domain(model: nn.Module, domain: int) -> int:
    """Set the domain that evaluation uses in every :class:`DomainSplitNorm` of ``model``, however deep it is.

    Args:
        model: changed in place.
        domain: from 0 on.

    Returns:
        The number of norms.

    Raises:
        ValueError: there is no such norm, or one has no such domain. The model is then as before.

    Example:
        >>> from normfuse.nn import DomainSplitNorm, choose_domain
        >>> choose_domain(nn.Sequential(DomainSplitNorm(nn.BatchNorm1d(8))), domain=1)
        1
    """
    norms = [module for module in model.modules() if isinstance(module, DomainSplitNorm)]
    if not norms:
        raise ValueError(f"model of class {type(model).__name__} has no DomainSplitNorm")
    before = [norm.domain for norm in norms]
    try:
        for norm in norms:
            norm.domain = domain
    except ValueError:
        for norm, old in zip(norms, before, strict=True):
            norm.domain = old
        raise
    return len(norms)
