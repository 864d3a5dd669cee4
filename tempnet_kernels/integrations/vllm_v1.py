"""vLLM's V1 model runner: sampling with the temperatures of a TempNet.

``LLM(model, logits_processors=["tempnet_kernels.integrations.vllm_v1:TempNetLogitsProcessorV1"],
additional_config={"tempnet": "tempnet.safetensors"})``; see ``docs/integrations/vllm.md``.
"""

import numpy as np

from tempnet_kernels.integrations import _serving

try:
    from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality
except ImportError as error:
    raise ImportError(
        "tempnet_kernels.integrations.vllm_v1: there is no logits processor of vLLM's V1 runner: "
        "pip install vllm, or for Model Runner V2 use "
        "tempnet_kernels.integrations.vllm:TempNetLogitsProcessor"
    ) from error


class TempNetLogitsProcessorV1(LogitsProcessor):
    """As :class:`tempnet_kernels.integrations.vllm.TempNetLogitsProcessor`, of the older interface.

    Here vLLM has divided by its own temperature and applied ``min_p`` before. The temperatures are
    the same: a TempNet sees the direction of the logits alone. But ``min_p`` would be that of other
    probabilities, so requests with it are refused.
    """

    def __init__(self, vllm_config, device, is_pin_memory):
        self._served = _serving.of_vllm(
            "TempNetLogitsProcessorV1", vllm_config, vllm_config.model_config.get_vocab_size()
        )
        self._device = device
        # By place in the batch.
        self._wanted = np.zeros(vllm_config.scheduler_config.max_num_seqs, dtype=bool)
        self._any = False
        self._where = None

    @classmethod
    def validate_params(cls, sampling_params):
        """Raise ValueError for a ``tempnet`` in ``extra_args`` that is not a bool, or ``min_p``."""
        _serving.vllm_validate("TempNetLogitsProcessorV1", sampling_params)
        if sampling_params.min_p > 0 and _serving.vllm_wants(sampling_params):
            raise ValueError(
                f"TempNetLogitsProcessorV1: min_p must be 0, got {sampling_params.min_p}: vLLM's "
                "V1 runner applies it before the TempNet. Use top_p or Model Runner V2, or opt out "
                'with extra_args={"tempnet": False}'
            )

    def is_argmax_invariant(self):
        """True: vLLM then skips it where every request is greedy."""
        return True

    def update_state(self, batch_update):
        """Follow the requests that left, came and moved, in that order."""
        if batch_update is None:
            return
        wanted = self._wanted
        for index in batch_update.removed:
            wanted[index] = False
        for index, params, *_ in batch_update.added:
            wanted[index] = _serving.vllm_wants(params)
        for a, b, direction in batch_update.moved:
            back = wanted[b] if direction == MoveDirectionality.SWAP else False
            wanted[a], wanted[b] = back, wanted[a]
        batch = wanted[: batch_update.batch_size]
        self._any = bool(batch.any())
        self._where = None if batch.all() else _serving.to_device(batch, self._device)
        if self._any:
            # As for V2: what is allocated before may belong to vLLM's sleep mode.
            self._served.tempnet.to(self._device)

    def apply(self, logits):
        """Divide rows of ``logits`` ``[batch, V]`` (float32) in place."""
        return self._served.divide(logits, self._where) if self._any else logits
