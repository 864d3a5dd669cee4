"""The command line: env, inspect and plot-tau. A command's own module is imported when it runs."""

import contextlib
import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

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


def _show_version(wanted: bool):
    if wanted:
        import tempnet_kernels

        print(f"tempnet_kernels {tempnet_kernels.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show it and exit.", callback=_show_version, is_eager=True),
    ] = False,
):
    """Kernels for losses with a learned temperature."""


# The functions' names differ from the modules', which become attributes of this package.


@app.command("env")
def show_env():
    """Versions, devices, SIMD level, the backend of each op, what is missing and how to get it."""
    from tempnet_kernels.cli import env

    env.show(Console())


@app.command("inspect")
def show_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(help="A file or a folder.")],
    prefix: Prefix = None,
    tau_min: TauMin = None,
    tau_max: TauMax = None,
    center: Center = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
):
    """The TempNets of a checkpoint: sizes, types, settings, weights, temperatures, warnings."""
    from tempnet_kernels.cli import inspect

    with _errors():
        facts = inspect.report(checkpoint, prefix, tau_min=tau_min, tau_max=tau_max, center=center)
    if as_json:
        print(json.dumps(facts, indent=1, allow_nan=False))
    else:
        inspect.draw(Console(), facts)


@app.command("plot-tau")
def draw_temperatures(
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
    from tempnet_kernels.cli import plot_tau

    console = Console()
    with _errors():
        written = plot_tau.run(
            console, model, text_file, out, tokens=tokens, batch=batch, window=window,
            tempnet=tempnet, prefix=prefix, tau_min=tau_min, tau_max=tau_max, center=center,
        )  # fmt: skip
    for path in written:
        console.print(path, soft_wrap=True, highlight=False, markup=False)


@contextlib.contextmanager
def _errors():
    """What a user can mend is said in one line, without a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        # Those of transformers and the hub have several lines.
        message = " ".join(str(error).split()).removeprefix("load_tempnet: ")
        typer.echo(f"error: {message}", err=True)
        raise typer.Exit(1) from error
