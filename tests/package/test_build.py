"""What setup.py says where something is missing, and what it packs. `make wheel` shows that a wheel
from the sdist works."""

import re
import shlex
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import tomllib

import tempnet_kernels

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
REQUIRED = [*PROJECT["build-system"]["requires"], PROJECT["project"]["dependencies"][0]]
# All that setup.py looks at; it imports none of them.
OLD = {
    "setuptools-65.5.0.dist-info/METADATA": "Name: setuptools\nVersion: 65.5.0\n",
    "torch/__init__.py": "raise ImportError('a torch that does not load')",
    "torch/version.py": "__version__ = '2.4.0+cu121'\ncuda = '12.1'\n",
}
# As in pip's isolated build, where the path holds what the build requires and no more.
HIDE_ENVIRONMENT = """
import runpy, sys
sys.path[:] = [folder for folder in sys.path if "site-packages" not in folder]
runpy.run_path("setup.py")
"""


@pytest.fixture
def python(tmp_path):
    """Of an environment in which nothing is installed."""
    venv.create(tmp_path / "environment", symlinks=True)
    return tmp_path / "environment" / "bin" / "python"


def put_old_versions(python):
    base = str(python.parents[1])
    folder = Path(sysconfig.get_path("platlib", vars={"base": base, "platbase": base}))
    for name, text in OLD.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def error(*command):
    """The line in which a build ends."""
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def test_one_line_names_all_that_is_missing(python):
    line = error(python, "setup.py", "build_ext")
    lacks, install, again = re.fullmatch(
        r"tempnet_kernels: the build lacks (.*); run `pip install (.*)`, then `(.*)`", line
    ).groups()
    # The versions are those of pyproject.toml.
    assert sorted(lacks.split(", ")) == sorted(shlex.split(install)) == sorted(REQUIRED)
    assert again == "pip install --no-build-isolation ."


def test_old_versions_are_named(python):
    put_old_versions(python)
    line = error(python, "setup.py", "build_ext")
    assert "setuptools>=77 (here 65.5.0), torch>=2.11 (here 2.4.0+cu121), pybind11" in line


def test_an_isolated_build_finds_the_torch_of_its_environment(python):
    put_old_versions(python)
    line = error(python, "-c", HIDE_ENVIRONMENT)
    assert "lacks setuptools>=77, torch>=2.11 (here 2.4.0+cu121), pybind11" in line


def test_the_sdist_holds_the_package_and_all_sources(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", f"--egg-base={tmp_path}"]
    subprocess.run(command, cwd=ROOT, check=True)
    names = (tmp_path / "tempnet_kernels.egg-info" / "SOURCES.txt").read_text().split("\n")
    folders = ["csrc", "tempnet_kernels"]
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    sources = listed.stdout.split()
    assert "csrc/cuda/dro_cross_entropy.cu" in sources
    assert {name for name in names if name.split("/")[0] in folders} == set(sources)
    assert {name for name in names if "/" not in name} == {
        "CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "README.md",
        "pyproject.toml", "setup.py",
    }  # fmt: skip


def test_a_wheel_holds_nothing_of_an_earlier_build(tmp_path):
    left = tmp_path / "lib" / "tempnet_kernels" / "lib" / "libtempnet_cuda.so"
    left.parent.mkdir(parents=True)
    left.touch()
    # Nothing is compiled.
    code = (
        "import runpy, setuptools, sys\n"
        "sys.argv = ['setup.py', '-q', 'build', '--build-base', sys.argv[1]]\n"
        "setup = setuptools.setup\n"
        "setuptools.setup = lambda **arguments: setup(**{**arguments, 'ext_modules': []})\n"
        "runpy.run_path('setup.py')\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, check=True)
    assert (tmp_path / "lib" / "tempnet_kernels" / "__init__.py").exists()
    assert not left.exists()


def test_errors_of_kernels_do_not_name_the_folder_of_the_build():
    library = Path(tempnet_kernels.__file__).with_name("lib") / "libtempnet_cpu.so"
    sources = re.findall(rb"[\w./-]*csrc/[\w./-]*", library.read_bytes())
    assert b"csrc/cpu/dro_cross_entropy.cpp" in sources
    assert not any(name.startswith(b"/") for name in sources)
