"""Whole trainings, a few steps of each, and a process group of one."""

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from tempnet_kernels import dro_contrastive, dro_cross_entropy, linear_dro_cross_entropy, nn

ROOT = Path(__file__).parents[2]


def example(directory, script, *arguments):
    """Runs a script of examples/ where it may write."""
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
    result = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    print(result.stdout[-4000:], result.stderr[-8000:])
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"exit status {result.returncode}: {last}")


def training(directory, script, kind, *arguments):
    """A run of train_lm.py or train_retrieval.py; its losses are the result."""
    out = Path(directory) / Path(script).stem
    example(directory, script, *kind, *arguments, "--out", out)
    (metrics,) = (x for x in out.rglob("metrics.jsonl") if kind[1] in x.parent.parts)
    losses = [json.loads(line)["loss"] for line in metrics.read_text().splitlines()]
    assert losses and all(abs(loss) < 1e3 for loss in losses), f"the losses are {losses[-5:]}"
    return {"row": {"steps": len(losses), "first loss": losses[0], "last loss": losses[-1]}}


def group_of_one(device):
    """Every path that talks to other ranks, where there is none."""
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        return _with_a_group(device)
    finally:
        dist.destroy_process_group()


def _with_a_group(device):
    group = dist.group.WORLD
    n, v, d = 24, 96, 16
    logits = torch.randn(n, v, device=device, requires_grad=True)
    hidden = torch.randn(n, d, device=device, requires_grad=True)
    weight = torch.randn(v, d, device=device, requires_grad=True)
    target = torch.randint(0, v, (n,), device=device)
    features = torch.nn.functional.normalize(torch.randn(2, n, d, device=device), dim=2)
    image, text = (x.requires_grad_() for x in features)
    for function, leaves in (
        (lambda g: dro_cross_entropy(logits, target, 0.8, 2.0, process_group=g), [logits]),
        (
            lambda g: linear_dro_cross_entropy(
                hidden, weight, target, tau=0.8, rho=2.0, process_group=g
            ),
            [hidden, weight],
        ),
        (lambda g: dro_contrastive(image, text, 0.1, 0.2, 2.0, process_group=g), [image, text]),
    ):
        alone, shared = (
            torch.autograd.grad(function(g), leaves, retain_graph=False) for g in (None, group)
        )
        for a, b in zip(alone, shared, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    nets = {
        f"{side}_temp_gen": nn.ContrastiveTempNet(d, seed=i)
        for i, side in enumerate(("image", "text"))
    }
    module = nn.RobustContrastiveLoss(2 * n, 0.8, 2.0, process_group="world", **nets).to(device)
    module(image, text, torch.arange(n, device=device)).backward()
    net = nn.TempNet(v).to(device)
    net.shard(group)
    loss = linear_dro_cross_entropy(
        hidden, weight, target, tempnet=net, rho=2.0, process_group=group
    )
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in net.parameters())


def cases(device, part):
    yield "a process group of one", functools.partial(group_of_one, device)
    with tempfile.TemporaryDirectory() as directory:
        run = functools.partial(training, directory)
        lm = ("--device", device, "--steps", 50)
        losses, methods = ("ce", "frozen", "linear", "tempnet", "official"), ("tempnet", "clip")
        if device == "cpu":  # the tests run the others there
            lm = ("--device", device, "--steps", 3, "--width", 32, "--layers", 1, "--context", 32)
            losses, methods = losses[:2], ()
        for loss in losses:  # frozen goes on from what ce has trained
            yield f"train_lm {loss}", functools.partial(run, "train_lm.py", ("--loss", loss), *lm)
        for method in methods:
            yield f"train_retrieval {method}", functools.partial(
                run, "train_retrieval.py", ("--method", method), "--seed", 0, "--epochs", 1,
                "--device", device,
            )  # fmt: skip
        if device == "cuda":
            yield (
                "Hugging Face Trainer",
                functools.partial(example, directory, "integrations/huggingface.py"),
            )
