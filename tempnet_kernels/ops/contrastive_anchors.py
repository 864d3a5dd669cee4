"""Schemas of what stands before and behind the tiles of the contrastive loss."""

import torch

from tempnet_kernels.core import register
from tempnet_kernels.core.fields import AnchorParameters, AnchorState, AnchorStatistics


def _fake_states(
    tau_image, tau_text, positive, text, candidates, begin, include_positive, every_pair
):
    m, n, columns = tau_image.shape[0], text.shape[0], candidates.shape[0]
    sizes = ((m,), (n,), (AnchorState.FIELDS, m), (AnchorState.FIELDS, columns))
    states = tuple(tau_image.new_empty(size) for size in sizes)
    place, pair = positive.new_empty(m), positive.new_empty(columns, dtype=torch.int32)
    return (*states, place, pair)


def _fake_anchors(
    rows, columns, row_a, column_a, tau_image, tau_text, positive, pair, log_s_image, log_s_text,
    begin, gamma, rho,
):  # fmt: skip
    m, n = row_a.shape[0], column_a.shape[0]
    parameters = AnchorParameters.FIELDS
    sizes = ((AnchorStatistics.FIELDS, m), (m,), (m,), (parameters, m), (parameters, n))
    return tuple(rows.new_empty(size) for size in sizes)


# What the visit of the tiles begins with: (row_a [M], column_a [n], rows, columns, place, pair).
# The temperatures are those of both anchors of each pair, in the accumulation dtype; `positive` [M]
# int64 is the column of a row's pair among the n of `text`, or empty: column i for row i. The
# columns of the visit are those of `candidates`, of which `text` is the part from `begin` on. Of
# these two only the sizes are read.
# a = log2(e) / tau; of a column that is no anchor 1e-30, of a row whose positive is outside NaN.
# rows and columns: AnchorState of nothing, with the number of pairs where every pair counts.
# place [M] is positive among `candidates`; pair [N] int32 the row whose pair a column is, or -1.
register.define(
    "anchor_states(Tensor tau_image, Tensor tau_text, Tensor positive, Tensor text, "
    "Tensor candidates, int begin, bool include_positive, bool every_pair) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_states,
    "contrastive_anchors",
)
# What the states give: (stats [6, M], term [M], total [M], row parameters, column parameters).
# `columns` are those of this process, whose first is `begin` among the candidates; `positive` and
# `pair` are as anchor_states returns them; log_s [M], or empty on a first visit of all.
# stats: AnchorStatistics; the parameters: AnchorParameters [3, M] and [3, n]; term and total are
# the sums over a pair's two anchors.
register.define(
    "contrastive_anchors(Tensor rows, Tensor columns, Tensor row_a, Tensor column_a, "
    "Tensor tau_image, Tensor tau_text, Tensor positive, Tensor pair, Tensor log_s_image, "
    "Tensor log_s_text, int begin, float gamma, float rho) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_anchors,
    "contrastive_anchors",
)
# grad_image_i = (image_sum_i / unit - total_i text_y) scale with y = positive[i], and the same for
# the texts; a text that is no pair's has no total. The difference is rounded to the gradients'
# dtype, once. A gradient may be its sum's own memory, and is (0, 0) where it is not wanted. unit
# 0-d or empty: 1; scale 0-d.
register.define(
    "pair_gradients_(Tensor(a!) grad_image, Tensor(b!) grad_text, Tensor image_sum, "
    "Tensor text_sum, Tensor image, Tensor text, Tensor total, Tensor positive, Tensor pair, "
    "Tensor unit, Tensor scale) -> ()",
    lambda *args: None,
    "contrastive_anchors",
)
