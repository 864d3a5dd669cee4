"""The modules' part of the smoke test."""

import functools

import torch
from judge import (
    BACKENDS,
    DTYPES,
    logits_of,
    moved,
    pairs,
    pairs_of,
    with_gradients,
)

from tempnet_kernels import (
    nn,
)


def module_cases(device):
    """In eval mode, since dropout is not the same on every device; then a step in train mode."""

    def run(build, names, call, x, backend):
        torch.manual_seed(2)
        double = any(value.dtype == torch.float64 for value in x.values())
        module = build(backend).to(dtype=torch.float64 if double else torch.float32).eval()
        module.to(next(iter(x.values())).device)
        parameters = [(k, p) for k, p in module.named_parameters() if p.requires_grad]
        return with_gradients(x, names, lambda x: (call(module, x), {}), parameters)

    def training(build, make, names, call):
        torch.manual_seed(2)
        x, _ = make(torch.float32)
        module = build("auto").to(device).train()
        x = moved(x, device)
        leaves = {name: x[name].detach().requires_grad_() for name in names}
        optimizer = torch.optim.SGD([*module.parameters(), *leaves.values()], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            out = call(module, {**x, **leaves})
            out.sum().backward()
            optimizer.step()
        assert out.isfinite().all(), f"the loss is {out}"
        for name, value in {**leaves, **dict(module.named_parameters())}.items():
            assert value.isfinite().all(), f"{name} is not finite after a step"
        if hasattr(module, "temperature_stats"):
            str(module.temperature_stats())

    n, v, d = (6, 101, 16) if device == "cpu" else (130, 5003, 64)

    def hidden(dtype):
        x = {
            "hidden": torch.randn(2, n // 2, d).to(dtype),
            "weight": (2 * torch.randn(v, d) / d**0.5).to(dtype),
            "labels": torch.randint(0, v, (2, n // 2)),
        }
        return x, {}

    def tempnet():
        net = nn.TempNet(v, 0.5, 2.0)
        torch.nn.init.normal_(net.last.weight)
        return net

    def rows(dtype):
        return logits_of(n, v, 0, dtype), {}

    def batch(dtype):
        x = pairs(n, n, d, dtype)
        return {**{k: x[k] for k in ("image", "text")}, "ids": torch.randperm(2 * n)[:n]}, {}

    def contrastive(method, backend):
        nets = {}
        if method == "tempnet":
            for i, side in enumerate(("image", "text")):
                nets[f"{side}_temp_gen"] = nn.ContrastiveTempNet(d, seed=i)
        samples = 0 if method == "clip" else 2 * n
        return nn.RobustContrastiveLoss(samples, 0.8, 0.1, method=method, backend=backend, **nets)

    def contrastive_call(m, x):
        return m(x["image"], x["text"], *([] if m.method == "clip" else [x["ids"]]))

    kinds = [
        (
            "TempNet", lambda backend: tempnet(), rows, (), lambda m, x: m(x["logits"]),
        ),
        (
            "TempNetCrossEntropyLoss",
            lambda backend: nn.TempNetCrossEntropyLoss(tempnet(), 3.0, backend=backend), rows,
            ("logits",), lambda m, x: m(x["logits"], x["target"]),
        ),
        (
            "TempNetCausalLMLoss",
            lambda backend: nn.TempNetCausalLMLoss(tempnet(), 3.0, backend=backend), hidden,
            ("hidden", "weight"),
            lambda m, x: m(x["hidden"], x["labels"], 7, weight=x["weight"]),
        ),
        (
            "ContrastiveTempNet", lambda backend: nn.ContrastiveTempNet(d, seed=1), batch, (),
            lambda m, x: m(x["image"], x["ids"]),
        ),
        *(
            (
                f"RobustContrastiveLoss {method}", functools.partial(contrastive, method), batch,
                ("image", "text"), contrastive_call,
            )
            for method in ("clip", "sogclr", "isogclr", "tempnet")
        ),
    ]  # fmt: skip
    for label, build, make, names, call in kinds:
        alone = label in ("TempNet", "ContrastiveTempNet")
        dtypes, backends = (DTYPES[:1], BACKENDS[2:]) if alone else (DTYPES[:2], BACKENDS)
        function = functools.partial(run, build, names, call)
        # The gradient of logit_scale is one number, in which the reference may err by little.
        draws = 8 if label == "RobustContrastiveLoss clip" else 1
        yield from pairs_of(label, make, function, device, dtypes, backends, draws)
        yield f"{label} two steps", functools.partial(training, build, make, names, call)
