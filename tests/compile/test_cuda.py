"""The CUDA sources compiled by nvcc for sm_80 and sm_90a against the installed torch: what ptxas
says of registers and spills. Runs without a GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import cuda_build
import pytest

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc")
ARCHITECTURES = ("80", "90a")
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not on the PATH: not compiled")
# kMode and kRead of the kernels that a training step launches on rows that begin on 16 bytes, or
# that are read twice. The others hold more: argmax, label smoothing, edges of a row.
MAIN_MODES = ("forward", "gradient")
MODES = ("forward", "gradient", "argmax", "all")
READS = ("aligned", "edged", "twice")


def token_loss(compiled):
    """{(kernel, dtype, mode, read, capped, ...): (registers, spilled bytes)}"""
    report = {}
    for kernel, arguments, registers, spilled in compiled:
        dtype = re.match(r"f|NS0_\d+(\w+?)E", arguments)
        mode = re.search(r"ModeE(\d)", arguments)
        read = re.search(r"ReadE(\d)", arguments)
        key = (
            kernel,
            (dtype.group(1) or "float") if dtype else None,
            MODES[int(mode.group(1))] if mode else None,
            READS[int(read.group(1))] if read else None,
            "Lb1E" in arguments and kernel not in ("join_kernel", "stats_kernel"),
            arguments if kernel in ("join_kernel", "stats_kernel") else None,
        )
        report[key] = (registers, spilled)
    return report


@pytest.fixture(scope="module")
def compiled():
    """{(source, architecture): kernels, of :func:`cuda_build.kernels`}"""
    found = cuda_build.kernels()
    assert len(found) == 9 * len(ARCHITECTURES)
    for (_, architecture), kernels in found.items():
        for kernel, arguments, registers, spilled in kernels:
            print(f"sm_{architecture} {kernel} {arguments} {registers} registers {spilled} spilled")
    return found


@pytest.fixture(scope="module")
def reports(compiled):
    return {a: token_loss(compiled["dro_cross_entropy", a]) for a in ARCHITECTURES}


def test_every_kernel_is_compiled(reports):
    for report in reports.values():
        # row: 3 types x 4 modes x 3 reads; split: 3 x 4; join: 3 x 2; stats: 2; backward and scale:
        # 3 each. With a softcap: row and split of 2 modes, stats, backward.
        assert len(report) == 36 + 12 + 6 + 2 + 6 + 6 + 6 + 2 + 3


def test_main_kernels_hold_a_row_in_64_registers_without_a_spill(reports):
    for architecture, report in reports.items():
        for key, (registers, spilled) in report.items():
            kernel, _, mode, read, capped, _ = key
            main = mode in MAIN_MODES and read != "edged" and not capped
            if kernel == "row_kernel" and main:
                # 512 threads x 64 registers: two CTAs fit on a multiprocessor.
                assert (registers <= 64, spilled) == (True, 0), (architecture, key)


def test_no_other_kernel_spills_more_than_a_few_words_of_a_row(reports):
    for architecture, report in reports.items():
        for key, (_, spilled) in report.items():
            kernel, *_, capped, _ = key
            # A thread holds 128 bytes of the row.
            limit = 128 if kernel == "row_kernel" and not capped else 0
            assert spilled <= limit, (architecture, key, spilled)


def test_kernels_with_a_softcap_leave_registers_for_two_ctas(reports):
    for architecture, report in reports.items():
        capped = {key: registers for key, (registers, _) in report.items() if key[4]}
        assert len(capped) == 6 + 6 + 3
        for key, registers in capped.items():
            # 512 threads for backward_kernel, 256 for the others.
            limit = 64 if key[0] == "backward_kernel" else 128
            assert registers <= limit, (architecture, key, registers)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_contrastive_kernels_do_not_spill(compiled, architecture):
    kernels = compiled["dro_contrastive", architecture]
    # stats: 2 x 2; join: 2; weights: 3 types x 2 x 2.
    assert len({(kernel, arguments) for kernel, arguments, *_ in kernels}) == 4 + 2 + 12
    for kernel, arguments, registers, spilled in kernels:
        # 256 threads x 128 registers: two CTAs fit on a multiprocessor.
        assert (registers <= 128, spilled) == (True, 0), (kernel, arguments, registers)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_of_the_anchors_and_of_their_state_do_not_spill(compiled, architecture):
    # start, pair_columns, anchors; gradients: of 3 types, and of 2 with one side in fp32.
    # Samples: read, write.
    for source, number in (("contrastive_anchors", 3 + 5), ("per_sample_state", 2)):
        kernels = compiled[source, architecture]
        assert len({(kernel, arguments) for kernel, arguments, *_ in kernels}) == number
        for kernel, arguments, registers, spilled in kernels:
            assert (registers <= 64, spilled) == (True, 0), (kernel, arguments, registers)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_moments_kernels_do_not_spill(compiled, architecture):
    kernels = compiled["linear_dro_cross_entropy", architecture]
    # moments: 3 types x 2, capped or not; normalize: 3, capped or not.
    assert len({(kernel, arguments) for kernel, arguments, *_ in kernels}) == 12 + 6
    for kernel, arguments, registers, spilled in kernels:
        assert (registers <= 64, spilled) == (True, 0), (kernel, arguments, registers)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_of_the_temperature_networks_do_not_spill(compiled, architecture):
    kernels = compiled["temperature_head", architecture]
    # sigmoid_dropout and its gradient; head and its gradient: squashed or not.
    assert len({(kernel, arguments) for kernel, arguments, *_ in kernels}) == 2 + 4
    for kernel, arguments, registers, spilled in kernels:
        # 256 threads x 64 registers: four CTAs fit on a multiprocessor.
        assert (registers <= 64, spilled) == (True, 0), (kernel, arguments, registers)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tempered_softmax_holds_a_row_without_a_spill(compiled, architecture):
    kernels = compiled["tempered_softmax", architecture]
    # forward and backward: 3 types, in registers and read twice.
    assert len({(kernel, arguments) for kernel, arguments, *_ in kernels}) == 6 + 6
    for kernel, arguments, registers, spilled in kernels:
        assert (registers <= 64, spilled) == (True, 0), (kernel, arguments, registers)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_of_the_optimal_temperature_do_not_spill(compiled, architecture):
    kernels = compiled["optimal_temperature", architecture]
    # 3 types, in registers or read again.
    assert len({(kernel, arguments) for kernel, arguments, *_ in kernels}) == 6
    for kernel, arguments, registers, spilled in kernels:
        # 1024 threads x 64 registers are a multiprocessor's.
        assert (registers <= 64, spilled) == (True, 0), (kernel, arguments, registers)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_around_the_token_loss_do_not_spill(compiled, architecture):
    kernels = compiled["token_rows", architecture]
    assert len({kernel for kernel, *_ in kernels}) == 2
    for kernel, arguments, registers, spilled in kernels:
        assert (registers <= 64, spilled) == (True, 0), (kernel, arguments, registers)


# A program with a CUDA runtime of its own, whose last error is that of a call that has failed.
RUNTIME = """
#include <cuda_runtime_api.h>
cudaError_t last = cudaErrorInvalidValue;
cudaError_t cudaGetLastError() { const cudaError_t e = last; last = cudaSuccess; return e; }
const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
extern "C" void** __cudaRegisterFatBinary(void*) { return nullptr; }
extern "C" void __cudaRegisterFatBinaryEnd(void**) {}
extern "C" void __cudaUnregisterFatBinary(void**) {}
extern "C" char __cudaInitModule(void**) { return 0; }
"""
PROGRAM = """
#include "cuda/device.cuh"
#include <cstdio>
extern cudaError_t last;
int main() {
  try {
    tempnet::device::check(cudaErrorInvalidValue, "cudaLaunchKernelEx");
  } catch (const std::exception& error) {
    std::printf("%s; then %d", error.what(), last);
  }
}
"""


def test_a_failed_call_leaves_no_error_for_the_next_kernel_of_torch(tmp_path):
    (tmp_path / "runtime.cpp").write_text(RUNTIME)
    (tmp_path / "program.cu").write_text(PROGRAM)
    command = [NVCC, "-std=c++17", "-cudart=none", f"-I{ROOT}/csrc", "program.cu", "runtime.cpp"]
    subprocess.run([*command, "-o", "program"], cwd=tmp_path, check=True)
    result = subprocess.run([tmp_path / "program"], capture_output=True, text=True)
    assert result.stdout == "cudaLaunchKernelEx: invalid argument; then 0"
