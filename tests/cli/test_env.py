"""--version and env: what they say of this package, and of another that it hides."""

import os
import shutil
import subprocess
import sys
from importlib.machinery import PathFinder
from importlib.util import spec_from_file_location
from pathlib import Path

import pytest
from command_line import call

import tempnet_kernels
from tempnet_kernels.core import register


def test_version():
    assert call("--version").stdout == f"tempnet_kernels {tempnet_kernels.__version__}\n"


@pytest.fixture
def elsewhere(tmp_path):
    """Stands for a built copy in site-packages."""
    package = tmp_path / "site" / "tempnet_kernels"
    (package / "lib").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "lib" / "libtempnet_cpu.so").touch()
    return package


def test_a_hidden_installation_is_found(elsewhere, tmp_path, monkeypatch):
    here = Path(tempnet_kernels.__file__).parent
    (tmp_path / "link").symlink_to(here.parent)
    (tmp_path / "tempnet_kernels").mkdir()  # a folder without __init__.py is no package
    own = ["", str(tmp_path), str(here.parent), str(tmp_path / "link"), str(tmp_path / "gone")]
    monkeypatch.setattr(sys, "meta_path", [PathFinder])
    monkeypatch.setattr(sys, "path", own)
    monkeypatch.chdir(here.parent)
    assert register.hidden_installation() is None
    monkeypatch.setattr(sys, "path", [*own, str(elsewhere.parent)])
    assert register.hidden_installation() == elsewhere

    class Editable:
        """As the finder that setuptools installs."""

        folder = here

        @classmethod
        def find_spec(cls, name, path=None, target=None):
            return spec_from_file_location(name, cls.folder / "__init__.py")

    monkeypatch.setattr(sys, "path", own)
    monkeypatch.setattr(sys, "meta_path", [PathFinder, Editable])
    assert register.hidden_installation() is None, "an editable one of this folder hides nothing"
    Editable.folder = elsewhere
    assert register.hidden_installation() == elsewhere


def test_env_in_a_checkout_that_is_not_built_names_the_installation_it_hides(elsewhere, tmp_path):
    checkout = tmp_path / "checkout" / "tempnet_kernels"
    built = shutil.ignore_patterns("*.so", "lib", "__pycache__")
    shutil.copytree(Path(tempnet_kernels.__file__).parent, checkout, ignore=built)
    result = subprocess.run(
        [sys.executable, "-m", "tempnet_kernels", "env"], cwd=checkout.parent, text=True,
        capture_output=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(elsewhere.parent), "COLUMNS": "1000"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert f"hides {elsewhere}: to use that one, run from another folder" in result.stdout
    assert (
        f"native, cpu, every op: the C++ kernels are not built in {checkout}, which hides the "
        f"installed {elsewhere}, where they are: run from another folder" in result.stdout
    )
