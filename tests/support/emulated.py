"""The CUDA kernels on a CPU, called as the CUDA operators are."""

import math

import torch
from emulator_build import load

from tempnet_kernels.core.tempnet import row_blocks

ORDERS = ["forward", "reversed", "random"]


def shape_params(n, v, stride):
    """The parameters of an aligned [n, v] gradient launch that nothing will run."""
    names = ("target", "tau", "scale", "loss", "rows", "argmax", "parts", "extras")
    return dict.fromkeys((*names, "rho", "label_smoothing", "z_loss", "softcap"), 0) | {
        "n": n, "v": v, "logits": 16, "logits_stride": stride, "grad": 16, "grad_stride": stride,
        "target_stride": 1, "tau_stride": 1, "scale_stride": 1, "wide_target": True,
        "ignore_index": -100, "unscaled": False, "begin": 0, "vocab_size": v,
    }  # fmt: skip


KERNELS = {"row": 0, "row, two passes": 1, "split": 2}


class HeadOperators:
    """Stands for the operators of the temperature networks, as ``Operators`` does."""

    def __init__(self, module):
        self.module = module

    def __call__(self, name, backend):
        return getattr(self, name)

    def sigmoid_dropout(self, pre, bias, factor, key, ids, first_row, probability):
        n, h = pre.shape
        dropped = torch.full((n, h), torch.nan)
        pre, bias = pre.contiguous(), bias.contiguous()
        params = {
            "n": n, "h": h, "pre": pre.data_ptr(), "bias": bias.data_ptr(),
            "factor": _address(factor), "key": _address(key), "ids": _address(ids),
            "ids_stride": 0 if ids is None else ids.stride(0), "first_row": first_row,
            "probability": probability, "dropped": dropped.data_ptr(),
        }  # fmt: skip
        self.module.sigmoid_dropout(params)
        return dropped

    def sigmoid_dropout_bwd(self, grad, dropped, factor, probability):
        n, h = dropped.shape
        grad = grad.contiguous()
        grad_pre = torch.full((n, h), torch.nan)
        sums = torch.full((row_blocks(n)[0], h), torch.nan)
        params = {
            "n": n, "h": h, "grad": grad.data_ptr(), "dropped": dropped.data_ptr(),
            "factor": _address(factor), "probability": probability,
            "grad_pre": grad_pre.data_ptr(), "sums": sums.data_ptr(),
        }  # fmt: skip
        self.module.sigmoid_dropout_bwd(params)
        return grad_pre, sums

    def _head(self, h, norms, scaler, weight, bias, squash, tau_min, tau_max):
        assert h.is_contiguous() and weight.is_contiguous() and h.dtype == torch.float32
        return {
            "n": h.shape[0], "k": h.shape[1], "h": h.data_ptr(), "norms": _address(norms),
            "scaler": scaler.data_ptr(), "weight": weight.data_ptr(), "bias": bias.data_ptr(),
            "tau_min": tau_min, "tau_range": tau_max - tau_min, "tau": 0, "grad_tau": 0,
            "grad_tau_stride": 0, "grad_h": 0, "sums": 0,
        }  # fmt: skip

    def temperature_head(self, h, norms, scaler, weight, bias, squash, *bounds):
        tau = torch.full(h.shape[:1], torch.nan)
        params = self._head(h, norms, scaler, weight, bias, squash, *bounds)
        self.module.temperature_head(params | {"tau": tau.data_ptr()}, squash)
        return tau

    def temperature_head_bwd(self, grad_tau, h, norms, scaler, weight, bias, squash, *bounds):
        n, k = h.shape
        grad_h = torch.full((n, k), torch.nan)
        width = 2 * k + 2 + (0 if norms is None else k)
        sums = torch.full((row_blocks(n)[0], width), torch.nan)
        params = self._head(h, norms, scaler, weight, bias, squash, *bounds) | {
            "grad_tau": grad_tau.data_ptr(), "grad_tau_stride": grad_tau.stride(0),
            "grad_h": grad_h.data_ptr(), "sums": sums.data_ptr(),
        }  # fmt: skip
        self.module.temperature_head_bwd(params, squash)
        return grad_h, sums


class Operators(HeadOperators):
    """Stands for ``torch.ops.tempnet`` with the emulated kernels under every name.

    ``plan`` overrides what the launch plan would choose.
    """

    multiprocessors = 132

    def __init__(self, module, arch=90, **plan):
        self.module, self.arch, self.plan = module, arch, plan
        self.launched = []

    def __call__(self, name, backend):
        return getattr(self, name)

    def _forward(
        self, logits, grad, target, tau, scale, rho, ignore_index, label_smoothing, z_loss, softcap,
        argmax,
    ):  # fmt: skip
        n, v = logits.shape
        loss = torch.full((n,), torch.nan)
        rows = torch.full((6, n), torch.nan)
        found = torch.full((n if argmax else 0,), -7)
        params = self._params(logits, grad, target, tau, scale, rows, ignore_index) | {
            "loss": loss.data_ptr(),
            "argmax": found.data_ptr() if argmax else 0,
            "rho": rho,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "softcap": softcap,
        }
        plan = self.module.plan(_name(logits), params, self.arch) | self.plan
        self.launched.append(plan)
        parts = torch.full((n * -(-v // plan["slice"]), 8), torch.nan)
        params |= {"parts": parts.data_ptr(), "extras": parts.data_ptr() + parts.numel() * 2}
        self.module.forward(_name(logits), params, plan)
        return loss, rows, found

    def _params(self, logits, grad, target, tau, scale, rows, ignore_index):
        return {
            "n": logits.shape[0], "v": logits.shape[1],
            "logits": logits.data_ptr(), "logits_stride": logits.stride(0),
            "grad": 0 if grad is None else grad.data_ptr(),
            "grad_stride": 0 if grad is None else grad.stride(0),
            "target": target.data_ptr(), "target_stride": target.stride(0),
            "wide_target": target.dtype == torch.int64,
            "tau": tau.data_ptr(), "tau_stride": tau.stride(0),
            "scale": scale.data_ptr(), "scale_stride": scale.stride(0),
            "rows": rows.data_ptr(), "ignore_index": ignore_index,
            "unscaled": logits.dtype == torch.float16,
            "loss": 0, "argmax": 0, "rho": 0.0, "label_smoothing": 0.0, "z_loss": 0.0,
            "softcap": 0.0, "parts": 0, "extras": 0, "begin": 0, "vocab_size": logits.shape[1],
        }  # fmt: skip

    def dro_cross_entropy_fwd(self, logits, target, tau, scale, *options):
        *numbers, want_grad, want_argmax = options
        n, v = logits.shape
        grad = torch.empty((n if want_grad else 0, v), dtype=logits.dtype)
        wanted = grad if want_grad else None
        out = self._forward(logits, wanted, target, tau, scale, *numbers, want_argmax)
        return grad, *out

    def dro_cross_entropy_fwd_(self, logits, target, tau, scale, *options):
        out = self._forward(logits, logits, target, tau, scale, *options)
        torch.autograd.graph.increment_version(logits)  # as the registered operator's kernel does
        return out

    def dro_cross_entropy_stats(
        self, logits, target, tau, ignore_index, softcap, begin, vocab_size, want_mean, want_argmax
    ):
        n = logits.shape[0]
        stats, argmax = torch.full((7, n), torch.nan), torch.full((n * want_argmax,), -7)
        params = self._params(logits, None, target, tau, tau, stats, ignore_index) | {
            "stats": stats.data_ptr(), "argmax": argmax.data_ptr() if want_argmax else 0,
            "begin": begin, "vocab_size": vocab_size, "softcap": softcap,
        }  # fmt: skip
        self.module.stats(_name(logits), params, want_mean, self.multiprocessors)
        return stats, argmax

    def dro_cross_entropy_bwd(self, logits, *args):
        grad = torch.empty(logits.shape, dtype=logits.dtype)
        self._backward(logits, grad, *args)
        return grad

    def dro_cross_entropy_bwd_(self, logits, *args):
        self._backward(logits, logits, *args)
        torch.autograd.graph.increment_version(logits)

    def _backward(
        self, logits, grad, target, tau, scale, rows, ignore_index, label_smoothing, z_loss,
        softcap, begin, vocab_size,
    ):  # fmt: skip
        params = self._params(logits, grad, target, tau, scale, rows, ignore_index)
        params |= {"label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap}
        params |= {"begin": begin, "vocab_size": vocab_size}
        self.module.backward(_name(logits), params)

    def row_scale(self, target, weight, normalizer, divisor, ignore_index, mean, wide):
        assert not wide
        # Called before the autograd function, where torch.func's transforms wrap new tensors.
        with torch._C._DisableFuncTorch():
            scale = torch.full((1 if weight is None else target.shape[0],), torch.nan)
            scale = scale.expand(target.shape)
            total = torch.full((1,), torch.nan)
        self.module.row_scale({
            "n": target.shape[0], "target": target.data_ptr(), "target_stride": target.stride(0),
            "wide_target": target.dtype == torch.int64, "weight": _address(weight),
            "weighted": weight is not None,
            "weight_stride": 0 if weight is None else weight.stride(0),
            "normalizer": _address(normalizer), "divisor": divisor, "ignore_index": ignore_index,
            "mean": mean, "scale": scale.data_ptr(), "total": total.data_ptr(),
        })  # fmt: skip
        return scale, total

    def sum_rows(self, rows, total):
        value = torch.full((), torch.nan)
        self.module.sum_rows({
            "n": rows.shape[0], "rows": rows.data_ptr(), "stride": rows.stride(0),
            "total": _address(total), "sum": value.data_ptr(),
        })  # fmt: skip
        return value

    def row_moments(self, logits, center, softcap):
        n, v = logits.shape
        moments = torch.full((5, n), torch.nan)
        params = {"n": n, "v": v, "logits": logits.data_ptr(), "stride": logits.stride(0)}
        params |= {"moments": moments.data_ptr(), "softcap": softcap}
        self.module.row_moments(_name(logits), params, center)
        return moments

    def normalized_rows(self, logits, shift, inverse, softcap):
        n, v = logits.shape
        x = torch.full((n, v), torch.nan)
        params = {"n": n, "v": v, "logits": logits.data_ptr(), "stride": logits.stride(0)}
        params |= {"shift": shift.data_ptr(), "inverse": inverse.data_ptr(), "x": x.data_ptr()}
        params["softcap"] = softcap
        self.module.normalized_rows(_name(logits), params)
        return x

    def scale_rows_(self, grad, scale):
        unused = torch.zeros(1, dtype=torch.int64)
        params = self._params(grad, grad, unused, scale, scale, scale, 0)
        self.module.scale(_name(grad), params)
        torch.autograd.graph.increment_version(grad)


class SoftmaxOperators:
    """Stands for the operators of the tempered softmax, as ``Operators`` does. ``plan``: all of
    twice, cluster, threads and slice, or nothing."""

    def __init__(self, module, arch=90, **plan):
        self.module, self.arch, self.plan = module, arch, plan
        self.launched = []

    def __call__(self, name, backend):
        return getattr(self, name)

    def _launch(self, logits, tau, rows, log, out, grad_output=None, grad_tau=None):
        params = {
            "n": logits.shape[0], "v": logits.shape[1], "log": log, "run": True,
            "logits": logits.data_ptr(), "logits_stride": logits.stride(0),
            "grad_output": 0 if grad_output is None else grad_output.data_ptr(),
            "grad_output_stride": 0 if grad_output is None else grad_output.stride(0),
            "out": 0 if out is None else out.data_ptr(),
            "tau": tau.data_ptr(), "tau_stride": tau.stride(0), "rows": rows.data_ptr(),
            "grad_tau": 0 if grad_tau is None else grad_tau.data_ptr(),
        }  # fmt: skip
        plan = self.module.tempered_softmax(_name(logits), params, self.arch, self.plan)
        self.launched.append(plan)

    def tempered_softmax_fwd(self, logits, tau, log):
        output = torch.empty(logits.shape, dtype=logits.dtype)
        rows = torch.full((3, logits.shape[0]), torch.nan)
        self._launch(logits, tau, rows, log, output)
        return output, rows

    def tempered_softmax_bwd(self, logits, tau, rows, grad_output, log, want_grad_logits):
        n, v = logits.shape
        grad_logits = torch.empty((n if want_grad_logits else 0, v), dtype=logits.dtype)
        grad_tau = torch.full((n,), torch.nan)
        out = grad_logits if want_grad_logits else None
        self._launch(logits, tau, rows, log, out, grad_output, grad_tau)
        return grad_logits, grad_tau


class ContrastiveOperators:
    """Stands for the operators on a tile of similarities and on the anchors, as ``Operators``
    does."""

    # What no operator of the package encloses: torch.compile takes an operator only.
    registered = ("anchor_states", "contrastive_anchors", "pair_gradients_")

    def __init__(self, module, multiprocessors=132):
        self.module, self.multiprocessors = module, multiprocessors

    def __call__(self, name, backend):
        return getattr(self, name)

    def anchor_states(
        self, tau_image, tau_text, positive, text, candidates, begin, include_positive, every_pair
    ):
        m, n, columns = tau_image.shape[0], text.shape[0], candidates.shape[0]
        sizes = {"row_a": (m,), "column_a": (n,), "rows": (5, m), "columns": (5, columns)}
        results = {name: torch.full(size, torch.nan) for name, size in sizes.items()}
        results["place"] = torch.full((m,), -7)
        results["pair"] = torch.full((columns,), -7, dtype=torch.int32)
        self.module.anchor_states(
            _addresses(results)
            | _addresses({"given": positive})
            | _strided({"tau_image": tau_image, "tau_text": tau_text})
            | {"m": m, "n": n, "all": columns, "begin": begin}
            | {"include_positive": include_positive, "every_pair": every_pair}
        )
        return tuple(results.values())

    def contrastive_anchors(
        self, rows, columns, row_a, column_a, tau_image, tau_text, positive, pair, log_s_image,
        log_s_text, begin, gamma, rho,
    ):  # fmt: skip
        m, n = row_a.shape[0], column_a.shape[0]
        sizes = {"stats": (6, m), "term": (m,), "total": (m,)}
        sizes |= {"row_parameters": (3, m), "column_parameters": (3, n)}
        results = {name: torch.full(size, torch.nan) for name, size in sizes.items()}
        given = {
            "rows": rows, "columns": columns, "row_a": row_a, "column_a": column_a,
            "positive": positive, "pair": pair, "log_s_image": log_s_image,
            "log_s_text": log_s_text,
        }  # fmt: skip
        self.module.contrastive_anchors(
            _addresses(results | given)
            | _strided({"tau_image": tau_image, "tau_text": tau_text})
            | {"m": m, "n": n, "begin": begin, "gamma": gamma, "rho": rho}
        )
        return tuple(results.values())

    def pair_gradients_(
        self, grad_image, grad_text, image_sum, text_sum, image, text, total, positive, pair, unit,
        scale,
    ):  # fmt: skip
        image, text = image.contiguous(), text.contiguous()
        tensors = {
            "grad_image": grad_image, "grad_text": grad_text, "image_sum": image_sum,
            "text_sum": text_sum, "image": image, "text": text, "total": total,
            "positive": positive, "pair": pair, "unit": unit, "scale": scale,
        }  # fmt: skip
        sizes = {"images": grad_image.shape[0], "texts": grad_text.shape[0], "d": image.shape[1]}
        wide_text = grad_text.dtype != image.dtype
        self.module.pair_gradients(_name(image), _addresses(tensors) | sizes, wide_text)

    def _tile(self, rows, columns, similarity, positive, ids, mask, include_positive, begin):
        assert similarity.dtype == torch.float32
        return {
            "row_begin": begin[0], "column_begin": begin[1],
            "m": rows.shape[1], "n": columns.shape[1],
            "tile_rows": similarity.shape[0], "tile_columns": similarity.shape[1],
            "similarity": similarity.data_ptr(), "stride": similarity.stride(0),
            "positive": positive.data_ptr(), "ids": ids.data_ptr() if ids.numel() else 0,
            "mask": mask.data_ptr() if mask.numel() else 0, "mask_stride": mask.stride(0),
            "include_positive": include_positive,
            "rows": rows.data_ptr(), "columns": columns.data_ptr(),
        }  # fmt: skip

    def similarity_stats_(
        self, rows, columns, similarity, row_begin, column_begin, row_a, column_a, *options
    ):
        params = self._tile(rows, columns, similarity, *options, (row_begin, column_begin))
        params |= {"row_a": row_a.data_ptr(), "column_a": column_a.data_ptr()}
        self.module.similarity_stats(params, self.multiprocessors)

    def similarity_weights_(
        self, weights, similarity, row_begin, column_begin, rows, columns, *options
    ):
        params = self._tile(rows, columns, similarity, *options, (row_begin, column_begin))
        params |= {"weights": weights.data_ptr(), "weights_stride": weights.stride(0)}
        self.module.similarity_weights(_name(weights), params)


class TemperatureOperators:
    """Stands for the operator of the optimal temperature, as ``Operators`` does. Without ``hold``
    no row stays in registers."""

    def __init__(self, module, hold=True):
        self.module, self.hold = module, hold

    def __call__(self, name, backend):
        return getattr(self, name)

    def optimal_temperature(self, logits, rho, tau_min, tau_max):
        n, v = logits.shape
        tau, kl = torch.full((2, n), torch.nan)
        iterations = torch.full((n,), -7, dtype=torch.int32)
        params = {
            "n": n, "v": v, "logits": logits.data_ptr(), "logits_stride": logits.stride(0),
            "rho": rho.data_ptr(), "rho_stride": rho.stride(0),
            "tau_min": tau_min, "tau_max": tau_max,
            "tau": tau.data_ptr(), "kl": kl.data_ptr(), "iterations": iterations.data_ptr(),
        }  # fmt: skip
        self.module.optimal_temperature(_name(logits), params, self.hold)
        return tau, kl, iterations


class SampleOperators:
    """The operators of the state per sample."""

    registered = ("read_samples", "write_samples_")

    def __init__(self, module):
        self.module = module

    def _run(self, tables, ids, order, values, write):
        strides = {"table_stride": values.stride(0), "value_stride": values.stride(1)}
        self.module.samples_at(
            [(table.data_ptr(), table.shape[0]) for table in tables],
            _addresses({"ids": ids, "order": order, "values": values})
            | {"b": ids.shape[0], "id_stride": ids.stride(0), **strides},
            write,
        )

    def read_samples(self, tables, ids):
        values = torch.full((len(tables), ids.shape[0]), torch.nan)
        self._run(tables, ids, ids, values, False)
        return values

    def write_samples_(self, tables, ids, order, values):
        self._run(tables, *((ids, order) if order.numel() else ids.sort(stable=True)), values, True)


# {op: (what stands for its operators, the modules that call them)}
OPERATORS = {
    "dro_cross_entropy": (Operators, "ops.dro_cross_entropy", "ops.overwrite", "ops.token_rows"),
    "linear_dro_cross_entropy": (
        Operators, "chunked.linear_dro_cross_entropy", "core.tempnet", "ops.token_rows",
    ),
    "dro_contrastive": (ContrastiveOperators, "chunked.dro_contrastive"),
    "token_rows": (Operators, "ops.token_rows"),
    "temperature_head": (HeadOperators, "core.tempnet", "ops.temperature_head"),
    "contrastive_anchors": (ContrastiveOperators,),
    "per_sample_state": (SampleOperators,),
    "tempered_softmax": (SoftmaxOperators, "ops.tempered_softmax"),
    "optimal_temperature": (TemperatureOperators, "ops.optimal_temperature"),
}  # fmt: skip


def install(request, monkeypatch, op, **plan):
    """Let the backends of ``op`` be its CUDA kernels in the emulator."""
    kind, *callers = OPERATORS[op]
    operators = kind(load(), **plan)
    for caller in callers:
        monkeypatch.setattr(f"tempnet_kernels.{caller}._op", operators)
    if hasattr(operators, "registered"):
        library = torch.library.Library("tempnet", "IMPL")
        request.addfinalizer(library._destroy)
        for name in operators.registered:
            function = getattr(operators, name)
            library.impl(f"{name}.native", function, "CPU", allow_override=True)
    return operators


def _address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def _addresses(tensors):
    return {name: x.data_ptr() if x.numel() else 0 for name, x in tensors.items()}


def _strided(rows):
    return _addresses(rows) | {f"{name}_stride": x.stride(0) for name, x in rows.items()}


def _name(tensor):
    return str(tensor.dtype).removeprefix("torch.")


def whole_lines(v, parts, dtype):
    """Columns of each of so many parts of a row, in whole lines of 128 bytes."""
    line = 128 // dtype.itemsize
    return math.ceil(v / parts / line) * line


def shifted(logits, columns):
    """A view of the same numbers with NaN around every row; its rows begin on 16 bytes where
    ``columns`` is 0."""
    n, v = logits.shape
    wide = torch.full((n, -(-v // 8) * 8 + 8), torch.nan, dtype=logits.dtype)
    wide[:, columns : columns + v] = logits
    return wide[:, columns : columns + v]
