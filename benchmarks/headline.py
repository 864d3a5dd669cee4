"""One size of every operator that says whether the kernels are as fast as they should be: its time,
its ceiling in the same run and what was predicted (NOTES.md); with the part "others" the official
formula and the peers; with "profile" where its time goes. The result is checked at that size first.

    python scripts/gpu_check.py --only headline profile --out DIR --device cuda
"""

import functools
import math
import time
from collections import defaultdict
from statistics import median
from typing import NamedTuple

import bench_dro_contrastive as contrastive
import bench_dro_cross_entropy as token
import bench_linear_dro_cross_entropy as linear
import bench_optimal_temperature as solver
import bench_tempered_softmax as softmax
import peers
import torch
from measure import peak_extra_mib, synchronize, time_ms

from tempnet_kernels.nn import ContrastiveTempNet, RobustContrastiveLoss

ROUNDS = 10
SECONDS = 6  # of rounds, after each variant's first call
OURS = "tempnet_kernels"
DRO_PEERS = ("official eager", "official compiled")

# Time over that of the ceiling, predicted before the first run: NOTES.md says how. The H200 is
# given where it differs.
PREDICTED = {
    "token": 1.07,
    "linear with TempNet": 1.13,
    "linear": 1.10,
    "linear, frozen": 1.17,
    "contrastive, B = 65536": {"H100": 1.76, "H200": 1.67},
    "contrastive, B = 8192": 2.9,
    "contrastive module, B = 8192": 4.9,
    "softmax": 2.6,
    "optimal temperature": 2.0,
}


class Call(NamedTuple):
    ours: callable
    ceiling: callable
    check: callable  # raises where the result is wrong
    others: dict  # name -> a call that does the same, or what a user has instead


def token_call(n, v, dtype):
    logits, target, tau = token.make(n, v, dtype)

    def variant(name):
        return lambda: token.gradients(name, logits, target, tau)

    others = {name: variant(name) for name in peers.TOKEN_LOSSES if name != OURS}
    for name in peers.OVERWRITES:  # it needs fresh logits in every call
        del others[name]
    return Call(
        variant(OURS), logits.detach().clone, lambda: token.check(OURS, logits, target, tau), others
    )


def linear_call(n, v, d, dtype, tempnet=True, frozen=False):
    tensors = linear.make(n, v, d, dtype, frozen)
    ours = OURS if tempnet else f"{OURS}, tau given"
    names = [x for x in peers.LINEAR_LOSSES if "given" not in x and x != OURS]
    if not tempnet:
        names = [x for x in names if not x.startswith((*DRO_PEERS, OURS))]
    if frozen:
        names = [x for x in names if x in DRO_PEERS]
    return Call(
        lambda: linear.step(ours, *tensors),
        linear.Products(*tensors[:2], training=not frozen),
        lambda: linear.check(*tensors[:3], tensors[3] if tempnet else None),
        {name: lambda name=name: linear.step(name, *tensors) for name in names},
    )


def contrastive_call(b, d, dtype):
    tensors = contrastive.make(b, d, dtype, torch.seed() % 2**32)
    names = [name for name in peers.CONTRASTIVE_LOSSES if name != OURS]
    return Call(
        lambda: contrastive.gradients(OURS, tensors),
        lambda: contrastive.four_products(*tensors[:2]),
        lambda: contrastive.check(OURS, tensors),
        {name: lambda name=name: contrastive.gradients(name, tensors) for name in names},
    )


def contrastive_module_call(b, d, dtype):
    """A training step's loss: state, temperatures of two networks with dropout, and gradients."""
    image, text, *_ = contrastive.make(b, d, dtype, torch.seed() % 2**32)
    ids = torch.randperm(2 * b, device=image.device)[:b]
    nets = {
        f"{side}_temp_gen": ContrastiveTempNet(d, seed=i)
        for i, side in enumerate(("image", "text"))
    }
    rho = 0.8 * math.log(b - 1)  # 7.2 of 8192 pairs
    modules = {"tempnet": RobustContrastiveLoss(2 * b, 0.8, rho, **nets)}
    modules |= {
        f"ours, {name}": RobustContrastiveLoss(2 * b, 0.8, rho, method=name)
        for name in ("sogclr", "isogclr")
    }

    def step(module):
        loss = module(image, text, ids)
        wanted = [image, text, *(p for p in module.parameters() if p.requires_grad)]
        return loss.detach(), *torch.autograd.grad(loss, wanted)

    def check():
        """Without dropout, at the temperatures that the networks then predict."""
        module = modules["tempnet"].eval()
        taus = [
            net(x.detach(), ids).detach()
            for net, x in zip(nets.values(), (image, text), strict=True)
        ]
        got = step(module)[1:3]
        module.train()
        contrastive.compare_with_definition("the module", [image, text, *taus], got)

    for module in modules.values():
        module.to(image.device)
    others = {
        name: lambda m=module: step(m) for name, module in modules.items() if name != "tempnet"
    }
    return Call(
        lambda: step(modules["tempnet"]),
        lambda: contrastive.four_products(image, text),
        check,
        others,
    )


def softmax_call(n, v, dtype):
    logits, tau, upstream = softmax.make(n, v, dtype)

    def variant(name):
        function = peers.SOFTMAXES[name]
        return lambda: softmax.forward_and_backward(function, logits, tau, upstream)

    return Call(
        variant(OURS), logits.detach().clone,
        lambda: softmax.check(OURS, logits, tau, upstream),
        {name: variant(name) for name in peers.SOFTMAXES if name != OURS},
    )  # fmt: skip


def solver_call(n, v, dtype):
    logits, _, variants, check = solver.prepare(n, v, dtype)
    ours = variants.pop(OURS)
    return Call(ours, logits.clone, check, variants)


def calls(device):
    """{name: a function that makes the Call}; what has never run comes first."""
    if device == "cuda":
        bf16 = torch.bfloat16
        token_shape, head, softmax_shape = (
            (8192, 128256, bf16),
            (8192, 128256, 4096, bf16),
            (8192, 32000, bf16),
        )
        few, batches, width = (1, 16), (65536, 8192), (768, bf16)
    else:
        token_shape, head = (64, 1000, torch.float32), (32, 500, 16, torch.float32)
        softmax_shape, few, batches, width = (
            (32, 1000, torch.float32),
            (1,),
            (96, 64),
            (16, torch.float32),
        )
    big, small = batches
    return {
        "linear with TempNet": functools.partial(linear_call, *head),
        f"contrastive, B = {big}": functools.partial(contrastive_call, big, *width),
        "softmax": functools.partial(softmax_call, *softmax_shape),
        "optimal temperature": functools.partial(solver_call, *softmax_shape),
        "linear, frozen": functools.partial(linear_call, *head, frozen=True),
        f"contrastive module, B = {small}": functools.partial(
            contrastive_module_call, small, *width
        ),
        f"contrastive, B = {small}": functools.partial(contrastive_call, small, *width),
        "linear": functools.partial(linear_call, *head, tempnet=False),
        "token": functools.partial(token_call, *token_shape),
        **{f"token, N = {n}": functools.partial(token_call, n, *token_shape[1:]) for n in few},
    }


def host_ms(function):
    """The host's share: until everything is queued."""
    times = []
    for _ in range(3):
        synchronize()
        begin = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - begin))
    synchronize()
    return median(times)


def predicted(name):
    """On this GPU; of a CPU nothing is predicted."""
    if not torch.cuda.is_available():
        return None
    found, gpu = PREDICTED.get(name), torch.cuda.get_device_name()
    if not isinstance(found, dict):
        return found
    return next((value for key, value in found.items() if key in gpu), None)


def in_turn(variants):
    """{name: times in ms}, round by round."""
    times = {name: [] for name in variants}
    begin = time.monotonic()
    for _ in range(ROUNDS):
        for name, function in variants.items():
            times[name].append(time_ms(function))
        if time.monotonic() - begin > SECONDS:
            break
    return times


def measure(name, make):
    """Ours beside its ceiling."""
    call = make()
    call.check()
    host, peak = host_ms(call.ours), peak_extra_mib(call.ours)
    times = in_turn({OURS: call.ours, "ceiling": call.ceiling})
    ours, ceiling = (median(values) for values in times.values())
    expected = predicted(name)
    row = {"ms": ours, "x ceiling": ours / ceiling, "predicted x": expected}
    row["measured / predicted"] = ours / ceiling / expected if expected else None
    row |= {"ceiling ms": ceiling, "host ms": host, "extra MiB": peak}
    return {"row": row, "time_ms": times}


def compare(name, make):
    """Ours beside what does the same, or what a user has instead."""
    torch.compiler.reset()
    call = make()
    variants, failed = {OURS: call.ours}, {}
    for other, function in call.others.items():
        try:
            function()
            variants[other] = function
        except torch.OutOfMemoryError:
            failed[other] = "out of memory"
        except Exception as error:  # a peer's failure is not ours
            failed[other] = type(error).__name__
            print(f"{name}: {other}: {error}")
    times = in_turn(variants)
    ours = median(times[OURS])
    said = {other: f"{median(values) / ours:.2f}x" for other, values in times.items()} | failed
    said.pop(OURS)
    theirs = ", ".join(f"{other} {how}" for other, how in said.items())
    return {"row": {"others, x ours": theirs}, "time_ms": times}


# Whose a kernel is, by its name.
PRODUCTS = ("gemm", "nvjet", "cutlass", "cublas", "aten::mm", "aten::addmm")
OUR_NAMES = ("tempnet", "one_pass_kernel", "two_pass_kernel", "stats_kernel", "bwd_kernel")
OUR_NAMES += ("scale_kernel", "moments_kernel", "merge_kernel", "weights_kernel")
OUR_NAMES += ("forward_kernel", "backward_kernel", "temperature_kernel")


def owner(kernel):
    kernel = kernel.lower()
    if any(name in kernel for name in PRODUCTS):
        return "products"
    return "ours" if any(name in kernel for name in OUR_NAMES) else "others"


def profile(name, make):
    """Launches by name of one call."""
    call = make()
    call.ours()
    host = host_ms(call.ours)
    cuda = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities) as profiler:
        call.ours()
        synchronize()
    kernels = defaultdict(lambda: [0, 0.0])
    for event in profiler.events():
        if cuda and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        found = kernels[event.name]
        found[0] += 1
        found[1] += (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3
    total = sum(ms for _, ms in kernels.values()) or float("nan")
    shares = dict.fromkeys(("ours", "products", "others"), 0.0)
    for kernel, (_, ms) in kernels.items():
        shares[owner(kernel)] += ms
    dearest = sorted(kernels.items(), key=lambda item: -item[1][1])[:10]
    row = {"launches": sum(count for count, _ in kernels.values()), "ms": total}
    row |= {f"{who} %": 100 * ms / total for who, ms in shares.items()} | {"host ms": host}
    table = {
        kernel[:70]: {"launches": count, "ms": ms, "whose": owner(kernel)}
        for kernel, (count, ms) in dearest
    }
    return {"row": row, "rows": table}


def cases(device, part):
    work = {"": measure, "others": compare, "profile": profile}[part]
    for name, make in calls(device).items():
        yield name, functools.partial(work, name, make)
