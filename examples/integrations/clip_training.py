"""Two towers learn which docstring belongs to which function of the standard library, with
TempNetClipLoss where open_clip has ClipLoss. (A script named open_clip.py would hide open_clip.)"""

import ast
import re
import sysconfig
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from tempnet_kernels.integrations.open_clip import TempNetClipLoss
from tempnet_kernels.nn import ContrastiveTempNet

D, BATCH, EPOCHS, BUCKETS = 64, 128, 6, 4096


def read_pairs(limit=2048):
    """(body, docstring) of functions, in the order of the files."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            doc = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if doc and len(node.body) > 1 and (limit := limit - 1) >= 0:
                yield "\n".join(map(ast.unparse, node.body[1:])), doc


def bag(texts):
    """Hashed words, [len(texts), BUCKETS]."""
    x = torch.zeros(len(texts), BUCKETS)
    for row, text in zip(x, texts, strict=True):
        for word in re.findall("[a-z0-9]+", text.lower()):
            row[zlib.crc32(word.encode()) % BUCKETS] += 1
    return F.normalize(x.sqrt(), dim=-1)


torch.manual_seed(0)
code, doc = (bag(texts) for texts in zip(*read_pairs(), strict=True))
code_tower, doc_tower = nn.Linear(BUCKETS, D), nn.Linear(BUCKETS, D)
nets = {
    f"{side}_temp_gen": ContrastiveTempNet(D, seed=i) for i, side in enumerate(("image", "text"))
}
loss = TempNetClipLoss(num_samples=len(code), rho=3.0, **nets)
model = {"params": [*code_tower.parameters(), *doc_tower.parameters()]}
optimizer = torch.optim.AdamW([model, {"params": loss.parameters(), "weight_decay": 0.0}], lr=1e-3)
for epoch in range(EPOCHS):
    optimizer.param_groups[1]["lr"] = 3e-5 * 0.9**epoch
    for ids in torch.randperm(len(code))[: len(code) // BATCH * BATCH].split(BATCH):
        image = F.normalize(code_tower(code[ids]), dim=-1)
        text = F.normalize(doc_tower(doc[ids]), dim=-1)
        optimizer.zero_grad()
        value = loss(image, text, logit_scale=None, ids=ids)
        value.backward()
        optimizer.step()
    found = ((image @ text.T).argmax(1) == torch.arange(BATCH)).float().mean()  # of 128 pairs
    tau = loss.temperature_stats().image
    print(f"epoch {epoch}: loss {value:.4f}, R@1 {found:.3f}, tau {tau.min:.4f} to {tau.max:.4f}")
