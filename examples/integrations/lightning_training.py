"""A character model of the standard library's sources, trained by Lightning with a TempNet. (A
script named lightning.py would hide lightning.)"""

import logging
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from tempnet_kernels.integrations.lightning import TempNetCallback, tempnet_param_groups
from tempnet_kernels.nn import TempNet, TempNetCausalLMLoss

V, D, T, BATCH, STEPS, CONTEXT = 128, 64, 48, 8, 40, 8


class LM(LightningModule):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.mix = nn.Conv1d(D, D, CONTEXT)
        self.head = nn.Linear(D, V, bias=False)
        self.loss = TempNetCausalLMLoss(TempNet(V, tau_min=0.5, tau_max=5.0), rho=3.0)

    def training_step(self, batch, batch_idx):
        x = F.pad(self.embedding(batch).mT, (CONTEXT - 1, 0))  # (BATCH, D, T + CONTEXT - 1)
        hidden = torch.tanh(self.mix(x)).mT  # (BATCH, T, D)
        loss = self.loss(hidden, batch, weight=self.head.weight)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(tempnet_param_groups(self, 3e-3, tempnet_lr=1e-3))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx % 20 == 19:
            tau = self.loss.temperature_stats()
            loss = outputs["loss"]
            print(f"step {batch_idx + 1}: loss {loss:.3f}, tau {tau.min:.3f} to {tau.max:.3f}")


if __name__ == "__main__":
    torch.manual_seed(0)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]
    text = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8)
    text = text[text < V].long()
    starts = torch.randint(len(text) - T, (STEPS * BATCH,))
    data = [text[start : start + T] for start in starts]
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[TempNetCallback()], log_every_n_steps=20,
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(LM(), torch.utils.data.DataLoader(data, batch_size=BATCH))
    print({name: round(float(value), 3) for name, value in trainer.logged_metrics.items()})
