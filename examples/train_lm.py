"""Train a small GPT with learned temperatures on the source code of the Python standard library.

    python examples/train_lm.py                  # all losses in turn, a table and pictures
    python examples/train_lm.py --loss tempnet   # one of them
    python examples/train_lm.py --resume         # go on where Ctrl-C stopped

It needs ``pip install tokenizers tensorboard matplotlib tqdm`` and no network. Everything is
written to runs/lm, where a finished run is kept unless --overwrite is passed.

The losses: ``ce`` (plain cross entropy), ``official`` (TempNet through the authors' formula in
eager PyTorch), ``tempnet`` (the same through tempnet_kernels), ``linear`` (the same again, from the
hidden states, without the logits) and ``frozen`` (the ``ce`` model frozen, only a TempNet trained).
"""

import json
import math
import resource
import statistics
import subprocess
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from loop import CHECKPOINT, Loop, Refused, check, checkpoint_config, is_finished, start, strip
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from torch import nn

from tempnet_kernels.nn import TempNet, TempNetCausalLMLoss, TempNetCrossEntropyLoss
from tempnet_kernels.reference.official import official_cross_entropy


class Loss(StrEnum):
    ce = "ce"
    official = "official"
    tempnet = "tempnet"
    linear = "linear"
    frozen = "frozen"


# The KL radius in nats; log V is 7.6. Trained together, model and TempNet can lower every
# temperature and flatten the logits to match, and in so few steps they do. A frozen model cannot:
# near its own mean KL the TempNet learns which tokens to treat as certain.
RHO = {Loss.official: 4.0, Loss.tempnet: 4.0, Loss.linear: 4.0, Loss.frozen: 3.0}


@dataclass
class Config:
    steps: int = 400
    batch: int = 12
    context: int = 128
    width: int = 128
    layers: int = 3
    heads: int = 4
    vocab_size: int = 2048
    lr: float = 2e-3
    tempnet_lr: float = 1e-2
    text_mib: float = 6.0
    eval_every: int = 50
    save_every: int = 100
    seed: int = 0
    device: str = "cpu"


ARCHITECTURE = ("context", "width", "layers", "heads", "vocab_size")

# Data: whole files are held out, so that no held-out line was trained on.


def standard_library(text_mib):
    """(training texts, held-out texts): every 20th file is held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "site-packages", "idlelib", "lib2to3", "__pycache__"}
    files = sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
    if not files:
        raise Refused(
            f"the text is the standard library's source, and there is none under {root}: use a "
            "Python that is not stripped of it"
        )
    train, held_out, size = [], [], 0
    for i, path in enumerate(files):
        text = path.read_text(encoding="utf-8", errors="replace")
        size += len(text)
        (held_out if i % 20 == 10 else train).append(text)
        if size > text_mib * 2**20:
            break
    return train, held_out


def tokenized(config, out):
    """(training ids, held-out ids, tokenizer), cached in ``out``."""
    vocabulary, merges, cache = out / "vocab.json", out / "merges.txt", out / "tokens.safetensors"
    if not cache.exists():
        out.mkdir(parents=True, exist_ok=True)
        train, held_out = standard_library(config.text_mib)
        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(train, vocab_size=config.vocab_size, show_progress=False)
        tokenizer.save_model(str(out))
        encode = lambda texts: torch.tensor(  # noqa: E731
            [i for e in tokenizer.encode_batch(texts) for i in e.ids], dtype=torch.int32
        )
        save_file({"train": encode(train), "held_out": encode(held_out)}, cache)
    ids = load_file(cache)
    return ids["train"], ids["held_out"], ByteLevelBPETokenizer(str(vocabulary), str(merges))


def batch_of(ids, config, seed):
    """(inputs, targets), each [batch, context]; the same for the same seed, so a resumed run sees
    the same data."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - config.context - 1, (config.batch,), generator=generator)
    rows = torch.stack([ids[s : s + config.context + 1] for s in starts]).long()
    return rows[:, :-1].to(config.device), rows[:, 1:].to(config.device)


# Model.


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, d))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def hidden(self, ids):
        """ids [B, T] -> hidden states [B, T, D], which the head takes."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, ids):
        """ids [B, T] -> logits [B, T, V]."""
        return self.head(self.hidden(ids))


# Training.


def make_loss(kind, tempnet):
    """What :meth:`Trainer.loss_of` calls."""
    if kind == Loss.ce:
        return lambda logits, target: F.cross_entropy(logits.flatten(0, 1), target.flatten())
    if kind == Loss.official:
        return lambda logits, target: official_cross_entropy(
            logits, target, tempnet(logits.detach()), RHO[kind]
        )
    module = TempNetCausalLMLoss if kind == Loss.linear else TempNetCrossEntropyLoss
    return module(tempnet, RHO[kind])


class Trainer(Loop):
    def __init__(self, kind, config, out):
        self.kind, self.config, self.out = kind, config, out / kind
        self.label, self.steps = f"{kind:9}", config.steps
        self.save_every, self.device = config.save_every, config.device
        if config.width % config.heads:
            raise Refused(
                f"--width must be a multiple of the {config.heads} heads, got {config.width}"
            )
        self.train_ids, self.held_out_ids, self.tokenizer = tokenized(config, out)
        longest = min(len(self.train_ids), len(self.held_out_ids)) - 2
        if config.context > longest:
            raise Refused(
                f"--context must be at most {longest}, for the text is short, got {config.context}"
            )
        torch.manual_seed(config.seed)
        self.model = GPT(config).to(config.device)
        # Drawn after the model: the model starts the same for every loss.
        self.tempnet = None
        if kind != Loss.ce:
            self.tempnet = TempNet(config.vocab_size, 0.5, 1.5).to(config.device)
        if kind == Loss.frozen:
            checkpoint = out / Loss.ce / CHECKPOINT
            if not checkpoint.exists():
                raise Refused(f"--loss frozen needs {checkpoint}: run --loss ce first")
            stored = checkpoint_config(checkpoint)
            for name in ARCHITECTURE:
                if stored[name] != getattr(config, name):
                    raise Refused(
                        f"--loss frozen needs the model of {checkpoint}, with {name} "
                        f"{stored[name]}, got {getattr(config, name)}: pass the same"
                    )
            weights = load_file(checkpoint)
            self.model.load_state_dict(strip(weights, "model."))
            self.model.requires_grad_(False)
        self.loss = make_loss(kind, self.tempnet)
        self.optimizer = torch.optim.AdamW(self.parameter_groups(), betas=(0.9, 0.95))
        self.modules = {"model": self.model}
        if self.tempnet is not None:
            self.modules["tempnet"] = self.tempnet

    def parameter_groups(self):
        groups = []
        if self.kind != Loss.frozen:
            matrices = [p for p in self.model.parameters() if p.dim() > 1]
            others = [p for p in self.model.parameters() if p.dim() <= 1]
            groups.append({"params": matrices, "lr": self.config.lr, "weight_decay": 0.1})
            groups.append({"params": others, "lr": self.config.lr, "weight_decay": 0.0})
        if self.tempnet is not None:
            tempnet = list(self.tempnet.parameters())
            groups.append({"params": tempnet, "lr": self.config.tempnet_lr, "weight_decay": 0.0})
        for group in groups:
            group["peak"] = group["lr"]
        return groups

    def loss_inputs(self, ids):
        return self.model.hidden(ids) if self.kind == Loss.linear else self.model(ids)

    def loss_of(self, inputs, target):
        if self.kind != Loss.linear:
            return self.loss(inputs, target)
        return self.loss(inputs, None, weight=self.model.head.weight, shift_labels=target)

    def train_step(self):
        """One optimizer step; returns the loss as a 0-d tensor."""
        warmup = max(1, self.config.steps // 20)
        progress = self.step / self.config.steps
        factor = min(1.0, (self.step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        ids, target = batch_of(
            self.train_ids, self.config, self.config.seed * 1_000_003 + self.step
        )
        with torch.set_grad_enabled(self.kind != Loss.frozen):
            inputs = self.loss_inputs(ids)
        loss = self.loss_of(inputs, target)
        self.optimizer.zero_grad()
        loss.backward()
        for group in self.optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], 1.0)
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def held_out(self, batches=8):
        """Mean cross entropy in nats per token of the held-out files: with z, and with z / tau."""
        if self.tempnet is not None:
            self.tempnet.eval()
        raw, tempered = [], []
        for i in range(batches):
            ids, target = batch_of(self.held_out_ids, self.config, 10**9 + i)
            logits, target = self.model(ids).flatten(0, 1), target.flatten()
            raw.append(F.cross_entropy(logits, target).item())
            if self.tempnet is not None:
                tau = self.tempnet(logits)
                tempered.append(F.cross_entropy(logits / tau[:, None], target).item())
        if self.tempnet is not None:
            self.tempnet.train()
        return statistics.mean(raw), statistics.mean(tempered) if tempered else None

    def loss_time_ms(self, repeats=15):
        """Median time of TempNet + loss, forward and backward down to the logits; of ``linear``
        down to the hidden states, with the head."""
        ids, target = batch_of(self.train_ids, self.config, 0)
        with torch.no_grad():
            inputs = self.loss_inputs(ids)
        times = []
        for _ in range(repeats):
            leaf = inputs.detach().clone().requires_grad_(self.kind != Loss.frozen)
            start = time.perf_counter()
            self.loss_of(leaf, target).backward()
            if leaf.is_cuda:
                torch.cuda.synchronize()
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times)

    def measure(self):
        row = {}
        if hasattr(self.loss, "temperature_stats"):
            stats = self.loss.temperature_stats().floats()
            row |= {f"tau_{k}": v for k, v in stats.items()}
        if self.step % self.config.eval_every == 0 or self.step == self.steps:
            row["held_out"], row["held_out_tempered"] = self.held_out()
        return row

    def result(self, rows):
        raw, tempered = self.held_out(batches=24)
        cuda = self.device.startswith("cuda")
        peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else peak_rss_mib()
        return {
            "loss": self.kind.value,
            "step_time_ms": statistics.median(row["step_ms"] for row in rows),
            "peak_mib": peak,  # before the timing below
            "loss_time_ms": self.loss_time_ms(),
            "held_out": raw,
            "held_out_tempered": tempered,
            "config": asdict(self.config),
        }


def peak_rss_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )


def report(out):
    results = [
        json.loads((out / kind / "result.json").read_text())
        for kind in Loss
        if (out / kind / "result.json").exists()
    ]
    table = Table(title="Held-out files of the Python standard library")
    columns = ("loss", "step ms", "loss ms", "peak MiB", "CE z", "ppl z", "CE z/tau", "ppl z/tau")
    for column in columns:
        table.add_column(column, justify="right")
    for r in results:
        tempered = r["held_out_tempered"]
        cells = [f"{r[k]:.1f}" for k in ("step_time_ms", "loss_time_ms", "peak_mib")]
        for value in (r["held_out"], tempered):
            cells += ["-", "-"] if value is None else [f"{value:.4f}", f"{math.exp(value):.2f}"]
        table.add_row(r["loss"], *cells)
    Console().print(table)
    print(
        "loss ms: TempNet + loss, forward and backward to the logits (linear: hidden states); "
        "peak MiB: of each loss's own process"
    )


def main(
    loss: Annotated[Loss | None, typer.Option(help="One loss; default all.")] = None,
    out: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("runs/lm"),
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoints.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Train finished runs again.")] = False,
    steps: int = Config.steps,
    batch: int = Config.batch,
    context: int = Config.context,
    width: int = Config.width,
    layers: int = Config.layers,
    seed: int = Config.seed,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
):
    """Train a small GPT with learned temperatures on the standard library."""
    check(
        device, resume, overwrite, steps=steps, batch=batch, context=context, width=width,
        layers=layers,
    )  # fmt: skip
    config = Config(
        steps=steps,
        batch=batch,
        context=context,
        width=width,
        layers=layers,
        seed=seed,
        device=device,
    )
    # All before the first is trained: what is refused is refused at once.
    unfinished = [
        kind
        for kind in (Loss if loss is None else [loss])
        if not is_finished(out / kind, config, resume, overwrite)
    ]
    if loss is not None:
        for kind in unfinished:
            Trainer(kind, config, out).run(resume)
        return
    # Each loss in a process of its own: its peak memory is then its own too.
    options = sys.argv[1:]
    for kind in unfinished:
        command = [sys.executable, __file__, *options, "--loss", kind.value]
        try:
            status = subprocess.run(command).returncode
        except KeyboardInterrupt:
            status = 130
        if status:
            raise typer.Exit(status)
    report(out)
    import plots

    for path in plots.draw(out, Trainer(Loss.frozen, config, out)):
        print(path)


if __name__ == "__main__":
    start(main)
