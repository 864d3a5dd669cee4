"""Compiles what the launchers launch at odd arguments, as a GPU would be asked to: every integer of
1 is a constant of the kernel, every other has its width and alignment, an empty tensor is a null
pointer. Prints how many kernels that were. No GPU: the tensors have no storage."""

import sys
from itertools import product

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tempnet_kernels.triton import contrastive_anchors as anchors
from tempnet_kernels.triton import dro_contrastive as contrastive
from tempnet_kernels.triton import dro_cross_entropy as token
from tempnet_kernels.triton import linear_dro_cross_entropy as linear
from tempnet_kernels.triton import optimal_temperature as temperature
from tempnet_kernels.triton import per_sample_state as samples
from tempnet_kernels.triton import temperature_head as head
from tempnet_kernels.triton import tempered_softmax as softmax
from tempnet_kernels.triton import token_rows

# (rows, columns, row stride). Past 2^31 offsets and strides are 64-bit; 16385 is odd and takes two
# visits, or a row of registers.
SHAPES = ((1, 1, 1), (7, 33, 33), (2, 16385, 2**31 + 1))
TILES = ((1, 1), (3, 130))
compiled = set()


class NoDevice:
    def get_current_target(self):
        return GPUTarget("cuda", int(sys.argv[1]), 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_only(launch):
    def run(self, *args, grid, warmup, **options):
        assert all(0 < size <= 65535 for size in grid), (self.fn.__name__, grid)
        compiled.add(launch(self, *args, grid=grid, warmup=True, **options).hash)

    return run


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def of_logits(n, v, stride, dtype, per_row, index):
    logits = empty(n, stride, dtype=dtype)[:, :v]
    target = empty(2 * n, dtype=index)[::2]
    for extras, softcap in product((False, True), (0.0, 30.0)):
        smoothing = 0.1 if extras else 0.0
        options = (1 if extras else 2**40, smoothing)  # ignore_index
        args = (logits, target, per_row, per_row, 8.0, *options, 1e-4, softcap)
        token.dro_cross_entropy_fwd(*args, False, not extras)
        token.dro_cross_entropy_fwd_(*args, extras)
        for begin in (1, 2**31):
            columns = (begin, begin + v)
            token.dro_cross_entropy_stats(
                logits, target, per_row, options[0], softcap, *columns, extras, begin == 1
            )
            args = (target, per_row, per_row, empty(6, n), *options, 0.0, softcap, *columns)
            token.dro_cross_entropy_bwd_(logits, *args)
        moments = linear.row_moments(logits, extras, softcap)
        linear.normalized_rows(logits, moments[0], moments[4], softcap)
        token.scale_rows_(logits, per_row)
        for normalizer in (None, empty(1)):
            token_rows.row_scale(
                target[:n], per_row if extras else None, normalizer, -1.0, options[0], True, False
            )
        token_rows.sum_rows(per_row, empty(1) if extras else None)
        _, rows = softmax.tempered_softmax_fwd(logits, per_row, extras)
        for want, upstream in ((False, logits), (True, empty(1, v, dtype=dtype).expand(n, v))):
            softmax.tempered_softmax_bwd(logits, per_row, rows, upstream, extras, want)
    temperature.optimal_temperature(logits, per_row, 0.01, 2.0)


def of_similarities(height, width, has_ids, has_mask, include_positive):
    m, n = height + 1, 2**31 + width if has_ids else width + 1
    rows, columns, similarity = empty(5, m), empty(5, n), empty(height, width)
    positive = empty(m, dtype=torch.int64)
    ids = empty(*((2, n) if has_ids else (0, 0)), dtype=torch.int32)
    mask = empty(*((m, n) if has_mask else (0, n)), dtype=torch.bool)
    begin, rest = (1, n - width), (positive, ids, mask, include_positive)
    contrastive.similarity_stats_(rows, columns, similarity, *begin, empty(m), empty(n), *rest)
    weights = empty(height, width, dtype=torch.float16 if has_ids else torch.bfloat16)
    contrastive.similarity_weights_(weights, similarity, *begin, empty(3, m), empty(3, n), *rest)


def of_networks(n, k, first_row):
    """With a key and ids, or neither; normalised prototypes, or not."""
    rows, last = empty(n, k), (empty(1), empty(1, k), empty(1))
    key, ids = empty(dtype=torch.int64), empty(2 * n, dtype=torch.int64)[::2]
    for given in ((empty(n), key, ids), (None, key, None), (None, None, None)):
        dropped = head.sigmoid_dropout(rows, empty(k), *given, first_row, 0.5)
        head.sigmoid_dropout_bwd(rows, dropped, given[0], 0.0 if given[1] is None else 0.5)
    for norms, squash in ((None, False), (empty(k), True)):
        head.temperature_head(rows, norms, *last, squash, 0.5, 2.0)
        for grad_tau in (empty().expand(n), empty(3 * n)[::3]):
            head.temperature_head_bwd(grad_tau, rows, norms, *last, squash, 0.5, 2.0)


def of_anchors(m, n, d, dtype, is_given, include_positive):
    """Of one process, and of the second of two."""
    tau, other_tau = empty().expand(m), empty(m, 3)[:, 0]
    given = empty(m * is_given, dtype=torch.int64)
    image, text = empty(m, d, dtype=dtype), empty(n, d, dtype=dtype)
    log_s = empty(m * is_given)
    for begin, every_pair in ((0, True), (n, False)):
        candidates = empty(n + begin, d)
        row_a, column_a, rows, columns, place, pair = anchors.anchor_states(
            tau, other_tau, given, text, candidates, begin, include_positive, every_pair
        )
        anchors.contrastive_anchors(
            rows, columns[:4, :n], row_a, column_a, tau, other_tau, place, pair, log_s, log_s,
            begin, 0.8 if is_given else 1.0, 0.0,
        )  # fmt: skip
        text_sum = empty(n + begin, d)
        of_text = text_sum if begin else empty(n, d, dtype=dtype)
        anchors.pair_gradients_(
            empty(m, d, dtype=dtype), of_text, empty(m, d), text_sum, image, candidates, empty(m),
            place, pair, empty() if is_given else empty(0), empty(),
        )  # fmt: skip


def of_samples(b):
    tables = [empty(1), empty(1)] if b == 1 else [empty(2**31 + 5), empty(2**31 + 5)]
    ids = empty(2 * b, dtype=torch.int64)[::2]
    values = samples.read_samples(tables, ids)
    samples.write_samples_(tables, ids, empty(b, dtype=torch.int64), values.T.contiguous().T)


driver.set_active(NoDevice())
JITFunction.run = compile_only(JITFunction.run)
for shape, dtype in zip(SHAPES, (torch.float32, torch.float16, torch.bfloat16), strict=True):
    of_logits(*shape, dtype, empty().expand(shape[0]), torch.int64)
of_logits(7, 33, 48, torch.float32, empty(7, 3)[:, 0], torch.int32)
of_logits(0, 33, 33, torch.float32, empty(0), torch.int64)  # launches nothing
for n, k, first_row in ((1, 1, 1), (7, 33, 2**33), (4100, 256, 0), (0, 5, 0)):
    of_networks(n, k, first_row)
for tile, ids, mask, include in product(TILES, *[(False, True)] * 3):
    of_similarities(*tile, ids, mask, include)
for size, dtype in zip(((1, 1, 1), (7, 33, 130)), (torch.float32, torch.bfloat16), strict=True):
    for is_given, include in product((False, True), repeat=2):
        of_anchors(*size, dtype, is_given, include)
    of_samples(size[0])
print(len(compiled))
