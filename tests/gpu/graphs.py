"""Every function captured in a CUDA graph and replayed, and under torch.compile's
"reduce-overhead", which captures, too. Capture raises where a call waits for the GPU. On a CPU the
steps run twice."""

import functools

import compare
import torch
import torch.nn.functional as F

from tempnet_kernels import (
    dro_contrastive,
    dro_cross_entropy,
    linear_dro_cross_entropy,
    nn,
    optimal_temperature,
    tempered_log_softmax,
    tempered_softmax,
)

N, V, D = (64, 2048, 64) if torch.cuda.is_available() else (24, 96, 16)


def inputs(device):
    """Leaves by name, and what needs no gradient."""
    image, noise = torch.randn(2, N, D, device=device)
    leaves = {
        "logits": 3 * torch.randn(N, V, device=device),
        "tau": 0.5 + torch.rand(N, device=device),
        "hidden": torch.randn(N, D, device=device),
        "weight": 0.2 * torch.randn(V, D, device=device),
        "image": F.normalize(image, dim=1),
        "text": F.normalize(image + noise, dim=1),
    }
    fixed = {
        "target": torch.randint(0, V, (N,), device=device).index_fill_(
            0, torch.tensor([3], device=device), -100
        ),
        "ids": torch.randperm(2 * N, device=device)[:N],
    }
    return {**{k: v.requires_grad_() for k, v in leaves.items()}, **fixed}


def functions(device, x):
    """{name: (a loss without arguments, its leaves)}; what has a state or dropout comes after."""
    net = nn.TempNet(V, 0.5, 2.0).to(device).eval()
    token = nn.TempNetCrossEntropyLoss(net, 3.0)
    causal = nn.TempNetCausalLMLoss(net, 3.0)
    parameters = list(net.parameters())
    z, y, tau = x["logits"], x["target"], x["tau"]
    both = [z, tau]
    head = [x["hidden"], x["weight"]]
    taus = 0.1 + 0.1 * torch.rand(2, N, device=device)
    found = {}
    for backend in ("native", "triton"):
        given = {"backend": backend}
        found |= {
            f"dro_cross_entropy {backend}": (
                lambda g=given: dro_cross_entropy(z, y, tau, 3.0, **g), both
            ),
            f"tempered_softmax {backend}": (
                lambda g=given: tempered_softmax(z, tau, **g).square().sum(), both
            ),
            f"tempered_log_softmax {backend}": (
                lambda g=given: tempered_log_softmax(z, tau, **g).square().mean(), both
            ),
            f"optimal_temperature {backend}": (
                lambda g=given: optimal_temperature(z.detach(), 2.0, 0.05, 9.0, **g), []
            ),
            f"linear_dro_cross_entropy {backend}": (
                lambda g=given: linear_dro_cross_entropy(
                    *head, y, tau=tau, rho=3.0, chunk_rows=24, **g
                ),
                [*head, tau],
            ),
            f"dro_contrastive {backend}": (
                lambda g=given: dro_contrastive(x["image"], x["text"], *taus, 2.0, **g),
                [x["image"], x["text"]],
            ),
            f"dro_contrastive, ids {backend}": (
                lambda g=given: dro_contrastive(
                    x["image"], x["text"], *taus, 2.0, image_ids=x["ids"] // 2, **g
                ),
                [x["image"], x["text"]],
            ),
        }  # fmt: skip
    found |= {
        "linear_dro_cross_entropy, TempNet": (
            lambda: linear_dro_cross_entropy(*head, y, tempnet=net, rho=3.0),
            [*head, *parameters],
        ),
        "TempNetCrossEntropyLoss": (
            lambda: token(z, y), [z, *parameters]
        ),
        "TempNetCausalLMLoss": (
            lambda: causal(x["hidden"][None], y[None], 50, weight=x["weight"]),
            [*head, *parameters],
        ),
    }  # fmt: skip
    return found


def changing(device, x):
    """Losses whose every call is another one: dropout, and the state of samples."""
    found = {}
    for method in ("clip", "sogclr", "isogclr", "tempnet"):
        nets = {}
        if method == "tempnet":
            for i, side in enumerate(("image", "text")):
                nets[f"{side}_temp_gen"] = nn.ContrastiveTempNet(D, seed=i)
        module = nn.RobustContrastiveLoss(
            0 if method == "clip" else 2 * N, 0.8, 2.0, method=method, **nets
        )
        module.to(device)
        ids = [] if method == "clip" else [x["ids"]]
        leaves = [x["image"], x["text"], *(p for p in module.parameters() if p.requires_grad)]
        found[f"RobustContrastiveLoss {method}"] = (
            lambda m=module, ids=ids: m(x["image"], x["text"], *ids),
            leaves,
        )
    net = nn.TempNet(V, 0.5, 2.0).to(device).train()
    found["linear_dro_cross_entropy, TempNet with dropout"] = (
        lambda: linear_dro_cross_entropy(
            x["hidden"], x["weight"], x["target"], tempnet=net, rho=3.0
        ),
        [x["hidden"], x["weight"], *net.parameters()],
    )
    return found


def step(function, leaves):
    loss = function()
    if not leaves:
        return (loss,)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def unable():
    return {"status": "unable", "error": "CUDA graphs need a GPU; the step itself ran"}


def capture(device, function, leaves, fixed):
    run = functools.partial(step, function, leaves)
    if device == "cpu":
        first, second = run(), run()
        if fixed:
            assert all(map(torch.equal, first, second)), "two runs differ"
        return unable()
    if fixed:
        compare.assert_graph_replays(run)
        return None
    run()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    assert all(x.isfinite().all() for x in captured), "a replay is not finite"
    return None


def compiled(device, function, leaves):
    run = functools.partial(step, function, leaves)
    if device == "cpu":
        run()
        return unable()
    expected = run()
    torch.compiler.reset()
    fast = torch.compile(function, mode="reduce-overhead")
    for _ in range(3):  # the third replays
        torch.compiler.cudagraph_mark_step_begin()
        got = [x.clone() for x in step(fast, leaves)]
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=2e-5, atol=1e-6)
    return None


def cases(device, part):
    torch.manual_seed(0)
    x = inputs(device)
    steady, other = functions(device, x), changing(device, x)
    for name, (function, leaves) in steady.items():
        yield f"capture {name}", functools.partial(capture, device, function, leaves, True)
    for name, (function, leaves) in other.items():
        yield f"capture {name}", functools.partial(capture, device, function, leaves, False)
    for name, (function, leaves) in steady.items():
        if "triton" not in name:
            yield f"compile {name}", functools.partial(compiled, device, function, leaves)
