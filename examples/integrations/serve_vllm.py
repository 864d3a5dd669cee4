"""Trains a tiny Llama on the bytes of the standard library and a TempNet for it, and samples with
vLLM. Without vLLM it prints the command; it has not run in a real vLLM."""

import importlib.util
import sysconfig
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tempnet_kernels.nn import TempNet, TempNetCausalLMLoss, save_tempnet

PROCESSOR = "tempnet_kernels.integrations.vllm:TempNetLogitsProcessor"
MODEL, TEMPNET, V, T = "tiny_llama", "tempnet.safetensors", 256, 64


def train(parameters, lr, steps, loss_of):
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    for _ in range(steps):
        loss = loss_of(TEXT[torch.randint(len(TEXT) - T, (8, 1)) + torch.arange(T)])  # of (8, T)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def prepare():
    """Write the model, and a TempNet that is trained with the model frozen."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, num_attention_heads=2, **shape))
    train(model.parameters(), 5e-3, 150, lambda ids: model(ids, labels=ids).loss)
    model.requires_grad_(False).save_pretrained(MODEL)
    loss_fn = TempNetCausalLMLoss(TempNet(V, 0.2, 2.0), rho=3.0)
    train(loss_fn.parameters(), 1e-2, 200, lambda ids: loss_fn(model(ids).logits, ids))
    save_tempnet(loss_fn.tempnet, TEMPNET)
    tau = loss_fn.temperature_stats()
    print(f"{MODEL}, {TEMPNET}: temperatures {tau.min:.3f} to {tau.max:.3f}")


torch.manual_seed(0)
SOURCES = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
TEXT = torch.tensor(list(b"".join(path.read_bytes() for path in SOURCES)))
if __name__ == "__main__":  # vLLM's processes import this file again
    prepare()
    if importlib.util.find_spec("vllm"):
        from vllm import LLM, SamplingParams

        additional = {"tempnet": TEMPNET}
        llm = LLM(MODEL, logits_processors=[PROCESSOR], additional_config=additional,
                  skip_tokenizer_init=True)  # fmt: skip
        params = SamplingParams(max_tokens=64, detokenize=False)  # temperature stays 1
        (output,) = llm.generate({"prompt_token_ids": list(b"def ")}, params)
        print(bytes(output.outputs[0].token_ids))
    else:
        print(
            f"vLLM is not installed: vllm serve {MODEL} --skip-tokenizer-init --logits-processors"
        )
        print(f"""{PROCESSOR} --additional-config '{{"tempnet": "{TEMPNET}"}}'""")
