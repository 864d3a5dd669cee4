"""vLLM's Model Runner V2: sampling with the temperatures of a TempNet.

``LLM(model, logits_processors=["tempnet_kernels.integrations.vllm:TempNetLogitsProcessor"],
additional_config={"tempnet": "tempnet.safetensors"})``; see ``docs/integrations/vllm.md``.
"""

import numpy as np

from tempnet_kernels.integrations import _serving

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor
except ImportError as error:
    raise ImportError(
        "tempnet_kernels.integrations.vllm: there is no logits processor of vLLM's Model Runner V2 "
        "(vllm 0.33 has it): pip install vllm, or for an older one or the V1 runner use "
        "tempnet_kernels.integrations.vllm_v1:TempNetLogitsProcessorV1"
    ) from error


class TempNetLogitsProcessor(LogitsProcessor):
    """Divides the logits of requests that sample by the temperature predicted for each row.

    vLLM calls it before its own temperature, by which it divides too: leave that at 1. A request
    with ``temperature=0`` or ``extra_args={"tempnet": False}`` is untouched, to the bit.

    ``additional_config["tempnet"]`` is the path of a checkpoint, or a dict with ``path``,
    ``tau_min``, ``tau_max``, ``center`` (as in :func:`tempnet_kernels.nn.load_tempnet`) and
    ``padded_vocabulary`` (True where the last columns of the logits are no tokens, and not the
    TempNet's).

    Raises:
        TypeError, ValueError, FileNotFoundError: when the engine starts, for settings that name no
            TempNet, or one of another vocabulary.
    """

    def __init__(self, vllm_config, req_states):
        self._served = _serving.of_vllm(
            "TempNetLogitsProcessor", vllm_config, req_states.vocab_size
        )
        self._device = req_states.device
        self._wanted = np.zeros(req_states.max_num_reqs, dtype=bool)  # by request slot
        self._stage()

    @classmethod
    def validate_params(cls, sampling_params):
        """Raise ValueError for a ``tempnet`` in ``extra_args`` that is not a bool."""
        _serving.vllm_validate("TempNetLogitsProcessor", sampling_params)

    def add_request(self, req_idx, sampling_params):
        """Whether the request in slot ``req_idx`` is divided."""
        wanted = _serving.vllm_wants(sampling_params)
        self._staged &= wanted == bool(self._wanted[req_idx])
        self._wanted[req_idx] = wanted
        if wanted:
            # Not before: vLLM constructs this where its sleep mode takes every allocation for one
            # of the model's weights, and may discard it.
            self._served.tempnet.to(self._device)
        return wanted

    def apply_staged_writes(self):
        """Send what :meth:`add_request` changed to the device."""
        if not self._staged:
            self._stage()

    def apply(self, logits, ctx):
        """Divide rows of ``logits`` ``[rows, V]`` (float32) in place."""
        wanted = self._wanted[ctx.idx_mapping_np]
        if not wanted.any():
            return logits
        where = None if wanted.all() else self._wanted_on_device[ctx.expanded_idx_mapping]
        return self._served.divide(logits, where)

    def _stage(self):
        self._wanted_on_device = _serving.to_device(self._wanted, self._device)
        self._staged = True
