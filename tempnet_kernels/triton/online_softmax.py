"""The algebra of csrc/online_softmax.h in Triton: base 2, centred, (m, s, sx) per partial row."""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
EMPTY = tl.constexpr(-(2.0**31))  # the maximum of nothing: kEmpty of the header
INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def centred(z, a, m):
    """z * a - m with one rounding."""
    if INTERPRET:  # its tl.fma rounds twice
        return (z.to(tl.float64) * a - m).to(tl.float32)
    else:
        return tl.fma(z, a, -m)


@triton.jit
def softcapped(z, inside, SOFTCAP: tl.constexpr):
    """(z', d z' / d z) of z' = c tanh(z / c), c > 0, with -inf outside. csrc/softcap.h has the
    numbers, and why."""
    if SOFTCAP > 0:
        y = tl.abs(tl.div_rn(z, tl.full(z.shape, SOFTCAP, tl.float32)))
        e = tl.exp2(y * -2.88539008)
        r = 1 / (1 + e)
        s = y * y
        p = ((0.016437578 * s - 0.052671812) * s + 0.13320725) * s - 0.33332947
        t = tl.where(y < 0.55, y + y * (p * s), 1 - 2 * e * r)
        capped = SOFTCAP * tl.where(z < 0, -t, t)
        return tl.where(inside, capped, float("-inf")), 4 * e * r * r
    else:
        return z, 1.0


@triton.jit
def weighted_exponent(e, u):
    """e * u for e = 2^u: 0 where u is -inf. Only here is u clamped: e keeps NaN."""
    return e * tl.where(u < -300.0, -300.0, u)


@triton.jit
def update(m, s, sx, m_new, e_sum, ex_sum):
    """Add terms that are already relative to ``m_new`` >= ``m`` to the state."""
    d = m - m_new
    f = tl.exp2(d)
    return m_new, f * s + e_sum, f * (sx + weighted_exponent(s, d)) + ex_sum


@triton.jit
def sums_relative_to(m_new, m, s, sx):
    """s and sx of the union over axis 0 of partial rows, relative to ``m_new`` >= ``m``."""
    d = m - m_new
    f = tl.exp2(d)
    return tl.sum(f * s, 0), tl.sum(f * (sx + weighted_exponent(s, d)), 0)


@triton.jit
def merge_all(m, s, sx):
    """The state of the union over axis 0 of partial rows."""
    m_row = tl.max(m, 0)
    s_row, sx_row = sums_relative_to(m_row, m, s, sx)
    return m_row, s_row, sx_row


@triton.jit
def finish(m, s, sx, zmax, z_y, mean_u, a, tau, rho, log_v, label_smoothing, z_loss):
    """(loss, d loss / d tau, log2 s, entropy, log p_y, c) with d loss / d z = c p - q."""
    log2_s = tl.log2(s)
    delta = centred(zmax, a, m)  # what the rounding of m left out
    centred_lse = LN2 * (log2_s - delta)
    lse = LN2 * (m + log2_s)
    entropy = LN2 * (log2_s - sx / s)
    entropy = tl.where(entropy < 0, 0.0, tl.where(entropy > log_v, log_v, entropy))
    below = zmax - z_y  # zmax - sum_j q_j z_j
    if label_smoothing > 0:
        mean_below = LN2 * tau * (delta - mean_u)
        below = (1 - label_smoothing) * below + label_smoothing * mean_below
    loss = below + tau * (centred_lse + rho - log_v) + z_loss * lse * lse
    grad_tau = entropy + rho - log_v - 2 * z_loss * lse * (lse - entropy) / tau
    log_prob = (z_y - zmax) / tau - centred_lse
    c = 1 + 2 * z_loss * lse / tau
    return loss, grad_tau, log2_s, entropy, log_prob, c
