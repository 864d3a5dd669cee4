"""Reads and writes TempNets: this package's files, the published ones, and models that hold one."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from tempnet_kernels.nn.tempnet import TempNet

PUBLISHED = (
    "0.5 and 5.0 for GPT-2, 0.01 and 2.0 for LLaMA-1 and LLaMA-2, 0.01 and 1.2 for the released "
    "LLaMA-2 Chat"
)
# Of a folder, the first kind that is there: the official converter writes its network twice.
PATTERNS = (
    ("*.safetensors",),
    ("*.bin", "*.pt", "*.pth"),
    ("mp_rank_00/model_optim_rng.pt", "mp_rank_00_000/model_optim_rng.pt"),
)


def save_tempnet(tempnet, path):
    """Write ``tempnet`` and its settings to the safetensors file ``path``, under the published
    names (``tempnet.proj.0.weight``, ...). :func:`load_tempnet` reads it."""
    from safetensors.torch import save_file

    tensors = {f"tempnet.{k}": x.detach().contiguous() for k, x in tempnet.state_dict().items()}
    save_file(tensors, path, {"format": "pt", "tempnet": json.dumps(settings_of(tempnet))})


def load_tempnet(source, *, tau_min=None, tau_max=None, center=None):
    """The :class:`TempNet` of a checkpoint, float32 on the CPU and in evaluation mode.

    Args:
        source: a file (safetensors, or what ``torch.load`` reads with ``weights_only=True``), a
            folder of Hugging Face or Megatron files, or a mapping from names to tensors, nested or
            not. The network may have any prefix (``tempnet.``, ``module.tempnet.``, Megatron's
            ``model.tempnet_model``); what else is there is not read.
        tau_min, tau_max, center: as in :class:`TempNet`. Default: what the checkpoint says, as
            those of :func:`save_tempnet` and ``apply_tempnet`` do. The published ones do not say
            the bounds.

    Raises:
        FileNotFoundError: no such file, or a folder without a file of tensors.
        ValueError: no TempNet or several, a tensor is missing or has another shape, or the bounds
            are neither in the checkpoint nor given.
    """
    tensors, settings = read_tempnet(source)
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
    settings = {name: getattr(tempnet, name) for name in ("tau_min", "tau_max", "center")}
    return {**settings, "dropout": tempnet.proj[2].p}


def read_tempnet(source):
    """(tensors under the names of TempNet's state dict, settings by name) of a checkpoint."""
    read, settings = _contents(source)  # name -> function that reads the tensor
    networks = tempnet_prefixes(read)
    if len(networks) != 1:
        found = f"{len(networks)} ({', '.join(networks)})" if networks else "none"
        raise ValueError(
            f"load_tempnet: {_name(source)} must hold one TempNet (proj.0.weight to last.bias "
            f"under one prefix), got {found}"
        )
    (prefix,) = networks
    tensors = {
        name.removeprefix(prefix): function()
        for name, function in read.items()
        if name.startswith(prefix)
    }
    h, v = tensors["proj.0.weight"].shape
    expected = TempNet(v, hidden_size=h).to("meta").state_dict()
    for name, parameter in expected.items():
        if name not in tensors:
            raise ValueError(f"load_tempnet: the TempNet of {_name(source)} has no {name}")
        # The official scaler is 0-d.
        if tensors[name].shape != parameter.shape and (name, tensors[name].dim()) != ("scaler", 0):
            raise ValueError(
                f"load_tempnet: {name} of {_name(source)} must have shape "
                f"{tuple(parameter.shape)}, got {tuple(tensors[name].shape)}"
            )
    return {name: tensors[name] for name in expected}, settings


def tempnet_prefixes(names):
    """The prefixes under which there is a TempNet for language models."""
    first, last = "proj.0.weight", "last.weight"
    prefixes = (name.removesuffix(first) for name in names if name.endswith(first))
    return sorted(prefix for prefix in prefixes if prefix + last in names)


def _contents(source):
    if isinstance(source, Mapping):
        return _flat(source), {}
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"load_tempnet: {path} does not exist")
    if path.is_file():
        return _file(path)
    for patterns in PATTERNS:
        files = sorted(file for pattern in patterns for file in path.glob(pattern))
        if files:
            break
    else:
        raise FileNotFoundError(
            f"load_tempnet: {path} holds none of {', '.join(sum(PATTERNS, ()))}"
        )
    read, settings = {}, {}
    for file in files:
        tensors, of_file = _file(file)
        read |= tensors
        settings |= of_file
    config = path / "config.json"
    if config.exists():
        settings |= json.loads(config.read_text()).get("tempnet") or {}
    return read, settings


def _file(path):
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        file = safe_open(path, "pt")
        settings = json.loads((file.metadata() or {}).get("tempnet", "{}"))
        return {k: lambda k=k: file.get_tensor(k) for k in file.keys()}, settings  # noqa: SIM118
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(
            f"load_tempnet: torch.load(weights_only=True) cannot read {path}. If you trust the "
            "file, read it yourself and pass the mapping: "
            "load_tempnet(torch.load(path, weights_only=False))"
        ) from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"load_tempnet: {path} must hold a mapping, got {type(loaded).__name__}")
    return _flat(loaded), {}


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
