"""What the modules for inference servers share; imports none of them."""

import torch

from tempnet_kernels.nn import load_tempnet

CHUNK_BYTES = 64 << 20  # of the float32 copies that a TempNet makes of the logits
SETTINGS = {
    "path": str,
    "tau_min": (int, float),
    "tau_max": (int, float),
    "center": str,
    "padded_vocabulary": bool,
}


class ServedTempNet:
    """A TempNet that divides logits by the temperatures it predicts.

    Args:
        function: the name that errors begin with.
        settings: the path of a checkpoint, or a dict with ``path`` and, where they are needed,
            ``tau_min``, ``tau_max`` and ``center`` as in :func:`tempnet_kernels.nn.load_tempnet`
            and ``padded_vocabulary``: True where the logits have more columns than the TempNet,
            the last of which are no tokens.

    Raises:
        TypeError, ValueError: the settings.
        FileNotFoundError, ValueError: as :func:`tempnet_kernels.nn.load_tempnet`.
    """

    def __init__(self, function, settings):
        settings = {"path": settings} if isinstance(settings, str) else settings
        if not isinstance(settings, dict):
            raise TypeError(
                f"{function}: tempnet must be a path or a dict of {', '.join(SETTINGS)}, "
                f"got {settings!r}"
            )
        for name, value in settings.items():
            if name not in SETTINGS:
                raise ValueError(
                    f"{function}: tempnet has the unknown key {name!r}; known are "
                    f"{', '.join(SETTINGS)}"
                )
            if not isinstance(value, SETTINGS[name]):
                raise TypeError(f"{function}: {name} of tempnet has the wrong type: {value!r}")
        if "path" not in settings:
            raise ValueError(f"{function}: tempnet must have a path, got {settings!r}")
        self.function = function
        self.padded = settings.get("padded_vocabulary", False)
        given = {k: v for k, v in settings.items() if k not in ("path", "padded_vocabulary")}
        self.tempnet = load_tempnet(settings["path"], **given).requires_grad_(False)

    def check_columns(self, columns):
        """Raise ValueError where logits of ``columns`` columns are not those of this TempNet."""
        v = self.tempnet.vocab_size
        if columns < v:
            raise ValueError(
                f"{self.function}: the logits must have the TempNet's {v} columns, got {columns}: "
                "take the TempNet that was trained with this model"
            )
        if columns > v and not self.padded:
            raise ValueError(
                f"{self.function}: the logits must have the TempNet's {v} columns, got {columns}: "
                "take the TempNet that was trained with this model or, if the last "
                f"{columns - v} are padding, set padded_vocabulary to true"
            )

    @torch.no_grad()
    def divide(self, logits, where=None):
        """Divide each row of ``logits`` ``[rows, columns]`` by its temperature, in place.

        Unchanged are rows where ``where`` ``[rows]`` is False, and those without a temperature:
        with a NaN or +inf, or nothing but -inf. Nothing is read back from the device.
        """
        v = self.tempnet.vocab_size
        n = max(1, CHUNK_BYTES // (4 * v))
        for first in range(0, logits.shape[0], n):
            z = logits[first : first + n]
            tau = self.tempnet(z[:, :v])  # (rows of the chunk,) fp32
            kept = tau.isnan()
            if where is not None:
                kept |= ~where[first : first + n]
            z.div_(tau.masked_fill(kept, 1)[:, None])
        return logits


def to_device(values, device):
    """A tensor of ``values`` on ``device``, for which the host does not wait."""
    pinned = torch.device(device).type == "cuda"
    return torch.tensor(values, pin_memory=pinned).to(device, non_blocking=True)


def of_vllm(function, vllm_config, vocab_size):
    """The TempNet that ``additional_config`` of vLLM's configuration names."""
    config = vllm_config.additional_config
    settings = config.get("tempnet") if isinstance(config, dict) else None
    if settings is None:
        raise ValueError(
            f"{function}: additional_config must say which TempNet: "
            'LLM(..., additional_config={"tempnet": "tempnet.safetensors"}), or '
            """--additional-config '{"tempnet": "tempnet.safetensors"}'; """
            f"got {config!r}"
        )
    served = ServedTempNet(function, settings)
    served.check_columns(vocab_size)
    return served


def vllm_wants(params):
    """Whether a request's logits are divided: it samples, and did not opt out."""
    return params.temperature > 0 and bool((params.extra_args or {}).get("tempnet", True))


def vllm_validate(function, params):
    value = (params.extra_args or {}).get("tempnet", True)
    if value not in (True, False):  # 1 and 0 too: vllm_xargs of the HTTP API has no booleans
        raise ValueError(
            f"{function}: tempnet in extra_args must be true or false, got {value!r}; which "
            "TempNet is said once, in additional_config"
        )
