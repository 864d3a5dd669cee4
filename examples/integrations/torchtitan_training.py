"""torchtitan's Llama 3 in small, on the bytes of the standard library, with a TempNet. (A script
named torchtitan.py would hide torchtitan.)"""

import sysconfig
from pathlib import Path

import torch
from torchtitan.components.optimizer import default_adamw
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3 import model_registry

from tempnet_kernels.integrations.torchtitan import TempNetLoss, add_tempnet, tempnet_param_group

T, BATCH, STEPS = 32, 8, 20


def read_bytes():
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]
    text = bytearray(b"".join(file.read_bytes() for file in files))
    return torch.frombuffer(text, dtype=torch.uint8).long()


torch.manual_seed(0)
config = add_tempnet(model_registry("debugmodel"), tau_min=0.5, tau_max=5.0).model
config.layers = config.layers[:1]
for layer in config.layers:
    layer.attention.inner_attention = ScaledDotProductAttention.Config()  # runs on a CPU
with torch.device("meta"):
    model = config.build()
model.to_empty(device="cpu")
with torch.no_grad():
    model.init_weights()

loss_fn = TempNetLoss.Config(rho=3.0).build()
loss_fn.set_lm_head(model.lm_head)  # this and the next line are torchtitan's trainer's
model._skip_lm_head = True
optimizer = default_adamw(lr=3e-3)
optimizer.param_groups.insert(0, tempnet_param_group(lr=1e-3))
optimizer.implementation = "for-loop"
optimizers = optimizer.build(model_parts=[model])
text = read_bytes()
for step in range(STEPS):
    starts = torch.randint(len(text) - T - 1, (BATCH, 1))
    tokens = text[starts + torch.arange(T + 1)]
    loss, _ = loss_fn(model(tokens[:, :-1]), tokens[:, 1:], torch.tensor(BATCH * T))
    optimizers.zero_grad()
    loss.backward()
    optimizers.step()
    if step % 10 == 9:
        stats = model.lm_head.temperature_stats()
        print(f"step {step + 1}: loss {loss:.3f}, tau {stats.min:.3f} to {stats.max:.3f}")
