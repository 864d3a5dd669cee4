"""python -m tempnet_kernels env | inspect | plot-tau"""

import contextlib
import json
import platform
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table

from tempnet_kernels.core import register

# Each public op, and the operator whose kernels decide what can run.
OPS = {
    "dro_cross_entropy": "dro_cross_entropy_fwd",
    "linear_dro_cross_entropy": "row_moments",
    "dro_contrastive": "similarity_stats_",
    "tempered_softmax": "tempered_softmax_fwd",
    "optimal_temperature": "optimal_temperature",
}

app = typer.Typer(
    help="Kernels for losses with a learned temperature.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Prefix = Annotated[str | None, typer.Option(help="Of the network, where there are several.")]
TauMin = Annotated[float | None, typer.Option(help="Where the checkpoint does not say it.")]
TauMax = Annotated[float | None, typer.Option(help="Where the checkpoint does not say it.")]
Center = Annotated[
    Literal["max"] | None, typer.Option(help="Subtract each row's largest logit first.")
]


@app.callback()
def main():
    """Kernels for losses with a learned temperature."""


@app.command()
def env():
    """Versions, devices, SIMD level, the backend of each op, what is missing and how to get it."""
    import tempnet_kernels

    console = Console()
    facts = Table(show_header=False, box=None)
    facts.add_row("tempnet_kernels", tempnet_kernels.__version__)
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
        facts.add_row(f"native, {device}", _library(device))
    console.print(facts)

    table = Table(title="backend of each op ('auto' in bold)")
    for column in ("op", "device", *register.BACKENDS):
        table.add_column(column)
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    missing = {}
    for op, operator in OPS.items():
        for device in devices:
            chosen = register.auto_backend(operator, device)
            cells = []
            for backend in register.BACKENDS:
                reason = register.missing(operator, backend, device)
                if reason is not None:
                    missing[f"{op}, {device}, {backend}"] = reason
                word = "missing" if reason else "yes"
                cells.append(f"[bold]{word}[/bold]" if chosen == backend else word)
            table.add_row(op, device, *cells)
    console.print(table)
    if torch.cuda.is_available() and not missing.get("dro_cross_entropy, cuda, native"):
        console.print(_launch_plans())
    for where, reason in missing.items():
        console.print(f"{where}: {reason}", highlight=False, markup=False)


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="A file or a folder.")],
    prefix: Prefix = None,
    tau_min: TauMin = None,
    tau_max: TauMax = None,
    center: Center = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
):
    """The TempNets of a checkpoint: sizes, types, settings, weights, temperatures, warnings."""
    from tempnet_kernels import _cli_inspect

    with _errors():
        facts = _cli_inspect.report(
            checkpoint, prefix, tau_min=tau_min, tau_max=tau_max, center=center
        )
    if as_json:
        print(json.dumps(facts, indent=1, allow_nan=False))
    else:
        _cli_inspect.draw(Console(), facts)


@app.command()
def plot_tau(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or name.")],
    text_file: Annotated[Path, typer.Argument(help="UTF-8.")],
    out: Annotated[str, typer.Option(help="Beginning of the names of what is written.")],
    tempnet: Annotated[
        Path | None, typer.Option(help="Checkpoint of the network, if MODEL does not hold it.")
    ] = None,
    prefix: Prefix = None,
    tau_min: TauMin = None,
    tau_max: TauMax = None,
    center: Center = None,
    tokens: Annotated[
        int | None, typer.Option(help="Only the first so many; default all of them.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Windows at a time.")] = 4,
    window: Annotated[
        int | None, typer.Option(help="Tokens; default what the model takes, at most 2048.")
    ] = None,
):
    """The temperatures of a text's tokens: OUT.csv, OUT.text.png, OUT.entropy.png,
    OUT.histogram.png, and a summary."""
    from tempnet_kernels import _cli_plot_tau

    console = Console()
    with _errors():
        written = _cli_plot_tau.run(
            console, model, text_file, out, tokens=tokens, batch=batch, window=window,
            tempnet=tempnet, prefix=prefix, tau_min=tau_min, tau_max=tau_max, center=center,
        )  # fmt: skip
    for path in written:
        console.print(path, soft_wrap=True, highlight=False, markup=False)


@contextlib.contextmanager
def _errors():
    """What a user can mend is said in a line, without a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


def _library(device):
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
    try:
        from tempnet_kernels import _C
    except ImportError:
        return "unknown: tempnet_kernels._C is not built for this Python"
    return f"{_C.cpu_capability()} (compiler {_C.compiler})"


if __name__ == "__main__":
    app()
