"""`vtv`: the library from the command line."""

from vtv_nnsight.cli.group import app, main

__all__ = ["app", "main"]
