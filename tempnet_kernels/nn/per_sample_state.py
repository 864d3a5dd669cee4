"""What a loss remembers of each sample of the training set."""

import torch
from torch import nn

from tempnet_kernels.core import register
from tempnet_kernels.ops import per_sample_state as _per_sample_state  # noqa: F401


class PerSampleState(nn.Module):
    """Float32 tensors ``[num_samples]``: in the state dict, moved with the module, but no buffers,
    which DDP would broadcast and ``half()`` round.

    Args:
        num_samples: their length.
        initial: name -> the value of a sample that was never visited.
    """

    def __init__(self, num_samples, initial):
        super().__init__()
        self.initial = initial
        self.in_step = False  # known to be the same on all ranks
        for name, x in initial.items():
            setattr(self, name, torch.full((num_samples,), x, dtype=torch.float32))

    def read(self, names, ids, backend="auto"):
        """``[K, B]``: of the tensors of these names, the values at ``ids``; inf outside."""
        return self._operator("read_samples", ids, backend)(self._tables(names), ids)

    @torch.no_grad()
    def write(self, names, ids, values, backend="auto"):
        """The new values ``[K, B]`` at ``ids``; of equal ids the last one counts, on every
        device."""
        if ids.device.type == "cpu":
            order = ids.new_empty(0)
        else:
            ids, order = torch.sort(ids, stable=True)
        write = self._operator("write_samples_", ids, backend)
        write(self._tables(names), ids, order, values.to(torch.float32))

    def _tables(self, names):
        return [getattr(self, name) for name in names]

    def _operator(self, name, ids, backend):
        chosen = register.pick("RobustContrastiveLoss", name, backend, ids.device)
        return register.operator(name, chosen)

    def fingerprint(self):
        """A number, 0-d on the device, that differs where states do; exact, so in whatever order it
        is summed. 0 once they were the same: from then on every rank writes the same."""
        if self.in_step:
            return 0
        bits = (getattr(self, name).view(torch.int32) for name in self.initial)
        return sum(x.sum(dtype=torch.int64) for x in bits) % (1 << 31)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for name, initial in self.initial.items():
            value = getattr(self, name)
            device = fn(value.new_empty(0)).device
            if value.is_meta and device.type != "meta":
                setattr(self, name, torch.full_like(value, initial, device=device))
            elif value.device != device:
                setattr(self, name, value.to(device))
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination.update((prefix + name, getattr(self, name)) for name in self.initial)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
    ):
        self.in_step = False
        for name in self.initial:
            value, loaded = getattr(self, name), state_dict.get(prefix + name)
            if loaded is None:
                missing.append(prefix + name)
            elif loaded.shape != value.shape:
                errors.append(
                    f"{prefix}{name} is of {tuple(loaded.shape)} samples, "
                    f"the loss of {tuple(value.shape)}"
                )
            elif value.is_meta or local_metadata.get("assign_to_params_buffers", False):
                setattr(self, name, loaded.detach().to(torch.float32).contiguous())
            else:
                value.copy_(loaded)
        own = {prefix + name for name in self.initial}
        unexpected += [key for key in state_dict if key.startswith(prefix) and key not in own]

    def extra_repr(self):
        return ", ".join(f"{name}: {tuple(getattr(self, name).shape)}" for name in self.initial)
