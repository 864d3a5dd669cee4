"""The example: the same training as the official formula, and exact resumption."""

import json
import sys
from pathlib import Path

import pytest
import torch
import typer

pytest.importorskip("tokenizers", reason="the example's packages are not installed")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import train_lm


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
    with pytest.raises(FileNotFoundError, match="run --loss ce"):
        train_lm.Trainer(train_lm.Loss.frozen, config(5), tmp_path)
    train_lm.Trainer(train_lm.Loss.ce, config(5), tmp_path).run(resume=False)
    frozen = train_lm.Trainer(train_lm.Loss.frozen, config(5), tmp_path)
    model = {k: v.clone() for k, v in frozen.model.state_dict().items()}
    tempnet = {k: v.clone() for k, v in frozen.tempnet.state_dict().items()}
    frozen.run(resume=False)
    assert all(torch.equal(v, model[k]) for k, v in frozen.model.state_dict().items())
    assert any(not torch.equal(v, tempnet[k]) for k, v in frozen.tempnet.state_dict().items())


def test_equal_temperatures_share_a_rank():
    plots = pytest.importorskip("plots", reason="the example's packages are not installed")
    assert plots.ranks(torch.tensor([0.5, 3.0, 1.0, 0.5, 0.5])).tolist() == [2, 5, 4, 2, 2]
