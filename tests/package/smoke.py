"""python smoke.py WHEEL: install a wheel into a fresh environment, and use it there.
python smoke.py: use what is installed."""

import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path, PurePath


def check_files(wheel):
    """The package, its libraries and what describes it; nothing else."""
    names = [name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")]
    for name in ("py.typed", "lib/libtempnet_cpu.so"):
        assert f"tempnet_kernels/{name}" in names, f"{wheel.name} lacks {name}"
    for name in names:
        top = PurePath(name).parts[0]
        wanted = PurePath(name).suffix in (".py", ".so", ".typed")
        if not (top.endswith(".dist-info") or (top == "tempnet_kernels" and wanted)):
            raise AssertionError(f"{wheel.name} holds {name}")


def install(wheel, folder):
    """The Python of a new environment with the wheel and, of this script's environment, what the
    wheel depends on."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", wheel], check=True)
    base = {"base": str(folder), "platbase": str(folder)}
    # A path, not a site folder: an editable tempnet_kernels there stays unknown.
    path = Path(sysconfig.get_path("purelib", vars=base), "dependencies.pth")
    path.write_text(sysconfig.get_path("purelib"))
    return python


def output(*command):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def use():
    import torch

    import tempnet_kernels
    from tempnet_kernels import _C, dro_cross_entropy

    package = Path(tempnet_kernels.__file__)
    assert package.is_relative_to(sys.prefix), f"imported from {package}"
    assert tempnet_kernels.__version__ == metadata.version("tempnet_kernels")
    assert _C.cpu_capability() in ("baseline", "avx2", "avx512")

    target = torch.tensor([1, 2, -100, 4])
    results = []
    for backend in ("native", "reference"):
        torch.manual_seed(0)
        logits = torch.randn(4, 1000, requires_grad=True)
        tau = torch.full((4,), 0.8, requires_grad=True)
        loss = dro_cross_entropy(logits, target, tau, rho=5.0, backend=backend)
        loss.backward()
        results.append((loss.detach(), logits.grad, tau.grad))
    torch.testing.assert_close(*results)

    env = output(sys.executable, "-m", "tempnet_kernels", "env")
    assert "libtempnet_cpu.so, loaded" in env, env
    assert "cpu, native:" not in env, env  # why a kernel is missing
    script = Path(sys.executable).with_name("tempnet-kernels")
    assert tempnet_kernels.__version__ in output(script, "--version")
    print(f"{package.parent}: libraries load, native equals reference, the command runs")


def main():
    if len(sys.argv) == 1:
        use()
        return
    wheel = Path(sys.argv[1]).resolve()
    check_files(wheel)
    with tempfile.TemporaryDirectory() as folder:
        python = install(wheel, Path(folder, "environment").resolve())
        subprocess.run([python, Path(__file__).resolve()], cwd=folder, check=True)
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
