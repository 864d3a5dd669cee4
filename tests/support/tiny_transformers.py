"""Tiny models of Hugging Face with random weights, a TempNet for them, the loss as a formula."""

import math

import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from tempnet_kernels.nn import TempNet

V, RHO = 96, 2.0
SMALL = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    # The head's weight is the embeddings'.
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0,
            embd_pdrop=0, attn_pdrop=0, bos_token_id=1, eos_token_id=2,
        )
    ),
    # A head with a bias.
    "phi": lambda: PhiForCausalLM(PhiConfig(**SMALL)),
    # A loss of the router is added to that of the tokens.
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SMALL, num_local_experts=2, output_router_logits=True)
    ),
    # Capped logits.
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.05)
    ),
}  # fmt: skip


def llama():
    return MODELS["llama"]().train()


def network(**options):
    torch.manual_seed(3)
    network = TempNet(V, **{"hidden_size": 8, "dropout": 0.0, **options})
    # From one row to the next the temperature of a new network hardly differs.
    nn.init.normal_(network.proj[0].weight, std=3)
    nn.init.normal_(network.last.weight, std=10)
    return network


def batch(rows=2, length=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V, (rows, length), generator=generator)
    labels = ids.clone()
    labels[0, :3] = -100
    return {"input_ids": ids, "labels": labels}


def plain(logits, labels, tempnet, normalizer=None):
    """The formula of MATH.md, in PyTorch."""
    z, y = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    z, y = z[y != -100], y[y != -100]
    tau = tempnet(z)
    lse = torch.logsumexp(z / tau[:, None], 1)
    loss = tau * (lse + RHO - math.log(V)) - z.gather(1, y[:, None])[:, 0]
    return loss.sum() / (len(y) if normalizer is None else normalizer)


def assert_close(got, expected):
    assert (got - expected).abs().max() <= 1e-6 * max(1, expected.abs().max())
