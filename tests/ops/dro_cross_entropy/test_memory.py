"""Peak memory of the token loss on the CPU."""

import pytest
from memory import needs_linux, printed_by

CODE = """
import torch
from measure import peak_extra_mib
from tempnet_kernels import dro_cross_entropy
logits = torch.randn(1024, 32000, requires_grad=True)
wide = logits * 1.0
target, tau = torch.randint(0, 32000, (1024,)), torch.rand(1024, requires_grad=True)
small = torch.randn(4, 50, requires_grad=True)
def run(z, y, t):
    loss = dro_cross_entropy(z, y, t, 0.0, overwrite_logits={overwrite})
    return torch.autograd.grad(loss, t if {overwrite} else (z, t))
run(small * 1.0, target[:4] % 50, tau[:4])  # code and thread pools
print(peak_extra_mib(lambda: run(wide, target, tau)), wide.nbytes / 2**20)
"""


@needs_linux
@pytest.mark.parametrize("overwrite, limit", [(False, 1.01), (True, 0.01)])
def test_peak_is_one_gradient_or_with_overwrite_logits_nothing(overwrite, limit):
    extra, logits = printed_by(CODE.format(overwrite=overwrite))
    assert extra <= limit * logits, f"{extra:.1f} MiB beside {logits:.1f} MiB of logits"
