"""SGLang: sampling with the temperatures of a TempNet.

``engine.generate(prompt, {"temperature": 1, "custom_params": {"tempnet": "tempnet.safetensors"}},
custom_logit_processor=TempNetLogitProcessor.to_str())``; see ``docs/integrations/sglang.md``.
"""

import functools
import json
import logging
from http import HTTPStatus

from tempnet_kernels.integrations import _serving

try:
    from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor
except ImportError as error:
    raise ImportError(
        "tempnet_kernels.integrations.sglang: there is no SGLang with custom logit processors: "
        "pip install sglang"
    ) from error

NAME = "TempNetLogitProcessor"
logger = logging.getLogger(__name__)


class TempNetLogitProcessor(CustomLogitProcessor):
    """Divides a request's logits by the temperature predicted for each row.

    SGLang calls it before its own temperature, by which it divides too: leave that at 1. Greedy
    requests are untouched.

    ``custom_params["tempnet"]`` of a request is the path of a checkpoint on the server, or a dict
    with ``path``, ``tau_min``, ``tau_max``, ``center`` (as in
    :func:`tempnet_kernels.nn.load_tempnet`) and ``padded_vocabulary`` (True where the last columns
    of the logits are no tokens, and not the TempNet's). A server process reads a checkpoint once,
    and keeps the last 8.

    A request whose TempNet cannot be used is aborted with the reason; the others go on.
    """

    def __call__(self, logits, custom_param_list=None):
        """Divide rows of ``logits`` ``[rows, V]`` in place; ``custom_param_list`` has one entry
        for each row."""
        rows_of = {}  # a TempNet -> its rows
        for row, params in enumerate(custom_param_list or [None] * len(logits)):
            served = _of_request(params, logits)
            if served is not None:
                rows_of.setdefault(served, []).append(row)
        for served, rows in rows_of.items():
            if len(rows) == len(logits):
                served.divide(logits)
            else:
                index = _serving.to_device(rows, logits.device)  # (rows of served,) int64
                logits.index_copy_(0, index, served.divide(logits.index_select(0, index)))
        return logits


def _of_request(params, logits):
    """The TempNet of a request, or None where its logits stay as they are."""
    if params is None:
        _warn_of_no_params()
        return None
    request = params.get("__req__")
    try:
        if request is not None and request.sampling_params.top_k <= 1:  # greedy
            return None
    except ReferenceError:  # a weak reference to a request that ended; its token is not used
        return None
    # Whatever is wrong with the TempNet of one request must not stop the server.
    try:
        served = _served(json.dumps(params.get("tempnet"), sort_keys=True), logits.device)
        served.check_columns(logits.shape[1])
    except Exception as error:
        if request is None:
            raise
        _abort(request, error)
        return None
    return served


@functools.lru_cache(maxsize=8)
def _served(settings_json, device):
    settings = json.loads(settings_json)
    if settings is None:
        raise ValueError(
            f'{NAME}: custom_params must say which TempNet: {{"tempnet": "tempnet.safetensors"}}'
        )
    served = _serving.ServedTempNet(NAME, settings)
    served.tempnet.to(device)
    return served


def _abort(request, error):
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    request.to_finish = FINISH_ABORT(str(error), HTTPStatus.BAD_REQUEST, type(error).__name__)


@functools.cache
def _warn_of_no_params():
    """Once: SGLang gives no hold of a request without parameters by which to abort it."""
    logger.error(
        '%s: a request without custom_params has no TempNet: pass custom_params={"tempnet": '
        '"tempnet.safetensors"} with the processor. It is sampled without.',
        NAME,
    )
