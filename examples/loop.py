"""What train_lm.py and train_retrieval.py share: a training loop that may be killed at any moment.

A checkpoint holds tensors, and the configuration in its header; it replaces the last one in one
piece. The metrics up to it are written before it is.
"""

import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import asdict

import torch
import torch.distributed as dist
import typer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

CHECKPOINT = "checkpoint.safetensors"


class Refused(Exception):
    """What the user can mend, said in a line."""


def start(main):
    """Run the command ``main``; what it refuses ends it with one line, without a traceback."""
    try:
        typer.run(main)
    except Refused as error:
        sys.exit(f"error: {error}")


def check(device, resume, overwrite, **at_least_1):
    """Refuse what no run can be started with."""
    for name, value in at_least_1.items():
        if value < 1:
            raise Refused(f"--{name} must be at least 1, got {value}")
    if resume and overwrite:
        raise Refused("--resume goes on with a run and --overwrite replaces it: pass one of them")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise Refused(f"--device {device} is not there ({reason}): pass --device cpu") from error


def is_finished(out, config, resume, overwrite):
    """Whether the folder ``out`` holds a finished run of ``config``, which is kept. Refused: one of
    another configuration, which would be lost, and to go on with a run of another."""
    if overwrite:
        return False
    result, checkpoint = out / "result.json", out / CHECKPOINT
    stored = None
    if result.exists():
        stored, what = json.loads(result.read_text())["config"], "a finished run"
    elif resume and checkpoint.exists():
        stored, what = checkpoint_config(checkpoint), "a run"
    if stored is None:
        return False
    other = differing(config, stored) - {"device"}
    if other:
        were = ", ".join(f"{name} {stored.get(name)}" for name in sorted(other))
        raise Refused(
            f"{out} holds {what} with {were}: pass the same, or another --out, or --overwrite to "
            "replace it"
        )
    if result.exists() and is_first():
        print(f"{out} holds this run, finished; --overwrite trains it again")
    return result.exists()


def differing(config, stored):
    """Names of the fields of ``config`` that differ from those of a stored configuration."""
    return {name for name, value in asdict(config).items() if stored.get(name) != value}


class Loop:
    """A subclass sets ``out`` (the folder), ``config`` (a dataclass), ``label`` (of the bar),
    ``steps``, ``save_every``, ``device``, ``modules`` (name -> module) and ``optimizer``, and
    defines

    - ``train_step()``: one optimizer step; returns the loss as a 0-d tensor;
    - ``measure()``: after a step, more numbers for its row of the metrics;
    - ``result(rows)``: at the end, what result.json is to hold.

    Of several processes each takes the steps, and the first one alone measures and writes.
    """

    step = 0

    @property
    def checkpoint(self):
        return self.out / CHECKPOINT

    def save(self):
        tensors = {
            f"{prefix}.{name}": value
            for prefix, module in self.modules.items()
            for name, value in module.state_dict().items()
        }
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
        tensors["step"] = torch.tensor(self.step)
        tensors["rng"] = torch.get_rng_state()
        if self.device.startswith("cuda"):
            tensors["cuda_rng"] = torch.cuda.get_rng_state()
        # Cloned, for safetensors refuses tied weights.
        tensors = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
        metadata = {"config": json.dumps(asdict(self.config))}
        replace(self.checkpoint, lambda path: save_file(tensors, path, metadata))

    def load(self):
        tensors = load_file(self.checkpoint, device=self.device)
        for prefix, module in self.modules.items():
            module.load_state_dict(strip(tensors, prefix + "."))
        state = self.optimizer.state_dict()
        for key, value in strip(tensors, "optimizer.").items():
            i, name = key.split(".")
            # AdamW counts its steps in a tensor on the CPU.
            state["state"].setdefault(int(i), {})[name] = value.cpu() if name == "step" else value
        self.optimizer.load_state_dict(state)
        self.step = int(tensors["step"])
        torch.set_rng_state(tensors["rng"].cpu())
        if self.device.startswith("cuda"):
            torch.cuda.set_rng_state(tensors["cuda_rng"].cpu())

    def run(self, resume):
        """Train to the end; with ``resume`` from the last checkpoint on, if there is one."""
        resume = resume and self.checkpoint.exists()
        if resume:
            self.load()
        if not is_first():
            while self.step < self.steps:
                self.train_step()
                self.step += 1
            return
        self.out.mkdir(parents=True, exist_ok=True)
        metrics, result = self.out / "metrics.jsonl", self.out / "result.json"
        rows = [row for row in read_rows(metrics) if row["step"] < self.step] if resume else []
        if not resume:
            # A kill before the first checkpoint must not leave those of another run.
            self.checkpoint.unlink(missing_ok=True)
            result.unlink(missing_ok=True)
        replace(metrics, lambda path: path.write_text("".join(map(line, rows))))
        board = SummaryWriter(self.out / "tensorboard", purge_step=self.step)
        try:
            with metrics.open("a") as file, between_steps() as interrupted, tqdm(
                total=self.steps, initial=self.step, desc=self.label
            ) as bar:  # fmt: skip
                while self.step < self.steps:
                    start = time.perf_counter()
                    loss = self.train_step().item()
                    self.step += 1
                    row = {"step": self.step - 1, "loss": loss}
                    row["step_ms"] = (time.perf_counter() - start) * 1e3
                    row |= self.measure()
                    rows.append(row)
                    file.write(line(row))
                    for name, value in row.items():
                        if value is not None and name != "step":
                            board.add_scalar(name, value, row["step"])
                    bar.update()
                    bar.set_postfix(loss=f"{loss:.3f}")
                    if self.step % self.save_every == 0:
                        file.flush()
                        self.save()
                    if interrupted:
                        raise KeyboardInterrupt
        except KeyboardInterrupt:
            if is_alone():
                self.save()
            print(f"\nstopped at step {self.step}; go on with --resume", file=sys.stderr)
            raise typer.Exit(130) from None
        finally:
            board.close()
        self.save()
        text = json.dumps(self.result(rows), indent=1)
        replace(result, lambda path: path.write_text(text))


@contextlib.contextmanager
def between_steps():
    """A list that Ctrl-C fills. In the middle of a step, weights and state do not fit together. Of
    several processes each would stop at another step, so there Ctrl-C acts at once, and the last
    checkpoint counts."""
    interrupted = []
    if not is_alone():
        yield interrupted
        return
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def is_alone():
    return not dist.is_initialized() or dist.get_world_size() == 1


def is_first():
    return not dist.is_initialized() or dist.get_rank() == 0


def replace(path, write):
    """``write(partial)``, then rename: a kill in the middle leaves the old file."""
    partial = path.with_suffix(".partial")
    write(partial)
    os.replace(partial, path)


def line(row):
    return json.dumps(row) + "\n"


def read_rows(metrics):
    """The rows of a metrics.jsonl; its last line may have been cut by a kill."""
    whole = [text for text in metrics.read_text().splitlines(True) if text.endswith("\n")]
    return [json.loads(text) for text in whole]


def checkpoint_config(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["config"])


def strip(tensors, prefix):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
