"""Every public function on tensors without memory, on the device of fake_device.py: prints, as
JSON, what a GPU would be waited for, or fed from the host, for. A process of its own, since the
device's name cannot be taken back.

FakeTensor raises where the host reads a value, or two devices meet; the rest is found here.
"""

import json
import sys
import warnings

import torch
from fake_device import GPU, GROUP, RANKS, WATCH, B, D, N, V, pretend
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._pytree import tree_leaves

import tempnet_kernels as tk
from tempnet_kernels.integrations._serving import ServedTempNet
from tempnet_kernels.nn import (
    ContrastiveTempNet,
    DROCrossEntropyLoss,
    RobustContrastiveLoss,
    TempNet,
    TempNetCausalLMLoss,
    TempNetCrossEntropyLoss,
)
from tempnet_kernels.nn.contrastive_methods import METHODS

CASES = {}


def case(**grid):
    """A function of the values of ``grid`` is a case for each combination."""

    def decorate(function):
        combinations = [{}]
        for key, values in grid.items():
            combinations = [c | {key: v} for c in combinations for v in values]
        for c in combinations:
            name = ", ".join(f"{k}={v}" for k, v in c.items())
            CASES[f"{function.__name__}({name})"] = lambda c=c: function(**c)
        return function

    return decorate


BACKENDS = ("native", "reference")  # what there is of Triton in Python is as of native
DTYPES = (torch.float32, torch.float16)


def randn(*shape, dtype=torch.float32, grad=True):
    return torch.randn(shape, device=GPU).to(dtype).requires_grad_(grad)


def integers(high, *shape, dtype=torch.int64):
    return torch.randint(high, shape, device=GPU, dtype=dtype)


def backward(loss, *leaves):
    loss.sum().backward()
    return [x.grad for x in leaves]


@case(backend=BACKENDS, dtype=DTYPES, reduction=("mean", "sum", "none"))
def cross_entropy(backend, dtype, reduction):
    leaf = randn(4, N // 4, V, dtype=dtype)
    tau, weight = randn(4, N // 4), randn(4, N // 4)
    loss, stats = tk.dro_cross_entropy(
        leaf, integers(V, 4, N // 4), tau, 1.0, row_weight=weight, label_smoothing=0.1,
        z_loss=1e-4, reduction=reduction, return_stats=True, backend=backend,
    )  # fmt: skip
    return loss, stats, backward(loss, leaf, tau, weight)


@case(backend=BACKENDS, tau=("number", "0-d"), normalizer=("none", "number", "0-d"))
def cross_entropy_of_numbers(backend, tau, normalizer):
    leaf = randn(N, V)
    loss = tk.dro_cross_entropy(
        leaf, integers(V, N, dtype=torch.int32), 0.5 if tau == "number" else randn(), 1.0,
        normalizer={"none": None, "number": 7.0, "0-d": randn(grad=False)}[normalizer],
        backend=backend,
    )  # fmt: skip
    return loss, backward(loss, leaf)


@case(backend=BACKENDS, padded=(False, True))
def cross_entropy_overwriting(backend, padded):
    leaf = randn(N, V)
    logits = (leaf * 2)[:, : V - 8 if padded else V]
    module = DROCrossEntropyLoss(1.0, overwrite_logits=True, backend=backend)
    loss = module(logits, integers(V - 8, N), randn(N))
    return loss, backward(loss, leaf)


@case(backend=BACKENDS, dtype=DTYPES)
def softmax(backend, dtype):
    leaf, tau = randn(N, V, dtype=dtype), randn(N)
    p = tk.tempered_softmax(leaf, tau, backend=backend)
    log_p = tk.tempered_log_softmax(leaf, 0.5, backend=backend)
    return p, log_p, backward(p + log_p, leaf, tau)


@case(dtype=DTYPES, rho=("number", "rows"))
def optimum(dtype, rho):
    rho = 1.0 if rho == "number" else randn(N)
    return tk.optimal_temperature(
        randn(N, V, dtype=dtype), rho, 0.1, 2.0, return_stats=True, backend="native"
    )


def tempnet(vocab_size=V, **options):
    with WATCH.off(), torch.device(GPU):
        return TempNet(vocab_size, hidden_size=32, **options)


LINEAR = {
    "plain": {},
    "tempnet": {"tempnet": "max"},
    "raw": {"tempnet": None},
    "direct": {"tempnet": "max", "softcap": 30.0},
    "softcap": {"softcap": 30.0},
    "each row": {"tempnet": "max", "reduction": "none"},
    "weights": {"tempnet": "max", "row_weight": True, "normalizer": 7.0},
}


@case(backend=BACKENDS, dtype=DTYPES, options=LINEAR, more=(False, True))
def linear(backend, dtype, options, more):
    options = dict(LINEAR[options])
    network, leaves = None, []
    if "tempnet" in options:
        network = tempnet(center=options.pop("tempnet"))
        leaves = list(network.parameters())
    if "row_weight" in options:
        options["row_weight"] = randn(N)
    hidden, weight = randn(N, D, dtype=dtype), randn(V, D, dtype=dtype)
    bias = randn(V, dtype=dtype) if more else None
    with torch.autocast(GPU, torch.bfloat16, enabled=more):
        loss, stats = tk.linear_dro_cross_entropy(
            hidden, weight, integers(V, N), tempnet=network, rho=1.0, bias=bias, chunk_rows=24,
            return_stats=True, backend=backend, **options,
        )  # fmt: skip
    leaves += [hidden, weight] if bias is None else [hidden, weight, bias]
    return loss, stats, backward(loss, *leaves)


STATE = ("log_s_image", "log_s_text")
CONTRASTIVE = {
    "plain": lambda: {},
    "numbers": lambda: {"tau_image": 0.1, "tau_text": randn(), "include_positive": True},
    "ids": lambda: {"image_ids": integers(9, B), "text_ids": integers(9, B)},
    "mask": lambda: {"negative_mask": integers(2, B, B).bool()},
    "positive": lambda: {"positive": integers(B, B)},
    "state": lambda: {name: randn(B, grad=False) for name in STATE} | {"gamma": 0.8},
}


@case(backend=BACKENDS, dtype=DTYPES, options=CONTRASTIVE, group=(False, True))
def contrastive(backend, dtype, options, group):
    tk.dro_contrastive.__globals__["KEEP_BYTES"] = (64 << 20) * (dtype == torch.float32)
    image, text = randn(B, D, dtype=dtype), randn(B, D, dtype=dtype)
    given = {"tau_image": randn(B), "tau_text": randn(B)} | CONTRASTIVE[options]()
    leaves = [image, text, *(x for x in given.values() if getattr(x, "requires_grad", False))]
    if group:
        given.pop("negative_mask", None)
        given["process_group"] = RANKS
    loss, stats = tk.dro_contrastive(
        image, text, given.pop("tau_image"), given.pop("tau_text"), 1.0, return_stats=True,
        backend=backend, **given,
    )  # fmt: skip
    return loss, stats, backward(loss, *leaves)


def robust_loss(method, group=None, **options):
    with WATCH.off():
        if method == "tempnet":
            with torch.device(GPU):
                networks = [ContrastiveTempNet(D) for _ in range(2)]
            options |= dict(zip(("image_temp_gen", "text_temp_gen"), networks, strict=True))
        loss = RobustContrastiveLoss(
            90 if method != "clip" else 0, rho=1.0, method=method, process_group=group, **options
        )
        loss.state.to(GPU)
        if method == "clip":
            loss.logit_scale = torch.nn.Parameter(randn(1))
    return loss


@case(group=(False, True), train=(False, True), method=METHODS)
def robust(method, train, group):
    loss = robust_loss(method, backend="native").train(train)
    leaves = [randn(B, D), randn(B, D), *loss.parameters()]
    loss._meet = lambda *_: RANKS if group else None
    value = loss(*leaves[:2], integers(90, B))
    return value, loss.temperature_stats(), backward(value, *leaves), loss.state_dict()


@case(method=list(METHODS)[1:])
def official(method):
    loss = robust_loss(method, estimator="official", backend="reference")
    leaves = [randn(B, D), randn(B, D), *loss.parameters()]
    value = loss(*leaves[:2], integers(90, B), epoch=1)
    return value, loss.temperature_stats(), backward(value, *leaves), loss.state_dict()


@case()
def numbers_that_ranks_compare():
    loss = robust_loss("tempnet", backend="native")
    return loss._sum_of_parameters(), loss.state.fingerprint()


@case(center=(None, "max"), train=(False, True), dtype=DTYPES, autocast=(False, True))
def network(center, train, dtype, autocast):
    x = tempnet(center=center).train(train)
    with torch.autocast(GPU, torch.bfloat16, enabled=autocast):
        tau = x(randn(4, N, V, dtype=dtype))
    return tau, backward(tau, *x.parameters())


@case(ids=(False, True), dtype=DTYPES)
def contrastive_network(ids, dtype):
    with WATCH.off():
        torch.set_default_dtype(dtype)
        with torch.device(GPU):
            x = ContrastiveTempNet(D)
        torch.set_default_dtype(torch.float32)
    x.init_prototypes(randn(300, D))
    tau = x(randn(B, D, dtype=dtype), integers(9, B) if ids else None)
    return tau, backward(tau, *x.parameters())


@case(backend=BACKENDS, linear=(False, True), shifted=(False, True), items=("none", "0-d"))
def causal(backend, linear, shifted, items):
    loss = TempNetCausalLMLoss(tempnet(), 1.0, backend=backend)
    labels = integers(V, 4, N // 4)
    options = {"num_items_in_batch": integers(9) if items == "0-d" else None}
    if shifted:
        options["shift_labels"] = labels
    leaves = list(loss.parameters())
    if linear:
        leaves += [randn(V, D)]
        options["weight"] = leaves[-1]
    leaves += [randn(4, N // 4, D if linear else V)]
    value = loss(leaves[-1], labels, **options)
    return value, loss.temperature_stats(), backward(value, *leaves)


@case(backend=BACKENDS)
def token_module(backend):
    loss = TempNetCrossEntropyLoss(tempnet(), 1.0, backend=backend)
    leaf = randn(N, V)
    value = loss(leaf, integers(V, N))
    return value, loss.temperature_stats(), backward(value, leaf, *loss.parameters())


@case(backend=BACKENDS, overwrite=(False, True), smooth=(0.0, 0.1))
def sharded_cross_entropy(backend, overwrite, smooth):
    leaf = randn(N, V)
    loss, stats = tk.dro_cross_entropy(
        leaf * 2, integers(2 * V, N), randn(N), 1.0, label_smoothing=smooth, return_stats=True,
        overwrite_logits=overwrite, process_group=GROUP, backend=backend,
    )  # fmt: skip
    return loss, stats, backward(loss, leaf)


@case(softcap=(None, 30.0), center=(None, "max"))
def sharded_linear(softcap, center):
    network = tempnet(2 * V, center=center).shard(GROUP)
    leaves = [randn(N, D, dtype=torch.bfloat16), randn(V, D, dtype=torch.bfloat16)]
    loss, stats = tk.linear_dro_cross_entropy(
        *leaves, integers(2 * V, N), tempnet=network, rho=1.0, softcap=softcap, chunk_rows=24,
        return_stats=True, process_group=GROUP, backend="native",
    )  # fmt: skip
    tau = network(randn(N, V))
    return loss, stats, tau, backward(loss + tau.sum(), *leaves, *network.parameters())


@case(some=(False, True))
def served(some):
    x = object.__new__(ServedTempNet)
    x.tempnet = tempnet().eval()
    return x.divide(randn(N, V, grad=False), integers(2, N).bool() if some else None)


# What is documented to wait.


@case()
def waits_for_dropped_rows():
    return tk.linear_dro_cross_entropy(
        randn(N, D), randn(V, D), integers(V, N), drop_ignored=True, backend="native"
    )


@case()
def waits_for_the_reference_of_the_optimum():
    return tk.optimal_temperature(randn(N, V), 1.0, 0.1, 2.0, backend="reference")


@case()
def waits_for_numbers_of_temperatures():
    loss = TempNetCrossEntropyLoss(tempnet(), 1.0, backend="native")
    loss(randn(N, V), integers(V, N))
    return loss.temperature_stats().floats()


def check(function):
    """What is wrong with a case: the notes, or the error."""
    WATCH.found = []
    try:
        with FakeTensorMode(), WATCH:
            results = tree_leaves(function())
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        return [f"the host reads a value: {error.func}"]
    found = list(dict.fromkeys(WATCH.found))
    for x in results:
        if not isinstance(x, torch.Tensor):
            found.append(f"a result is {x!r}, no tensor")
        elif x.device.type != GPU:
            found.append(f"a result of shape {tuple(x.shape)} is on {x.device}")
    return found


def main():
    warnings.simplefilter("ignore")
    pretend()
    torch.manual_seed(0)
    only = sys.argv[1:]
    found = {}
    for name, function in CASES.items():
        if not only or any(x in name for x in only):
            try:
                found[name] = check(function)
            except Exception as error:
                if only:
                    raise
                found[name] = [f"{type(error).__name__}: {str(error)[:300]}"]
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
