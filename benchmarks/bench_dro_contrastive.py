"""Contrastive loss, forward and backward: ours, the official formula, the loss of open_clip, and
four matrix products of that size, which is the limit of a loss that recomputes the similarities.

    make bench

The variants run in turn, round by round. Ours and the official formula are checked against the
definition in float64 before they are timed: the gradients of some of the images and texts. On a GPU
also Triton, and Inf-CL where it is installed.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from measure import peak_extra_mib_alone, time_in_turn
from peers import CONTRASTIVE_LOSSES, CONTRASTIVE_RHO

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ROUNDS = 9 if CUDA else 5
OURS = "tempnet_kernels"
LIMIT = "four matrix products"
PRODUCT_ROWS = 8192
SHAPES = [(b, d, torch.float32) for d in (512, 1024) for b in (2048, 4096, 8192)]
if CUDA:
    SHAPES = [
        *((b, 768, torch.bfloat16) for b in (8192, 16384, 32768, 65536, 131072, 262144)),
        *((b, d, torch.bfloat16) for d in (512, 1024) for b in (8192, 32768, 65536, 131072)),
        (8192, 512, torch.float32),
    ]


def make(b, d, dtype, seed):
    """Pairs of unit vectors with a similarity of about 0.7, as [image, text, tau_image, tau_text]
    that want a gradient."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    image, noise = torch.randn(2, b, d, generator=generator, device=DEVICE)
    taus = 0.05 + 0.1 * torch.rand(2, b, generator=generator, device=DEVICE)
    features = (F.normalize(x, dim=1).to(dtype) for x in (image, image + noise))
    return [t.requires_grad_() for t in (*features, *taus.unbind())]


def gradients(name, tensors):
    return torch.autograd.grad(CONTRASTIVE_LOSSES[name](*tensors), tensors, allow_unused=True)


@torch.no_grad()
def four_products(image, text):
    """Of rows at a time: the whole matrix need not fit."""
    grad_image, grad_text = torch.empty_like(image), torch.zeros_like(text)
    for begin in range(0, image.shape[0], PRODUCT_ROWS):
        rows = slice(begin, begin + PRODUCT_ROWS)
        similarity = image[rows] @ text.T
        torch.mm(image[rows], text.T, out=similarity)
        torch.mm(similarity, text, out=grad_image[rows])
        grad_text.addmm_(similarity.T, image[rows])
    return grad_image, grad_text


def variant(name, b, d, dtype, seed):
    """A call of that name without arguments."""
    tensors = make(b, d, dtype, seed)
    if name == LIMIT:
        return lambda: four_products(*tensors[:2])
    return lambda: gradients(name, tensors)


def definition(tensors, rows):
    """The gradients of the images and texts of ``rows``, and of both temperatures, in float64."""
    image, text, tau_image, tau_text = (t.detach().double() for t in tensors)
    b = image.shape[0]
    s_positive = (image * text).sum(1)

    def statistics(anchors, candidates, tau):
        """(log g, the mean of h / tau under p) of every anchor."""
        parts = []
        for begin in range(0, b, 1024):
            block = slice(begin, begin + 1024)
            x = (anchors[block] @ candidates.T - s_positive[block, None]) / tau[block, None]
            x.diagonal(begin).fill_(-math.inf)
            log_g = torch.logsumexp(x, 1)
            p = torch.exp(x - log_g[:, None])
            parts.append((log_g, torch.where(p > 0, p * x, 0).sum(1)))
        return (torch.cat(part) for part in zip(*parts, strict=True))

    log_image, mean_image = statistics(image, text, tau_image)
    log_text, mean_text = statistics(text, image, tau_text)
    k = [
        (log - math.log(b - 1) + CONTRASTIVE_RHO - mean) / b
        for log, mean in ((log_image, mean_image), (log_text, mean_text))
    ]
    grads = []
    for own, other, by_own, by_other in (
        (image, text, (tau_image, log_image), (tau_text, log_text)),
        (text, image, (tau_text, log_text), (tau_image, log_image)),
    ):
        s = own[rows] @ other.T  # (rows, B)
        w = torch.exp((s - s_positive[rows, None]) / by_own[0][rows, None] - by_own[1][rows, None])
        w += torch.exp((s - s_positive) / by_other[0] - by_other[1])
        at = torch.arange(len(rows), device=w.device)
        w[at, rows] = -2.0  # both anchors' weights sum to 1
        grads.append(w @ other / b)
    return grads[0], grads[1], *k


def compare_with_definition(name, tensors, grads):
    """``grads``: of the features, and of the temperatures unless they are not wanted."""
    rows = torch.randperm(tensors[0].shape[0], device=DEVICE)[:256]
    exact = definition(tensors, rows)[: len(grads)]
    got = (grads[0][rows], grads[1][rows], *grads[2:])
    tolerance = 1e-5 if tensors[0].dtype == torch.float32 else 1e-2
    for g, e in zip(got, exact, strict=True):
        assert (g - e).norm() <= tolerance * e.norm(), name


def check(name, tensors):
    compare_with_definition(name, tensors, gradients(name, tensors))


@pytest.mark.parametrize("b, d, dtype", SHAPES, ids=str)
def test_contrastive_loss(benchmark, b, d, dtype):
    torch.compiler.reset()
    shape = (b, d, dtype, torch.seed() % 2**32)  # fresh data every run
    peak, variants = {}, {}
    for name in (*CONTRASTIVE_LOSSES, LIMIT):
        try:
            if "official" in name or OURS in name:
                check(name, make(*shape))
            peak[name] = peak_extra_mib_alone(variant, name, *shape)
            variants[name] = variant(name, *shape)
            variants[name]()
        except torch.OutOfMemoryError:
            print(f"{name}: out of memory at B = {b}")
            variants.pop(name, None)

    time_in_turn(
        benchmark, OURS, variants, ROUNDS, op="dro_contrastive", n=b, d=d,
        dtype=str(dtype).removeprefix("torch."), peak_extra_mib=peak,
    )  # fmt: skip
