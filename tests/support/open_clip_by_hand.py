"""open_clip as a package made by hand, a tiny model, its loop and the page's patches.

open_clip cannot be imported where torchvision does not load, as beside a CPU build of torch: its
__init__ and utils.py need it. So the package has open_clip's files but not its __init__, and of
torchvision one class that is never used. The tokenizer, the image transforms and the data set,
which need torchvision too, are stand-ins. Nothing else is replaced.
"""

import contextlib
import importlib
import importlib.util
import re
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F

from tempnet_kernels.nn import ContrastiveTempNet

PAGE = Path(__file__).parents[2] / "docs/integrations/open_clip.md"
D, SAMPLES = 16, 24


@contextlib.contextmanager
def open_clip_by_hand():
    """The package ``open_clip`` of the installed files; sys.modules as before at the end."""
    mine = ("open_clip", "open_clip_train", "torchvision", "transformers")
    before = {name: x for name, x in sys.modules.items() if name.split(".")[0] in mine}
    for name in before:
        del sys.modules[name]
    package = types.ModuleType("open_clip")
    package.__path__ = list(importlib.util.find_spec("open_clip").submodule_search_locations)
    stand_ins = ("torchvision", "torchvision.ops", "torchvision.ops.misc")
    sys.modules |= {name: types.ModuleType(name) for name in stand_ins}
    sys.modules["torchvision.ops.misc"].FrozenBatchNorm2d = type("FrozenBatchNorm2d", (), {})
    # Not to be imported beside the stand-in; open_clip does without.
    sys.modules |= {"open_clip": package, "transformers": None}
    try:
        loss, model = (importlib.import_module(f"open_clip.{x}") for x in ("loss", "model"))
        package.ClipLoss = loss.ClipLoss
        package.CLIP, package.CustomTextCLIP = model.CLIP, model.CustomTextCLIP
        package.get_input_dtype = model.get_input_dtype
        package.get_model_config = lambda name: {"embed_dim": D}
        package.create_model_and_transforms = lambda *args, **kwargs: (tiny_clip(), None, None)
        for name in (
            "get_tokenizer", "build_zero_shot_classifier", "IMAGENET_CLASSNAMES",
            "OPENAI_IMAGENET_TEMPLATES", "trace_model", "create_loss",
        ):  # fmt: skip
            setattr(package, name, lambda *args, **kwargs: None)
        data = types.ModuleType("open_clip_train.data")
        data.get_data = lambda args, *_, **__: {"train": Data(args.batch_size)}
        importlib.import_module("open_clip_train")
        sys.modules["open_clip_train.data"] = data
        yield package
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] in mine]:
            del sys.modules[name]
        sys.modules.update(before)


def tiny_clip(**options):
    """open_clip's CLIP, of 8 x 8 images and 6 tokens."""
    vision = {"layers": 1, "width": 16, "head_width": 8, "patch_size": 4, "image_size": 8}
    text = {"context_length": 6, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    return sys.modules["open_clip"].CLIP(D, vision, text, output_dict=True, **options)


class Data:
    """What train_one_epoch takes for its data: the same random pairs in every epoch, with their
    ids where asked for; of one rank, its part of each batch."""

    def __init__(self, batch_size=8, ids=False, sizes=None, rank=0):
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(SAMPLES, 3, 8, 8, generator=generator)
        texts = torch.randint(1, 32, (SAMPLES, 6), generator=generator)
        every = (images, texts, torch.arange(SAMPLES))[: 3 if ids else 2]
        sizes = (batch_size,) if sizes is None else sizes
        batches = zip(*(x.split(sum(sizes)) for x in every), strict=True)
        self.batches = [tuple(x.split(sizes)[rank] for x in batch) for batch in batches]
        self.dataloader = self
        self.num_batches, self.num_samples = len(self.batches), SAMPLES

    def __iter__(self):
        return iter(self.batches)

    def set_epoch(self, epoch):
        pass


def patched(file):
    """The installed source of ``file`` with the page's patch of it; every hunk must fit once."""
    source = (Path(importlib.util.find_spec("open_clip_train").origin).parent / file).read_text()
    (patch,) = re.findall(
        rf"```diff\n--- open_clip_train/{file}\n[^\n]*\n(.*?)```", PAGE.read_text(), re.S
    )
    hunks = patch.split("@@\n")[1:]
    for hunk in hunks:
        lines = hunk.splitlines(keepends=True)
        # From the start of a line, as patch does.
        old, new = ("\n" + "".join(x[1:] for x in lines if x[0] in side) for side in (" -", " +"))
        assert source.count(old) == 1, f"{source.count(old)} times in {file}:\n{old}"
        source = source.replace(old, new)
    assert len(hunks) >= 2
    return source


def module_of(source, name):
    module = types.ModuleType(name)
    exec(compile(source, name, "exec"), module.__dict__)
    return module


def loop_args(**changes):
    args = {
        "device": "cpu", "precision": "fp32", "distill": False, "accum_freq": 1, "horovod": False,
        "skip_scheduler": True, "grad_clip_norm": 1.0, "rank": 0, "local_rank": 0, "world_size": 1,
        "log_every_n_steps": 1, "batch_size": 8, "wandb": False, "log_local": False,
    } | changes  # fmt: skip
    return types.SimpleNamespace(**args)


def train(
    loss, epochs=1, data=None, model=None, loop=None, freeze=True, optimizer=torch.optim.AdamW,
    tempnet_lr=1e-2, **changes,
):  # fmt: skip
    """open_clip's train_one_epoch, or that of ``loop``. Returns the model. SGD is for runs that are
    compared: Adam turns the rounding of a gradient that is 0 into steps."""
    model = tiny_clip() if model is None else model
    getattr(model, "module", model).logit_scale.requires_grad_(not freeze)
    loop = importlib.import_module("open_clip_train.train") if loop is None else loop
    groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    if list(loss.parameters()):
        groups.append({"params": list(loss.parameters()), "lr": tempnet_lr, "weight_decay": 0.0})
    optimizer = optimizer(groups, lr=1e-3)
    data = Data() if data is None else data
    for epoch in range(epochs):
        loop.train_one_epoch(
            model, {"train": data}, loss, epoch, optimizer, None, None, None, loop_args(**changes)
        )
    return model


def networks(seed=5):
    torch.manual_seed(seed)
    return {
        f"{side}_temp_gen": ContrastiveTempNet(D, num_prototypes=8, seed=i)
        for i, side in enumerate(("image", "text"))
    }


def features(n=8, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, n, D, generator=generator, dtype=torch.float64)
    x[1] += x[0]  # pairs that belong together
    return [side.to(dtype).requires_grad_() for side in F.normalize(x, dim=-1)]
