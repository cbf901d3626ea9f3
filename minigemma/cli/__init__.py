"""The command line: a file a command."""

from .main import main

__all__ = ["main"]
