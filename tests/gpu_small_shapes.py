"""Runs every CUDA kernel on small shapes; for compute-sanitizer (scripts/gpu_check.sh)."""

import torch
from test_dro_cross_entropy import CUDA_SHAPES

from tempnet_kernels import dro_cross_entropy


def run(wide, target, tau, v, first, **options):
    logits = wide.clone()[:, first : first + v].requires_grad_()
    out = dro_cross_entropy(logits, target, tau, 0.5, backend="native", **options)
    loss = out[0] if options.get("return_stats") else out
    (2 * loss.sum()).backward()
    with torch.no_grad():
        dro_cross_entropy(logits, target, tau, 0.5, backend="native", **options)


def main():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for n, v, first in CUDA_SHAPES:
            wide = torch.randn(n, -(-(v + first) // 8) * 8, device="cuda").to(dtype)
            target = torch.randint(0, v, (n,), device="cuda")
            target[1] = -100
            tau = (torch.rand(n, device="cuda") + 0.5).requires_grad_()
            run(wide, target, tau, v, first)
            run(wide, target, tau, v, first, reduction="none", return_stats=True)
            run(wide, target, tau, v, first, label_smoothing=0.1, z_loss=1e-3)
        torch.cuda.synchronize()
        print(dtype, "done")


main()
