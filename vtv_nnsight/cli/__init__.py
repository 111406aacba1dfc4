"""`vtv`: the library from the command line."""

# isort: off
from vtv_nnsight.cli import start, demo, model, prompts, vectors, training, benchmarks  # noqa: F401  the order of help
from vtv_nnsight.cli.app import app, main

__all__ = ["app", "main"]
