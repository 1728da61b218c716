"""The command ``normfuse``: export, fold, inspect, verify, bench, plot.

What a command imports beyond typer it imports when it runs: help, completion and refusals of options need no torch.
"""

from .app import app, main

__all__ = ["app", "main"]
