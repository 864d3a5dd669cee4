"""A tiny GPTModel of the installed megatron-core, on CPU tensors. Of the model only the core
attention is a stand-in, given in the layer's specification: Megatron's own asks CUDA for memory and
for a generator. Where Megatron asks for the current CUDA device (its DDP, its checkpoints), it is
told the CPU."""

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer import TransformerConfig

V, S, B, D, RHO = 24, 6, 2, 16, 1.5


class CoreAttention(torch.nn.Module):
    """Megatron's DotProductAttention without dropout."""

    def __init__(self, **_):
        super().__init__()

    def forward(self, query, key, value, attention_mask, **_):
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # (b, heads, s, d)
        x = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x.permute(2, 0, 1, 3).flatten(2)


class Parallel:
    """Megatron's groups over the processes of the test, with ``tp`` tensor-parallel ranks."""

    def __init__(self, tp):
        self.tp = tp

    def __enter__(self):
        self.cuda = torch.cuda.current_device, torch.cuda.synchronize
        torch.cuda.current_device = lambda: torch.device("cpu")
        torch.cuda.synchronize = lambda *_: None
        parallel_state.initialize_model_parallel(self.tp)

    def __exit__(self, *_):
        parallel_state.destroy_model_parallel()
        torch.cuda.current_device, torch.cuda.synchronize = self.cuda


def gpt(tp=1, seed=0, spec=None, **options):
    torch.manual_seed(seed)
    config = TransformerConfig(
        num_layers=1, hidden_size=D, num_attention_heads=4, hidden_dropout=0.0,
        attention_dropout=0.0, use_cpu_initialization=True, tensor_model_parallel_size=tp,
        **{k: options.pop(k) for k in ("mtp_num_layers", "bf16", "params_dtype") if k in options},
    )  # fmt: skip
    layer = get_gpt_layer_local_spec()
    layer.submodules.self_attention.submodules.core_attention = CoreAttention
    if config.mtp_num_layers:
        options["mtp_block_spec"] = get_gpt_mtp_block_spec(config, layer, False)
    return GPTModel(config, layer, vocab_size=V, max_sequence_length=S, **options)


def batch(seed=1):
    ids = torch.randint(V, (B, S + 1), generator=torch.Generator().manual_seed(seed))
    position = torch.arange(S).expand(B, S)
    return ids[:, :-1], position, None, ids[:, 1:].contiguous()


def loss_of(model, seed=1, mask=None):
    """As Megatron's loss function: the mean over the tokens of the mask."""
    ids, position, attention_mask, labels = batch(seed)
    losses = model(ids, position, attention_mask, labels=labels)  # (b, s)
    mask = torch.ones(B, S) if mask is None else mask
    return (losses * mask).sum() / mask.sum(), losses
