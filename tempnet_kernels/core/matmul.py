"""Matrix products by the platform, accumulated in float32 whatever their operands' dtype."""

import torch

# Where a product of 16-bit matrices accumulates in float32 and can return that. Elsewhere it would
# round the result to 16 bits, so the operands are copied to float32 first.
WIDE_PRODUCTS = {"cuda"}
COPY_BYTES = 4 << 20  # of an operand that is copied to float32, at a time


def operand(x, acc):
    return x if x.device.type in WIDE_PRODUCTS else x.to(acc)


def wide_operand(x):
    """As :func:`operand`, and float16 is left only for what cannot underflow in it."""
    if x.dtype == torch.float16:
        return x.float()
    return operand(x, torch.promote_types(x.dtype, torch.float32))


def multiply(a, b, out):
    """out := a b in the dtype of ``out``."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def add_product(out, a, b, fresh=False):
    """out += a b in the dtype of ``out``; out := a b where it is ``fresh``, not written yet."""
    if fresh and (a.dtype == out.dtype or out.device.type in WIDE_PRODUCTS):
        multiply(a, b, out)
    elif a.dtype == out.dtype:  # not addmm_, which torch's flop counter does not know
        torch.addmm(out, a, b, out=out)
    elif out.device.type in WIDE_PRODUCTS:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        b = b.to(out.dtype)
        step = max(1, COPY_BYTES // (a.shape[1] * out.itemsize))
        for i in range(0, a.shape[0], step):
            r = slice(i, i + step)
            if fresh:
                torch.mm(a[r].to(out.dtype), b, out=out[r])
            else:
                torch.addmm(out[r], a[r].to(out.dtype), b, out=out[r])


def unit_of(scale):
    """What the gradients of float16 inputs are still to be multiplied with, 0-d."""
    if not scale.numel():
        return scale.new_ones(())
    largest = scale.abs().amax()
    return torch.where(largest == 0, 1, largest)
