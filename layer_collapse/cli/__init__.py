"""The command line ``layer-collapse``: one file per group of commands."""

from .main import main

__all__ = ["main"]
