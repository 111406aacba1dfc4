"""What version 0.1 had elsewhere is still imported, with a warning."""

import subprocess
import sys
from importlib import import_module

import pytest

from vtv_nnsight import _moved


@pytest.mark.parametrize("old", _moved.MODULES)
def test_a_module_is_found_where_it_was(old):
    """It is the module itself, so that its classes are one class."""
    sys.modules.pop(f"vtv_nnsight.{old}", None)
    with pytest.warns(DeprecationWarning, match=rf"vtv_nnsight\.{old} is now vtv_nnsight\.{_moved.MODULES[old]};"):
        found = import_module(f"vtv_nnsight.{old}")
    new = import_module(f"vtv_nnsight.{_moved.MODULES[old]}")
    assert found is new and new.__name__ == new.__spec__.name == f"vtv_nnsight.{_moved.MODULES[old]}"


def test_scripts_of_0_1_run():
    """In a process of its own, where nothing was imported before."""
    script = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)
from vtv_nnsight.model.config import MAEVQGANConfig
from vtv_nnsight.tracing import MAEVQGAN
from vtv_nnsight.settings import Settings
import vtv_nnsight
from vtv_nnsight.models.mae_vqgan import MAEVQGANConfig as new
assert MAEVQGANConfig is new and MAEVQGAN is vtv_nnsight.MAEVQGAN and Settings().model == "tiny"
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=240)


def test_a_name_that_was_in_one():
    with pytest.warns(DeprecationWarning, match="Run is deprecated; use Search"):
        from vtv_nnsight.search.run import Run
    assert Run is import_module("vtv_nnsight.search").Search


def test_what_is_nowhere_is_not_found():
    with pytest.raises(ModuleNotFoundError, match=r"vtv_nnsight\.traces"):
        import_module("vtv_nnsight.traces")
