"""torchtitan's trainer with a tiny Llama 3 on a CPU."""

import os
from dataclasses import dataclass

import torch

# torchtitan asks for the accelerator when it is imported, and takes CUDA where there is none.
if not torch.cuda.is_available():
    torch._utils._get_available_device_type = lambda: "cpu"

import torchtitan.components.metrics
import torchtitan.models.llama3 as llama3
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.trainer import Trainer

from tempnet_kernels.integrations.torchtitan import (
    TempNetLoss,
    TempNetMetrics,
    add_tempnet,
    tempnet_param_group,
)

V, D, LENGTH, RHO = 64, 32, 16, 2.0


def model_spec(vocab_size=V):
    spec = llama3.model_registry("debugmodel")
    rope = ComplexRoPE.Config(dim=D // 4, max_seq_len=64)
    spec.model = llama3.Llama3Model.Config(
        dim=D, vocab_size=vocab_size,
        tok_embeddings=Embedding.Config(
            num_embeddings=vocab_size, embedding_dim=D, param_init=llama3._EMBEDDING_INIT
        ),
        norm=RMSNorm.Config(normalized_shape=D, param_init=llama3._NORM_INIT),
        lm_head=Linear.Config(
            in_features=D, out_features=vocab_size, param_init=llama3._output_linear_init(D)
        ),
        layers=llama3._build_llama3_layers(
            n_layers=2, dim=D, n_heads=4, hidden_dim=64, attn_backend="flex", rope=rope,
            fuse_qkv=False,  # its state dict has other names than its parameters
        ),
    )  # fmt: skip
    for layer in spec.model.layers:
        # FlexAttention has no backward on a CPU.
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    return spec


class Tokenizer(BaseTokenizer):
    """The trainer wants one; Data is tokens already."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config, **kwargs):
        super().__init__()

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode()

    def get_vocab_size(self):
        return V


def batch(number, rank=0):
    """(tokens, labels), each (2, LENGTH); ranks have different numbers of labels that count."""
    generator = torch.Generator().manual_seed(100 * rank + number)
    tokens = torch.randint(V, (2, LENGTH + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[0, : 3 + 5 * rank] = -100
    return tokens[:, :-1], labels


class Data(BaseDataLoader):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config, *, dp_rank, **kwargs):
        self.number, self.rank = 0, dp_rank

    def __iter__(self):
        while True:
            tokens, labels = batch(self.number, self.rank)
            self.number += 1
            yield {"input": tokens}, labels

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]


class NoMemory:
    device_name = "cpu"

    def get_peak_stats(self):
        return torchtitan.components.metrics.DeviceMemStats(0, 0, 0, 0, 0, 0)

    def reset_peak_stats(self):
        pass


def trainer(folder, *, spec=None, **parallelism):
    """torchtitan's trainer of two micro-batches per step. The process group must be there."""
    os.environ["LOCAL_RANK"] = "0"
    torchtitan.components.metrics.build_device_memory_monitor = NoMemory
    optimizer = default_adamw(lr=1e-2)
    optimizer.implementation = "for-loop"
    optimizer.param_groups.insert(0, tempnet_param_group(lr=2e-2))
    ranks = torch.distributed.get_world_size() // parallelism.get("tensor_parallel_degree", 1)
    config = Trainer.Config(
        model_spec=spec or add_tempnet(model_spec(), hidden_size=8, dropout=0.0),
        loss=TempNetLoss.Config(rho=RHO, chunk_rows=9),
        optimizer=optimizer,
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=0, total_steps=1000),
        tokenizer=Tokenizer.Config(),
        dataloader=Data.Config(),
        training=TrainingConfig(
            local_batch_size=2, global_batch_size=4 * ranks, seq_len=LENGTH, steps=4,
            max_norm=1e9, disable_cuda_graphs=True, mixed_precision_param="float32",
        ),
        metrics=TempNetMetrics.Config(log_freq=1),
        checkpoint=CheckpointManager.Config(enable=True, interval=2),
        activation_checkpoint=None,
        parallelism=ParallelismConfig(**parallelism),
        dump_folder=str(folder),
    )  # fmt: skip
    made = Trainer(config)
    for module in made.model_parts[0].modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other for a factor
    return made


def steps(trainer, number):
    """What is logged in each of ``number`` steps; a checkpoint after every second."""
    logged = []
    trainer.metrics_processor.logger.log = lambda metrics, step: logged.append(metrics)
    batches = trainer.batch_generator(trainer.dataloader)
    for _ in range(number):
        trainer.step += 1
        trainer.train_step(batches)
        trainer.checkpointer.save(trainer.step)
    return logged


def weights(trainer):
    """Whole tensors by name."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in trainer.model_parts[0].named_parameters()
    }
