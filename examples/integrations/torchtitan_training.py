"""torchtitan's Llama 3 in small, on the bytes of the standard library, with a TempNet. (A script
named torchtitan.py would hide torchtitan.)"""

import sysconfig
from pathlib import Path

import torch
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3 import model_registry

from tempnet_kernels.integrations.torchtitan import TempNetConverter, TempNetLoss

T, BATCH, STEPS = 32, 8, 20
GROUPS = {r"^lm_head\.tempnet\.": 1e-3, ".*": 3e-3}  # pattern -> learning rate


def read_bytes():
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]
    text = bytearray(b"".join(file.read_bytes() for file in files))
    return torch.frombuffer(text, dtype=torch.uint8).long()


torch.manual_seed(0)
converter = TempNetConverter.Config(tau_min=0.5, tau_max=5.0)
config = model_registry("debugmodel", converters=[converter]).model
config.layers = config.layers[:1]
for layer in config.layers:
    layer.attention.inner_attention = ScaledDotProductAttention.Config()  # runs on a CPU
with torch.device("meta"):
    model = config.build()
model.to_empty(device="cpu")
with torch.no_grad():
    model.init_weights()

loss_fn = ChunkedLossWrapper.Config(num_chunks=4, loss_fn=TempNetLoss.Config(rho=3.0)).build()
loss_fn.set_lm_head(model.lm_head)
model._skip_lm_head = True
groups = [
    ParamGroupConfig(pattern=pattern, optimizer_name="AdamW", optimizer_kwargs={"lr": lr})
    for pattern, lr in GROUPS.items()
]
optimizers = OptimizersContainer.Config(param_groups=groups, implementation="for-loop").build(
    model_parts=[model]
)
text = read_bytes()
for step in range(STEPS):
    starts = torch.randint(len(text) - T - 1, (BATCH, 1))
    tokens = text[starts + torch.arange(T + 1)]
    loss, metrics = loss_fn(model(tokens[:, :-1]), tokens[:, 1:], torch.tensor(BATCH * T))
    optimizers.zero_grad()
    loss.backward()
    optimizers.step()
    if step % 10 == 9:
        low, high = metrics["tau/min"], metrics["tau/max"]
        print(f"step {step + 1}: loss {loss:.3f}, tau {low:.3f} to {high:.3f}")
