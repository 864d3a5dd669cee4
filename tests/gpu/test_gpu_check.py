"""scripts/gpu_check.py without a GPU: every step runs, and what fails, hangs or dies takes nothing
else with it."""

import json
import subprocess
import sys
import time

import gpu_check
import pytest
import summary

FAULTY = """
import os, time

def fails():
    raise ValueError("no such thing")

def cases(device, part):
    yield "first", lambda: {"row": {"ms": 1.5}}
    yield "fails", fails
    yield "hangs", lambda: time.sleep(1000)
    yield "killed", lambda: os.kill(os.getpid(), 9)
    yield "aborts", os.abort
    yield "wrong", lambda: {"status": "wrong", "error": "grad errs by 3 x its bound"}
    yield "last", lambda: None
"""


def step_of(tmp_path, text, name="faults", seconds=60, case_seconds=3):
    file = tmp_path / f"{name}.py"
    file.write_text(text)
    return gpu_check.Step(name, seconds, case_seconds, (gpu_check.Job(str(file)),))


def statuses(step):
    return {case["case"]: case["status"] for case in step["cases"]}


def test_a_case_that_fails_hangs_or_dies_does_not_stop_the_next(tmp_path):
    found = gpu_check.run([step_of(tmp_path, FAULTY)], 3, tmp_path / "out", "cpu")
    assert statuses(found["steps"][0]) == {
        "first": "ok",
        "fails": "exception",
        "hangs": "hangs",
        "killed": "crashed",
        "aborts": "crashed",
        "wrong": "wrong",
        "last": "ok",
    }
    told = {case["case"]: case.get("error") for case in found["steps"][0]["cases"]}
    assert told["fails"] == "ValueError: no such thing" and "signal 9" in told["killed"]
    assert "Traceback" in (tmp_path / "out/log.txt").read_text()
    stored = json.loads((tmp_path / "out/summary.json").read_text())
    assert stored["steps"][0]["counts"] == {
        "ok": 2, "exception": 1, "hangs": 1, "crashed": 2, "wrong": 1
    }  # fmt: skip
    text = (tmp_path / "out/summary.md").read_text()
    assert "| first | 1.5 |" in text and "killed: crashed: signal 9" in text


def test_a_line_that_a_killed_process_left_unfinished_is_not_read(tmp_path):
    path = tmp_path / "lines"
    path.write_text(
        '{"case": "a", "status": "ok"}\n{"case": "b", "begins": true}\n{"case": "b", "sta'
    )
    lines = gpu_check._Lines(path)
    lines.read()
    assert [c["case"] for c in lines.done] == ["a"] and lines.current == "b"
    lines.end()
    lines.give_up("crashed", "signal 9")
    with path.open("a") as file:
        file.write('{"case": "c", "status": "ok"}\n')
    lines.read()
    assert [(c["case"], c["status"]) for c in lines.done] == [
        ("a", "ok"),
        ("b", "crashed"),
        ("c", "ok"),
    ]


def test_a_process_that_cannot_start_again_is_said(tmp_path):
    """The cases behind the one that died are not lost in silence."""
    once = f"""
import os, pathlib
mark = pathlib.Path({str(tmp_path / "mark")!r})
if mark.exists():
    raise ImportError("the driver is gone")
mark.touch()
def cases(device, part):
    yield "dies", os.abort
    yield "never", dict
"""
    found = gpu_check.run([step_of(tmp_path, once)], 1, tmp_path / "out", "cpu")
    assert statuses(found["steps"][0]) == {"dies": "crashed", "(no case)": "crashed"}
    assert "the driver is gone" in found["steps"][0]["cases"][1]["error"]


def test_a_gpu_that_is_not_there_is_no_silent_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "_environment", lambda device: {"device": "CPU", "torch": "2"})
    with pytest.raises(SystemExit, match="sees no GPU: use --device cpu"):
        gpu_check.run([], 1, tmp_path / "out", "cuda")


def test_limits_hold_and_what_was_done_is_kept(tmp_path):
    endless = "import time\ndef cases(device, part):\n"
    endless += "    for i in range(1000):\n        yield str(i), lambda: time.sleep(0.5)\n"
    steps = [
        step_of(tmp_path, endless, "endless", seconds=9),
        step_of(tmp_path, "import no_such_module\n", "broken"),
        step_of(tmp_path, "def cases(device, part):\n    yield 'one', dict\n", "next"),
        step_of(tmp_path, endless, "too long", seconds=1000),
        step_of(tmp_path, endless, "too late", seconds=1000),
    ]
    begin = time.monotonic()
    found = gpu_check.run(steps, 0.6, tmp_path / "out", "cpu")
    assert time.monotonic() - begin < 36 + 10
    endless, broken, following, long, late = found["steps"]
    assert list(statuses(endless).values())[-1] == "stopped" and len(endless["cases"]) > 1
    assert "No module named 'no_such_module'" in broken["cases"][0]["error"]
    assert statuses(following) == {"one": "ok"}
    assert "ok" in statuses(long).values() and late["cases"] == []
    assert "| too late | 0.0 | no time was left |" in (tmp_path / "out/summary.md").read_text()


def test_every_step_runs_on_a_cpu_beside_a_faulty_one(tmp_path):
    # The limits are a GPU's; here other tests share the processor.
    steps = [
        step._replace(seconds=4 * step.seconds, case_seconds=4 * step.case_seconds)
        for step in gpu_check.STEPS
    ]
    steps.insert(1, step_of(tmp_path, FAULTY))
    found = gpu_check.run(steps, 30, tmp_path / "out", "cpu")
    by_name = {step["name"]: step for step in found["steps"]}
    assert list(by_name) == [step.name for step in steps]
    assert statuses(by_name.pop("faults"))["last"] == "ok"
    bad = {
        (name, case["case"], case["status"], case.get("error"))
        for name, step in by_name.items()
        for case in step["cases"]
        if case["status"] not in ("ok", "unable")
    }
    assert not bad
    assert all(step["cases"] for step in by_name.values())
    # What needs a GPU says so, and everything else has run.
    unable = {name for name, step in by_name.items() if "ok" not in statuses(step).values()}
    assert unable == {"sanitize", "graphs"}
    screen = summary.markdown({**found, "steps": list(by_name.values())})
    assert len(screen.splitlines()) <= 80
    # Every operator and backend was in the smoke step.
    smoke = " ".join(statuses(by_name["smoke"]))
    ops = "dro_cross_entropy", "linear_dro", "tempered_log", "optimal", "contrastive", "network"
    assert [words for words in ops if words not in smoke] == []
    assert len(by_name["smoke"]["cases"]) >= 150


def test_the_headline_has_what_was_predicted_for_a_gpu(monkeypatch):
    import headline

    assert set(headline.PREDICTED) <= set(headline.calls("cuda"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for gpu, expected in (("NVIDIA H200", 1.67), ("NVIDIA H100 80GB HBM3", 1.76), ("other", None)):
        monkeypatch.setattr("torch.cuda.get_device_name", lambda gpu=gpu: gpu)
        assert headline.predicted("contrastive, B = 65536") == expected


@pytest.mark.parametrize(
    "architectures, capability, runs",
    [
        ("8.0+PTX;9.0a", (9, 0), True),
        ("8.0+PTX;9.0a", (8, 9), True),
        ("8.0+PTX;9.0a", (12, 0), True),
        ("8.0;9.0a", (12, 0), False),
        ("9.0a", (9, 1), False),
        ("8.6", (8, 0), False),
        ("8.0", (7, 5), False),
    ],
)
def test_a_library_built_before_is_taken_where_it_runs(architectures, capability, runs):
    from tests.gpu.library import runs_on

    assert runs_on(capability, architectures) is runs


def test_a_stopped_run_of_pytest_has_said_what_it_did(tmp_path):
    """Every test is a line as soon as it has ended, from the workers, too."""
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no wind')\n"
        "def test_skipped(): pass\n"
    )
    lines = tmp_path / "lines"
    command = [sys.executable, "-m", "pytest", "-n", "2", "-p", "case_lines", "--case-lines", lines]
    subprocess.run(
        [*command, tmp_path / "test_some.py"], capture_output=True, cwd=tmp_path,
        env=gpu_check.environment_variables("cpu"),
    )  # fmt: skip
    cases = [json.loads(line) for line in lines.read_text().splitlines()]
    found = {case["case"].rpartition("_")[2]: case for case in cases}
    assert {k: v["status"] for k, v in found.items()} == {
        "passes": "ok",
        "fails": "exception",
        "skipped": "unable",
    }
    assert "no wind" in found["skipped"]["error"] and "1 == 2" in found["fails"]["error"]


def test_cells_of_a_table():
    rows = {"a": {"ms": 1.23456, "note": None}, "b": {"ms": None, "note": None}}
    assert summary._rows("t", rows)[1:] == [
        "| t | ms |",
        "| --- | ---: |",
        "| a | 1.235 |",
        "| b |  |",
    ]
