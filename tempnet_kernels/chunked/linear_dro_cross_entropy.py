"""Linear layer, TempNet and token loss a chunk of rows at a time: matrix products by the platform,
the rest by the backend's kernels, never an N x V matrix. With a group, weight, bias and W1 are this
rank's columns of the logits, and all else is the same on every rank."""

from typing import NamedTuple

import torch

from tempnet_kernels.chunked.dro_cross_entropy import columns_of, sharded_fwd, sharded_fwd_
from tempnet_kernels.core import register
from tempnet_kernels.core.checks import check_target
from tempnet_kernels.core.collectives import all_sum_
from tempnet_kernels.core.fields import LinearOptions, LinearWants, TokenRow, accumulation_dtype
from tempnet_kernels.core.matmul import add_product, multiply, unit_of, wide_operand
from tempnet_kernels.core.tempnet import (
    Dropout,
    Head,
    gradients,
    predict,
    row_scaling,
)

# Bytes of the columns of W1 and rows of the head that are multiplied at a time, in the dtype of the
# product.
FOLD_BYTES = {"cpu": 16 << 20, "cuda": 128 << 20}

_op = register.operator


class _Chunk(NamedTuple):
    """What the gradient needs of a chunk's temperatures."""

    dropped: torch.Tensor  # (n, H)
    h: torch.Tensor  # (n, H)
    input: torch.Tensor | None  # (n, V), or of the folded network (n, D)
    shift: torch.Tensor  # (n,), what centring took off the logits
    factor: torch.Tensor | None  # (n,), of the rows of W1 times the input


class DirectTempNet:
    """Temperatures of chunks of logits, and the network's gradient summed over them.

    ``tensors``: W1 ``[H, V]`` and the head's parameters; ``want_w1``: whether W1 gets a gradient;
    ``rows``: how many there are.
    """

    def __init__(self, backend, tensors, options, weight, bias, want_w1, acc, group, rows):
        self.backend, self.options, self.group = backend, options, group
        self.bounds = options.tau_min, options.tau_max
        self.w1, *rest = tensors  # (H, V)
        self.head = Head(*(p.to(acc) for p in rest))
        self.weight, self.bias, self.want_w1, self.acc = weight, bias, want_w1, acc
        # 16-bit where the platform's products of the logits are.
        self.dtype = wide_operand(weight[:0]).dtype
        # What temperature_head_bwd and sigmoid_dropout_bwd sum over blocks of rows.
        h = self.w1.shape[0]
        self.sums = [[] if rows else [self.w1.new_empty((0, x), dtype=acc)] for x in (2 * h + 2, h)]
        # The first chunk's products are written to the gradients, the others' are added.
        self.fresh, self.begun = True, torch.empty_like if rows else torch.zeros_like
        self.grad_w2 = self.begun(self.head.w2)
        self._begin()

    def _begin(self):
        like = self.w1 if self.want_w1 else self.w1[:0, :0]
        self.grad_w1 = self.begun(like, dtype=self.acc)

    def temperatures(self, hidden, logits, dropout):
        """(``[n]``, :class:`_Chunk`) of the rows hidden ``[n, D]`` with logits ``[n, V]``."""
        shift, inverse = row_scaling(
            self.backend, logits, self.options.center, self.options.softcap, self.group
        )
        x, pre, factor = self._first_layer(hidden, logits, shift, inverse)
        tau, dropped, h = predict(self.backend, pre, self.head, dropout, self.bounds, factor)
        return tau, _Chunk(dropped, h, x if self.want_w1 else None, shift, factor)

    def _first_layer(self, hidden, logits, shift, inverse):
        """(its input as the gradient of its weight takes it, W1 times it, factors of its rows)."""
        softcap = self.options.softcap
        x = _op("normalized_rows", self.backend)(logits, shift, inverse, softcap)
        x = x.to(self.dtype)  # (n, V)
        pre = self._product(x, self.w1.to(self.dtype))
        all_sum_(pre, self.group)
        return x, pre, None

    def _product(self, x, weight):
        pre = x.new_empty((x.shape[0], weight.shape[0]), dtype=self.acc)  # (n, H)
        multiply(x, weight.T, pre)
        return pre

    def backward(self, grad_tau, chunk):
        """Adds the gradient of the chunk's temperatures."""
        dropped, h, _, _, factor = chunk
        grad_pre, grad_h, *sums = gradients(
            self.backend, grad_tau, dropped, h, self.head, self.options.dropout, self.bounds, factor
        )
        for total, part in zip(self.sums, sums, strict=True):
            total.append(part)
        add_product(self.grad_w2, grad_h.T, dropped, self.fresh)
        if self.want_w1:
            self._add_first_layer(grad_pre, chunk)
        self.fresh = False

    def _add_first_layer(self, grad_pre, chunk):
        add_product(self.grad_w1, grad_pre.T.to(self.dtype), chunk.input, self.fresh)

    def gradients(self):
        """Of W1, empty where it is not wanted, and W2; then :class:`HeadSums` and the gradient of
        b1, one after the other."""
        sums = torch.cat([_cat(parts, 0) for parts in self.sums], 1).sum(0)
        return [self.grad_w1, self.grad_w2, sums]


class FoldedTempNet(DirectTempNet):
    """The same without touching the logits: z = W h + bias is linear, so W1 z = (W1 W) h + W1 bias,
    and the gradient of W1 follows from that of W1 W. A column whose bias is -inf counts as 0: it is
    left out of W1."""

    def _begin(self):
        h, v, d = *self.w1.shape, self.weight.shape[1]
        self.grad_w1 = self.w1.new_empty((0, 0), dtype=self.acc)
        folded = self.weight.new_zeros((h, d), dtype=self.acc)
        step = FOLD_BYTES[self.weight.device.type] // (max(h, d) * self.dtype.itemsize)
        step = max(1, step)
        self.blocks = [slice(i, i + step) for i in range(0, v, step)]
        self.of_bias = self.of_ones = None  # (H,): W1 bias and W1 1
        for b in self.blocks:
            w1 = self._w1(b)
            add_product(folded, w1, wide_operand(self.weight[b]))
            ones = w1.to(self.acc)
            if self.options.center:
                self.of_ones = _plus(self.of_ones, ones.sum(1))
            if self.bias is not None:
                self.of_bias = _plus(self.of_bias, ones @ self._bias(b))
        for x in (folded, self.of_ones, self.of_bias):
            if x is not None:
                all_sum_(x, self.group)
        self.folded = folded.to(self.dtype)  # (H, D)
        if self.want_w1:
            self.grad_folded = self.begun(folded)
            self.grad_of_bias = folded.new_zeros(h)
            self.grad_of_ones = folded.new_zeros(h)

    def _w1(self, b):
        """Columns ``b`` of W1 as a product takes them."""
        w1 = self.w1[:, b].to(self.dtype)
        return w1 if self.bias is None else torch.where(self.bias[b] == -torch.inf, 0, w1)

    def _bias(self, b):
        bias = self.bias[b].to(self.acc)
        return torch.where(bias == -torch.inf, 0, bias)

    def _first_layer(self, hidden, logits, shift, inverse):
        x = hidden.to(self.dtype)  # (n, D)
        pre = self._product(x, self.folded)
        if self.of_bias is not None:
            pre += self.of_bias
        if self.options.center:
            pre.addr_(shift, self.of_ones, alpha=-1)
        return x, pre, inverse

    def _add_first_layer(self, grad_pre, chunk):
        add_product(self.grad_folded, grad_pre.T.to(self.dtype), chunk.input, self.fresh)
        if self.bias is not None:
            self.grad_of_bias += grad_pre.sum(0)
        if self.options.center:
            self.grad_of_ones -= chunk.shift @ grad_pre

    def gradients(self):
        if self.want_w1:
            self.grad_w1 = self.w1.new_empty(self.w1.shape, dtype=self.acc)
            grad_folded = self.grad_folded.to(self.dtype)
            for b in self.blocks:
                block = self.grad_w1[:, b]
                multiply(grad_folded, wide_operand(self.weight[b]).T, block)
                if self.options.center:
                    block += self.grad_of_ones[:, None]
                if self.bias is not None:
                    block.addr_(self.grad_of_bias, self._bias(b))
                    block.masked_fill_(self.bias[b] == -torch.inf, 0)
        return super().gradients()


def _plus(total, x):
    return x if total is None else total + x


def _loss_of_rows(backend, group, in_place, logits, target, tau, scale, options, want_argmax):
    """(scale * loss, rows, argmax), with ``in_place`` leaving the gradient in the logits."""
    args = logits, target, tau, scale
    if group is not None:
        sharded = sharded_fwd_ if in_place else sharded_fwd
        return sharded(backend, *args, options, group, want_argmax)
    if in_place:
        return _op("dro_cross_entropy_fwd_", backend)(*args, *options, want_argmax)
    return _op("dro_cross_entropy_fwd", backend)(*args, *options, False, want_argmax)[1:]


def linear_dro_cross_entropy_fwd(
    backend, hidden, weight, bias, target, tau, scale, tempnet, dropout_key, wants, want_argmax,
    *options,
    group=None,
):  # fmt: skip
    options, want = LinearOptions(*options), LinearWants(*wants)
    (n, d), v = hidden.shape, weight.shape[0]
    acc = accumulation_dtype(hidden.dtype)
    ignore_index = options.ignore_index
    vocab_size = columns_of(v, group)[1]
    all_live = check_target(target, vocab_size, ignore_index, "linear_dro_cross_entropy")

    live = None if all_live else target != ignore_index
    index = None
    if options.drop_ignored and live is not None:
        index = live.nonzero()[:, 0]
        if index.numel() == n:
            index = live = None
    count = n if index is None else index.numel()
    # Every one of its rows is written, but for those that are left out.
    new = hidden.new_empty if index is None else hidden.new_zeros
    grad_hidden = new((n if want.hidden else 0, d))
    new = weight.new_empty if count else weight.new_zeros
    grad_weight = new((v if want.weight else 0, d), dtype=acc)
    grad_bias = (weight.new_zeros if want.bias else weight.new_empty)(v * want.bias, dtype=acc)
    net = None
    if tempnet:
        kind = FoldedTempNet if options.fold else DirectTempNet
        net = kind(backend, tempnet, options, weight, bias, want.w1, acc, group, count)
    ratio = scale / unit_of(scale) if hidden.dtype == torch.float16 else None

    chunk_rows = min(options.chunk_rows, count)
    buffer = hidden.new_empty(chunk_rows * v)
    of_chunks = []
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
        if net is None:
            t = tau[r]
        else:
            ids = None if index is None else r
            t, chunk = net.temperatures(h, z, Dropout(dropout_key, options.dropout, ids, i))

        row_loss, row, row_argmax = _loss_of_rows(
            backend, group, want.logits, z, y, t, s, options.token, want_argmax
        )
        of_chunks.append((row_loss, row, row_argmax, t if net else scale.new_empty(0)))
        if want.hidden and index is None:
            torch.mm(z, weight, out=grad_hidden[r])
        elif want.hidden:
            grad_hidden[r] = z @ weight
        if ratio is not None and (want.weight or want.bias):  # float16: c p - q, not scaled
            _op("scale_rows_", backend)(z, ratio[r])
        if want.weight:
            add_product(grad_weight, z.T, h, fresh=i == 0)
        if want.bias:
            grad_bias += z.sum(0, dtype=acc)
        if want.tempnet:
            net.backward(row[TokenRow.GRAD_TAU], chunk)
        chunk = None  # it may be as large as the logits

    buffer = z = None  # their memory is the gradient of W1's now
    if want.hidden:
        all_sum_(grad_hidden, group)
    if index is None and of_chunks:
        loss, rows, argmax, taus = (_cat(parts) for parts in zip(*of_chunks, strict=True))
    else:  # of the rows that were left out, what a kernel says of ignored ones
        loss, rows = scale.new_zeros(n), scale.new_full((TokenRow.FIELDS, n), torch.nan)
        rows[TokenRow.LOSS], rows[TokenRow.GRAD_TAU] = 0, 0
        argmax = target.new_full((n if want_argmax else 0,), -1, dtype=torch.int64)
        taus = scale.new_full((n if net else 0,), torch.nan)
        whole = loss, rows, argmax, taus
        for to, *parts in zip(whole, *of_chunks, strict=True) if of_chunks else ():
            if to.numel():
                to.index_copy_(-1, index, _cat(parts))
    if live is not None and net:
        taus.masked_fill_(~live, torch.nan)
    grads_tempnet = net.gradients() if want.tempnet else []
    if hidden.dtype != torch.float16:  # there p / N underflows until the loss scale multiplies it
        grad_weight, grad_bias = grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)
    return loss, rows, argmax, taus, grad_hidden, grad_weight, grad_bias, grads_tempnet


def _cat(parts, dim=-1):
    return parts[0] if len(parts) == 1 or not parts[0].numel() else torch.cat(parts, dim)
