"""The commands, called in this process."""

import json
from pathlib import Path

from typer.testing import CliRunner

from tempnet_kernels.cli import app

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/integrations/command_line.md").read_text()


def call(*arguments):
    return CliRunner().invoke(app, [str(x) for x in arguments])


def facts(*arguments):
    result = call("inspect", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def error(*arguments):
    result = call(*arguments)
    # transformers and tqdm show their progress before it.
    _, found, message = result.stderr.partition("error: ")
    assert result.exit_code == 1 and found and message.count("\n") == 1, result.output
    return message
