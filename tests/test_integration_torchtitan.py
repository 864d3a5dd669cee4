"""A torchtitan model with a TempNet: its configs, chunked loss, optimizers, FSDP, checkpoint."""

import math

import processes
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torchtitan.components.lora import LoRAConverter
from torchtitan.components.loss import IGNORE_INDEX, ChunkedLossWrapper
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.utils import set_spmd_backend
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3 import model_registry

from tempnet_kernels.integrations.torchtitan import TempNetConverter, TempNetLoss

B, T, V, RHO = 4, 16, 2048, 2.0
CONVERTER = TempNetConverter.Config(tau_min=0.5, tau_max=5.0, hidden_size=16, dropout=0.0)


def make_config(converters=(CONVERTER,)):
    """The debug model, one layer of it, with attention that runs on a CPU."""
    config = model_registry("debugmodel", converters=list(converters)).model
    config.layers = config.layers[:1]
    config.layers[0].attention.inner_attention = ScaledDotProductAttention.Config()
    return config


def initialized(model):
    """As torchtitan's trainer does it, after the model was built on the meta device."""
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_weights()
    return model.train()


def on_meta():
    with torch.device("meta"):
        model = make_config().build()
    model.verify_module_protocol()
    return model


def make_loss(model, num_chunks=4):
    inner = TempNetLoss.Config(rho=RHO)
    if num_chunks is None:
        return inner.build(compile_config=CompileConfig())
    loss = ChunkedLossWrapper.Config(num_chunks=num_chunks, loss_fn=inner).build()
    loss.set_lm_head(model.lm_head)
    model._skip_lm_head = True
    return loss


def batch():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(V, (B, T + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[0, :9] = IGNORE_INDEX  # some of a chunk, and all of others
    labels[:, 4:8] = IGNORE_INDEX
    return tokens[:, :-1], labels


def by_hand(model, tokens, labels):
    """(mean loss over tokens that count, their temperatures)."""
    logits, tau = model(tokens)
    live = labels != IGNORE_INDEX
    z, tau, y = logits[live], tau[live], labels[live]
    lse = torch.logsumexp(z / tau[:, None], 1)
    z_y = z.gather(1, y[:, None])[:, 0]
    return (tau * (lse + RHO - math.log(V)) - z_y).mean(), tau


def gradients(model):
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return grads


@pytest.mark.parametrize("num_chunks", [None, 1, 4])
def test_loss_gradients_and_metrics_are_the_plain_formulas(num_chunks):
    model, (tokens, labels) = initialized(on_meta()), batch()
    expected, tau = by_hand(model, tokens, labels)
    expected.backward()
    grads = gradients(model)
    loss, metrics = make_loss(model, num_chunks)(model(tokens), labels, torch.tensor(len(tau)))
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
    loss.backward()
    for name, grad in gradients(model).items():
        assert grads[name].abs().max() > 0, name
        torch.testing.assert_close(grad, grads[name], rtol=1e-4, atol=1e-6)
    for key, value in {"mean": tau.mean(), "min": tau.min(), "max": tau.max()}.items():
        torch.testing.assert_close(metrics[f"tau/{key}"], value.detach())
    assert 0.5 < metrics["tau/min"] < metrics["tau/max"] < 5.0


def test_micro_batches_add_up_and_validation_needs_no_gradient():
    model, (tokens, labels) = initialized(on_meta()), batch()
    loss, count = make_loss(model), (labels != IGNORE_INDEX).sum()
    expected = by_hand_with_head(model, tokens, labels)
    parts = [loss(model(x[None]), y[None], count)[0] for x, y in zip(tokens, labels, strict=True)]
    torch.testing.assert_close(sum(parts), expected, rtol=0, atol=1e-6)
    with torch.no_grad():
        value, _ = loss(model(tokens), labels, count)
    torch.testing.assert_close(value, expected.detach(), rtol=0, atol=1e-6)


def by_hand_with_head(model, tokens, labels):
    model._skip_lm_head = False
    expected = by_hand(model, tokens, labels)[0]
    model._skip_lm_head = True
    return expected


def test_compiled_loss_is_the_same():
    model, (tokens, labels) = initialized(on_meta()), batch()
    compiled = TempNetLoss.Config(rho=RHO).build(
        compile_config=CompileConfig(enable=True, components=["loss"], backend="aot_eager")
    )
    pred = model(tokens)
    expected, _ = make_loss(model, None)(pred, labels)
    got, _ = compiled(pred, labels)
    assert torch.equal(got, expected)


def optimizers(model):
    options = {"weight_decay": 0.0}
    return OptimizersContainer.Config(
        param_groups=[
            ParamGroupConfig(
                pattern=r"^lm_head\.tempnet\.", optimizer_name="AdamW",
                optimizer_kwargs={"lr": 1e-3, **options},
            ),
            ParamGroupConfig(
                pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-2, **options}
            ),
        ],
        implementation="for-loop",
    ).build(model_parts=[model])  # fmt: skip


def test_optimizer_and_checkpoint_hold_the_network(tmp_path):
    model, (tokens, labels) = initialized(on_meta()), batch()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss, optimizer = make_loss(model), optimizers(model)
    groups = optimizer.optimizers[0].param_groups
    assert groups[0]["param_names"] == [name for name in start if "tempnet" in name]
    assert len(groups[0]["params"]) == 7 and groups[0]["lr"] == 1e-3
    loss(model(tokens), labels, torch.tensor(40))[0].backward()
    optimizer.step()
    network = [name for name in start if "tempnet" in name]
    moved = {name: p for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert set(network) <= set(moved)
    dcp.save({**model.state_dict(), "optimizer": optimizer}, checkpoint_id=tmp_path)

    other = initialized(on_meta())
    resumed = optimizers(other)
    state = other.state_dict()
    dcp.load({**state, "optimizer": resumed}, checkpoint_id=tmp_path)
    other.load_state_dict(state)
    for name, p in other.named_parameters():
        assert torch.equal(p, moved.get(name, p)), name
    states = optimizer.state_dict()
    assert sum("tempnet" in key and "exp_avg" in key for key in states) == 14
    for key, value in resumed.state_dict().items():
        torch.testing.assert_close(value, states[key], rtol=0, atol=0)


def sharded_gradients(group):
    """Of this rank's half of the batch, through torchtitan's own FSDP."""
    import torchtitan.distributed.parallel_dims as module
    from torchtitan.models.llama3 import parallelize_llama

    module.device_type = "cpu"  # where there is no accelerator torchtitan says cuda
    set_spmd_backend("partial_dtensor")
    parallelism = ParallelismConfig(spmd_backend="partial_dtensor")
    config = make_config()
    with torch.device("meta"):
        model = config.build()
    dims = ParallelDims.from_config(parallelism, group.size())
    parallelize_llama(
        model, parallel_dims=dims, parallelism=parallelism, ac_config=None, dump_folder="",
        training=TrainingConfig(mixed_precision_param="float32"), compile_config=CompileConfig(),
    )  # fmt: skip
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_force_sum_reduction_for_comms(True)  # gloo has no other
    initialized(model)
    whole = dict(initialized(on_meta()).named_parameters())
    for name, p in model.named_parameters():
        p.detach().copy_(
            torch.distributed.tensor.distribute_tensor(whole[name].detach(), *p_layout(p))
        )
    tokens, labels = batch()
    count = (labels != IGNORE_INDEX).sum()
    own = slice(group.rank() * B // 2, (group.rank() + 1) * B // 2)
    loss, _ = make_loss(model)(model(tokens[own]), labels[own], count)
    loss.backward()
    assert all(isinstance(p, DTensor) for p in model.lm_head.tempnet.parameters())
    grads = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    return loss.detach(), grads


def p_layout(p):
    return p.device_mesh, p.placements


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    pool = processes.Processes(2, tmp_path_factory.mktemp("gloo"))
    yield pool
    pool.stop()


def test_fsdp_shards_the_network_and_adds_its_gradients(two):
    model, (tokens, labels) = initialized(on_meta()), batch()
    expected, _ = by_hand(model, tokens, labels)
    expected.backward()
    grads = gradients(model)
    (first, got), (second, other) = two.run(2, sharded_gradients)
    torch.testing.assert_close(first + second, expected.detach(), rtol=0, atol=1e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-6)
        assert torch.equal(got[name], other[name])


def test_a_model_without_the_converter_raises():
    with pytest.raises(ValueError, match=r"pred must be \(logits, tau\), got Tensor: build the"):
        TempNetLoss.Config(rho=RHO).build()(torch.zeros(1, 2, 3), torch.zeros(1, 2).long())


def test_a_head_that_another_converter_changed_raises():
    with pytest.raises(ValueError, match=r"TempNetConverter: .* leave lm_head out"):
        make_config([LoRAConverter.Config(rank=2), CONVERTER])
    with pytest.raises(ValueError, match=r"TempNetConverter: .* leave lm_head out"):
        make_config([CONVERTER, CONVERTER])


def test_tensor_parallelism_is_refused(two):
    dims = ParallelDims(
        dp_replicate=1, dp_shard=1, cp=1, tp=2, pp=1, ep=1, world_size=2,
        spmd_backend="spmd_types",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"set parallelism\.tensor_parallel_degree to 1"):
        on_meta().lm_head.parallelize(dims)
    for error in two.run(2, error_with_sharded_logits):
        assert "got a DTensor of (Shard(dim=2),): set parallelism" in error


def error_with_sharded_logits(group):
    mesh = init_device_mesh("cpu", (2,))
    logits = DTensor.from_local(torch.zeros(1, 2, 3), mesh, [Shard(2)])
    loss = TempNetLoss.Config(rho=RHO).build()
    return processes.error_of(
        group, lambda _: loss((logits, torch.ones(1, 2)), torch.zeros(1, 2).long())
    )
