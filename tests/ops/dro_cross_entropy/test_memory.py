"""Peak memory of the losses on the CPU, as the operating system counts it; each case in a
process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
sys.path.insert(0, {benchmarks!r})
import torch
from measure import peak_extra_mib
from tempnet_kernels import dro_cross_entropy
logits = torch.randn(1024, 32000, requires_grad=True)
wide = logits * 1.0
target, tau = torch.randint(0, 32000, (1024,)), torch.rand(1024, requires_grad=True)
small = torch.randn(4, 50, requires_grad=True)
def run(z, y, t):
    loss = dro_cross_entropy(z, y, t, overwrite_logits={overwrite})
    return torch.autograd.grad(loss, t if {overwrite} else (z, t))
run(small * 1.0, target[:4] % 50, tau[:4])  # code and thread pools
print(peak_extra_mib(lambda: run(wide, target, tau)), wide.nbytes / 2**20)
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs /proc/self/clear_refs (Linux)"
)
@pytest.mark.parametrize("overwrite, limit", [(False, 1.01), (True, 0.01)])
def test_peak_is_one_gradient_or_with_overwrite_logits_nothing(overwrite, limit):
    benchmarks = str(Path(__file__).parents[3] / "benchmarks")
    code = CODE.format(benchmarks=benchmarks, overwrite=overwrite)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    extra, logits = map(float, result.stdout.split())
    assert extra <= limit * logits, f"{extra:.1f} MiB beside {logits:.1f} MiB of logits"


CONTRASTIVE = """
import sys
sys.path.insert(0, {benchmarks!r})
import torch
from measure import peak_extra_mib
from tempnet_kernels import dro_contrastive
features = torch.randn(2, {b}, 512) / 512**0.5
def run(b):
    image, text = features[:, :b].detach().requires_grad_()
    tau = torch.full((b,), 0.1, requires_grad=True)
    torch.autograd.grad(dro_contrastive(image, text, tau, tau), (image, text, tau))
run(1000)  # code and thread pools
print(peak_extra_mib(lambda: run({b})))
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs /proc/self/clear_refs (Linux)"
)
def test_8192_pairs_take_64_mib_with_their_gradients():
    """The gradients take 32 MiB; the matrix of similarities alone would take 256."""
    benchmarks = str(Path(__file__).parents[3] / "benchmarks")
    code = CONTRASTIVE.format(benchmarks=benchmarks, b=8192)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    assert 32 <= float(result.stdout) <= 64
