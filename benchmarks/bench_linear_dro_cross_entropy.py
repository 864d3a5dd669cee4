"""Linear layer, TempNet and token loss, forward and backward: ours, the official formula on whole
logits, and the matrix products alone, in chunks of the same size.

    make bench

Variants run in turn, round by round; ours is checked in float64 before it is timed. Peaks are of a
process of their own. Then a frozen model of which only the TempNet is trained, and the TempNet
alone: its first layer folded into the head, and applied to the logits.
"""

import copy

import pytest
import torch
from measure import peak_extra_mib_alone, time_in_turn
from peers import LINEAR_LOSSES

from tempnet_kernels import linear_dro_cross_entropy
from tempnet_kernels.chunked import linear_dro_cross_entropy as chunked_linear
from tempnet_kernels.core.fields import LinearOptions
from tempnet_kernels.core.tempnet import Dropout
from tempnet_kernels.nn import TempNet
from tempnet_kernels.ops.linear_dro_cross_entropy import CHUNK_BYTES, CHUNK_BYTES_WITHOUT_WEIGHT

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
RHO = 8.0
ROUNDS = 7 if CUDA else 3
OURS = "tempnet_kernels"
if CUDA:
    SHAPES = [(8192, 128256, 4096, torch.bfloat16), (8192, 32000, 4096, torch.bfloat16)]
    TEMPNET_SHAPES = [(8192, 128256, 4096, torch.bfloat16)]
else:
    SHAPES = [
        (2048, 32000, 512, torch.float32),
        (2048, 32000, 512, torch.bfloat16),
        (4096, 128256, 256, torch.float32),
    ]
    TEMPNET_SHAPES = [(8192, 32000, 512, torch.float32)]


def make(n, v, d, dtype, frozen=False):
    torch.manual_seed(torch.seed())  # fresh data every run
    hidden = torch.randn(n, d, device=DEVICE, dtype=dtype)
    weight = torch.randn(v, d, device=DEVICE, dtype=dtype) * (2 / d**0.5)
    target = torch.randint(0, v, (n,), device=DEVICE)
    grad = not frozen
    return hidden.requires_grad_(grad), weight.requires_grad_(grad), target, TempNet(v).to(DEVICE)


def step(name, hidden, weight, target, net):
    loss = LINEAR_LOSSES[name](hidden, weight, target, net, RHO)
    parameters = () if net is None else net.parameters()
    wanted = [x for x in (hidden, weight, *parameters) if x.requires_grad]
    return loss.detach(), *torch.autograd.grad(loss, wanted, allow_unused=True)


class Products:
    """The products of every chunk: logits, and in a training step both gradients. Its memory is
    there before."""

    def __init__(self, hidden, weight, training):
        self.hidden, self.weight, self.training = hidden.detach(), weight.detach(), training
        budget = (CHUNK_BYTES if training else CHUNK_BYTES_WITHOUT_WEIGHT)[hidden.device.type]
        v = weight.shape[0]
        self.rows = min(hidden.shape[0], max(1, budget // (v * weight.element_size())))
        self.z = hidden.new_empty((self.rows, v))
        self.grad_hidden = torch.empty_like(self.hidden)
        self.grad_weight = torch.zeros_like(self.weight)

    @torch.no_grad()
    def __call__(self):
        for i in range(0, self.hidden.shape[0], self.rows):
            h = self.hidden[i : i + self.rows]
            z = torch.mm(h, self.weight.T, out=self.z[: h.shape[0]])
            if self.training:
                torch.mm(z, self.weight, out=self.grad_hidden[i : i + self.rows])
                self.grad_weight.addmm_(z.T, h)


def peak_of(name, frozen, *shape):
    tensors = make(*shape, frozen)
    return lambda: step(name, *tensors)


def check(hidden, weight, target, net):
    """Some rows of the launch that is timed, in float64: the temperatures, and where something
    trains but the network the gradient of the hidden states. Without ``net`` of the loss at a given
    temperature."""
    tolerance = 1e-4 if hidden.dtype == torch.float32 else 3e-2
    rows = torch.randperm(hidden.shape[0], device=hidden.device)[:8]
    z = hidden[rows].detach().double() @ weight.detach().double().T
    name, tau = f"{OURS}, tau given", torch.full((len(rows),), 0.8).to(z)
    if net is not None:
        net.eval()
        name = OURS
        _, stats = linear_dro_cross_entropy(
            hidden, weight, target, tempnet=net, rho=RHO, return_stats=True
        )
        tau = stats.tau[rows].double()
        exact = copy.deepcopy(net).double()(z)
        assert (tau - exact).abs().max() <= tolerance * exact.abs().max()
    grads = step(name, hidden, weight, target, net)
    if net is not None:
        net.train()
    if not hidden.requires_grad:
        return
    p = torch.softmax(z / tau[:, None], 1)
    p[torch.arange(len(rows)), target[rows]] -= 1
    exact = p @ weight.detach().double() / hidden.shape[0]
    assert (grads[1][rows].double() - exact).abs().max() <= tolerance * exact.abs().max()


def info_of(op, n, v, d, dtype):
    return {"op": op, "n": n, "v": v, "d": d, "dtype": str(dtype).removeprefix("torch.")}


@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_loss(benchmark, shape, frozen):
    torch.compiler.reset()  # past a number of recompilations it runs eagerly, in silence
    peak = {}
    for name in LINEAR_LOSSES:
        if not frozen or not name.endswith("given"):
            try:
                peak[name] = peak_extra_mib_alone(peak_of, name, frozen, *shape)
            except torch.OutOfMemoryError:
                print(f"{name}: out of memory at {shape}")
    tensors = make(*shape, frozen)
    check(*tensors)
    variants = {name: lambda name=name: step(name, *tensors) for name in peak}
    op, limit = "linear_dro_cross_entropy", "three matrix products"
    if frozen:
        op, limit = f"{op}, frozen", "one matrix product"
    variants[limit] = Products(*tensors[:2], training=not frozen)
    time_in_turn(benchmark, OURS, variants, ROUNDS, peak_extra_mib=peak, **info_of(op, *shape))


@pytest.mark.parametrize("shape", TEMPNET_SHAPES, ids=str)
def test_tempnet(benchmark, shape):
    """Temperatures and all gradients of the network, for logits that are there: the module, and
    both ways of the chunk loop."""
    n, v, *_ = shape
    hidden, weight, _, net = make(*shape, frozen=True)
    rows = CHUNK_BYTES[DEVICE] // (v * weight.element_size())
    z, grad_tau = hidden[:rows] @ weight.T, torch.rand(n, device=DEVICE)
    tensors = [p.detach() for p in (net.proj[0].weight, *net.head(torch.float32))]

    def chunks():
        return (slice(i, min(n, i + rows)) for i in range(0, n, rows))

    options = LinearOptions(
        RHO, -100, 0.0, 0.0, softcap=0.0, tau_min=0.5, tau_max=2.0, dropout=0.5, center=False,
        fold=True, chunk_rows=rows, drop_ignored=False,
    )  # fmt: skip

    def ours(fold):
        kind = chunked_linear.FoldedTempNet if fold else chunked_linear.DirectTempNet
        key = net.dropout_key(torch.device(DEVICE))
        loop = kind("native", tensors, options, weight, None, True, torch.float32, None, n)
        for r in chunks():
            count = r.stop - r.start
            dropout = Dropout(key, options.dropout, None, r.start)
            _, chunk = loop.temperatures(hidden[r], z[:count], dropout)
            loop.backward(grad_tau[r], chunk)
        return loop.gradients()

    def module():
        for r in chunks():
            net(z[: r.stop - r.start]).backward(grad_tau[r])
        net.zero_grad()

    def products():
        """(W1 W), two products per row, and (grad of W1 W) W^T."""
        folded = tensors[0] @ weight.float().T.T
        pre = hidden.float() @ folded.T
        return (pre.T @ hidden.float()) @ weight.float().T

    variants = {
        "module, on the logits": module,
        "chunk loop, on the logits": lambda: ours(False),
        OURS: lambda: ours(True),
        "its products, folded": products,
    }
    info = info_of("TempNet of a linear layer", *shape)
    time_in_turn(benchmark, OURS, variants, ROUNDS, peak_extra_mib={}, **info)
