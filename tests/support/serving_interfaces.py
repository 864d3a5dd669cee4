"""Stand-ins for what vLLM 0.33.0 and SGLang 0.5.23 give a logits processor: interfaces with the
names, signatures and abstract methods of theirs, and samplers that call them in their order.
Neither package installs here."""

import importlib
import inspect
import json
import sys
import types
import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum, auto

import dill
import numpy as np
import torch

from tempnet_kernels.nn import TempNet

V = 40


def module_with(monkeypatch, interface, names, module):
    """Import ``module`` afresh, with a module ``interface`` that holds ``names``."""
    parts = interface.split(".")
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    vars(sys.modules[interface]).update(names)
    full = f"tempnet_kernels.integrations.{module}"
    monkeypatch.delitem(sys.modules, full, raising=False)
    imported = importlib.import_module(full)
    # monkeypatch puts back what there was: nothing.
    monkeypatch.setitem(sys.modules, full, sys.modules.pop(full))
    return imported


def network(center=None, vocab_size=V, seed=0):
    """A TempNet whose temperatures differ by row."""
    torch.manual_seed(seed)
    tempnet = TempNet(vocab_size, 0.3, 2.0, hidden_size=16, center=center)
    with torch.no_grad():
        # Not steeper: rounding of a float32 product would show in the temperature.
        tempnet.proj[0].weight.normal_(0, 2)
        tempnet.proj[3].weight.normal_(0, 1)
        tempnet.last.weight.normal_(0, 2)
    return tempnet  # in training mode, as a trainer would save it


def plain_temperatures(tempnet, z):
    """The definition, float64, evaluation mode."""
    p = {name: x.double() for name, x in tempnet.state_dict().items()}
    z = z.double()
    if tempnet.center == "max":
        z = z - z.max(1, keepdim=True).values
    z = torch.where(z == -torch.inf, 0.0, z)
    x = z / z.norm(dim=1, keepdim=True).clamp_min(1e-12)
    h = torch.sigmoid(x @ p["proj.0.weight"].T + p["proj.0.bias"])
    h = h @ p["proj.3.weight"].T + p["proj.3.bias"]
    w = torch.softmax(h / p["scaler"].exp(), 1)
    t = ((w - 1 / h.shape[1]) * h) @ p["last.weight"].T + p["last.bias"]
    return tempnet.tau_min + (tempnet.tau_max - tempnet.tau_min) * torch.sigmoid(t)  # (rows, 1)


def probabilities(tempnet, z, temperature=1.0):
    """softmax(z / (temperature tau(z)))."""
    return torch.softmax(z.double() / (temperature * plain_temperatures(tempnet, z)), 1)


@dataclass
class SamplingParams:
    temperature: float = 1.0
    min_p: float = 0.0
    extra_args: dict | None = None


def vllm_config(additional_config, max_num_seqs=8, vocab_size=V):
    return types.SimpleNamespace(
        additional_config=additional_config,
        scheduler_config=types.SimpleNamespace(max_num_seqs=max_num_seqs),
        model_config=types.SimpleNamespace(get_vocab_size=lambda: vocab_size),
    )


class V2LogitsProcessor(ABC):
    def __init__(self, vllm_config, req_states):  # noqa: B027
        pass

    @classmethod  # noqa: B027
    def validate_params(cls, sampling_params):
        pass

    def add_request(self, req_idx, sampling_params):
        return True

    def apply_staged_writes(self):  # noqa: B027
        pass

    @abstractmethod
    def apply(self, logits, ctx):
        raise NotImplementedError


@dataclass(frozen=True)
class LogitsContext:
    """The fields that a processor without a token history reads."""

    expanded_idx_mapping: torch.Tensor
    idx_mapping_np: np.ndarray


class V2Sampler:
    """Model Runner V2: slots, and the processor before the temperature."""

    def __init__(self, processor_class, config, max_num_reqs=8, vocab_size=V, device="cpu"):
        states = types.SimpleNamespace(
            device=torch.device(device), max_num_reqs=max_num_reqs, vocab_size=vocab_size
        )
        self.processor = processor_class(config, states)
        self.temperature = np.zeros(max_num_reqs, dtype=np.float32)
        self.needs = np.zeros(max_num_reqs, dtype=bool)

    def add(self, slot, params):
        type(self.processor).validate_params(params)
        self.temperature[slot] = params.temperature
        self.needs[slot] = self.processor.add_request(slot, params)
        self.needs[slot] |= params.temperature not in (0.0, 1.0)

    @torch.inference_mode()
    def step(self, logits, slots, rows_of_each=None):
        """Processed logits. Request i of ``slots`` has ``rows_of_each[i]`` rows."""
        self.processor.apply_staged_writes()
        idx = np.array(slots, dtype=np.int32)
        if not self.needs[idx].any():
            return logits
        expanded = np.repeat(idx, rows_of_each or [1] * len(slots))
        logits = logits.float().clone()
        context = LogitsContext(torch.from_numpy(expanded), idx)
        logits = self.processor.apply(logits, context)
        temperature = torch.from_numpy(self.temperature[expanded])
        return logits / torch.where(temperature == 0, 1, temperature)[:, None]


class MoveDirectionality(Enum):
    UNIDIRECTIONAL = auto()
    SWAP = auto()


@dataclass(frozen=True)
class BatchUpdate:
    batch_size: int
    removed: list = field(default_factory=list)
    added: list = field(default_factory=list)
    moved: list = field(default_factory=list)


class V1LogitsProcessor(ABC):
    @classmethod
    def validate_params(cls, sampling_params):
        return None

    @abstractmethod
    def __init__(self, vllm_config, device, is_pin_memory):
        raise NotImplementedError

    @abstractmethod
    def apply(self, logits):
        raise NotImplementedError

    @abstractmethod
    def is_argmax_invariant(self):
        raise NotImplementedError

    @abstractmethod
    def update_state(self, batch_update):
        raise NotImplementedError


class CustomLogitProcessor(ABC):
    @abstractmethod
    def __call__(self, logits, custom_param_list=None):
        raise NotImplementedError

    @classmethod
    def to_str(cls):
        return json.dumps({"callable": dill.dumps(cls).hex()})

    @classmethod
    def from_str(cls, json_str):
        return dill.loads(bytes.fromhex(json.loads(json_str)["callable"]))()


class FinishAbort:
    def __init__(self, message=None, status_code=None, err_type=None):
        self.message, self.status_code, self.err_type = message, status_code, err_type


class Request:
    """SGLang's Req: a weak reference to itself is added to parameters that are a dict."""

    def __init__(self, custom_params, processor, temperature=1.0, top_k=1 << 30):
        if temperature == 0:
            temperature, top_k = 1.0, 1  # as SamplingParams does
        self.processor, self.to_finish = processor, None
        self.sampling_params = types.SimpleNamespace(temperature=temperature, top_k=top_k)
        if processor is not None and isinstance(custom_params, dict):
            custom_params = custom_params | {"__req__": weakref.proxy(self)}
        self.custom_params = custom_params


@torch.inference_mode()
def sglang_step(logits, requests, tokens=1):
    """Processed logits, ``tokens`` rows for each request: the processor, then the temperature."""
    logits = logits.clone()
    for string in {r.processor for r in requests if r.processor is not None}:
        rows = [i for i, r in enumerate(requests) if r.processor == string]
        index = torch.tensor([i * tokens + k for i in rows for k in range(tokens)])
        params = [requests[i].custom_params for i in rows for _ in range(tokens)]
        result = CustomLogitProcessor.from_str(string)(logits.index_select(0, index), params)
        logits.index_copy_(0, index, result.to(logits.dtype))
    temperature = torch.tensor([r.sampling_params.temperature for r in requests])
    return logits / temperature.repeat_interleave(tokens)[:, None]


def overridden(cls, interface):
    """(name, parameter names of the class, of the interface) of every method of the interface."""
    for name, method in vars(interface).items():
        if inspect.isroutine(method) or isinstance(method, classmethod):
            yield (
                name,
                list(inspect.signature(getattr(cls, name)).parameters),
                list(inspect.signature(getattr(interface, name)).parameters),
            )
