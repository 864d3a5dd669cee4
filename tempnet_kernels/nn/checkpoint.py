"""Reads and writes TempNets: this package's files, the published ones, and models that hold one."""

import json
import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from tempnet_kernels.core.collectives import all_gather
from tempnet_kernels.nn.tempnet import TempNet

PUBLISHED = (
    "0.5 and 5.0 for GPT-2, 0.01 and 2.0 for LLaMA-1 and LLaMA-2, 0.01 and 1.2 for the released "
    "LLaMA-2 Chat"
)
SETTINGS = ("tau_min", "tau_max", "center", "dropout")  # what a state dict does not say
# A network is where all of these are under one prefix.
LANGUAGE = ("proj.0.weight", "last.weight")
CONTRASTIVE = ("proj.weight", "prototypes", "linear_1.weight", "scaler")

# Of a folder, the first kind that holds a network: the official converter writes its network twice.
TENSORS = ("*.safetensors",)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
RANKS = ("mp_rank_*/model*rng.pt", "mp_rank_*_model_states.pt")  # Megatron's and DeepSpeed's
DISTRIBUTED = ".metadata"  # of torch.distributed.checkpoint
# The file of a run that names the folder of its last step, and that folder.
TRACKERS = {
    "latest_checkpointed_iteration.txt": lambda x: f"iter_{int(x):07d}" if x.isdigit() else x,
    "latest": str,
}


def save_tempnet(tempnet: TempNet, path: str | os.PathLike) -> None:
    """Write ``tempnet`` and its settings to the safetensors file ``path``, under the published
    names (``tempnet.proj.0.weight``, ...). :func:`load_tempnet` reads it.

    The whole network is written also where ranks share it, by ``tempnet.shard`` or FSDP2: every
    rank of them makes the call, and the first one writes.
    """
    from safetensors.torch import save_file

    state = undivided(tempnet)
    writes = tempnet.process_group is None or tempnet.process_group.rank() == 0
    if any(hasattr(x, "full_tensor") for x in state.values()):
        state = {k: x.full_tensor() if hasattr(x, "full_tensor") else x for k, x in state.items()}
        writes = dist.get_rank() == 0
    tensors = {f"tempnet.{k}": x.detach().contiguous() for k, x in state.items()}
    if writes:
        save_file(tensors, path, {"format": "pt", "tempnet": json.dumps(settings_of(tempnet))})


def undivided(tempnet):
    """The state dict with all columns; of a network that was sharded every rank makes the call."""
    state = tempnet.state_dict()
    if tempnet.process_group is not None:
        parts = all_gather(state["proj.0.weight"].detach(), tempnet.process_group)
        state["proj.0.weight"] = torch.cat(parts.unbind(), 1)
    return state


def load_tempnet(
    source: str | os.PathLike | Mapping[str, Any],
    *,
    prefix: str | None = None,
    tau_min: float | None = None,
    tau_max: float | None = None,
    center: Literal["max"] | None = None,
) -> TempNet:
    """The :class:`TempNet` of a checkpoint, float32 on the CPU and in evaluation mode.

    Args:
        source: a mapping from names to tensors, nested or not; a file, safetensors or of
            ``torch.save``; or a folder: of Hugging Face files, of a step of Megatron or DeepSpeed
            (``mp_rank_*``), of ``torch.distributed.checkpoint``, or the folder of such steps with
            the file that names the last one. The network may have any prefix (``tempnet.``,
            ``module.tempnet.``, Megatron's ``model.tempnet_model.``). What else is there is not
            read, and of a pickle nothing is run: objects in it that are not tensors are left out.
            A ``.metadata`` of ``torch.distributed.checkpoint`` is read as torch reads it, which
            runs what it says.
        prefix: of the network, where there are several; the error lists them.
        tau_min, tau_max, center: as in :class:`TempNet`. Default: what the checkpoint says, as
            those of :func:`save_tempnet` and ``apply_tempnet`` do. The published ones do not say
            the bounds.

    The parts of a network whose first layer tensor-parallel ranks share are put together.

    Raises:
        FileNotFoundError: no such file, or a folder without a file of tensors.
        ValueError: a file cannot be read; no TempNet or several; a tensor is missing or has another
            shape; or the bounds are neither in the checkpoint nor given.
    """
    tensors, settings = read_tempnet(source, prefix)
    given = {"tau_min": tau_min, "tau_max": tau_max, "center": center}
    settings |= {name: value for name, value in given.items() if value is not None}
    missing = [name for name in ("tau_min", "tau_max") if name not in settings]
    if missing:
        raise ValueError(
            f"load_tempnet: {_name(source)} does not say {' and '.join(missing)}: pass those of "
            f"its training, {PUBLISHED}"
        )
    hidden_size, vocab_size = tensors["proj.0.weight"].shape
    tempnet = TempNet(vocab_size, hidden_size=hidden_size, **settings)
    tempnet.load_state_dict(tensors)
    return tempnet.eval()


def settings_of(tempnet):
    """What the state dict does not say, for JSON."""
    dropout = tempnet.proj[2].p
    return {name: dropout if name == "dropout" else getattr(tempnet, name) for name in SETTINGS}


def read_tempnet(source, prefix=None):
    """(tensors under the names of TempNet's state dict, settings by name) of a checkpoint."""
    read, settings = contents(source)
    return tensors_of(read, choose(read, prefix, source), source), settings


def choose(read, prefix, source):
    """``prefix`` if there is a TempNet under it; for None that of the only one there is."""
    networks = prefixes(read)
    found = ", ".join(repr(network) for network in networks)
    if prefix is not None and prefix not in networks:
        raise ValueError(
            f"load_tempnet: prefix must be that of a TempNet of {_name(source)}, one of "
            f"{found or '(none)'}, got {prefix!r}"
        )
    if prefix is None and len(networks) > 1:
        raise ValueError(
            f"load_tempnet: {_name(source)} must hold one TempNet, got {len(networks)}: choose "
            f"with prefix, one of {found}"
        )
    if not networks:
        others = ", ".join(repr(network) for network in prefixes(read, CONTRASTIVE))
        hint = f"; the ContrastiveTempNets under {others} are not for language models"
        if not read:
            raise ValueError(
                f"load_tempnet: {_name(source)} holds no tensors with names: of a module that was "
                "saved whole, save the state dict, torch.save(module.state_dict(), path)"
            )
        raise ValueError(
            f"load_tempnet: {_name(source)} must hold one TempNet, which TempNetCrossEntropyLoss "
            "or apply_tempnet trains (proj.0.weight to last.bias under one prefix), got none in "
            f"{len(read)} tensors{hint if others else ''}"
        )
    return networks[0] if prefix is None else prefix


def prefixes(names, kind=LANGUAGE):
    """The prefixes of ``names`` under which there is a network. Those of an optimizer's state are
    left out: Megatron's has tensors of the same names."""
    first, *others = kind
    found = (name.removesuffix(first) for name in names if name.endswith(first))
    return sorted(
        prefix
        for prefix in found
        if (not prefix or prefix.endswith("."))
        and not prefix.startswith("optimizer.")
        and all(prefix + other in names for other in others)
    )


def tensors_of(read, prefix, source):
    """The TempNet under ``prefix``, checked: tensors under the names of its state dict."""
    first = read[prefix + "proj.0.weight"]()
    if first.dim() != 2 or not first.numel():
        raise ValueError(
            f"load_tempnet: {prefix}proj.0.weight of {_name(source)} must have shape "
            f"(hidden_size, V), got {tuple(first.shape)}; of a model that DeepSpeed's ZeRO-3 or "
            "FSDP shares out, save the whole state dict"
        )
    h, v = first.shape
    with torch.device("meta"):
        expected = TempNet(v, hidden_size=h).state_dict()
    tensors = {}
    for name, parameter in expected.items():
        if prefix + name not in read:
            raise ValueError(f"load_tempnet: the TempNet of {_name(source)} has no {prefix}{name}")
        x = tensors[name] = first if name == "proj.0.weight" else read[prefix + name]()
        # The official scaler is 0-d.
        if x.shape != parameter.shape and (name, x.dim()) != ("scaler", 0):
            raise ValueError(
                f"load_tempnet: {prefix}{name} of {_name(source)} must have shape "
                f"{tuple(parameter.shape)}, got {tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise ValueError(
                f"load_tempnet: {prefix}{name} of {_name(source)} must be of a float dtype, got "
                f"{x.dtype}"
            )
    return tensors


def contents(source):
    """(name -> function that reads the tensor, settings by name) of a checkpoint."""
    if isinstance(source, Mapping):
        return _flat(source), {}
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"load_tempnet: {path} does not exist: pass the file or the folder of a checkpoint"
        )
    read, settings = _file(path) if path.is_file() else _folder(path)
    for name in ("tau_min", "tau_max"):  # null says nothing, but that there is no center
        if settings.get(name, 0) is None:
            del settings[name]
    return read, {name: settings[name] for name in SETTINGS if name in settings}


def _folder(path):
    found = None
    for kind in (_tensor_files, _pickle_files, _ranks, _distributed, _last_step):
        here = kind(path)
        if here is not None and (prefixes(here[0]) or prefixes(here[0], CONTRASTIVE)):
            read, settings = here
            return read, settings | _of_config(path)
        found = found or here
    if found is None:
        patterns = ", ".join((*TENSORS, *PICKLES, *RANKS, DISTRIBUTED, *TRACKERS))
        raise FileNotFoundError(
            f"load_tempnet: {path} holds none of {patterns}: pass the file, if it has another name"
        )
    return found


def _of_config(path):
    config = path / "config.json"
    if not config.exists():
        return {}
    try:
        return dict(json.loads(config.read_text()).get("tempnet") or {})
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"load_tempnet: {config} must be a JSON object; it may hold one with "
            f"{', '.join(SETTINGS)} under 'tempnet'"
        ) from error


def _union(files):
    """Of files that each hold a part."""
    read, settings, where = {}, {}, {}
    for file in files:
        tensors, of_file = _file(file)
        for prefix in prefixes(tensors):
            if prefix in where:
                raise ValueError(
                    f"load_tempnet: {where[prefix]} and {file} both hold a TempNet under "
                    f"{prefix!r}: pass one of the files"
                )
            where[prefix] = file
        read |= tensors
        settings |= of_file
    return (read, settings) if files else None


def _glob(path, patterns):
    return sorted(file for pattern in patterns for file in path.glob(pattern) if file.is_file())


def _tensor_files(path):
    return _union(_glob(path, TENSORS))


def _pickle_files(path):
    ranks = _glob(path, RANKS)
    return _union([file for file in _glob(path, PICKLES) if file not in ranks])


def _ranks(path):
    ranks = {}
    for file in _glob(path, RANKS):
        # Each stage of a pipeline may hold a TempNet; only that of the last one was trained.
        rank = re.search(r"mp_rank_(\d+)", str(file.relative_to(path)))[1]
        ranks.setdefault(rank, {}).update(_file(file)[0])
    if not ranks:
        return None
    first, *others = ranks.values()
    read = {
        name: partial(_joined, name, [function, *(rank[name] for rank in others if name in rank)])
        for name, function in first.items()
    }
    return read, {}


def _joined(name, parts):
    """A tensor of tensor-parallel ranks: copies, or the first layer's columns."""
    first, *others = (part() for part in parts)
    if all(torch.equal(first, x) for x in others):
        return first
    if name.endswith("proj.0.weight"):
        return torch.cat([first, *others], 1)
    raise ValueError(
        f"load_tempnet: {name} is not the same on the {len(parts)} ranks, so they hold copies that "
        "drifted apart: pass the file of one of them"
    )


def _distributed(path):
    if not (path / DISTRIBUTED).exists():
        return None
    from torch.distributed import checkpoint

    try:
        entries = checkpoint.FileSystemReader(path).read_metadata().state_dict_metadata
    except Exception as error:
        raise ValueError(
            f"load_tempnet: torch.distributed.checkpoint cannot read {path / DISTRIBUTED}: it is "
            f"cut short, or the package that wrote it is not installed ({error})"
        ) from error

    def read(name, entry):
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        reader = checkpoint.FileSystemReader(path)
        with warnings.catch_warnings():  # that this is one process, which no_dist says
            warnings.simplefilter("ignore", UserWarning)
            checkpoint.load({name: tensor}, storage_reader=reader, no_dist=True)
        return tensor

    tensors = {name: entry for name, entry in entries.items() if hasattr(entry, "size")}
    return {name: partial(read, name, entry) for name, entry in tensors.items()}, {}


def _last_step(path):
    for tracker, folder in TRACKERS.items():
        if (path / tracker).is_file():
            step = path / folder((path / tracker).read_text().strip())
            if not step.is_dir():
                raise FileNotFoundError(
                    f"load_tempnet: {path / tracker} names {step.name}, which is not there"
                )
            return _folder(step)
    return None


class _LeftOut:
    """Stands for an object of a pickle that is not of tensors."""

    def __new__(cls, *args):
        return super().__new__(cls)

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


def _file(path):
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            file = safe_open(path, "pt")
            settings = json.loads((file.metadata() or {}).get("tempnet", "{}"))
        except (SafetensorError, ValueError) as error:
            raise ValueError(
                f"load_tempnet: {path} is not a whole safetensors file ({error}): copy it again, "
                "or fetch it if it is a Git LFS pointer"
            ) from error
        return {k: partial(file.get_tensor, k) for k in file.keys()}, settings  # noqa: SIM118
    try:
        loaded = _unpickled(path)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(
            f"load_tempnet: torch.load(weights_only=True) cannot read {path}, which is cut short "
            f"or not of torch.save ({type(error).__name__}): copy it again; or, if you trust it, "
            "pass the mapping, load_tempnet(torch.load(path, weights_only=False))"
        ) from error
    return (_flat(loaded) if isinstance(loaded, Mapping) else {}), {}


def _unpickled(path):
    options = {"map_location": "cpu", "weights_only": True}
    if not zipfile.is_zipfile(path):  # the format before torch 1.6
        return torch.load(path, **options)
    # A training's checkpoint also holds its arguments, random states and the like.
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    with torch.serialization.safe_globals([(_LeftOut, name) for name in names]):
        return torch.load(path, **options, mmap=True)


def _flat(nested, prefix=""):
    flat = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            flat[f"{prefix}{key}"] = lambda value=value: value
    return flat


def _name(source):
    return "the mapping" if isinstance(source, Mapping) else str(source)
