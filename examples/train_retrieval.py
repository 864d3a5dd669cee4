"""Find glyphs by name, or functions by docstring, with four contrastive losses.

    python examples/train_retrieval.py                             # 4 methods x 5 seeds
    python examples/train_retrieval.py --method tempnet --seed 0   # one run
    python examples/train_retrieval.py --data code --resume        # go on where it was stopped
    torchrun --nproc-per-node 2 examples/train_retrieval.py --method tempnet --seed 0

It needs ``pip install tensorboard matplotlib tqdm`` and no network. Everything is written to
runs/retrieval/<data>/<method>/<seed>, where a finished run is kept unless --overwrite is passed.

The methods, all of them ``RobustContrastiveLoss``: ``clip`` (one learned temperature), ``sogclr``
(one fixed temperature), ``isogclr`` (a table of temperatures) and ``tempnet`` (predicted
temperatures). Those of a seed start with the same encoders and see the same batches.
"""

import json
import math
import os
import statistics
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import retrieval_data
import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from loop import Loop, Refused, check, differing, is_finished, is_first, start
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tempnet_kernels.nn import ContrastiveTempNet, RobustContrastiveLoss


class Method(StrEnum):
    clip = "clip"
    sogclr = "sogclr"
    isogclr = "isogclr"
    tempnet = "tempnet"


class Data(StrEnum):
    glyphs = "glyphs"
    code = "code"


@dataclass(frozen=True)
class Config:
    data: str = Data.glyphs
    method: str = Method.tempnet
    seed: int = 0
    epochs: int = 15
    batch: int = 128
    width: int = 128
    lr: float = 1e-3
    tempnet_lr: float = 1e-3
    weight_decay: float = 0.1
    gamma: float = 0.8
    # In nats. The KL of B - 1 negatives is at most log(B - 1), 4.84 here: a larger rho, at which
    # every temperature would only fall, is refused. Chosen on 1,000 of the training names, where 2
    # is as good as 3.
    rho: float = 3.0
    tau: float = 0.07  # sogclr's; clip and isogclr begin with it
    tau_min: float = 0.01
    tau_max: float = 0.15
    save_every: int = 100
    texts: int | None = None  # train with this many; None: all
    device: str = "cpu"


METRICS = ("image_to_text@1", "image_to_text@10", "text_to_image@1", "text_to_image@10")


# Model.


def move(x, device):
    """A tensor, or a tuple of them, to the device."""
    return tuple(y.to(device) for y in x) if isinstance(x, tuple) else x.to(device)


def shifted(images, corners):
    """Each square image cut anew from within a margin of 2 pixels; ``corners [B, 2]`` in 0..4."""
    side = images.shape[1]
    windows = F.pad(images, (2, 2, 2, 2)).unfold(1, side, 1).unfold(2, side, 1)
    down, right = corners.unbind(1)
    return windows[torch.arange(len(images)), down, right]


class GlyphEncoder(nn.Module):
    def __init__(self, width):
        super().__init__()

        def block(channels, to, stride):
            # Norms of a sample, not of a batch: results then do not depend on the processes.
            convolution = nn.Conv2d(channels, to, 3, stride, padding=1, bias=False)
            return nn.Sequential(convolution, nn.GroupNorm(8, to), nn.ReLU())

        self.blocks = nn.Sequential(
            block(1, 32, 2), block(32, 64, 2), block(64, 64, 1), block(64, 128, 2)
        )  # fmt: skip
        self.out = nn.Linear(128 * 16, width)

    def forward(self, images):
        """[B, 32, 32] uint8 -> [B, width]."""
        x = images.unsqueeze(1).float() / 255
        return F.normalize(self.out(self.blocks(x).flatten(1)), dim=1)


class BagEncoder(nn.Module):
    def __init__(self, vocabulary, width):
        super().__init__()
        self.embedding = nn.EmbeddingBag(vocabulary, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )

    def forward(self, bags):
        """(words, offsets of the B bags) -> [B, width]."""
        return F.normalize(self.mlp(self.embedding(*bags)), dim=1)


class Retrieval(nn.Module):
    """Encoders and loss, in one module for DistributedDataParallel."""

    def __init__(self, config, num_samples, vocabulary):
        super().__init__()
        width = config.width
        if config.data == Data.glyphs:
            self.image = GlyphEncoder(width)
        else:
            self.image = BagEncoder(vocabulary["image"], width)
        self.text = BagEncoder(vocabulary["text"], width)
        # Drawn after the encoders, which start the same for every method.
        options = {"tau": config.tau}
        if config.method == Method.tempnet:
            options = {}
            for i, side in enumerate(("image", "text")):
                options[f"{side}_temp_gen"] = ContrastiveTempNet(
                    width, config.tau_min, config.tau_max, seed=2 * config.seed + i
                )
        elif config.method == Method.isogclr:
            options |= {"tau_min": config.tau_min, "tau_max": config.tau_max}
        self.loss = RobustContrastiveLoss(
            num_samples, config.gamma, config.rho, method=config.method, **options
        )

    def forward(self, images, texts, ids, text_ids):
        return self.loss(
            self.image(images), self.text(texts), ids, image_ids=ids, text_ids=text_ids
        )


# Training.


def check_rho(config):
    """The loss refuses a rho that no softmax over the negatives of a batch reaches."""
    least = math.floor(math.exp(config.rho)) + 2
    if config.method in (Method.isogclr, Method.tempnet) and 1 < config.batch < least:
        raise Refused(
            f"--batch must be at least {least} for --method {config.method}, with rho "
            f"{config.rho} below the log of its negatives, got {config.batch}"
        )


def folder_of(config, out):
    return out / config.data / config.method / str(config.seed)


class Trainer(Loop):
    def __init__(self, config, out):
        self.config, self.device, self.save_every = config, config.device, config.save_every
        self.out = folder_of(config, out)
        self.label = f"{config.method:7} {config.seed}"
        self.train, self.held_out, vocabulary = retrieval_data.load(config.data, out / config.data)
        if config.texts is not None:
            self.train = self.train.of_texts(config.texts)
            self.held_out = self.held_out.of_texts(config.texts // 4)
        if not 2 <= config.batch <= len(self.train):
            raise Refused(
                f"--batch must be in [2, {len(self.train)}], the training pairs, got {config.batch}"
            )
        self.batches = len(self.train) // config.batch
        self.steps = config.epochs * self.batches
        torch.manual_seed(config.seed)
        self.model = Retrieval(config, len(self.train), vocabulary).to(self.device)
        if config.method == Method.tempnet:
            self.init_prototypes()
        self.modules = {"model": self.model}
        encoders = [*self.model.image.parameters(), *self.model.text.parameters()]
        matrices = [p for p in encoders if p.dim() > 1]
        others = [p for p in encoders if p.dim() <= 1]
        groups = [
            {"params": matrices, "lr": config.lr, "weight_decay": config.weight_decay},
            {"params": others, "lr": config.lr, "weight_decay": 0.0},
        ]
        temperature = list(self.model.loss.parameters())
        if temperature:
            lr = config.tempnet_lr if config.method == Method.tempnet else config.lr
            groups.append({"params": temperature, "lr": lr, "weight_decay": 0.0})
        for group in groups:
            group["peak"] = group["lr"]
        self.optimizer = torch.optim.AdamW(groups)
        self.parallel = self.model
        if dist.is_initialized():
            self.parallel = DistributedDataParallel(self.model)

    def init_prototypes(self):
        """Each side's network begins with features of the other side."""
        network = self.model.loss.image_temp_gen
        rows = torch.randperm(len(self.train), generator=self.generator(0))
        rows = rows[: network.prototypes.shape[0]]
        model, pairs = self.model, self.train
        network.init_prototypes(self.encode(model.text, pairs.texts, pairs.text_ids[rows]))
        model.loss.text_temp_gen.init_prototypes(self.encode(model.image, pairs.images, rows))

    def generator(self, i):
        return torch.Generator().manual_seed(self.config.seed * 1_000_003 + i)

    def batch_of(self, step):
        """Arguments of the model, this process's part of the batch; the same for the same seed and
        step, so a resumed run sees the same data."""
        epoch, i = divmod(step, self.batches)
        order = torch.randperm(len(self.train), generator=self.generator(epoch))
        rows = order[i * self.config.batch : (i + 1) * self.config.batch]
        corners = torch.randint(5, (len(rows), 2), generator=self.generator(500_000 + step))
        if dist.is_initialized():
            world, rank = dist.get_world_size(), dist.get_rank()
            rows, corners = (x.tensor_split(world)[rank] for x in (rows, corners))
        images, text_ids = self.train.images[rows], self.train.text_ids[rows]
        if self.config.data == Data.glyphs:
            images = shifted(images, corners)
        batch = (images, self.train.texts[text_ids], rows, text_ids)
        return [move(tensors, self.device) for tensors in batch]

    def train_step(self):
        warmup = max(1, self.steps // 20)
        factor = min(1.0, (self.step + 1) / warmup)
        factor *= 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        loss = self.parallel(*self.batch_of(self.step))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def measure(self):
        row = {}
        stats = self.model.loss.temperature_stats()
        for side, values in stats._asdict().items():
            row |= {f"tau_{side}_{k}": v for k, v in values.floats().items()}
        if self.step % self.batches == 0:
            row |= self.recall()
        return row

    @torch.no_grad()
    def encode(self, encoder, items, rows):
        """Features of the images or bags ``rows``."""
        parts = [encoder(move(items[part], self.device)) for part in rows.split(1024)]
        return torch.cat(parts)

    def recall(self):
        """Of each held-out image among the held-out texts, and of each text, for which any of its
        images counts, among the images."""
        pairs = self.held_out
        rows, texts = torch.arange(len(pairs)), torch.arange(len(pairs.texts))
        image = self.encode(self.model.image, pairs.images, rows)
        text = self.encode(self.model.text, pairs.texts, texts)
        similarity = image @ text.T
        own = pairs.text_ids[:, None].to(self.device) == texts.to(self.device)
        row = {}
        for name, x, right in (
            ("image_to_text", similarity, own), ("text_to_image", similarity.T, own.T),
        ):  # fmt: skip
            best = x.masked_fill(~right, -math.inf).amax(1, keepdim=True)
            before = ((x >= best) & ~right).sum(1)  # a tie is no success
            row |= {f"{name}@{k}": (before < k).float().mean().item() for k in (1, 10)}
        return row

    @torch.no_grad()
    def temperatures(self):
        """Those that a TempNet predicts for the training images and for their texts."""
        model, pairs = self.model.eval(), self.train
        image = self.encode(model.image, pairs.images, torch.arange(len(pairs)))
        text = self.encode(model.text, pairs.texts, pairs.text_ids)
        return model.loss.image_temp_gen(image).cpu(), model.loss.text_temp_gen(text).cpu()

    def result(self, rows):
        return {
            "config": asdict(self.config),
            "pairs": len(self.train),
            "step_time_ms": statistics.median(row["step_ms"] for row in rows),
            "time_s": sum(row["step_ms"] for row in rows) / 1e3,
            **{name: rows[-1][name] for name in METRICS},
        }


def finished(out, config):
    """{method: [its results, one a seed]} of the runs with this configuration but for the seed."""
    found = {}
    for method in Method:
        for path in sorted((out / config.data / method).glob("*/result.json")):
            result = json.loads(path.read_text())
            if differing(config, result["config"]) <= {"method", "seed", "device"}:
                found.setdefault(method, []).append(result)
    return found


def report(out, config):
    table = Table(title=f"{config.data}: recall on {retrieval_data.HELD_OUT} held-out texts")
    for column in ("method", "seeds", *METRICS, "time s"):
        table.add_column(column.replace("_to_", " to "), justify="right")
    for method, results in finished(out, config).items():
        cells = []
        for name in METRICS:
            values = [result[name] for result in results]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        time = statistics.mean(result["time_s"] for result in results)
        table.add_row(method, str(len(results)), *cells, f"{time:.0f}")
    Console().print(table)
    print("mean ± standard deviation over seeds; time: of the training steps")


def main(
    method: Annotated[Method | None, typer.Option(help="One method; default all four.")] = None,
    seed: Annotated[int | None, typer.Option(help="One seed; default the first --seeds.")] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds.")] = 5,
    data: Annotated[Data, typer.Option(help="Glyphs and names, or code and docstrings.")] = (
        Data.glyphs
    ),
    out: Annotated[Path, typer.Option(help="Where everything is written.")] = (
        Path("runs/retrieval")
    ),
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoints.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Train finished runs again.")] = False,
    epochs: int = Config.epochs,
    batch: int = Config.batch,
    width: int = Config.width,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
):
    """Train image and text encoders with four contrastive losses."""
    check(device, resume, overwrite, seeds=seeds, epochs=epochs, width=width)
    several = "WORLD_SIZE" in os.environ
    if several:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        if is_first():
            retrieval_data.load(data, out / data)
        dist.barrier()  # the first process makes the cache, the others read it
    configs = [
        Config(
            data=data.value, method=one_method.value, seed=one_seed, epochs=epochs, batch=batch,
            width=width, device=device,
        )
        for one_seed in (range(seeds) if seed is None else [seed])
        for one_method in (Method if method is None else [method])
    ]  # fmt: skip
    # All before the first is trained: what is refused is refused at once.
    for config in configs:
        check_rho(config)
    unfinished = [c for c in configs if not is_finished(folder_of(c, out), c, resume, overwrite)]
    for config in unfinished:
        trainer = Trainer(config, out)
        trainer.run(resume)
        del trainer
    first = is_first()
    if several:
        # DDP's threads must have ended before the group does, or gloo hangs now and then.
        dist.barrier()
        dist.destroy_process_group()
    if first:
        report(out, configs[-1])
        import retrieval_plots

        for path in retrieval_plots.draw(out, configs[-1]):
            print(path)


if __name__ == "__main__":
    start(main)
