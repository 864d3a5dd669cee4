"""The CUDA kernels of the temperature networks in the emulator."""

import torch
from emulated import ORDERS

from tempnet_kernels.core import tempnet

OP = "temperature_head"


def test_every_thread_order_gives_the_same_bits(use):
    """A block of more rows than a CTA holds at a time, and columns of more than one CTA."""
    key, bounds = torch.tensor(77), (0.5, 2.0)
    tall, wide = torch.randn(8200, 3), torch.randn(9, 300)
    grad_tau = torch.randn(8200)
    results = []
    for order in ORDERS:
        use(order)
        found = []
        for h, norms in ((tall, torch.arange(1.0, 4.0)), (wide, None)):
            n, k = h.shape
            last = norms, torch.zeros(1), torch.ones(1, k), torch.zeros(1), norms is None, *bounds
            dropped = tempnet._op("sigmoid_dropout", "native")(
                h, torch.zeros(k), None, key, None, 0, 0.5
            )
            found += [dropped, tempnet._op("temperature_head", "native")(h, *last)]
            found += tempnet._op("sigmoid_dropout_bwd", "native")(h, dropped, None, 0.5)
            found += tempnet._op("temperature_head_bwd", "native")(grad_tau[:n], h, *last)
        results.append(found)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))
        assert all(x.isfinite().all() for x in other)
