"""env: what was found on this machine, the backend of each op, and how to get what is missing."""

import platform
from pathlib import Path

import torch
from rich.table import Table

import tempnet_kernels
from tempnet_kernels.core import register

# Each public op, and the operator whose kernels decide what can run.
OPS = {
    "dro_cross_entropy": "dro_cross_entropy_fwd",
    "linear_dro_cross_entropy": "row_moments",
    "dro_contrastive": "similarity_stats_",
    "tempered_softmax": "tempered_softmax_fwd",
    "optimal_temperature": "optimal_temperature",
}


def show(console):
    folder = Path(tempnet_kernels.__file__).parent
    hidden = register.hidden_installation()
    facts = Table(show_header=False, box=None)
    facts.add_row("tempnet_kernels", f"{tempnet_kernels.__version__} in {folder}")
    if hidden is not None:
        facts.add_row("", f"hides {hidden}: to use that one, run from another folder")
    facts.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    facts.add_row("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}")
    facts.add_row("triton", _version("triton"))
    facts.add_row("numpy", _version("numpy"))
    facts.add_row("CPU", f"{torch.get_num_threads()} threads, SIMD {_simd()}")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        facts.add_row(f"cuda:{i}", f"{properties.name}, sm_{properties.major}{properties.minor}")
    if not torch.cuda.is_available():
        facts.add_row("GPU", "none")
    for device in ("cpu", "cuda"):
        facts.add_row(f"native, {device}", library_state(device))
    console.print(facts)

    table = Table(title="backend of each op ('auto' in bold)")
    for column in ("op", "device", *register.BACKENDS):
        table.add_column(column)
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    missing = {}  # (device, backend, why) -> ops
    for op, operator in OPS.items():
        for device in devices:
            chosen = register.auto_backend(operator, device)
            cells = []
            for backend in register.BACKENDS:
                reason = register.missing(operator, backend, device)
                if reason is not None:
                    missing.setdefault((device, backend, reason), []).append(op)
                word = "missing" if reason else "yes"
                cells.append(f"[bold]{word}[/bold]" if chosen == backend else word)
            table.add_row(op, device, *cells)
    console.print(table)
    if (
        torch.cuda.is_available()
        and register.missing("dro_cross_entropy_fwd", "native", "cuda") is None
    ):
        console.print(_launch_plans())
    for (device, backend, reason), ops in missing.items():
        ops = "every op" if len(ops) == len(OPS) else ", ".join(ops)
        console.print(f"{backend}, {device}, {ops}: {reason}", highlight=False, markup=False)


def library_state(device):
    """The compiled library, for which architectures, and whether it is loaded."""
    path = register.library(device)
    if not path.exists():
        return "not built"
    name = f"{path.parent.name}/{path.name}"
    if device == "cuda" and not torch.version.cuda:
        return f"{name}, not loaded: this torch has no CUDA"
    error = register.load_native().get(device)
    if error is not None:
        return f"{name}, not loaded: {error}"
    if device == "cpu":
        return f"{name}, loaded"
    return f"{name}, loaded; compiled for {register.cuda_architectures()}"


def _launch_plans():
    try:
        from tempnet_kernels import _C_cuda
    except ImportError:
        return "launch plans: tempnet_kernels._C_cuda is not built for this Python"

    major, minor = torch.cuda.get_device_capability()
    table = Table(title="CUDA C++ kernels of dro_cross_entropy, loss and gradient, N = 8192")
    columns = ("kernel", "cluster", "threads", "slice", "shared_bytes", "registers")
    for column in ("V", "dtype", *columns):
        table.add_column(column)
    for v in (32000, 50257, 128256, 262144):
        for dtype in ("bfloat16", "float32"):
            plan = _C_cuda.launch_plan(8192, v, dtype, 10 * major + minor)
            table.add_row(str(v), dtype, *(str(plan[column]) for column in columns))
    return table


def _version(package):
    try:
        return __import__(package).__version__
    except ImportError:
        return "not installed"


def _simd():
    # An editable installation of another folder would lend its own _C.
    if not register.library("cpu").exists():
        return "unknown: the kernels are not built"
    try:
        from tempnet_kernels import _C
    except ImportError:
        return "unknown: tempnet_kernels._C is not built for this Python"
    return f"{_C.cpu_capability()} (compiler {_C.compiler})"
