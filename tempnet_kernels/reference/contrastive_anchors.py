"""What stands before and behind the tiles of the contrastive loss in plain PyTorch."""

import math
from typing import NamedTuple

import torch

from tempnet_kernels.core.fields import AnchorState

# The maximum of nothing. Finite, since -inf - -inf is NaN.
EMPTY = {torch.float32: -(2.0**31), torch.float64: -(2.0**60)}
# An anchor without negatives, and a candidate that is no anchor: a weight 0 * 2^(z a). Not 0, whose
# product with the -inf of a masked pair is NaN.
NO_ANCHOR = 1e-30


def anchor_states(
    tau_image, tau_text, positive, text, candidates, begin, include_positive, every_pair
):
    m, n, columns = tau_image.shape[0], text.shape[0], candidates.shape[0]
    row = torch.arange(m, device=text.device)
    given = positive if positive.numel() else row
    place = given.clamp(0, n - 1)
    log2e = 1 / math.log(2)
    inside = place == given
    row_a = torch.where(inside, log2e / tau_image, math.nan)
    # A place outside is no column's: it goes behind the last one.
    column_a = tau_text.new_full((n + 1,), NO_ANCHOR)
    column_a = column_a.scatter(0, torch.where(inside, place, n), log2e / tau_text)[:n]
    pair = torch.full((columns + 1,), -1, dtype=torch.int32, device=text.device)
    pair = pair.scatter(0, torch.where(inside, place + begin, columns), row.int())[:columns]
    states = [tau_image.new_zeros((AnchorState.FIELDS, size)) for size in (m, columns)]
    for state in states:
        state[AnchorState.M] = EMPTY[state.dtype]
    if every_pair:
        states[0][AnchorState.COUNT] = columns - (not include_positive)
        # Not every column is one of these rows' pairs: the other ranks have theirs.
        own = (pair >= 0).to(tau_image.dtype) * (not include_positive)
        states[1][AnchorState.COUNT] = m - own
    return row_a, column_a, *states, place + begin, pair


def contrastive_anchors(
    rows, columns, row_a, column_a, tau_image, tau_text, positive, pair, log_s_image, log_s_text,
    begin, gamma, rho,
):  # fmt: skip
    own = positive - begin
    s_positive = rows[AnchorState.POSITIVE]
    text_a, of_texts = column_a[own], columns[:4, own]
    image = _anchors(rows[:4], s_positive, row_a, tau_image, log_s_image, gamma, rho)
    text = _anchors(of_texts, s_positive, text_a, tau_text, log_s_text, gamma, rho)
    stats = (image.log_s, text.log_s, image.kl, text.kl, image.k, text.k)
    column_parameters = columns.new_zeros((3, columns.shape[1]))
    column_parameters[0] = NO_ANCHOR
    column_parameters[:, own] = _parameters(text, text_a, of_texts)
    return (
        torch.stack(stats).to(row_a.dtype),
        (image.term + text.term).to(row_a.dtype),
        (image.total + text.total).to(row_a.dtype),
        _parameters(image, row_a, rows),
        column_parameters,
    )


class _Anchors(NamedTuple):
    """What one side's states give, per anchor, in float64."""

    term: torch.Tensor  # tau (log(s/n) + rho)
    log_s: torch.Tensor
    kl: torch.Tensor
    k: torch.Tensor  # the term's derivative by tau; of the surrogate loss at gamma < 1
    q: torch.Tensor  # w_ij = q_i 2^(S_ij a_i - m_i)
    total: torch.Tensor  # sum_j w_ij = g_i / s_i
    live: torch.Tensor  # has a negative


def _anchors(state, s_positive, a, tau, log_s_old, gamma, rho):
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
    old = log_s_old.double() if log_s_old.numel() else torch.full_like(log_g, math.nan)
    averaged = log_g + math.log(gamma)
    if gamma < 1:
        averaged = torch.logaddexp(old + math.log1p(-gamma), averaged)
    log_s = torch.where(torch.isnan(old), log_g, averaged)
    term = tau.double() * (log_s - log_n + rho)
    behind = log_g - log_s  # exactly 0 for gamma = 1 and on a first visit
    total = torch.exp(behind)
    # log(s/n) + rho - sum_j w_ij h_ij / tau, without a difference of large numbers at behind = 0.
    k = rho - kl - behind - torch.expm1(behind) * ln2 * (sx / s + shift)
    bad = ~((a > 0) & (a < math.inf))
    nan = math.nan

    def choose(value, dead):
        return torch.where(live, torch.where(bad, nan, value), dead)

    return _Anchors(
        term=choose(term, 0.0),
        # What is not finite must not reach the state.
        log_s=torch.where(live & torch.isfinite(log_s), log_s, old),
        kl=choose(kl, nan),
        k=choose(k, 0.0),
        q=choose(total / s, 0.0),
        total=choose(total, 0.0),
        live=live,
    )


def _parameters(side, a, states):
    m = torch.where(side.live, states[AnchorState.M], 0)
    return torch.stack([torch.where(side.live, a, NO_ANCHOR), m, side.q.to(a.dtype)])


def pair_gradients_(
    grad_image, grad_text, image_sum, text_sum, image, text, total, positive, pair, unit, scale
):
    wide = total.dtype
    unit = unit if unit.numel() else 1
    if grad_image.numel():
        others = text[positive].to(wide)
        grad_image.copy_((image_sum / unit - total[:, None] * others) * scale)
    if grad_text.numel():
        i = pair.clamp(min=0).long()
        share = torch.where(pair[:, None] >= 0, total[i, None] * image[i].to(wide), 0)
        grad_text.copy_((text_sum / unit - share) * scale)
