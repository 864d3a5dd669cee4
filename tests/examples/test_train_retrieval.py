"""The second example: it learns, survives ``kill -9``, and its data sets are what they claim."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

pytest.importorskip("tensorboard", reason="the example's packages are not installed")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import loop
import retrieval_data
import retrieval_plots
import train_retrieval
from train_retrieval import Config, Data, Method, Trainer

# Some 290 pairs, enough for the prototypes; 18 steps an epoch.
TINY = {"texts": 100, "batch": 16, "rho": 2.0, "width": 32, "epochs": 12, "save_every": 9}


@pytest.fixture(autouse=True)
def ordinary_memory():
    """A training is no test of unwritten memory, and NaN-filling slows it."""
    torch.utils.deterministic.fill_uninitialized_memory = False


@pytest.fixture(autouse=True)
def one_thread():
    """Threads of several test processes wait for each other longer than these models compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """With the data sets in it, made once."""
    out = tmp_path_factory.mktemp("retrieval")
    for data in Data:
        retrieval_data.load(data, out / data)
    return out


@pytest.fixture
def own_out(out, tmp_path):
    for data in Data:
        (tmp_path / data).mkdir()
        for name in ("pairs.safetensors", "names.json"):
            (tmp_path / data / name).symlink_to(out / data / name)
    return tmp_path


def texts_of(pairs, rows):
    return [pairs.names[int(pairs.text_ids[i])] for i in rows]


def test_bags_are_taken_by_row():
    bags = retrieval_data.Bags(torch.tensor([5, 6, 7, 8, 9]), torch.tensor([0, 2, 2, 5]))
    words, offsets = bags[torch.tensor([2, 1, 0, 2])]
    assert words.tolist() == [7, 8, 9, 5, 6, 7, 8, 9]
    assert offsets.tolist() == [0, 3, 3, 5]


def test_glyphs(out):
    train, held_out, vocabulary = retrieval_data.load(Data.glyphs, out / Data.glyphs)
    assert len(train) > 14_000 and len(held_out.names) == 1000 and len(held_out) > 2000
    assert not set(train.names) & set(held_out.names)
    for pairs in (train, held_out):
        assert pairs.images.shape == (len(pairs), 32, 32) and pairs.images.dtype == torch.uint8
        assert pairs.images.flatten(1).amax(1).min() > 0, "no empty glyph"
        assert pairs.faces.unique().tolist() == [0, 1, 2, 3]
        assert pairs.text_ids.unique().tolist() == list(range(len(pairs.names)))
        assert len(set(pairs.names)) == len(pairs.names)
        assert pairs.texts.words.max() < vocabulary["text"]
    letter = torch.nonzero(train.text_ids == train.names.index("LATIN SMALL LETTER G")).squeeze(1)
    assert sorted(train.faces[letter].tolist()) == [0, 1, 2, 3]
    a, b = train.images[letter[:2]]
    assert not torch.equal(a, b), "another face is another image"


def test_code(out):
    train, held_out, vocabulary = retrieval_data.load(Data.code, out / Data.code)
    assert len(train) > 3000 and len(held_out.names) == 1000 and len(held_out) >= 1000
    assert not set(train.names) & set(held_out.names)
    assert len(train) > len(train.names), "equal docstrings share a text id"
    for pairs in (train, held_out):
        assert len(pairs.images) == len(pairs) and len(pairs.texts) == len(pairs.names)
        assert pairs.images.words.max() < vocabulary["image"]
        assert pairs.texts.words.max() < vocabulary["text"]
        assert train.images.offsets.diff().min() > 0


def test_code_has_no_docstring_and_not_its_own_name(tmp_path, monkeypatch):
    source = (
        "class A:\n"
        '    """Of the class."""\n'
        "    def frobnicate(self, depth):\n"
        '        """Call frobnicate again and again.\n\n        Elsewhere.\n        """\n'
        "        def inner():\n"
        '            """Secret words of another pair."""\n'
        "        return self.frobnicate(depth - innerLimit)\n"
    )
    (tmp_path / "module.py").write_text(source)
    monkeypatch.setattr(retrieval_data.sysconfig, "get_paths", lambda: {"stdlib": tmp_path})
    codes, texts, _ = retrieval_data.functions()
    assert texts == ["Call  again and again.", "Secret words of another pair."]
    assert " ".join(codes[0]) == "def self depth def inner pass return self depth inner limit"
    assert codes[1] == ["def", "pass"]


@pytest.mark.parametrize(
    "data, options",
    [
        (Data.glyphs, {"texts": 400, "epochs": 6}),
        (Data.code, {"texts": 1600, "epochs": 8}),
    ],
)
def test_learns(data, options, own_out):
    trainer = Trainer(Config(data=data, batch=64, width=64, **options), own_out)
    trainer.run(resume=False)
    row = loop.read_rows(trainer.out / "metrics.jsonl")[-1]
    assert row["step"] == trainer.steps - 1
    assert len(trainer.held_out.names) == options["texts"] // 4
    chance = 10 / len(trainer.held_out.names)
    for name in ("image_to_text@10", "text_to_image@10"):
        assert 2 * chance < row[name] < 1, name
    assert 0.01 <= row["tau_image_min"] < row["tau_image_max"] <= 0.15
    if data == Data.glyphs:
        paths = retrieval_plots.draw(own_out, trainer.config)
        assert len(paths) == 3 and all(path.stat().st_size > 10_000 for path in paths)
        train_retrieval.report(own_out, trainer.config)


@pytest.mark.parametrize("method", Method)
def test_every_method_steps_and_a_seed_shows_all_the_same_batches(method, own_out):
    trainer = Trainer(Config(method=method, **TINY), own_out)
    other = Trainer(Config(method=Method.clip, **TINY), own_out)
    for mine, others in zip(
        trainer.model.text.parameters(), other.model.text.parameters(), strict=True
    ):
        assert torch.equal(mine, others)
    assert torch.equal(trainer.batch_of(3)[2], other.batch_of(3)[2])
    assert not torch.equal(trainer.batch_of(3)[2], trainer.batch_of(3 + trainer.batches)[2])
    losses = [trainer.train_step() for _ in range(2)]
    assert torch.isfinite(torch.stack(losses)).all()
    assert {"tau_image_mean", "tau_text_mean"} <= trainer.measure().keys()


def start(own_out, resume):
    """The training in a process of its own, to be killed."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(loop.__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "from train_retrieval import Config, Trainer\n"
        f"Trainer(Config(**{TINY}), Path({str(own_out)!r})).run(resume={resume})"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def curve(trainer):
    """(steps, their loss and temperature statistics)."""
    rows = loop.read_rows(trainer.out / "metrics.jsonl")
    names = [name for name in rows[0] if name not in ("step", "step_ms")]
    values = torch.tensor([[row[name] for name in names] for row in rows])
    return [row["step"] for row in rows], values


def test_killed_run_goes_on_as_if_nothing_had_happened(own_out):
    killed = Trainer(Config(**TINY), own_out)
    process = start(own_out, resume=False)
    deadline = time.monotonic() + 60
    while not killed.checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    killed.load()
    assert 0 < killed.step < killed.steps
    with (killed.out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4')  # as a kill in the middle of a write leaves it
    process = start(own_out, resume=True)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()
    killed.load()
    steps, rows = curve(killed)

    whole = Trainer(Config(**TINY), own_out)
    whole.run(resume=False)
    assert killed.step == whole.step == whole.steps
    assert steps == list(range(whole.steps))
    torch.testing.assert_close(rows, curve(whole)[1], rtol=1e-6, atol=1e-6)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(
            killed.model.state_dict()[name], value, rtol=1e-6, atol=1e-6, equal_nan=True
        )
    assert whole.model.loss.state.log_s_image.isfinite().all()
    assert whole.temperatures()[0].std() > 0
    for mine, others in zip(killed.temperatures(), whole.temperatures(), strict=True):
        torch.testing.assert_close(mine, others, rtol=1e-6, atol=0)


TWO_PROCESSES = """
import sys
from pathlib import Path
import torch, torch.distributed as dist
sys.path[:0] = {paths!r}
from train_retrieval import Config, Trainer
torch.set_num_threads(1)
dist.init_process_group("gloo")
trainer = Trainer(Config(**{options}), Path({out!r}))
trainer.run(resume=False)
dist.barrier()
del trainer
dist.destroy_process_group()
"""


def test_two_processes_train_as_one_and_one_goes_on_from_their_checkpoint(own_out, tmp_path):
    short = TINY | {"epochs": 1}
    script = tmp_path / "two_processes.py"
    examples = Path(loop.__file__).parent
    paths = [str(examples.parent), str(examples)]
    script.write_text(TWO_PROCESSES.format(paths=paths, options=short, out=str(own_out)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", script]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    two = Trainer(Config(**short), own_out)
    two.load()
    steps, rows = curve(two)

    one = Trainer(Config(**short), own_out)
    one.run(resume=False)
    assert steps == list(range(one.steps)) and two.step == one.steps
    # The loss; the temperatures' statistics are those of the first process's pairs.
    torch.testing.assert_close(rows[:, 0], curve(one)[1][:, 0], rtol=1e-4, atol=0)
    torch.testing.assert_close(
        two.model.loss.state.log_s_text, one.model.loss.state.log_s_text, rtol=1e-4, atol=1e-4,
        equal_nan=True,
    )  # fmt: skip
    torch.testing.assert_close(two.train_step(), one.train_step(), rtol=1e-3, atol=0)


def test_ctrl_c_waits_for_the_end_of_the_step(own_out):
    trainer = Trainer(Config(**TINY), own_out)
    step = trainer.train_step

    def interrupted():
        if trainer.step == 5:
            signal.raise_signal(signal.SIGINT)
        return step()

    trainer.train_step = interrupted
    with pytest.raises(typer.Exit):
        trainer.run(resume=False)
    stopped = Trainer(Config(**TINY), own_out)
    assert not loop.is_finished(stopped.out, stopped.config, resume=True, overwrite=False)
    stopped.load()
    assert stopped.step == 6
    assert [row["step"] for row in loop.read_rows(stopped.out / "metrics.jsonl")] == list(range(6))
    for mine, others in zip(
        stopped.model.state_dict().values(), trainer.model.state_dict().values(), strict=True
    ):
        assert torch.equal(mine.nan_to_num(), others.nan_to_num())


def test_resume_refuses_another_configuration(own_out):
    options = TINY | {"epochs": 1}
    trainer = Trainer(Config(**options), own_out)
    trainer.run(resume=False)
    assert loop.is_finished(trainer.out, trainer.config, resume=True, overwrite=False)
    result = trainer.out / "result.json"
    assert json.loads(result.read_text())["config"]["epochs"] == 1
    with pytest.raises(loop.Refused, match="a finished run with epochs 1: pass"):
        loop.is_finished(trainer.out, Config(**TINY), resume=True, overwrite=False)
    result.unlink()
    with pytest.raises(loop.Refused, match="a run with epochs 1: pass"):
        loop.is_finished(trainer.out, Config(**TINY), resume=True, overwrite=False)


def test_finished_runs_are_kept(own_out, monkeypatch):
    """Run twice, as `make demo` may be, the second command draws its pictures and no more."""
    train, held_out, sizes = retrieval_data.load(Data.glyphs, own_out / Data.glyphs)
    small = (train.of_texts(60), held_out.of_texts(30), sizes)
    monkeypatch.setattr(retrieval_data, "load", lambda data, folder: small)
    app = typer.Typer()
    app.command()(train_retrieval.main)

    def run(*options):
        arguments = ["--out", own_out, "--method", "clip", "--seeds", 2, "--epochs", 1, *options]
        arguments += ["--batch", 16, "--width", 32, "--device", "cpu"]
        return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False).stdout

    folder = own_out / Data.glyphs / Method.clip
    names = [folder / seed / name for seed in "01" for name in ("metrics.jsonl", loop.CHECKPOINT)]
    first = run()
    before = [name.read_bytes() for name in names]
    second = run()
    assert second.count("holds this run, finished; --overwrite trains it again") == 2
    assert "recall.png" in first and "recall.png" in second
    with pytest.raises(loop.Refused, match="a finished run with epochs 1"):
        run("--epochs", 2)
    assert [name.read_bytes() for name in names] == before
    run("--overwrite", "--epochs", 2)
    assert [name.read_bytes() for name in names] != before


@pytest.mark.parametrize(
    "options, words",
    [
        (("--epochs", 0), "--epochs must be at least 1, got 0"),
        (("--seeds", 0), "--seeds must be at least 1"),
        (("--device", "nowhere"), "--device nowhere is not there"),
        (("--batch", 1), r"--batch must be in \[2, \d+\], the training pairs, got 1"),
        (("--batch", 21), "--batch must be at least 22 for --method isogclr, with rho 3.0 below"),
        (("--batch", 10**6), r"--batch must be in \[2, \d+\]"),
    ],
)
def test_refused_options(options, words, own_out):
    app = typer.Typer()
    app.command()(train_retrieval.main)
    arguments = ["--out", own_out, *options]
    with pytest.raises(loop.Refused, match=words):
        CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


def test_data_that_are_not_there_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval_data.sysconfig, "get_paths", lambda: {"stdlib": tmp_path})
    with pytest.raises(loop.Refused, match=f"no source under {tmp_path}: use a Python"):
        retrieval_data.functions()
    monkeypatch.setattr(retrieval_data.matplotlib, "get_data_path", lambda: tmp_path)
    with pytest.raises(loop.Refused, match=r"DejaVuSans\.ttf is not there: install matplotlib"):
        retrieval_data.glyphs()
