"""Trains a small LLaMA on the standard library's sources with transformers' Trainer and a TempNet,
saves and loads both, and generates at the predicted temperatures."""

import inspect
import json
import textwrap

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from tempnet_kernels.integrations.transformers import (
    TempNetCallback,
    TempNetLogitsProcessor,
    apply_tempnet,
)
from tempnet_kernels.nn import TempNet, load_tempnet

V, LENGTH = 256, 64  # bytes are the tokens
text = "".join(inspect.getsource(module) for module in (inspect, json, textwrap, torch.nn.init))
tokens = torch.tensor(list(text.encode()))
samples = [{"input_ids": x, "labels": x} for x in tokens.split(LENGTH) if len(x) == LENGTH]

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=V, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
)
model = LlamaForCausalLM(config)
handle = apply_tempnet(model, rho=3.0, tempnet=TempNet(V, tau_min=0.1, tau_max=2.0))
arguments = TrainingArguments(
    "run", max_steps=30, per_device_train_batch_size=16, learning_rate=3e-3, logging_steps=10,
    report_to=[], use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
)  # fmt: skip
trainer = Trainer(model, arguments, train_dataset=samples)
TempNetCallback(handle).attach(trainer)
trainer.train()
trainer.save_model("trained")

model = AutoModelForCausalLM.from_pretrained("trained").eval()
processor = TempNetLogitsProcessor(load_tempnet("trained"))
prompt = torch.tensor([list(b"def ")])
out = model.generate(
    prompt, do_sample=True, max_new_tokens=60, logits_processor=[processor], pad_token_id=0
)
print(bytes(out[0].tolist()).decode(errors="replace"))
tau = processor.temperatures
print(f"temperatures of {len(tau)} tokens: {tau.min():.3f} to {tau.max():.3f}")
