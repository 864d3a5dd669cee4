"""Fine-tunes a small LLaMA with TRL's SFTTrainer and a TempNet: the prompt is a function of the
standard library, the completion its docstring, and only the completion counts."""

import ast
import sysconfig
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from tempnet_kernels.integrations.transformers import apply_tempnet
from tempnet_kernels.integrations.trl import TempNetSFTMixin
from tempnet_kernels.nn import TempNet


class TempNetSFTTrainer(TempNetSFTMixin, SFTTrainer):
    pass


def functions():
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]:
        for node in ast.walk(ast.parse(path.read_text(errors="replace"))):
            if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node)):
                arguments = ", ".join(a.arg for a in node.args.args)
                yield {"prompt": f"def {node.name}({arguments}): ", "completion": doc[:80]}


def byte_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {x: i for i, x in enumerate(["<pad>", "<end>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>"
    ), len(vocabulary)


torch.manual_seed(0)
tokenizer, V = byte_tokenizer()
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=V, num_attention_heads=4, **shape))
apply_tempnet(model, rho=3.0, tempnet=TempNet(V, tau_min=0.1, tau_max=2.0))
arguments = SFTConfig(
    "run", max_steps=30, per_device_train_batch_size=16, learning_rate=3e-3, logging_steps=10,
    report_to=[], use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
)  # fmt: skip
data = Dataset.from_list(list(functions())[:480])
TempNetSFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer).train()
