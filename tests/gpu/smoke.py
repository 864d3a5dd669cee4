"""Every public function and module, every backend and dtype and all gradients at small shapes,
against the reference in float64. A case says how many times its bound it errs."""

import functools
import itertools
import math

import torch
from judge import (
    BACKENDS,
    DTYPES,
    logits_of,
    moved,
    pairs_and_bounds,
    pairs_of,
    row_shapes,
    rows_of,
    with_gradients,
)
from smoke_modules import module_cases

from tempnet_kernels import (
    dro_contrastive,
    dro_cross_entropy,
    linear_dro_cross_entropy,
    nn,
    optimal_temperature,
    tempered_log_softmax,
    tempered_softmax,
)
from tempnet_kernels.chunked import dro_contrastive as tiles
from tempnet_kernels.chunked import dro_cross_entropy as sharded
from tempnet_kernels.core import matmul, register
from tempnet_kernels.core.fields import TokenOptions


def token_cases(device):
    def loss(options, x, backend):
        def call(x):
            given = {"row_weight": x["row_weight"]} if options.get("z_loss") else {}
            out, stats = dro_cross_entropy(
                x["logits"] * 1, x["target"], x["tau"], 0.7, return_stats=True, backend=backend,
                **given, **options,
            )  # fmt: skip
            return out, stats._asdict()

        names = ["logits", "tau"] + ["row_weight"] * ("z_loss" in options)
        return with_gradients(x, names, call)

    everything = {"label_smoothing": 0.1, "z_loss": 1e-3, "overwrite_logits": True}
    everything["reduction"] = "sum"
    kinds = ("", {}), (" none", {"reduction": "none"}), (" all", everything)
    kinds += tuple((f"{words} softcap", {**options, "softcap": 8.0}) for words, options in kinds)
    for n, v, first in row_shapes(device):
        for words, options in kinds:
            make = functools.partial(rows_of, n, v, first)
            label = f"dro_cross_entropy{words} ({n}, {v})"
            yield from pairs_of(label, make, functools.partial(loss, options), device)


def vocabulary_cases(device):
    """Three processes' columns, in this one."""

    def parts(softcap, x, backend):
        logits, target, tau = x["logits"], x["target"], x["tau"]
        v, scale, options = logits.shape[1], x["row_weight"], (-100, 0.1, 1e-2, softcap)
        places = [(begin, v) for begin in range(0, v, v // 3)]
        shards = [logits[:, begin : begin + v // 3] for begin, _ in places]
        op = functools.partial(register.operator, backend=backend)
        stats = [
            op("dro_cross_entropy_stats")(z, target, tau, -100, softcap, *place, True, True)
            for z, place in zip(shards, places, strict=True)
        ]
        stats = map(torch.stack, zip(*stats, strict=True))
        numbers = TokenOptions(0.7, *options)
        loss, rows, argmax = sharded.merged(*stats, target, tau, scale, numbers, v)
        args = target, tau, scale, rows, *options
        grads = [
            op("dro_cross_entropy_bwd")(z, *args, *place)
            for z, place in zip(shards, places, strict=True)
        ]
        in_place = shards[1].clone()
        op("dro_cross_entropy_bwd_")(in_place, *args, *places[1])
        assert torch.equal(in_place, grads[1]), "in place the gradient is another one"
        return {"loss": loss, "argmax": argmax, "grad_logits": torch.cat(grads, 1)}

    for n, v, first in row_shapes(device):
        v = v // 3 * 3
        make = functools.partial(rows_of, n, v, first)
        for softcap in (0.0, 8.0):
            label = f"vocabulary in 3 parts{' softcap' * (softcap > 0)} ({n}, {v})"
            yield from pairs_of(label, make, functools.partial(parts, softcap), device)


def softmax_cases(device):
    def softmax(function, x, backend):
        leaves = [x[name].detach().requires_grad_() for name in ("logits", "tau")]
        out = function(*leaves, backend=backend)
        grads = torch.autograd.grad(out, leaves, x["upstream"])
        return {"output": out, "grad_logits": grads[0], "grad_tau": grads[1]}

    for n, v, first in row_shapes(device):
        for function in (tempered_softmax, tempered_log_softmax):
            make = functools.partial(rows_of, n, v, first)
            label = f"{function.__name__} ({n}, {v})"
            yield from pairs_of(label, make, functools.partial(softmax, function), device)


def network_cases(device):
    """The temperature networks around their matrix products."""

    def rows(n, k, dtype):
        key = torch.tensor(-(1 << 61) + 12345)
        floats = {
            "pre": 3 * torch.randn(n, k), "bias": torch.randn(k), "factor": torch.rand(n) + 0.5,
            "norms": torch.rand(k) + 0.5, "scaler": torch.tensor([-1.0]),
            "weight": torch.randn(1, k), "last": torch.tensor([0.3]), "upstream": torch.randn(n),
        }  # fmt: skip
        return {**floats, "key": key, "ids": torch.randint(1 << 62, (n,))}, {}

    def network(squash, x, backend):
        op = functools.partial(register.operator, backend=backend)
        drawn = (x["factor"], x["key"], x["ids"]) if squash else (None, x["key"], None)
        dropped = op("sigmoid_dropout")(x["pre"], x["bias"], *drawn, 1 << 40, 0.3)
        last = x["norms"] if squash else None, x["scaler"], x["weight"], x["last"], squash, 0.5, 2.0
        tau = op("temperature_head")(x["pre"], *last)
        grad_h, sums = op("temperature_head_bwd")(x["upstream"], x["pre"], *last)
        grad_pre, grad_bias = op("sigmoid_dropout_bwd")(grad_h, dropped, drawn[0], 0.3)
        return {
            "dropped": dropped, "kept": dropped != 0, "tau": tau, "grad_h": grad_h,
            "sums": sums.sum(0), "grad_pre": grad_pre, "grad_bias": grad_bias.sum(0),
        }  # fmt: skip

    shapes = [(7, 33), (40, 300)] if device == "cpu" else [(7, 33), (150, 256), (20000, 256)]
    for (n, k), squash in itertools.product(shapes, (False, True)):
        label = f"temperature network ({n}, {k}) {'squashed' if squash else 'as it is'}"
        make, function = functools.partial(rows, n, k), functools.partial(network, squash)
        yield from pairs_of(label, make, function, device, DTYPES[:1])


def solver_cases(device):
    """KL(tau) and not tau is compared: a flat KL leaves tau open."""

    def case(backend, dtype, n, v, first):
        torch.manual_seed(1)
        x = moved(logits_of(n, v, first, dtype), device)
        rho = 0.3 * math.log(v)
        tau, stats = optimal_temperature(
            x["logits"], rho, 0.05, 9.0, return_stats=True, backend=backend
        )
        log_p = torch.log_softmax(x["logits"].cpu().double() / tau.cpu().double()[:, None], 1)
        excess = math.log(v) + (log_p.exp() * log_p).sum(1) - rho
        excess[(tau.cpu() == torch.tensor(9.0)) & (excess > 0)] = 0
        excess[(tau.cpu() == torch.tensor(0.05)) & (excess < 0)] = 0
        ratio = (excess.abs().max() / 1e-5).item()
        told = (stats.kl.cpu() - rho - excess).abs().max().item() / (2e-6 * max(1, math.log(v)))
        if ratio <= 1:
            return {"of_bound": ratio, "kl_of_bound": told}
        return {"status": "wrong", "error": f"the KL is off by {1e-5 * ratio:.3g}"}

    for n, v, first in row_shapes(device):
        for backend, dtype in itertools.product(BACKENDS, DTYPES):
            name = f"optimal_temperature ({n}, {v}) {backend} {str(dtype).removeprefix('torch.')}"
            yield name, functools.partial(case, backend, dtype, n, v, first)


def linear_cases(device):
    def tempnet_of(x, v, center):
        """The same weights every time, in the dtype of the sums and without dropout."""
        net = nn.TempNet(v, 0.5, 2.0, hidden_size=64, center=center).eval()
        state = {name[4:]: value for name, value in x.items() if name.startswith("net.")}
        double = x["hidden"].dtype == torch.float64
        net.to(x["hidden"].device, torch.float64 if double else torch.float32)
        net.load_state_dict(state)
        return net

    def make(n, v, d, dtype):
        net = nn.TempNet(v, hidden_size=64)
        torch.nn.init.normal_(net.last.bias)
        x = {f"net.{name}": value for name, value in net.state_dict().items()}
        x |= {
            "hidden": torch.randn(n, d).to(dtype),
            "weight": (2 * torch.randn(v, d) / d**0.5).to(dtype),
            "bias": torch.randn(v).to(dtype),
            "tau": 0.5 + torch.rand(n),
            "target": torch.randint(0, v, (n,)).index_fill_(0, torch.tensor([n // 2]), -100),
        }
        return x, {}  # the product rounds its logits

    def loss(options, x, backend):
        options = dict(options)
        net = None
        if options.pop("net", False):
            net = tempnet_of(x, x["weight"].shape[0], options.pop("center", None))
        names = [] if options.pop("frozen", False) else ["hidden", "weight", "bias"]
        names += ["tau"] * (net is None)

        def call(x):
            given = {"tau": x["tau"]} if net is None else {"tempnet": net}
            out, stats = linear_dro_cross_entropy(
                x["hidden"], x["weight"], x["target"], bias=x["bias"], rho=3.0, return_stats=True,
                backend=backend, **given, **options,
            )  # fmt: skip
            # Logits that a product has rounded have no one argmax.
            return out, {**stats._asdict(), "argmax": None}

        return with_gradients(x, names, call, () if net is None else net.named_parameters())

    kinds = (
        (" tau", {}),
        (" none", {"reduction": "none"}),
        (" softcap", {"softcap": 3.0, "net": True}),
        (" TempNet", {"net": True}),
        (" TempNet, centred, dropping rows", {"net": True, "center": "max", "drop_ignored": True}),
        (" frozen", {"net": True, "frozen": True}),
    )
    shapes = (
        ((7, 33, 5), (12, 130, 8))
        if device == "cpu"
        else ((7, 33, 5), (70, 4099, 64), (300, 8192, 128))
    )
    for (n, v, d), (words, options) in itertools.product(shapes, kinds):
        options = {**options, "chunk_rows": max(3, n // 3)}
        yield from pairs_of(
            f"linear_dro_cross_entropy{words} ({n}, {v}, {d})", functools.partial(make, n, v, d),
            functools.partial(loss, options), device,
        )  # fmt: skip


def contrastive_cases(device):
    def loss(given, options, x, backend):
        names = ("image", "text", "tau_image", "tau_text")

        def call(x):
            out, stats = dro_contrastive(
                *(x[name] for name in names), 2.0, return_stats=True, backend=backend,
                **{name: x[name] for name in given}, **options,
            )  # fmt: skip
            return out, stats._asdict()

        return with_gradients(x, names, call)

    def tiled(function, x, backend):
        """Several tiles in both directions, the last ones ragged."""
        saved = tiles.TILE_ROWS, tiles.TILE_BYTES
        tiles.TILE_ROWS, tiles.TILE_BYTES = ({k: v for k in saved[0]} for v in (64, 1))
        try:
            return function(x, backend)
        finally:
            tiles.TILE_ROWS, tiles.TILE_BYTES = saved

    kinds = (
        ("", (), {}),
        (" moving average", ("log_s_image", "log_s_text"), {"gamma": 0.7}),
        (" with the positive", (), {"include_positive": True}),
        (" ids", ("image_ids",), {}),
        (" mask and places", ("negative_mask", "positive"), {}),
    )
    shapes = (
        ((1, 1, 8), (66, 80, 24))
        if device == "cpu"
        else ((1, 1, 8), (70, 130, 24), (333, 1029, 64))
    )
    for (m, n, d), (words, given, options) in itertools.product(shapes, kinds):
        if m == 1 and given:
            continue
        function = functools.partial(loss, given, options)
        make = functools.partial(pairs_and_bounds, m, n, d)
        yield from pairs_of(f"dro_contrastive{words} ({m}, {n}, {d})", make, function, device)
        if m > 1:
            label = f"dro_contrastive{words}, tiles ({m}, {n}, {d})"
            yield from pairs_of(label, make, functools.partial(tiled, function), device)


def product_cases(device):
    """The products of the loops: 16-bit operands with a float32 result, into a block of columns,
    of transposed operands, twice into the same place."""

    def case(dtype, m, k, n):
        a, b = torch.randn(k, m).to(dtype), torch.randn(n, k).to(dtype)
        exact, sizes = a.double().T @ b.double().T, a.double().abs().T @ b.double().abs().T
        bound = 2**-20 * max(sizes.flatten().tolist(), default=1.0) + 1e-30
        wide = torch.full((m, n + 3), math.nan, device=device)
        wide[:, 3:] = 0
        out, a, b = wide[:, 3:], a.to(device).T, b.to(device).T
        if device == "cpu":  # as the loops do there: no product of 16 bits has a float32 result
            a, b = a.float(), b.float()
        matmul.multiply(a, b, out)
        error = (out.cpu().double() - exact).abs().max().item() if exact.numel() else 0.0
        for _ in range(2):
            matmul.add_product(out, a, b)
        if exact.numel():
            error = max(error, (out.cpu().double() - 3 * exact).abs().max().item() / 3)
        assert wide[:, :3].isnan().all(), "the columns beside the result are written"
        if error <= bound:
            return {"of_bound": error / bound}
        return {"status": "wrong", "error": f"errs by {error / bound:.3g} x its bound"}

    shapes = [(64, 32, 48), (1, 16, 40), (33, 100, 257), (5, 0, 8), (0, 8, 8), (257, 1, 16)]
    if device == "cuda":
        shapes += [(256, 4096, 50257), (4097, 64, 1)]
    for dtype, shape in itertools.product(DTYPES, shapes):
        name = f"product {shape} {str(dtype).removeprefix('torch.')}"
        yield name, functools.partial(case, dtype, *shape)


def large_cases(device):
    """More than 2^31 logits: the last rows are those of a call on them alone."""
    n, v, last = (16800, 128256, 3) if device == "cuda" else (40, 300, 3)
    dtype = torch.bfloat16

    def token(x, backend):
        z = x["logits"].detach().requires_grad_()
        t = x["tau"].detach().requires_grad_()
        loss = dro_cross_entropy(z, x["target"], t, 0.7, reduction="sum", backend=backend)
        return torch.autograd.grad(loss, (z, t))

    def softmax(x, backend):
        return (tempered_softmax(x["logits"], x["tau"], backend=backend),)

    def solver(x, backend):
        return (optimal_temperature(x["logits"], 3.0, 0.05, 9.0, backend=backend),)

    def moments(x, backend):
        return (register.operator("row_moments", backend)(x["logits"], True, 0.0).T,)

    def case(function, backend):
        x = {
            "logits": torch.randn(n, v, device=device, dtype=dtype).mul_(3),
            "target": torch.randint(0, v, (n,), device=device),
            "tau": 0.5 + torch.rand(n, device=device),
        }
        got = [y[-last:].clone() for y in function(x, backend)]
        alone = function({name: y[-last:].clone() for name, y in x.items()}, backend)
        for g, a in zip(got, alone, strict=True):  # few rows take another kernel
            torch.testing.assert_close(g, a, rtol=1e-2 if g.dtype == dtype else 1e-4, atol=1e-5)

    for function in (token, softmax, solver, moments):
        for backend in BACKENDS[:2]:
            name = f"more than 2^31 logits, {function.__name__} {backend}"
            yield name, functools.partial(case, function, backend)


CASES = {
    "large": large_cases,
    "products": product_cases,
    "dro_contrastive": contrastive_cases,
    "linear_dro_cross_entropy": linear_cases,
    "tempered_softmax": softmax_cases,
    "optimal_temperature": solver_cases,
    "temperature_head": network_cases,
    "vocabulary_parts": vocabulary_cases,
    "modules": module_cases,
    "dro_cross_entropy": token_cases,
}


def cases(device, part):
    return CASES[part](device)
