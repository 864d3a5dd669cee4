"""Peak memory of the contrastive loss on the CPU."""

from memory import needs_linux, printed_by

CODE = """
import torch
from measure import peak_extra_mib
from tempnet_kernels import dro_contrastive
features = torch.randn(2, {b}, 512) / 512**0.5
def run(b):
    image, text = features[:, :b].detach().requires_grad_()
    tau = torch.full((b,), 0.1, requires_grad=True)
    torch.autograd.grad(dro_contrastive(image, text, tau, tau, 0.0), (image, text, tau))
run(1000)  # code and thread pools
print(peak_extra_mib(lambda: run({b})))
"""


@needs_linux
def test_8192_pairs_take_64_mib_with_their_gradients():
    """The gradients take 32 MiB; the matrix of similarities alone would take 256."""
    (extra,) = printed_by(CODE.format(b=8192))
    assert 32 <= extra <= 64
