"""A tiny GPTModel of megatron-core learns a module's text at learned temperatures, on the CPU with
a core attention that does not need CUDA. (A script named megatron.py would hide megatron.)"""

import sysconfig
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.parallel_state import destroy_model_parallel, initialize_model_parallel
from megatron.core.transformer import TransformerConfig

from tempnet_kernels.integrations.megatron import apply_tempnet
from tempnet_kernels.nn import TempNet, save_tempnet

SEQUENCE, BATCH, STEPS = 64, 8, 30


class CoreAttention(torch.nn.Module):
    def __init__(self, **_):
        super().__init__()

    def forward(self, query, key, value, attention_mask, **_):
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # (b, heads, s, d)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x.permute(2, 0, 1, 3).flatten(2)


dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
initialize_model_parallel(tensor_model_parallel_size=1)
torch.manual_seed(0)
config = TransformerConfig(
    num_layers=1, hidden_size=64, num_attention_heads=4, use_cpu_initialization=True
)  # fmt: skip
layer = get_gpt_layer_local_spec()
layer.submodules.self_attention.submodules.core_attention = CoreAttention
model = GPTModel(config, layer, vocab_size=256, max_sequence_length=SEQUENCE)
applied = apply_tempnet(model, rho=3.0, tempnet=TempNet(256, hidden_size=64))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
text = torch.tensor(list(Path(sysconfig.get_path("stdlib"), "argparse.py").read_bytes()))
for step in range(STEPS):
    begin = torch.randint(len(text) - SEQUENCE, (BATCH, 1))
    rows = text[begin + torch.arange(SEQUENCE + 1)]  # (b, s + 1)
    position = torch.arange(SEQUENCE).expand(BATCH, SEQUENCE)
    loss = model(rows[:, :-1], position, None, labels=rows[:, 1:]).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 9:
        tau = applied.loss.temperature_stats()
        print(f"step {step + 1}: loss {loss:.3f}, tau {tau.min:.3f} to {tau.max:.3f}")
save_tempnet(applied.loss.whole_tempnet(), Path(tempfile.mkdtemp(), "tempnet.safetensors"))
destroy_model_parallel()
dist.destroy_process_group()
