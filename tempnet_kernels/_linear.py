"""Linear layer, TempNet and token loss a chunk of rows at a time: matrix products by the platform,
the rest by the backend's kernels, never an N x V matrix. With a group, weight, bias and W1 are this
rank's columns of the logits, and all else is the same on every rank."""

import torch

from tempnet_kernels import _register, _tempnet
from tempnet_kernels._checks import check_target
from tempnet_kernels._products import add_product, multiply, unit_of, wide_operand
from tempnet_kernels._ranks import all_gather, all_sum_
from tempnet_kernels._vocabulary import columns_of, sharded_fwd, sharded_fwd_
from tempnet_kernels.dro_cross_entropy import GRAD_TAU, LOSS, ROWS, accumulation_dtype

# Bytes of the columns of W1 and rows of the head that are multiplied at a time, in the dtype of the
# product.
FOLD_BYTES = {"cpu": 16 << 20, "cuda": 128 << 20}

_op = _register.operator

SHIFT, SQUARES = range(2)  # rows of what row_moments returns


class _TempNetOfChunks:
    """Temperatures of chunks of logits, and the network's gradient summed over them.

    ``fold``: z = W h + bias is linear, so W1 z = (W1 W) h + W1 bias, and neither that nor the
    gradient of W1 touches the logits. A column whose bias is -inf counts as 0: it is left out of
    W1.
    """

    def __init__(self, backend, tensors, bounds, center, fold, weight, bias, wants, acc, group):
        self.backend, self.bounds, self.center, self.fold = backend, bounds, center, fold
        self.w1, *rest = tensors  # (H, V)
        self.head = _tempnet.Head(*(p.to(acc) for p in rest))
        self.weight, self.bias, self.acc, self.group = weight, bias, acc, group
        self.want_w1 = wants[0]
        h, v, d = *self.w1.shape, weight.shape[1]
        self.grad_head = [p.new_zeros(p.shape) for p in self.head]
        self.grad_w1 = self.w1.new_empty((0, 0), dtype=acc)
        # 16-bit where the platform's products of the logits are.
        self.dtype = wide_operand(weight[:0]).dtype
        if fold:
            folded = weight.new_zeros((h, d), dtype=acc)
            step = max(1, FOLD_BYTES[weight.device.type] // (max(h, d) * self.dtype.itemsize))
            self.blocks = [slice(i, i + step) for i in range(0, v, step)]
            self.of_bias = self.of_ones = None  # (H,): W1 bias and W1 1
            for b in self.blocks:
                w1 = self._w1(b)
                add_product(folded, w1, wide_operand(weight[b]))
                ones = w1.to(acc)
                if center:
                    self.of_ones = _plus(self.of_ones, ones.sum(1))
                if bias is not None:
                    self.of_bias = _plus(self.of_bias, ones @ self._bias(b))
            for x in (folded, self.of_ones, self.of_bias):
                if x is not None:
                    all_sum_(x, group)
            self.folded = folded.to(self.dtype)  # (H, D)
            if self.want_w1:
                self.grad_folded = torch.zeros_like(folded)
                self.grad_of_bias = folded.new_zeros(h)
                self.grad_of_ones = folded.new_zeros(h)
        elif self.want_w1:
            self.grad_w1 = self.w1.new_zeros((h, v), dtype=acc)

    def _w1(self, b):
        """Columns ``b`` of W1 as a product takes them."""
        w1 = self.w1[:, b].to(self.dtype)
        return w1 if self.bias is None else torch.where(self.bias[b] == -torch.inf, 0, w1)

    def _bias(self, b):
        bias = self.bias[b].to(self.acc)
        return torch.where(bias == -torch.inf, 0, bias)

    def temperatures(self, hidden, logits, keep):
        """``[n]``, of the rows hidden ``[n, D]`` with logits ``[n, V]``."""
        moments = _op("row_moments", self.backend)(logits, self.center)
        self.shift, squares = moments[SHIFT], moments[SQUARES]  # (n,) each
        if self.group is not None:
            self.shift, squares = _tempnet.merged_moments(all_gather(moments, self.group))
        inverse = squares.sqrt().clamp_min(_tempnet.NORM_MIN).reciprocal()
        # Of equal logits x is 0, and the fold's rounding must not be divided by the least norm.
        self.inverse = torch.where(squares == 0, 0, inverse)
        self.keep = keep
        if self.fold:
            x, weight = hidden.to(self.dtype), self.folded  # (n, D), (H, D)
        else:
            x = logits.to(self.acc, copy=True)
            if self.center:
                x -= self.shift[:, None]
            x.masked_fill_(x == -torch.inf, 0).mul_(self.inverse[:, None])
            x, weight = x.to(self.dtype), self.w1.to(self.dtype)  # (n, V), (H, V)
        pre = hidden.new_empty((hidden.shape[0], weight.shape[0]), dtype=self.acc)  # (n, H)
        multiply(x, weight.T, pre)
        self.input = x if self.want_w1 else None
        if not self.fold:
            all_sum_(pre, self.group)
        else:
            if self.of_bias is not None:
                pre += self.of_bias
            if self.center:
                pre.addr_(self.shift, self.of_ones, alpha=-1)
            pre *= self.inverse[:, None]
        share, self.saved = _tempnet.head(pre, self.head, keep)
        tau_min, tau_max = self.bounds
        return tau_min + (tau_max - tau_min) * share

    def backward(self, grad_tau):
        """Adds the gradient of the last chunk's temperatures."""
        tau_min, tau_max = self.bounds
        grad_pre, grads = _tempnet.head_gradients(
            grad_tau * (tau_max - tau_min), self.saved, self.head, self.keep
        )
        for total, grad in zip(self.grad_head, grads, strict=True):
            total += grad
        if not self.want_w1:
            return
        if not self.fold:
            add_product(self.grad_w1, grad_pre.T.to(self.dtype), self.input)
            self.input = None  # as large as the chunk
            return
        grad_pre *= self.inverse[:, None]
        add_product(self.grad_folded, grad_pre.T.to(self.dtype), self.input)
        self.grad_of_bias += grad_pre.sum(0)
        if self.center:
            self.grad_of_ones -= self.shift @ grad_pre

    def gradients(self):
        """Of W1, empty where it is not wanted, and of the head's parameters."""
        if self.fold and self.want_w1:
            self.grad_w1 = self.w1.new_empty(self.w1.shape, dtype=self.acc)
            grad_folded = self.grad_folded.to(self.dtype)
            for b in self.blocks:
                block = self.grad_w1[:, b]
                multiply(grad_folded, wide_operand(self.weight[b]).T, block)
                if self.center:
                    block += self.grad_of_ones[:, None]
                if self.bias is not None:
                    block.addr_(self.grad_of_bias, self._bias(b))
                    block.masked_fill_(self.bias[b] == -torch.inf, 0)
        return [self.grad_w1, *self.grad_head]


def _plus(total, x):
    return x if total is None else total + x


def _loss_of_rows(backend, group, in_place, *args):
    """(scale * loss, rows, argmax), with ``in_place`` leaving the gradient in the logits."""
    if group is not None:
        sharded = sharded_fwd_ if in_place else sharded_fwd
        return sharded(backend, *args[:-1], group, args[-1])
    if in_place:
        return _op("dro_cross_entropy_fwd_", backend)(*args)
    return _op("dro_cross_entropy_fwd", backend)(*args[:-1], False, args[-1])[1:]


def linear_dro_cross_entropy_fwd(
    backend, hidden, weight, bias, target, tau, scale, tempnet, keep, rho, ignore_index,
    label_smoothing, z_loss, softcap, tau_min, tau_max, center, fold, chunk_rows, drop_ignored,
    wants, want_argmax, group=None,
):  # fmt: skip
    (n, d), v = hidden.shape, weight.shape[0]
    acc = accumulation_dtype(hidden.dtype)
    check_target(target, columns_of(v, group)[1], ignore_index, "linear_dro_cross_entropy")
    want_hidden, want_weight, want_bias, *want_tempnet = wants
    want_grad = want_hidden or want_weight or want_bias
    numbers = (rho, ignore_index, label_smoothing, z_loss)

    loss, rows = scale.new_zeros(n), scale.new_full((ROWS, n), torch.nan)
    rows[LOSS], rows[GRAD_TAU] = 0, 0
    argmax = target.new_full((n if want_argmax else 0,), -1, dtype=torch.int64)
    taus = scale.new_full((n,), torch.nan)
    grad_hidden = hidden.new_zeros((n if want_hidden else 0, d))
    grad_weight = weight.new_zeros((v if want_weight else 0, d), dtype=acc)
    grad_bias = weight.new_zeros(v if want_bias else 0, dtype=acc)
    net = None
    if tempnet:
        bounds = (tau_min, tau_max)
        net = _TempNetOfChunks(
            backend, tempnet, bounds, center, fold, weight, bias, want_tempnet, acc, group
        )
    ratio = scale / unit_of(scale) if hidden.dtype == torch.float16 else None

    live = target != ignore_index
    index = live.nonzero()[:, 0] if drop_ignored else None
    if index is not None and index.numel() == n:
        index = live = None
    count = n if index is None else index.numel()
    chunk_rows = min(chunk_rows, count)
    buffer = hidden.new_empty(chunk_rows * v)
    tanh = hidden.new_empty(buffer.shape if softcap and want_grad else 0)
    for i in range(0, count, max(1, chunk_rows)):
        r = slice(i, i + chunk_rows) if index is None else index[i : i + chunk_rows]
        h, y, s = hidden[r], target[r], scale[r]
        if index is None and live is not None:
            h = torch.where(live[r, None], h, 0)  # of an ignored row nothing is read
        z = buffer[: h.shape[0] * v].view(-1, v)
        if bias is None:
            torch.mm(h, weight.T, out=z)
        else:
            torch.addmm(bias, h, weight.T, out=z)
        if softcap:
            z.div_(softcap).tanh_()
            if want_grad:
                capped = tanh[: z.numel()].view_as(z).copy_(z)
            z.mul_(softcap)
        t = tau[r] if net is None else net.temperatures(h, z, None if keep is None else keep[r])

        row_loss, row, row_argmax = _loss_of_rows(
            backend, group, want_grad, z, y, t, s, *numbers, want_argmax
        )
        if want_grad and softcap:
            torch.ops.aten.tanh_backward(z, capped, grad_input=z)
        loss[r], rows[:, r], taus[r] = row_loss, row, t
        if want_argmax:
            argmax[r] = row_argmax
        if want_hidden and index is None:
            torch.mm(z, weight, out=grad_hidden[r])
        elif want_hidden:
            grad_hidden[r] = z @ weight
        if ratio is not None and (want_weight or want_bias):  # float16: c p - q, not scaled
            _op("scale_rows_", backend)(z, ratio[r])
        if want_weight:
            add_product(grad_weight, z.T, h)
        if want_bias:
            grad_bias += z.sum(0, dtype=acc)
        if any(want_tempnet):
            net.backward(row[GRAD_TAU])

    buffer = tanh = z = capped = None  # their memory is the gradient of W1's now
    if want_hidden:
        all_sum_(grad_hidden, group)
    if live is not None:
        taus.masked_fill_(~live, torch.nan)
    grads_tempnet = net.gradients() if any(want_tempnet) else []
    if hidden.dtype != torch.float16:  # there p / N underflows until the loss scale multiplies it
        grad_weight, grad_bias = grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)
    return loss, rows, argmax, taus, grad_hidden, grad_weight, grad_bias, grads_tempnet
