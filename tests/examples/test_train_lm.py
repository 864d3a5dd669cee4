"""The example: the same training as the official formula, and exact resumption."""

import json
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

pytest.importorskip("tokenizers", reason="the example's packages are not installed")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import loop
import train_lm

pytestmark = pytest.mark.usefixtures("one_thread")


def config(steps, **options):
    return train_lm.Config(
        steps=steps, batch=4, context=32, width=32, layers=1, heads=2, vocab_size=512,
        text_mib=0.5, eval_every=100, **options,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def ordinary_memory():
    """A training is no test of unwritten memory, and NaN-filling slows it."""
    torch.utils.deterministic.fill_uninitialized_memory = False


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("lm")


def losses(trainer):
    lines = (trainer.out / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(trainer.config.steps))
    return torch.tensor([row["loss"] for row in rows])


def test_trains_as_the_official_formula_for_200_steps(out):
    curves = []
    for kind in (train_lm.Loss.official, train_lm.Loss.tempnet, train_lm.Loss.linear):
        trainer = train_lm.Trainer(kind, config(200), out)
        trainer.run(resume=False)
        curves.append(losses(trainer))
    official, *ours = curves
    assert official[-20:].mean() < official[:5].mean() - 1, "it must learn"
    for curve in ours:
        assert ((curve - official) / official).abs().max() <= 1e-3


def test_interrupted_run_goes_on_as_if_nothing_had_happened(out, tmp_path):
    whole = train_lm.Trainer(train_lm.Loss.tempnet, config(16), tmp_path)
    whole.run(resume=False)
    expected = losses(whole)

    stopped = train_lm.Trainer(train_lm.Loss.tempnet, config(16), tmp_path)
    step = stopped.train_step

    def interrupted():
        if stopped.step == 7:
            raise KeyboardInterrupt
        return step()

    stopped.train_step = interrupted
    with pytest.raises(typer.Exit):
        stopped.run(resume=False)
    resumed = train_lm.Trainer(train_lm.Loss.tempnet, config(16), tmp_path)
    resumed.run(resume=True)
    assert torch.equal(losses(resumed), expected)


def test_frozen_run_trains_the_tempnet_only(tmp_path):
    with pytest.raises(loop.Refused, match="run --loss ce first"):
        train_lm.Trainer(train_lm.Loss.frozen, config(5), tmp_path)
    train_lm.Trainer(train_lm.Loss.ce, config(5), tmp_path).run(resume=False)
    frozen = train_lm.Trainer(train_lm.Loss.frozen, config(5), tmp_path)
    model = {k: v.clone() for k, v in frozen.model.state_dict().items()}
    tempnet = {k: v.clone() for k, v in frozen.tempnet.state_dict().items()}
    frozen.run(resume=False)
    assert all(torch.equal(v, model[k]) for k, v in frozen.model.state_dict().items())
    assert any(not torch.equal(v, tempnet[k]) for k, v in frozen.tempnet.state_dict().items())


def run(out, *options):
    """The example's command, on a model of one layer; what it prints."""
    app = typer.Typer()
    app.command()(train_lm.main)
    tiny = ("--steps", 3, "--batch", 2, "--context", 16, "--width", 32, "--layers", 1)
    arguments = ["--out", out, "--loss", "tempnet", "--device", "cpu", *tiny, *options]
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False).stdout


@pytest.fixture
def short_text(monkeypatch):
    texts = train_lm.standard_library(0.2)
    monkeypatch.setattr(train_lm, "standard_library", lambda text_mib: texts)


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_finished_run_is_kept(tmp_path, short_text):
    run(tmp_path)
    folder = tmp_path / "tempnet"
    before = contents(folder)
    for options in ((), ("--resume",)):
        assert f"{folder} holds this run, finished; --overwrite" in run(tmp_path, *options)
    for options in (("--width", 64), ("--steps", 4), ("--resume", "--layers", 2)):
        with pytest.raises(loop.Refused, match=r"a finished run with .*another --out, or --over"):
            run(tmp_path, *options)
    assert contents(folder) == before
    run(tmp_path, "--overwrite", "--steps", 4)
    assert json.loads((folder / "result.json").read_text())["config"]["steps"] == 4


def test_all_losses_are_looked_at_before_the_first_is_trained(tmp_path, short_text, monkeypatch):
    run(tmp_path)
    monkeypatch.setattr(train_lm.subprocess, "run", None)
    app = typer.Typer()
    app.command()(train_lm.main)
    with pytest.raises(loop.Refused, match=r"tempnet holds a finished run with .*width 32"):
        CliRunner().invoke(app, ["--out", str(tmp_path)], catch_exceptions=False)


def test_resume_refuses_another_architecture(tmp_path, short_text):
    run(tmp_path)
    (tmp_path / "tempnet" / "result.json").unlink()  # as if it had been stopped
    with pytest.raises(loop.Refused, match=r"tempnet holds a run with layers 1, width 32: pass"):
        run(tmp_path, "--resume", "--width", 64, "--layers", 2)
    run(tmp_path, "--loss", "ce")
    with pytest.raises(loop.Refused, match=r"needs the model of .* with width 32, got 64"):
        run(tmp_path, "--loss", "frozen", "--width", 64)


@pytest.mark.parametrize(
    "options, words",
    [
        (("--steps", 0), "--steps must be at least 1, got 0"),
        (("--context", 0), "--context must be at least 1"),
        (("--width", 30), "--width must be a multiple of the 4 heads"),
        (("--context", 10**6), r"--context must be at most \d+"),
        (("--device", "nowhere"), "--device nowhere is not there .*: pass --device cpu"),
        (("--resume", "--overwrite"), "pass one of them"),
    ],
)
def test_refused_options(options, words, tmp_path, short_text):
    with pytest.raises(loop.Refused, match=words) as error:
        run(tmp_path, *options)
    assert "\n" not in str(error.value)


def test_refused_in_one_line(monkeypatch):
    def main():
        raise loop.Refused("why")

    monkeypatch.setattr(sys, "argv", ["train_lm.py"])
    with pytest.raises(SystemExit) as end:
        loop.start(main)
    assert end.value.code == "error: why"  # printed, and 1 is the exit status


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(loop.Refused, match=r"--device cuda is not there .*: pass --device cpu"):
        loop.check("cuda", resume=False, overwrite=False)


def test_no_standard_library_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(train_lm.sysconfig, "get_paths", lambda: {"stdlib": tmp_path})
    with pytest.raises(loop.Refused, match=f"there is none under {tmp_path}: use a Python"):
        train_lm.standard_library(1)


def test_equal_temperatures_share_a_rank():
    plots = pytest.importorskip("plots", reason="the example's packages are not installed")
    assert plots.ranks(torch.tensor([0.5, 3.0, 1.0, 0.5, 0.5])).tolist() == [2, 5, 4, 2, 2]
