"""Nitsum serves large language models with a parallel layout that follows the load."""

__version__ = "0.1.0"
