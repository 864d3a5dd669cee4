"""Peak memory of the token loss of a linear layer on the CPU."""

from memory import needs_linux, printed_by

CODE = """
import torch
from measure import peak_extra_mib
from tempnet_kernels import linear_dro_cross_entropy
from tempnet_kernels.nn import TempNet
n, v, d = 2048, 32000, 64
hidden, weight = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
target, net = torch.randint(0, v, (n,)), TempNet(v, hidden_size=64)
def run(h, y):
    loss = linear_dro_cross_entropy(h, weight, y, chunk_rows=128, {options})
    torch.autograd.grad(loss, (h, weight, *net.parameters()), allow_unused=True)
run(hidden[:8], target[:8])  # code and thread pools
print(peak_extra_mib(lambda: run(hidden, target)))
"""


@needs_linux
def test_peak_is_the_gradients_and_a_chunk():
    (extra,), mib = printed_by(CODE.format(options="tempnet=net, rho=4.0")), 4 / 2**20
    chunk, wide, tall = 128 * 32000 * mib, 64 * 32000 * mib, 2048 * 64 * mib
    # Gradients of weight and hidden; that of W1 comes when the chunk has gone. All logits would
    # take 250 MiB.
    assert chunk < extra <= 1.3 * (wide + tall + chunk), f"{extra:.1f} MiB"


@needs_linux
def test_a_softcap_keeps_no_second_chunk():
    (extra,), (without,) = (printed_by(CODE.format(options=o)) for o in ("softcap=20.0", ""))
    assert extra <= without + 4, f"{extra:.1f} MiB, without a softcap {without:.1f}"  # a chunk: 16
