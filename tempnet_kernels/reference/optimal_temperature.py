"""The optimal temperature in plain PyTorch, all rows at a time."""

import math

import torch

MOST_EVALUATIONS = 30


def optimal_temperature(logits, rho, tau_min, tau_max):
    z = logits.to(rho.dtype)
    d = z - z.amax(1, keepdim=True)  # (N, V)
    rho = torch.where(rho >= 0, rho, math.nan)  # (N,)
    log_v = math.log(d.shape[1])
    tolerance = 1e-12 if rho.dtype == torch.float64 else 3e-6
    tau = _start(d, rho, log_v, tau_min, tau_max)  # (N,)
    kl = torch.full_like(tau, math.nan)
    low, high = torch.zeros_like(tau), torch.full_like(tau, math.inf)
    # |kl - rho| of the last evaluation and of that before.
    last = before = high
    live = torch.ones_like(tau, dtype=torch.bool)
    iterations = torch.zeros_like(tau, dtype=torch.int32)
    for _ in range(MOST_EVALUATIONS):
        if not live.any():
            break
        found, variance = _evaluate(d, tau, log_v)
        kl = torch.where(live, found, kl)
        iterations += live
        error = (kl - rho).abs()
        above = kl > rho
        clipped = torch.where(above, tau >= tau_max, tau <= tau_min)
        live = live & (error > tolerance) & ~clipped
        low, high = torch.where(live & above, tau, low), torch.where(live & ~above, tau, high)

        # Newton for log(kl / (log V - kl)) as a function of log tau: nearly straight where kl is
        # small (kl ~ tau^-2) as well as where it saturates. d kl / d log tau = -variance.
        rest = log_v - kl
        odds = kl * (log_v - rho) / (rest * rho)
        newton = tau * torch.exp(torch.log(odds) * kl * rest / (log_v * variance))
        # kl is 0 or log V, all there can be: nothing says how far the root is.
        end = torch.where(above, tau_max, tau_min)
        newton = torch.where(newton.isnan(), end, newton.clamp(tau_min, tau_max))
        middle = low.clamp(min=tau_min).sqrt() * high.clamp(max=tau_max).sqrt()
        halve = (error > 0.9 * before) | ~((low < newton) & (newton < high))
        before = torch.where(halve, math.inf, last)
        last = torch.where(halve, math.inf, error)
        new = torch.where(halve, middle, newton)
        live = live & (low < new) & (new < high)  # otherwise nothing is left between them
        tau = torch.where(live, new, tau)
    bad = (kl - rho).isnan()
    return torch.where(bad, math.nan, tau), torch.where(bad, math.nan, kl), iterations


def _start(d, rho, log_v, tau_min, tau_max):
    """Where a row of normal logits has kl = rho: kl = log(V / finite) + Var(z) / (2 tau^2)."""
    finite = d.isfinite()
    count = finite.sum(1)  # (N,)
    mean = torch.where(finite, d, 0).sum(1, keepdim=True) / count[:, None]  # (N, 1)
    variance = torch.where(finite, (d - mean) ** 2, 0).sum(1) / count  # (N,)
    excess = rho - (log_v - torch.log(count.to(d.dtype)))
    tau = torch.where(excess > 0, (variance / (2 * excess)).sqrt(), tau_max)
    # No kl is above log V, and kl of equal logits does not depend on tau.
    tau = torch.where((rho >= log_v) | ~(variance > 0), tau_min, tau)
    return tau.clamp(tau_min, tau_max)


def _evaluate(d, tau, log_v):
    """kl at tau, and the variance of z / tau."""
    x = d / tau[:, None]  # (N, V)
    e = torch.exp(x)
    p = e / e.sum(1, keepdim=True)
    x = torch.where(p == 0, 0, x)  # 0 * -inf would be NaN
    mean = (p * x).sum(1, keepdim=True)  # (N, 1)
    variance = (p * (x - mean) ** 2).sum(1)
    kl = mean[:, 0] - torch.log(e.sum(1)) + log_v
    return kl.clamp(0, log_v), variance
