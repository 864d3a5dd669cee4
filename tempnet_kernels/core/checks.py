"""Checks that several functions make."""

import functools
import math
import numbers

import torch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_floats(function, argument, tensor):
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{function}: {argument} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{function}: {argument} must be float32, bfloat16, float16 or float64, "
            f"got {tensor.dtype}"
        )


def check_rows(function, argument, tensor, width="V"):
    """``[..., V]`` of a float dtype, of at least one column."""
    check_floats(function, argument, tensor)
    if tensor.dim() < 1 or tensor.shape[-1] < 1:
        raise ValueError(
            f"{function}: {argument} must have shape (..., {width}) with {width} >= 1, "
            f"got {tuple(tensor.shape)}"
        )


def unit_columns(rows):
    """Rows ``[N, V]`` as the kernels take them: with any stride, columns one after the other."""
    return rows.contiguous() if rows.stride(1) != 1 and rows.shape[1] > 1 else rows


def check_target(target, vocab_size, ignore_index, function="dro_cross_entropy"):
    """Raise IndexError for the first bad row of a target on the CPU; on a GPU that would wait for
    it. Returns whether it is known that no row is ignored."""
    if target.device.type != "cpu" or not target.numel():
        return False
    if not torch.compiler.is_compiling():
        least, most = (int(x) for x in torch.aminmax(target))
        if least >= 0 and most < vocab_size:
            return not least <= ignore_index <= most
    bad = (target != ignore_index) & ((target < 0) | (target >= vocab_size))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise IndexError(
            f"{function}: target[{row}] must be in [0, {vocab_size}) or "
            f"ignore_index={ignore_index}, got {int(target[row])}"
        )
    return False


def check_like(function, argument, tensor, shape, device):
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{function}: {argument} must have shape {shape}, got {tuple(tensor.shape)}"
        )
    if tensor.device != device:
        raise ValueError(f"{function}: {argument} must be on {device}, got {tensor.device}")


def check_has_float64(function, argument, tensor, backend):
    """The kernels for a GPU, and Triton's interpreter, have no float64."""
    if tensor.dtype == torch.float64 and (
        backend == "triton" or (backend == "native" and tensor.is_cuda)
    ):
        raise TypeError(
            f"{function}: {argument} must be float32, bfloat16 or float16 for backend {backend!r} "
            f"on {tensor.device.type}, got torch.float64; use backend='reference'"
        )


def check_integers(function, argument, tensor, shape, device):
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{function}: {argument} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise TypeError(f"{function}: {argument} must be of an integer dtype, got {tensor.dtype}")
    check_like(function, argument, tensor, tuple(shape), device)


def first_outside(indices, size):
    """The first row whose index is not in [0, size); None if there is none, and where that is not
    known without waiting for a GPU or breaking a graph."""
    readable = indices.device.type == "cpu" and not torch.compiler.is_compiling()
    if not readable or not indices.numel():
        return None
    low, high = torch.aminmax(indices)
    if low.item() >= 0 and high.item() < size:
        return None
    return int(((indices < 0) | (indices >= size)).nonzero()[0])


def temperature_bounds(function, tau_min, tau_max):
    if not 0 < tau_min < tau_max < math.inf:
        raise ValueError(
            f"{function}: tau_min and tau_max must satisfy 0 < tau_min < tau_max, "
            f"got {tau_min} and {tau_max}"
        )


# Where a radius is to be read off, by what the softmax is over.
_KL_SHOWN_BY = {
    "columns": "the mean kl that dro_cross_entropy(..., return_stats=True) shows",
    "negatives": "the mean kl_image and kl_text that dro_contrastive(..., return_stats=True) shows",
}


def radius(function, rho, learner=None, over="columns"):
    """``rho`` as a float. ``learner``: what learns from it, for which it must be given."""
    if rho is None:
        if learner is None:
            return 0.0  # it adds rho * tau, a constant
        raise ValueError(
            f"{function}: rho must be given where {learner} learns: a temperature falls while the "
            "KL of its softmax from uniform is below rho, and rises above it; choose rho near "
            f"{_KL_SHOWN_BY[over]} at a temperature of your liking"
        )
    if not isinstance(rho, numbers.Real):
        raise TypeError(f"{function}: rho must be a number, got {type(rho).__name__}")
    if not 0 <= rho < math.inf:
        raise ValueError(f"{function}: rho must be a finite number >= 0, got {rho}")
    return float(rho)


def check_reachable(function, rho, n, over):
    """Raise for a radius that no softmax over ``n`` columns or negatives reaches."""
    # Not rho >= log(n), as n may be symbolic; log(n) itself is to raise.
    if n <= math.exp(min(rho, 700.0)) * (1 + 1e-12):
        last = "; leave out a last batch that is too small (drop_last=True)"
        raise ValueError(
            f"{function}: rho must be below log({n}) = {math.log(n):.4g}, the largest KL from "
            f"uniform of a softmax over {n} {over}, got {rho}: no temperature meets it, and all "
            f"would fall to tau_min; choose it near {_KL_SHOWN_BY[over]} at a temperature of your "
            f"liking{last if over == 'negatives' else ''}"
        )


def first_backward(function, ctx, instead):
    """Raise in a second backward of a function whose gradient was formed in the forward: the first
    one scaled it in place. ``instead``: what to do."""
    if torch.compiler.is_compiling():
        return
    if getattr(ctx, "had_backward", False):
        raise RuntimeError(
            f"{function}: a second backward of one loss (retain_graph=True) has no gradient left: "
            "it was formed in the forward and handed out in place. Call backward once, on the sum "
            f"of the losses; or {instead}"
        )
    ctx.had_backward = True


def in_backward():
    """Whether a backward pass is running: then a forward is a checkpointed region's second one."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def temperatures(function, argument, tau, shape, device, dtype):
    """``tau``, a number, a 0-d tensor or one of ``shape``, as ``[n]`` in ``dtype``."""
    n = math.prod(shape)
    if not isinstance(tau, torch.Tensor):
        if not 0 < tau < math.inf:
            raise ValueError(f"{function}: {argument} must be a finite number > 0, got {tau}")
        return torch.full((), tau, dtype=dtype, device=device).expand(n)
    if not tau.dtype.is_floating_point:
        raise TypeError(
            f"{function}: {argument} must be of a floating-point dtype, got {tau.dtype}"
        )
    if tau.dim() == 0:
        check_like(function, argument, tau, (), device)
        return tau.to(dtype).expand(n)
    check_like(function, argument, tau, shape, device)
    tau = tau if tau.dtype == dtype else tau.to(dtype)
    return tau if tau.dim() == 1 else tau.reshape(-1)


def once_differentiable(function):
    """A decorator of the backward of ``function``: torch's of that name lets
    ``create_graph=True`` pass where the upstream gradient is a constant."""

    def decorate(backward):
        first_order = torch.autograd.function.once_differentiable(backward)

        @functools.wraps(backward)
        def checked(ctx, *grads):
            if not torch.compiler.is_compiling() and torch.is_grad_enabled():
                # torch.func.grad always asks for a graph; only a second level of it would use one.
                level = torch._C._functorch.maybe_current_level()
                if level is None or level > 1:
                    raise RuntimeError(
                        f"{function}: there is no second derivative (create_graph=True or nested "
                        "torch.func transforms)"
                    )
            return first_order(ctx, *grads)

        return checked

    return decorate
