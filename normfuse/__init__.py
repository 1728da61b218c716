"""Train with fast norms, deploy with none."""

__version__ = "0.1.0"
