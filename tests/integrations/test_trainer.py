"""Trainers of Hugging Face: transformers' Trainer and TRL's SFTTrainer; DDP and FSDP2."""

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from tiny_transformers import MODELS, RHO, V, assert_close, batch, llama, network, plain
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from tempnet_kernels.integrations.transformers import TempNetCallback, apply_tempnet
from tempnet_kernels.integrations.trl import TempNetSFTMixin

pytestmark = pytest.mark.usefixtures("one_thread")

# Samples of several lengths, so that micro-batches have different numbers of labels.
SAMPLES = [
    {"input_ids": ids, "labels": labels}
    for seed in range(8)
    for ids, labels in [[x[0].tolist() for x in batch(1, 12, seed).values()]]
]
for i, sample in enumerate(SAMPLES):
    sample["labels"] = [-100] * (i + 1) + sample["labels"][i + 1 :]


class TempNetSFTTrainer(TempNetSFTMixin, SFTTrainer):
    pass


class Recorder(TrainerCallback):
    """A reporter, as TensorBoard's: it sees what others have added to the logs before it."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def collate(samples):
    return {k: torch.tensor([s[k] for s in samples]) for k in ("input_ids", "labels")}


def arguments(folder, cls=TrainingArguments, **options):
    defaults = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 8,
        "learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "save_strategy": "no",
        "use_cpu": True, "seed": 1, "disable_tqdm": True, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return cls(**{**defaults, **options})


def model_and_handle(**options):
    torch.manual_seed(2)
    model = llama()
    return model, apply_tempnet(model, rho=RHO, tempnet=network(), **options)


def trainer_of(model, args, **options):
    return Trainer(model, args, train_dataset=SAMPLES, data_collator=collate, **options)


def trained(folder, **options):
    """Logged losses, and the weights after the training."""
    model, handle = model_and_handle()
    trainer = trainer_of(model, arguments(folder, **options))
    TempNetCallback(handle).attach(trainer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return torch.tensor(losses), model.state_dict()


def test_accumulated_gradients_equal_those_of_the_whole_batch(tmp_path):
    """The number of labels of all micro-batches is what each divides by."""
    losses, state = trained(tmp_path)
    accumulated, other = trained(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    # The first steps: AdamW turns rounding of a gradient near 0 into a step of full size.
    assert (accumulated - losses)[:2].abs().max() < 1e-4
    assert losses[-1] < losses[0] - 0.05
    model, handle = model_and_handle()
    inputs = collate(SAMPLES)
    logits = model(input_ids=inputs["input_ids"]).logits
    assert abs(plain(logits, inputs["labels"], handle.tempnet) - losses[0]) < 1e-4
    moved = [k for k in state if k.startswith("tempnet.")]
    initial = model.state_dict()
    assert len(moved) == 7 and all(not torch.equal(state[k], initial[k]) for k in moved)
    assert other.keys() == state.keys()


def test_a_resumed_training_goes_on_with_the_same_losses(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    whole, state = trained(tmp_path / "whole", **options)
    model, _ = model_and_handle()
    trainer = trainer_of(model, arguments(tmp_path / "part", **options))
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == whole.tolist()
    assert all(torch.equal(x, state[k]) for k, x in model.state_dict().items())


def test_callback_reports_the_temperatures_before_the_reporters(tmp_path):
    model, handle = model_and_handle()
    recorder = Recorder()
    trainer = trainer_of(model, arguments(tmp_path, max_steps=2), callbacks=[recorder])
    TempNetCallback(handle).attach(trainer)
    trainer.train()
    names = {f"tau/{x}" for x in ("mean", "min", "max", "at_min", "at_max")}
    for logs in (recorder.logs[0], trainer.state.log_history[0]):
        assert names < logs.keys()
        assert 0.5 <= logs["tau/min"] < logs["tau/mean"] < logs["tau/max"] <= 2


def test_a_training_that_goes_past_the_tempnet_raises(tmp_path):
    def outcome(message, error=ValueError, trainer_options=None, **options):
        model, handle = model_and_handle()
        trainer = trainer_of(model, arguments(tmp_path, **options), **(trainer_options or {}))
        TempNetCallback(handle).attach(trainer)
        with pytest.raises(error, match=message):
            trainer.train()

    outcome("pass label_smoothing to apply_tempnet", label_smoothing_factor=0.1)
    other_loss = {"compute_loss_func": lambda out, labels, **kwargs: out.logits.float().mean()}
    outcome("without the TempNet", RuntimeError, trainer_options=other_loss)
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1), None
    handle = apply_tempnet(model, rho=RHO)
    trainer = trainer_of(model, arguments(tmp_path), optimizers=optimizer)
    TempNetCallback(handle).attach(trainer)
    with pytest.raises(ValueError, match="make it after apply_tempnet"):
        trainer.train()


def test_trainer_compiles_and_checkpoints_activations(tmp_path):
    losses, _ = trained(tmp_path, max_steps=2)
    other, _ = trained(
        tmp_path,
        max_steps=2,
        torch_compile=True,
        torch_compile_backend="aot_eager",
        gradient_checkpointing=True,
    )
    assert (losses - other).abs().max() < 1e-4


def tokenized():
    return Dataset.from_list([{"input_ids": s["input_ids"]} for s in SAMPLES])


def test_sft_trainer_trains_the_tempnet(tmp_path, tokenizer):
    def run(cls):
        model, handle = model_and_handle()
        args = arguments(tmp_path, SFTConfig, max_steps=3, max_length=None)
        trainer = cls(model, args, train_dataset=tokenized(), processing_class=tokenizer)
        trainer.train()
        return handle, [entry for entry in trainer.state.log_history if "loss" in entry]

    handle, logs = run(TempNetSFTTrainer)
    fresh, fresh_handle = model_and_handle()
    ids = torch.tensor([s["input_ids"] for s in SAMPLES])
    expected = plain(fresh(input_ids=ids).logits, ids, fresh_handle.tempnet)
    assert abs(logs[0]["loss"] - expected) < 1e-4 and logs[-1]["loss"] < logs[0]["loss"] - 0.02
    assert 0.5 <= logs[0]["tau/min"] < logs[0]["tau/max"] <= 2
    assert logs[0]["num_tokens"] == ids.numel()
    assert not torch.equal(handle.tempnet.last.weight, fresh_handle.tempnet.last.weight)
    # Without the mixin the loss is SFTTrainer's own.
    with pytest.raises(RuntimeError, match=r"did not call .*TempNetSFTMixin"):
        run(SFTTrainer)


def test_sft_trainer_refuses_other_losses(tmp_path, tokenizer):
    def outcome(error, message, model, **options):
        args = arguments(tmp_path, SFTConfig, max_steps=1, max_length=None, **options)
        trainer = TempNetSFTTrainer(
            model, args, train_dataset=tokenized(), processing_class=tokenizer
        )
        with pytest.raises(error, match=message):
            trainer.train()

    outcome(RuntimeError, r"call apply_tempnet\(model", llama())
    outcome(ValueError, "loss_type='dft'", model_and_handle()[0], loss_type="dft")
    mixture = MODELS["mixtral"]()
    apply_tempnet(mixture, rho=RHO)
    outcome(ValueError, "loss of the router", mixture, router_aux_loss_coef=0.5)


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w0"
    )


# Several processes.


def shares():
    """Two ranks' inputs, the number of labels of both, and what one process gets from all."""
    inputs = [collate(SAMPLES[:4]), collate(SAMPLES[4:])]
    items = sum((x["labels"][:, 1:] != -100).sum() for x in inputs)
    return inputs, items


def gradients_on_ranks(group, wrapper, linear):
    model, _ = model_and_handle(linear=linear)
    if wrapper == "ddp":
        # A model whose lm_head is not called by its forward has unused parameters for DDP.
        wrapped = DistributedDataParallel(model, process_group=group, find_unused_parameters=True)
    else:
        from torch.distributed.device_mesh import DeviceMesh

        mesh = DeviceMesh.from_group(group, "cpu")
        for part in (
            *model.model.layers,
            *(
                {"fsdp": (), "fsdp, head and network apart": (model.lm_head, model.tempnet)}[
                    wrapper
                ]
            ),
        ):
            fully_shard(part, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    inputs, items = shares()
    loss = wrapped(**inputs[dist.get_rank(group)], num_items_in_batch=items / group.size()).loss
    loss.backward()
    grads = {
        k: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for k, p in model.named_parameters()
    }
    return loss.detach(), {k: x.clone() for k, x in grads.items()}, [*model.state_dict()]


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp", "fsdp, head and network apart"])
def test_ranks_average_to_the_gradients_of_one_process(gloo, wrapper, linear):
    model, _ = model_and_handle(linear=linear)
    inputs, _ = shares()
    whole = {k: torch.cat([x[k] for x in inputs]) for k in inputs[0]}
    expected = model(**whole).loss
    expected.backward()
    results = gloo.run(2, gradients_on_ranks, wrapper, linear)
    assert_close(sum(results[rank][0] for rank in (0, 1)) / 2, expected.detach())
    for rank in (0, 1):
        _, grads, names = results[rank]
        assert sum(name.startswith("tempnet.") for name in names) == 7
        for name, p in model.named_parameters():
            assert (grads[name] - p.grad).abs().max() <= 1e-5 * p.grad.abs().max() + 1e-8, name
