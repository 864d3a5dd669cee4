"""Runs every CUDA kernel on small shapes, for compute-sanitizer (sanitize.py)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import torch
from token_loss import CUDA_SHAPES

from tempnet_kernels import (
    dro_contrastive,
    dro_cross_entropy,
    linear_dro_cross_entropy,
    optimal_temperature,
    tempered_log_softmax,
    tempered_softmax,
)
from tempnet_kernels.chunked import dro_contrastive as tiles
from tempnet_kernels.core import register
from tempnet_kernels.nn import RobustContrastiveLoss, TempNet


def token(wide, target, tau, v, first, **options):
    logits = wide.clone()[:, first : first + v].requires_grad_()
    out = dro_cross_entropy(logits, target, tau, 0.5, backend="native", **options)
    loss = out[0] if options.get("return_stats") else out
    (2 * loss.sum()).backward()
    with torch.no_grad():
        dro_cross_entropy(logits, target, tau, 0.5, backend="native", **options)


def vocabulary_parts(logits, target, tau, softcap):
    """The columns of the second of two processes."""
    v = logits.shape[1]
    register.operator("dro_cross_entropy_stats", "native")(
        logits, target, tau, -100, softcap, v, 2 * v, True, True
    )
    rows = torch.zeros(6, len(target), device="cuda")
    for name in ("dro_cross_entropy_bwd", "dro_cross_entropy_bwd_"):
        register.operator(name, "native")(
            logits.clone(),
            target,
            tau,
            torch.ones_like(tau),
            rows,
            -100,
            0.1,
            1e-3,
            softcap,
            v,
            2 * v,
        )


def softmax(logits, tau):
    logits = logits.detach().requires_grad_()
    for function in (tempered_softmax, tempered_log_softmax):
        out = function(logits, tau, backend="native")
        out.backward(torch.randn_like(out))


def run_contrastive(dtype, m, n, **options):
    image = torch.randn(m, 24, device="cuda").to(dtype).requires_grad_()
    text = torch.randn(n, 24, device="cuda").to(dtype).requires_grad_()
    tau = torch.rand(m, device="cuda") + 0.5
    dro_contrastive(image, text, tau, tau, backend="native", **options).backward()


def contrastive(dtype):
    """Tiles whose columns are whole groups and tiles whose are not, several of them, with and
    without ids and mask."""
    tiles.TILE_ROWS, tiles.TILE_BYTES = {"cuda": 64}, {"cuda": 1}
    for m, n in ((1, 1), (70, 70), (130, 1028), (33, 601)):
        run_contrastive(dtype, m, n)
        ids = torch.randint(40, (n,), device="cuda")
        mask = torch.rand(m, n, device="cuda") < 0.5
        positive = torch.randperm(n, device="cuda")[:m]
        run_contrastive(
            dtype, m, n, image_ids=ids, negative_mask=mask, positive=positive, include_positive=True
        )


def robust_contrastive(dtype):
    """The state per sample, with equal ids."""
    ids = torch.randint(300, (200,), device="cuda")
    for method in ("sogclr", "isogclr"):
        loss = RobustContrastiveLoss(300, rho=1.0, method=method, backend="native").to("cuda")
        image, text = torch.randn(2, 200, 24, device="cuda").to(dtype).requires_grad_()
        for _ in range(2):
            loss(image, text, ids).backward()


def linear(dtype):
    for v, center in ((33, None), (4100, "max")):
        hidden = torch.randn(70, 24, device="cuda").to(dtype).requires_grad_()
        weight = torch.randn(v, 24, device="cuda").to(dtype).requires_grad_()
        target = torch.randint(0, v, (70,), device="cuda")
        net = TempNet(v, center=center).cuda()
        for softcap in (None, 5.0):
            loss = linear_dro_cross_entropy(
                hidden, weight, target, tempnet=net, rho=1.0, softcap=softcap, chunk_rows=32,
                backend="native",
            )  # fmt: skip
            loss.backward()


def main():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for n, v, first in CUDA_SHAPES:
            wide = torch.randn(n, -(-(v + first) // 8) * 8, device="cuda").to(dtype)
            target = torch.randint(0, v, (n,), device="cuda")
            target[1] = -100
            tau = (torch.rand(n, device="cuda") + 0.5).requires_grad_()
            token(wide, target, tau, v, first)
            token(wide, target, tau, v, first, reduction="none", return_stats=True)
            token(wide, target, tau, v, first, label_smoothing=0.1, z_loss=1e-3)
            token(wide, target, tau, v, first, softcap=5.0)
            token(wide, target, tau, v, first, softcap=5.0, reduction="none", return_stats=True)
            logits = wide[:, first : first + v]
            for softcap in (0.0, 5.0):
                vocabulary_parts(logits, target + v, tau.detach(), softcap)
            softmax(logits, tau)
            optimal_temperature(logits, 0.5, 0.1, 9, backend="native")
        contrastive(dtype)
        robust_contrastive(dtype)
        linear(dtype)
        torch.cuda.synchronize()
        print(dtype, "done")


main()
