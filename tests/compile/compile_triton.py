"""Compiles the kernels for one architecture and prints what the compiler says of each, as JSON."""

import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tempnet_kernels.triton import contrastive_anchors as anchors
from tempnet_kernels.triton import dro_contrastive as contrastive
from tempnet_kernels.triton import dro_cross_entropy as token
from tempnet_kernels.triton import linear_dro_cross_entropy as linear
from tempnet_kernels.triton import optimal_temperature as temperature
from tempnet_kernels.triton import per_sample_state as samples
from tempnet_kernels.triton import temperature_head as head
from tempnet_kernels.triton import tempered_softmax as softmax
from tempnet_kernels.triton import token_rows

VOCABULARIES = (32000, 50304, 128256, 262144, 50257)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
POINTERS = {
    "logits_ptr": "*{dtype}", "grad_ptr": "*{dtype}", "weights_ptr": "*{dtype}",
    "target_ptr": "*i64", "argmax_ptr": "*i64", "positive_ptr": "*i64", "ids_ptr": "*i32",
    "mask_ptr": "*i1", "iterations_ptr": "*i32", "key_ptr": "*i64", "row_ids_ptr": "*i64",
    "out_ptr": "*{dtype}", "upstream_ptr": "*{dtype}", "given_ptr": "*i64", "pair_ptr": "*i32",
    "image_ptr": "*{dtype}", "text_ptr": "*{dtype}", "grad_image_ptr": "*{dtype}",
    "grad_text_ptr": "*{dtype}", "order_ptr": "*i64",
}  # the others: *fp32  # fmt: skip
FLOATS = ("divisor", "rho", "log_v", "label_smoothing", "z_loss", "tau_min", "tau_max")
FLOATS += ("tau_range", "scale", "kept", "uniform", "gamma", "log_gamma", "log_rest")
WITHOUT_EXPONENTIALS = (
    token.scale_kernel, linear.moments_kernel, linear.normalize_kernel, head.dropout_grad_kernel,
    token_rows.scale_kernel, token_rows.sum_kernel,
)  # fmt: skip
ONES = (
    "target_stride", "tau_stride", "scale_stride", "rho_stride", "tau_image_stride",
    "tau_text_stride",
)  # fmt: skip
# Multiples of 16 where the launch is aligned.
ALIGNED = (
    "v", "logits_stride", "grad_stride", "weights_stride", "stride", "width", "row_begin",
    "column_begin", "upstream_stride",
)  # fmt: skip


def token_loss():
    """(shape, kernel, constexprs, num_warps, dtype, aligned): every launch at these shapes."""
    for v in VOCABULARIES:
        for dtype in ("bf16", "fp32") if v != 32000 else ("bf16", "fp32", "fp16"):
            end = (dtype, v % 16 == 0)
            wanted = [(True, False, 0.0), (False, False, 0.0), (True, True, 0.0)]
            for grad, extras, softcap in (*wanted, (True, False, 30.0), (True, True, 30.0)):
                kernel, block, num_warps = token.config(v, extras, softcap > 0)
                flags = {"UNSCALED": dtype == "fp16", "WANT_GRAD": grad, "WANT_ARGMAX": extras}
                flags |= {"SMOOTH": extras, "SOFTCAP": softcap, "BLOCK": block}
                yield f"V={v}", kernel, flags, num_warps, *end
            for extras, softcap in product((False, True), (0.0, 30.0)):
                block, num_warps = token.stats_config(v, extras, softcap > 0)
                flags = {"WANT_ARGMAX": extras, "SMOOTH": extras, "SOFTCAP": softcap}
                yield f"V={v}", token.stats_kernel, {**flags, "BLOCK": block}, num_warps, *end
            flags = {"BLOCK": token.ELEMENTWISE_BLOCK}
            for softcap in (0.0, 30.0):
                num_warps = token.bwd_warps(softcap > 0)
                yield f"V={v}", token.bwd_kernel, {"SOFTCAP": softcap, **flags}, num_warps, *end
            yield f"V={v}", token.scale_kernel, flags, 8, *end

    # The longest rows with a softcap that are held in registers.
    most = token.ONE_PASS_COLUMNS // 4
    for dtype, extras in product(("bf16", "fp32"), (False, True)):
        kernel, block, num_warps = token.config(most, extras, True)
        flags = {"UNSCALED": False, "WANT_GRAD": True, "WANT_ARGMAX": extras, "SMOOTH": extras}
        flags |= {"SOFTCAP": 30.0, "BLOCK": block}
        yield f"V={most}", kernel, flags, num_warps, dtype, True


def rows_of_tokens():
    for weight, normalizer in product((False, True), (False, True)):
        flags = {"HAS_WEIGHT": weight, "HAS_NORMALIZER": normalizer, "SUMS": not normalizer}
        flags |= {"MEAN": True, "BLOCK": token_rows.BLOCK}
        yield "N", token_rows.scale_kernel, flags, token_rows.NUM_WARPS, "fp32", False
        flags = {"GUARDED": weight, "BLOCK": token_rows.BLOCK}
        yield "N", token_rows.sum_kernel, flags, token_rows.NUM_WARPS, "fp32", False


def optimal_temperature():
    for v in VOCABULARIES:
        for dtype in ("bf16", "fp32"):
            held, block, num_warps = temperature.config(v)
            flags = {"HELD": held, "BLOCK": block}
            yield f"V={v}", temperature.temperature_kernel, flags, num_warps, dtype, v % 16 == 0


def contrastive_loss():
    num_warps = contrastive.NUM_WARPS
    for vec, ids, mask in product((4, 1), (False, True), (False, True)):
        flags = {"HAS_IDS": ids, "HAS_MASK": mask, "INCLUDE_POSITIVE": mask, "VEC": vec}
        begin, aligned = f"VEC={vec}", vec == 4
        stats = {**flags, "WARPS": num_warps, **contrastive.STATS}
        yield begin, contrastive.stats_kernel, stats, num_warps, "fp32", aligned
        if ids == mask:
            merge = {"COUNTED": ids, **contrastive.MERGE}
            yield begin, contrastive.merge_kernel, merge, num_warps, "fp32", aligned
            weights = {**flags, **contrastive.WEIGHTS}
            for dtype in ("fp32", "bf16"):
                yield begin, contrastive.weights_kernel, weights, num_warps, dtype, aligned


def contrastive_anchors():
    """Also the state per sample. They have no NaN to keep from a maximum, and few registers."""
    end, shape = (anchors.NUM_WARPS, "fp32", True), "B"
    for on in (False, True):
        flags = {"GIVEN": on, "EVERY_PAIR": on, "EXCLUDED": int(on), "BLOCK": anchors.BLOCK}
        yield shape, anchors.start_kernel, flags, *end
        flags = {"COUNTED": on, "BLOCK": anchors.BLOCK}
        yield shape, anchors.pair_columns_kernel, flags, *end
        flags = {"HAS_IMAGE": on, "HAS_TEXT": on, "BLOCK": anchors.BLOCK}
        yield shape, anchors.anchors_kernel, flags, *end
        flags = {"HAS_UNIT": on, "FEATURES": anchors.FEATURES}
        for dtype in ("fp32", "bf16", "fp16"):
            yield shape, anchors.gradients_kernel, flags, anchors.NUM_WARPS, dtype, True
    for kernel in (samples.read_kernel, samples.write_kernel):
        yield shape, kernel, {"BLOCK": samples.BLOCK}, samples.NUM_WARPS, "fp32", True


def linear_loss():
    for dtype in ("fp32", "bf16", "fp16"):
        for center, softcap in product((False, True), (0.0, 30.0)):
            flags = {"CENTER": center, "SOFTCAP": softcap, "BLOCK": linear.BLOCK}
            yield "V=128256", linear.moments_kernel, flags, linear.NUM_WARPS, dtype, True
        for softcap in (0.0, 30.0):
            flags = {"SOFTCAP": softcap, "BLOCK": linear.NORMALIZE["BLOCK"]}
            num_warps = linear.NORMALIZE["num_warps"]
            yield "V=128256", linear.normalize_kernel, flags, num_warps, dtype, True


def temperature_networks():
    for width in (256, 1000):
        end = ("fp32", width % 16 == 0)
        for has in (False, True):
            for flags in (head.DROPOUT, head.DROPOUT_GRAD):
                flags, num_warps = dict(flags), flags["num_warps"]
                del flags["num_warps"]
                kernel = head.dropout_kernel if "ROWS" in flags else head.dropout_grad_kernel
                given = {name: has for name in kernel.arg_names if name.startswith("HAS_")}
                yield f"K={width}", kernel, {**given, **flags}, num_warps, *end
            block, num_warps = head.head_config(width)
            flags = {"HAS_NORMS": has, "SQUASH": has, "BLOCK": block}
            for kernel in (head.head_kernel, head.head_grad_kernel):
                yield f"K={width}", kernel, flags, num_warps, *end


def tempered_softmax():
    for v in VOCABULARIES:
        for dtype, log in product(("bf16", "fp32"), (False, True)):
            end = (dtype, v % 16 == 0)
            one_pass, block, num_warps = softmax.config(v, "forward")
            flags = {"LOG": log, "ONE_PASS": one_pass, "BLOCK": block}
            yield f"V={v}", softmax.forward_kernel, flags, num_warps, *end
            one_pass, block, num_warps = softmax.config(v, "backward")
            for want in (True, False):
                flags = {"LOG": log, "WANT_GRAD": want, "ONE_PASS": one_pass, "BLOCK": block}
                yield f"V={v}", softmax.backward_kernel, flags, num_warps, *end
    # The longest rows that are held in registers.
    for dtype, log in product(("bf16", "fp32"), (False, True)):
        most = softmax.ONE_PASS_COLUMNS["backward"]
        one_pass, block, num_warps = softmax.config(most, "backward")
        flags = {"LOG": log, "WANT_GRAD": True, "ONE_PASS": one_pass, "BLOCK": block}
        yield f"V={most}", softmax.backward_kernel, flags, num_warps, dtype, True


def source(kernel, constexprs, dtype, aligned):
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constexprs:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name, "*fp32").format(dtype=dtype)
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif name in FLOATS:
            signature[name] = "fp32"
        elif name in ONES:
            signature[name] = "constexpr"  # the launcher specialises a stride of 1
            constexprs = {**constexprs, name: 1}
        else:
            signature[name] = "i32"
            if aligned and name in ALIGNED:
                attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs, attributes)


def resources(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.check_output([CUOBJDUMP, "--dump-resource-usage", file.name], text=True)
    # What spills has its place in the stack's frame.
    return tuple(
        int(re.search(rf"{name}:(\d+)", text).group(1)) for name in ("REG", "STACK", "LOCAL")
    )


def clamped(ptx):
    """Exponentials whose argument is the result of a min or max."""
    bounded = set(re.findall(r"(?:min|max)\.f32\s+(%\w+),", ptx))
    arguments = re.findall(r"ex2\.approx(?:\.ftz)?\.f32\s+%\w+, (%\w+);", ptx)
    return len(arguments), sum(argument in bounded for argument in arguments)


def compile_one(target, kernel, constexprs, num_warps, dtype, aligned, **options):
    options |= {"num_warps": num_warps, "num_stages": 1}
    code = source(kernel, constexprs, dtype, aligned)
    binary = triton.compile(code, target=target, options=options)
    ptx = binary.asm["ptx"]
    registers, stack, local = resources(binary.asm["cubin"])
    exponentials, bounded = clamped(ptx)
    return {
        "registers": registers,
        "spills": local + stack,
        "exponentials": exponentials or kernel in WITHOUT_EXPONENTIALS,
        "clamped_exponentials": bounded,
        "exact_divisions": len(re.findall(r"div\.rn\.f32", ptx)),
        "approximate_divisions": len(re.findall(r"(?:div\.(?:full|approx)|rcp\.approx)", ptx)),
        "atomics": bool(re.search(r"^\s*(?:@\S+\s+)?(?:atom|red)\.", ptx, re.M)),
    }


def main(architecture):
    target = GPUTarget("cuda", architecture, 32)
    report, seen = [], {}
    for op in (
        token_loss, contrastive_loss, contrastive_anchors, linear_loss, temperature_networks,
        tempered_softmax,
        optimal_temperature, rows_of_tokens,
    ):  # fmt: skip
        for shape, kernel, constexprs, *rest in op():
            # Only a shape that changes what is compiled is compiled again.
            key = (kernel.fn.__name__, *constexprs.values(), *rest)
            if key not in seen:
                seen[key] = compile_one(target, kernel, constexprs, *rest)
            flags = "".join(str(int(x)) for x in constexprs.values() if isinstance(x, bool))
            flags += " softcap" if constexprs.get("SOFTCAP") else ""
            name = f"{kernel.fn.__name__} {flags} {shape} {rest[1]} sm_{architecture}"
            report.append({"name": name, "op": op.__name__, "shape": shape, **seen[key]})
    # One that must spill, so that it is known that a spill is seen.
    _, kernel, *rest = next(tempered_softmax())
    starved = compile_one(target, kernel, *rest, maxnreg=32)
    report.append({"name": "starved", "op": "starved", **starved})
    print(json.dumps(report))


main(int(sys.argv[1]))
