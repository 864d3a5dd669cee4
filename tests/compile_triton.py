"""Compiles the token-loss kernels for one architecture and prints what the compiler says of each,
as JSON."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tempnet_kernels.triton import dro_cross_entropy as kernels

VOCABULARIES = (32000, 50304, 128256, 262144, 50257)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
POINTERS = {
    "logits_ptr": "*{dtype}", "grad_ptr": "*{dtype}", "target_ptr": "*i64", "tau_ptr": "*fp32",
    "scale_ptr": "*fp32", "loss_ptr": "*fp32", "rows_ptr": "*fp32", "argmax_ptr": "*i64",
}  # fmt: skip
FLOATS = ("rho", "log_v", "label_smoothing", "z_loss")


def variants(v, dtype):
    """(kernel, its constexprs, num_warps): every launch of the package at this shape."""
    for grad, smooth, argmax in ((True, False, False), (False, False, False), (True, True, True)):
        kernel, block, num_warps = kernels.config(v, smooth or argmax)
        flags = {"UNSCALED": dtype == "fp16", "WANT_GRAD": grad, "WANT_ARGMAX": argmax}
        yield kernel, {**flags, "SMOOTH": smooth, "BLOCK": block}, num_warps
    yield kernels.bwd_kernel, {"BLOCK": kernels.ELEMENTWISE_BLOCK}, 8
    yield kernels.scale_kernel, {"BLOCK": kernels.ELEMENTWISE_BLOCK}, 8


def source(kernel, constexprs, v, dtype):
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constexprs:
            signature[name] = "constexpr"
        elif name in POINTERS:
            signature[name] = POINTERS[name].format(dtype=dtype)
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif name in FLOATS:
            signature[name] = "fp32"
        elif name in ("target_stride", "tau_stride", "scale_stride"):
            signature[name] = "constexpr"  # the launcher specialises a stride of 1
            constexprs = {**constexprs, name: 1}
        else:
            signature[name] = "i32"
            if v % 16 == 0 and name in ("v", "logits_stride", "grad_stride"):
                attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs, attributes)


def resources(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.check_output([CUOBJDUMP, "--dump-resource-usage", file.name], text=True)
        sass = subprocess.check_output([CUOBJDUMP, "--dump-sass", file.name], text=True)
    registers = int(re.search(r"REG:(\d+)", text).group(1))
    return registers, len(re.findall(r"\b(?:STL|LDL)\b", sass)), int(
        re.search(r"STACK:(\d+)", text).group(1)
    )  # fmt: skip


def clamped(ptx):
    """Exponentials whose argument is the result of a min or max."""
    bounded = set(re.findall(r"(?:min|max)\.f32\s+(%\w+),", ptx))
    arguments = re.findall(r"ex2\.approx(?:\.ftz)?\.f32\s+%\w+, (%\w+);", ptx)
    return len(arguments), sum(argument in bounded for argument in arguments)


def main(architecture):
    target = GPUTarget("cuda", architecture, 32)
    report, seen = [], {}
    for v in VOCABULARIES:
        for dtype in ("bf16", "fp32") if v != 32000 else ("bf16", "fp32", "fp16"):
            for kernel, constexprs, num_warps in variants(v, dtype):
                # Only a shape that changes what is compiled is compiled again.
                key = (kernel.fn.__name__, dtype, num_warps, v % 16 == 0, *constexprs.values())
                if key not in seen:
                    options = {"num_warps": num_warps, "num_stages": 1}
                    binary = triton.compile(
                        source(kernel, constexprs, v, dtype), target=target, options=options
                    )
                    ptx = binary.asm["ptx"]
                    registers, local, stack = resources(binary.asm["cubin"])
                    exponentials, bounded = clamped(ptx)
                    seen[key] = {
                        "registers": registers,
                        "spills": local + stack,
                        "exponentials": exponentials or kernel is kernels.scale_kernel,
                        "clamped_exponentials": bounded,
                        "atomics": bool(re.search(r"^\s*(?:@\S+\s+)?(?:atom|red)\.", ptx, re.M)),
                    }
                flags = "".join(str(int(x)) for x in list(constexprs.values())[:-1])
                name = f"{kernel.fn.__name__} {flags} V={v} {dtype} sm_{architecture}"
                report.append({"name": name, "v": str(v), **seen[key]})
    print(json.dumps(report))


main(int(sys.argv[1]))
