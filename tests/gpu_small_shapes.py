"""Runs every CUDA kernel on small shapes; for compute-sanitizer (scripts/gpu_check.sh)."""

import torch

from tempnet_kernels import dro_cross_entropy

# (N, V, columns before the row), to reach every kernel of the launch plan.
SHAPES = [
    (150, 33, 0),  # a row in the registers of one CTA
    (150, 1001, 1),  # the same, off 16 bytes
    (133, 36000, 0),  # read twice
    (133, 60000, 0),  # a cluster per row
    (133, 60001, 7),  # the same, off 16 bytes
    (3, 20011, 0),  # few rows
]


def run(wide, target, tau, v, first, **options):
    logits = wide.clone()[:, first : first + v].requires_grad_()
    out = dro_cross_entropy(logits, target, tau, 0.5, backend="native", **options)
    loss = out[0] if options.get("return_stats") else out
    (2 * loss.sum()).backward()
    with torch.no_grad():
        dro_cross_entropy(logits, target, tau, 0.5, backend="native", **options)


def main():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for n, v, first in SHAPES:
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
