"""Two towers learn which docstring belongs to which function of the standard library, with
TempNetClipLoss in the place of open_clip's ClipLoss. Not named after the package, which a script of
that name would hide."""

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
    pairs = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            doc = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if doc and len(node.body) > 1:
                pairs.append(("\n".join(map(ast.unparse, node.body[1:])), doc))
    return pairs[:limit]


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
nets = (ContrastiveTempNet(D, seed=0), ContrastiveTempNet(D, seed=1))
loss = TempNetClipLoss(
    num_samples=len(code), rho=3.0, image_temp_gen=nets[0], text_temp_gen=nets[1]
)
groups = [
    {"params": [*code_tower.parameters(), *doc_tower.parameters()]},
    {"params": loss.parameters(), "weight_decay": 0.0},
]
optimizer = torch.optim.AdamW(groups, lr=1e-3)
for epoch in range(EPOCHS):
    optimizer.param_groups[1]["lr"] = 3e-5 * 0.9**epoch
    for ids in torch.randperm(len(code))[: len(code) // BATCH * BATCH].split(BATCH):
        image, text = code_tower(code[ids]), doc_tower(doc[ids])
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
        optimizer.zero_grad()
        value = loss(image, text, logit_scale=None, ids=ids)
        value.backward()
        optimizer.step()
    tau = loss.temperature_stats().image
    print(f"epoch {epoch}: loss {value.item():.4f}, tau {tau.mean:.4f} from {tau.min:.4f}")
