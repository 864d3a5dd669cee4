"""Proves and measures everything on a GPU in a few minutes, the most telling first:

    python scripts/gpu_check.py --minutes 8.5 --out DIR [--only STEP ...] [--device cuda|cpu]

Every step runs in processes of its own under a limit of its own, and what fails, hangs or loses the
GPU stops nothing else. After each step DIR/summary.json and DIR/summary.md hold all that there is;
DIR/log.txt holds what the processes printed. The work is in tests/gpu/ and benchmarks/; this file
arranges it. With --device cpu the same steps run at small sizes. The exit status is 1 where
something was wrong.
"""

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from summary import write_summary

ROOT = Path(__file__).resolve().parents[1]
LOG_BYTES = 200_000  # of what a process printed
START_SECONDS = 60  # of a process, up to its first case


class Job(NamedTuple):
    """One process after another that runs ``cases(device, part)`` of a file."""

    file: str
    part: str = ""

    def command(self, device, lines, after):
        command = [sys.executable, "scripts/cases.py", self.file, *[self.part] * bool(self.part)]
        command += ["--device", device, "--out", lines]
        return [*command, "--after", after] if after else command


class Tests(NamedTuple):
    """The tests marked "gpu", each a case; on a CPU a few of them."""

    def command(self, device, lines, after):
        workers = str(min(8, os.cpu_count()))
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", workers, "--dist=worksteal"]
        command += ["-p", "case_lines", "--case-lines", lines]
        # They import frameworks, which a machine with a GPU need not have.
        command += ["--ignore=tests/integrations", "--continue-on-collection-errors"]
        return command if device == "cuda" else [*command, "tests/nn/test_causal_lm_loss.py"]


class Step(NamedTuple):
    name: str
    seconds: float  # it is stopped after so many
    case_seconds: float  # a case that takes longer hangs
    jobs: tuple
    together: int = 1  # jobs at a time


# What smoke.py can be asked for; what has never run on a GPU comes first.
OPS = (
    "products",
    "temperature_head",
    "dro_contrastive", "linear_dro_cross_entropy", "tempered_softmax", "optimal_temperature",
    "vocabulary_parts", "modules", "dro_cross_entropy", "large",
)  # fmt: skip
STEPS = (
    Step("ceilings", 40, 20, (Job("benchmarks/ceilings.py"),)),
    Step("build", 180, 180, (Job("tests/gpu/library.py"),)),
    Step("smoke", 130, 50, tuple(Job("tests/gpu/smoke.py", op) for op in OPS), together=8),
    Step(
        "headline",
        180,
        60,
        (Job("benchmarks/headline.py"), Job("benchmarks/headline.py", "others")),
    ),
    Step("profile", 60, 30, (Job("benchmarks/headline.py", "profile"),)),
    Step("sweep", 110, 30, (Job("benchmarks/sweep.py"),)),
    Step("tests", 240, 240, (Tests(),)),
    Step("sanitize", 180, 90, (Job("tests/gpu/sanitize.py"),)),
    Step("training", 120, 60, (Job("tests/gpu/training.py"),)),
    Step("graphs", 90, 45, (Job("tests/gpu/graphs.py"),)),
)


def environment_variables(device):
    paths = [ROOT, *(ROOT / folder for folder in ("tests/support", "benchmarks", "scripts"))]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    variables |= {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    if device == "cpu":
        variables |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return variables


class _Lines:
    """The cases in a file of JSON lines that a process is still writing."""

    def __init__(self, path):
        self.path, self.offset = path, 0
        self.done, self.current, self.began = [], None, time.monotonic()

    def read(self):
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.offset += len(whole)
        for line in whole.splitlines():
            try:
                case = json.loads(line)
            except ValueError:  # a process was killed while it wrote this
                continue
            self.began = time.monotonic()
            if case.get("begins"):
                self.current = case["case"]
            else:
                self.current = None
                self.done.append(case)

    def end(self):
        """No process is writing now: the next one begins a line."""
        with open(self.path, "a") as file:
            file.write("\n")
        self.read()

    def give_up(self, status, error):
        """The case that was running takes the blame; without one, what came before the first."""
        seconds = round(time.monotonic() - self.began, 1)
        case = self.current or "(no case)"
        self.done.append({"case": case, "status": status, "error": error, "seconds": seconds})
        self.current = None


def run_job(job, step, device, deadline, directory, log):
    """The cases of a job. A process that a case took with it is followed by another, which goes on
    behind that case."""
    descriptor, path = tempfile.mkstemp(dir=directory, suffix=".jsonl")
    os.close(descriptor)
    lines, after = _Lines(path), ""
    while True:
        with tempfile.TemporaryFile(dir=directory) as output:
            process = subprocess.Popen(
                job.command(device, path, after), cwd=ROOT, env=environment_variables(device),
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            lines.began, before = time.monotonic(), len(lines.done)
            ended = _watch(process, lines, step, deadline)
            _kill(process)
            lines.end()
            size = output.seek(0, os.SEEK_END)
            output.seek(max(0, size - LOG_BYTES))
            printed = output.read().decode(errors="replace")
        log(f"== {step.name}: {' '.join(map(str, job))} {after}".rstrip(), printed)
        if ended == "limit":
            lines.give_up("stopped", "the step's time was over")
        elif ended == "hangs":
            lines.give_up("hangs", f"more than {step.case_seconds:.0f} s")
        elif lines.current is not None or (process.returncode and len(lines.done) == before):
            lines.give_up("crashed", _how(process.returncode, printed))
        elif process.returncode == 0 or isinstance(job, Tests):
            return lines.done
        last = lines.done[-1]["case"]
        if ended == "limit" or last == "(no case)":
            return lines.done
        after = last


def _watch(process, lines, step, deadline):
    """Until the process has ended by itself: "limit" or "hangs" if it has not."""
    while process.poll() is None:
        lines.read()
        now = time.monotonic()
        if now > deadline:
            return "limit"
        if now - lines.began > step.case_seconds + START_SECONDS * (lines.current is None):
            return "hangs"
        time.sleep(0.05)
    return None


def _kill(process):
    """With all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # the driver may not let it go
        process.wait(5)


def _how(returncode, printed):
    last = next((line for line in reversed(printed.splitlines()) if line.strip()), "")
    how = f"signal {-returncode}" if returncode < 0 else f"exit status {returncode}"
    return f"{how}: {last.strip()[:200]}"


def run(steps, minutes, out, device):
    """{"environment", "steps", ...}, as in DIR/summary.json; never raises for what a step does.
    Exits where device "cuda" is asked for and is not there."""
    out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    end = begin + 60 * minutes
    log_file = out / "log.txt"
    log_file.write_text("")

    def log(title, printed):
        with log_file.open("a") as file:
            file.write(f"{title}\n{printed}\n")

    summary = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": device,
        "environment": _environment(device),
        "minutes": minutes,
        "steps": [],
    }
    known = summary["environment"]
    if device == "cuda" and "torch" in known and "cuda" not in known:
        sys.exit("gpu_check: torch sees no GPU: use --device cpu")
    with tempfile.TemporaryDirectory() as directory:
        for step in steps:
            started = time.monotonic()
            deadline = min(started + step.seconds, end)
            cases = []
            if deadline - started > 1:
                with ThreadPoolExecutor(min(step.together, os.cpu_count())) as pool:
                    jobs = [
                        pool.submit(run_job, job, step, device, deadline, directory, log)
                        for job in step.jobs
                    ]
                    cases = [case for job in jobs for case in job.result()]
            seconds = round(time.monotonic() - started, 1)
            summary["steps"].append({"name": step.name, "seconds": seconds, "cases": cases})
            summary["seconds"] = round(time.monotonic() - begin, 1)
            write_summary(summary, out)
    return summary


def _environment(device):
    code = "import json, measure; print(json.dumps(measure.environment()))"
    try:
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment_variables(device),
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        return json.loads(result.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        return {"device": "unknown: torch does not import or sees no GPU"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", metavar="STEP", choices=[s.name for s in STEPS])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    steps = [s for s in STEPS if not options.only or s.name in options.only]
    summary = run(steps, options.minutes, options.out, options.device)
    print((options.out / "summary.md").read_text())
    bad = {"wrong", "exception", "crashed", "hangs"}
    sys.exit(any(c["status"] in bad for s in summary["steps"] for c in s["cases"]))


if __name__ == "__main__":
    main()
