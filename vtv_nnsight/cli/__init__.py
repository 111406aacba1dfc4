"""`vtv`: the library from the command line."""

from vtv_nnsight.cli import start, demo, model, prompts, vectors, training, benchmarks  # noqa: F401, I001  the help's order
from vtv_nnsight.cli.app import app, main

__all__ = ["app", "main"]
