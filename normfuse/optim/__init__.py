"""Optimisers for weights in front of norms, whose length has no effect (Heo et al., 2021, arXiv 2006.08217)."""

from .groups import no_decay
from .projected import SGDP, AdamP

__all__ = ["SGDP", "AdamP", "no_decay"]
