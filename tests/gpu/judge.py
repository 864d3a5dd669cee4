"""Inputs of the smoke test, and the judgement of what a GPU makes of them: how many times its bound
it errs."""

import functools
import itertools
import math

import torch
import torch.nn.functional as F

# On a CPU, where the tests cover more, so that this script has run before it is needed.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)[: 3 if torch.cuda.is_available() else 2]
BACKENDS = ("native", "triton", "reference")


def absolute_bounds(v, *names):
    """Of H and KL over v columns and of what is formed from them, whatever the dtype."""
    return dict.fromkeys(names, 2e-6 * max(1.0, math.log(v)))


def judge(got, exact, plain, absolute):
    """(the largest error over its bound, of which output). ``absolute``: bounds by name; the others
    are twice the error of the reference in the same dtype, plus one unit."""
    worst = (0.0, "nothing")
    for name, g in got.items():
        g, e, p = g.detach().cpu(), exact[name].detach(), plain[name].detach().double()
        assert g.shape == e.shape, f"{name} has shape {tuple(g.shape)}, expected {tuple(e.shape)}"
        if not g.is_floating_point():
            worst = max(worst, (0.0 if torch.equal(g, e) else math.inf, name))
            continue
        there = ~e.isnan()
        assert torch.equal(there, ~g.isnan()), f"{name}: NaN in other places"
        if not there.any():
            continue
        unit = torch.finfo(g.dtype).eps * e[there].abs().max()
        bound = absolute.get(name, (2 * ((p - e)[there].abs().max() + unit)).item())
        error = (g.double() - e)[there].abs().max().item()
        worst = max(worst, (error / bound if error else 0.0, name))
    return worst


def moved(inputs, device, dtype=None):
    """With ``dtype``, of what is floating-point."""
    return {
        name: x.to(device, dtype if dtype and x.is_floating_point() else x.dtype)
        for name, x in inputs.items()
    }


def pairs_of(label, make, function, device, dtypes=DTYPES, backends=BACKENDS, draws=1):
    """Cases of ``function(inputs, backend) -> {name: tensor}`` with
    ``make(dtype) -> (inputs, absolute bounds)``; of several draws of them together."""

    def of_all(inputs, *args):
        results = [function(moved(x, *args[:-1]), args[-1]) for x in inputs]
        return {name: torch.stack([x[name] for x in results]) for name in results[0]}

    @functools.cache
    def expected(dtype):
        torch.manual_seed(1)
        inputs, absolutes = zip(*(make(dtype) for _ in range(draws)), strict=True)
        exact = of_all(inputs, "cpu", torch.float64, "reference")
        return inputs, absolutes[0], exact, of_all(inputs, "cpu", "reference")

    def case(backend, dtype):
        inputs, absolute, exact, plain = expected(dtype)
        got = of_all(inputs, device, backend)
        off = {name for name, x in got.items() if x.device.type != device}
        assert not off, f"{off} are not on the {device}"
        ratio, name = judge(got, exact, plain, absolute)
        if ratio <= 1:
            return {"of_bound": ratio}
        return {"status": "wrong", "error": f"{name} errs by {ratio:.3g} x its bound"}

    if device == "cpu" and len(backends) > 1:
        backends = backends[:2]  # the third is what they are compared with
    for backend, dtype in itertools.product(backends, dtypes):
        name = f"{label} {backend} {str(dtype).removeprefix('torch.')}"
        yield name, functools.partial(case, backend, dtype)


def with_gradients(inputs, names, loss_of, parameters=()):
    """The loss, what ``loss_of(inputs)`` gives beside it, and the gradients of the inputs ``names``
    and of named parameters."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in names}
    loss, others = loss_of({**inputs, **leaves})
    leaves |= dict(parameters)
    upstream = torch.linspace(0.5, 1, loss.numel()).to(loss).view(loss.shape)
    grads = torch.autograd.grad(loss, list(leaves.values()), upstream)
    named = {f"grad of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    others = {name: x for name, x in others.items() if x is not None}
    return {"loss": loss.detach(), **named, **others}


def logits_of(n, v, first, dtype):
    """Rows that begin ``first`` columns into a wider matrix."""
    wide = (3 * torch.randn(n, v + first)).to(dtype)
    return {
        "logits": wide[:, first:],
        "target": torch.randint(0, v, (n,)).index_fill_(0, torch.tensor([n // 2]), -100),
        "tau": 0.5 + torch.rand(n),
        "row_weight": 0.5 + torch.rand(n),
        "upstream": torch.randn(n, v).to(dtype),
    }


def rows_of(n, v, first, dtype):
    return logits_of(n, v, first, dtype), absolute_bounds(v, "entropy", "kl")


def row_shapes(device):
    """(N, V, columns before a row). On a GPU: a row in registers, read twice, over a cluster, and
    few rows."""
    if device == "cpu":
        return (7, 33, 0), (3, 1000, 1)
    return (7, 33, 0), (150, 4100, 1), (133, 36000, 1), (133, 60000, 0), (4, 128256, 1)


def pairs(m, n, d, dtype):
    image = F.normalize(torch.randn(m, d), dim=1)
    text = torch.randn(n, d)
    text[:m] += 2 * image
    old = torch.randn(2, m) * 0.5 + math.log(m)
    old[0, ::3] = math.nan
    return {
        "image": image.to(dtype),
        "text": F.normalize(text, dim=1).to(dtype),
        "tau_image": 0.1 + 0.2 * torch.rand(m),
        "tau_text": 0.1 + 0.2 * torch.rand(m),
        "log_s_image": old[0],
        "log_s_text": old[1],
        "image_ids": torch.randint(0, 2 * n, (n,)),
        "negative_mask": torch.rand(m, n) < 0.7,
        "positive": torch.randperm(n)[:m],
    }


def pairs_and_bounds(m, n, d, dtype):
    absolute = absolute_bounds(n, "kl_image", "kl_text", "k_image", "k_text")
    tau = absolute["kl_image"] / m
    return pairs(m, n, d, dtype), {**absolute, "grad of tau_image": tau, "grad of tau_text": tau}
