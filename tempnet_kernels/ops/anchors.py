"""What the states of a matrix of similarities give per anchor."""

import math
from typing import NamedTuple

import torch


class Anchors(NamedTuple):
    """What one side's states give, per anchor."""

    term: torch.Tensor  # tau (log(s/n) + rho)
    log_s: torch.Tensor
    kl: torch.Tensor
    k: torch.Tensor  # the term's derivative by tau; of the surrogate loss at gamma < 1
    q: torch.Tensor  # w_ij = q_i 2^(S_ij a_i - m_i)
    total: torch.Tensor  # sum_j w_ij = g_i / s_i
    live: torch.Tensor  # has a negative


def anchors(state, s_positive, a, tau, log_s_old, gamma, rho):
    # In float64: these are B numbers, and m - S_ii a cancels.
    m, s, sx, count = state.double()
    live = count > 0
    ln2 = math.log(2)
    shift = m - s_positive.double() * a.double()
    log_n = torch.log(count)
    log2_s = torch.log2(s)
    log_g = ln2 * (log2_s + shift)
    entropy = (ln2 * (log2_s - sx / s)).clamp(min=0)
    entropy = torch.minimum(entropy, log_n)
    kl = log_n - entropy
    old = log_s_old.double()
    averaged = log_g + math.log(gamma)
    if gamma < 1:
        averaged = torch.logaddexp(old + math.log1p(-gamma), averaged)
    log_s = torch.where(torch.isnan(old), log_g, averaged)
    term = tau.double() * (log_s - log_n + rho)
    behind = log_g - log_s  # exactly 0 for gamma = 1 and on a first visit
    total = torch.exp(behind)
    # log(s/n) + rho - sum_j w_ij h_ij / tau, without a difference of large numbers at behind = 0.
    k = rho - kl - behind - torch.expm1(behind) * ln2 * (sx / s + shift)
    bad = ~((tau > 0) & (tau < math.inf))
    nan = math.nan

    def choose(value, dead):
        return torch.where(live, torch.where(bad, nan, value), dead)

    return Anchors(
        term=choose(term, 0.0),
        # What is not finite must not reach the state.
        log_s=torch.where(live & torch.isfinite(log_s), log_s, old).to(tau.dtype),
        kl=choose(kl, nan).to(tau.dtype),
        k=choose(k, 0.0).to(tau.dtype),
        q=choose(total / s, 0.0).to(tau.dtype),
        total=choose(total, 0.0).to(tau.dtype),
        live=live,
    )
