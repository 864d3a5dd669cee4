"""The model and the TempNet of serve_vllm.py in SGLang. Without SGLang it prints the request that a
client would send; it has not run in a real SGLang."""

import importlib.util
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from serve_vllm import MODEL, TEMPNET, prepare

if __name__ == "__main__":  # SGLang's processes import this file again
    prepare()
    settings = {"tempnet": str(Path(TEMPNET).resolve())}  # the server reads it
    params = {"temperature": 1.0, "max_new_tokens": 64, "custom_params": settings}
    prompt = list(b"def ")
    if importlib.util.find_spec("sglang"):
        import sglang

        from tempnet_kernels.integrations.sglang import TempNetLogitProcessor

        engine = sglang.Engine(
            model_path=MODEL, skip_tokenizer_init=True, enable_custom_logit_processor=True
        )
        output = engine.generate(
            input_ids=prompt, sampling_params=params,
            custom_logit_processor=TempNetLogitProcessor.to_str(),
        )  # fmt: skip
        print(bytes(output["output_ids"]))
        engine.shutdown()
    else:
        server = f"python -m sglang.launch_server --model-path {MODEL} --skip-tokenizer-init"
        print(f"SGLang is not installed: {server} --enable-custom-logit-processor")
        request = {"input_ids": prompt, "sampling_params": params}
        print(json.dumps(request | {"custom_logit_processor": "<TempNetLogitProcessor.to_str()>"}))
