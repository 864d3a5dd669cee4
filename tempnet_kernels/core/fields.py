"""The numbers of a row: what each is called, and the dtype that they are in."""

from typing import NamedTuple

import torch


def accumulation_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


class TokenOptions(NamedTuple):
    """What the token loss is told once for all rows."""

    rho: float
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float  # 0 for none


class TokenRow:
    """Rows of the per-row result of the token loss, ``[6, N]`` in the accumulation dtype. M and
    LOG2_S are the base-2 state of the row (docs/numerics.md); GRAD_TAU is already multiplied by its
    scale."""

    LOSS, GRAD_TAU, M, LOG2_S, ENTROPY, LOG_PROB = range(6)
    FIELDS = 6


class TokenPart:
    """The state of a rank's columns of a row, ``[7, N]``; csrc/online_softmax.h has the same order.

    M, S, SX and DELTA = zmax a - m are those of docs/numerics.md; Z_Y is the target's logit, -inf
    on the ranks that do not have it; MEAN_U the mean of u. DELTA is exchanged because backends
    round a = log2(e) / tau differently: what is added must have one a. With a softcap ZMAX and Z_Y
    are the logits as they were given, and all else is of the capped ones.
    """

    ZMAX, M, DELTA, S, SX, Z_Y, MEAN_U = range(7)
    FIELDS = 7


class AnchorState:
    """The states ``[5, M]`` of the rows of a matrix of similarities and ``[5, N]`` of its columns;
    csrc/similarity_fields.h has the same order. M, S and SX are those of docs/numerics.md; POSITIVE
    is S_ii (rows only)."""

    M, S, SX, COUNT, POSITIVE = range(5)
    FIELDS = 5


class AnchorParameters:
    """What the weights of an anchor's row or column are made of, ``[3, M]``: a = log2(e) / tau,
    and w_ij = q 2^(S_ij a - m)."""

    A, M, Q = range(3)
    FIELDS = 3


class AnchorStatistics:
    """What is known of a pair's two anchors after a visit, ``[6, M]``, in the order of
    :class:`tempnet_kernels.ContrastiveStats`; csrc/contrastive_anchors.h has the same order."""

    LOG_S_IMAGE, LOG_S_TEXT, KL_IMAGE, KL_TEXT, K_IMAGE, K_TEXT = range(6)
    FIELDS = 6


class Moments:
    """What row_moments returns, ``[5, N]``: the SHIFT (the largest logit where rows are centred,
    else 0), and over the columns that are not -inf the sum of (z - shift)^2, of z - shift, and the
    number of columns. Not centred, the last two are 0. INVERSE is 1 / max(norm of z - shift,
    1e-12), and 0 where that norm is 0; it is of these columns alone, and not exchanged."""

    SHIFT, SQUARES, TOTAL, COUNT, INVERSE = range(5)
    FIELDS = 5


class LinearOptions(NamedTuple):
    """What the loss of a linear layer's outputs is told once for all rows: first
    :class:`TokenOptions`."""

    rho: float
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float  # 0 for none
    tau_min: float
    tau_max: float
    dropout: float  # probability, 0 without a key
    center: bool
    fold: bool
    chunk_rows: int
    drop_ignored: bool

    @property
    def token(self):
        return TokenOptions(*self[:5])


class LinearWants(NamedTuple):
    """Which gradients that loss forms."""

    hidden: bool
    weight: bool
    bias: bool
    w1: bool  # of the TempNet's first layer
    head: bool  # of what follows it

    @property
    def logits(self):
        return self.hidden or self.weight or self.bias

    @property
    def tempnet(self):
        return self.w1 or self.head
