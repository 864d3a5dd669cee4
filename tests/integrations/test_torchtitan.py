"""torchtitan's own trainer, model, FSDP, tensor parallelism, optimizer and checkpoint, with a
TempNet, against the formula written out."""

import math

import pytest
import torch
from processes import error_of
from tiny_titan import LENGTH, RHO, V, batch, model_spec, steps, trainer, weights

from tempnet_kernels.integrations.torchtitan import (
    TempNetLinear,
    TempNetLoss,
    add_tempnet,
    tempnet_param_group,
)
from tempnet_kernels.nn import load_tempnet

STEPS = 3


def build(spec):
    model = spec.model.build()
    model.verify_module_protocol()
    with torch.no_grad():
        model.init_weights()
    model._skip_lm_head = True
    return model


def attached(model, **options):
    loss = TempNetLoss.Config(rho=RHO, **options).build(compile_config=None)
    loss.set_lm_head(model.lm_head)
    return loss


def plain_loss(model, tokens, labels):
    """Sum over the labels that count, of logits that are held."""
    z = torch.nn.functional.linear(model(tokens), model.lm_head.weight)
    x = z.detach() / z.detach().norm(dim=-1, keepdim=True)
    net = model.lm_head.tempnet
    h = net.proj(x)
    w = torch.softmax(h / net.scaler.exp(), -1)
    share = torch.sigmoid(net.last((w - 1 / h.shape[-1]) * h)).squeeze(-1)
    tau = net.tau_min + (net.tau_max - net.tau_min) * share
    lse = torch.logsumexp(z / tau[..., None], -1)
    z_y = z.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    rows = tau * (lse + RHO - math.log(V)) - z_y
    return torch.where(labels != -100, rows, 0).sum()


def trained_by_hand(start, ranks):
    """(losses, weights) of STEPS steps from the weights ``start``."""
    model = build(add_tempnet(model_spec(), hidden_size=8, dropout=0.0))
    model.load_state_dict(start)
    own = {n: p for n, p in model.named_parameters() if "tempnet" in n}
    others = [p for n, p in model.named_parameters() if "tempnet" not in n]
    optimizer = torch.optim.AdamW(
        [
            {"params": list(own.values()), "lr": 2e-2, "weight_decay": 0.0},
            {"params": others, "lr": 1e-2, "weight_decay": 0.1},
        ],
        betas=(0.9, 0.95),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 1000)
    losses = []
    for step in range(STEPS):
        batches = [batch(2 * step + i, rank) for i in range(2) for rank in range(ranks)]
        count = sum(int((labels != -100).sum()) for _, labels in batches)
        loss = sum(plain_loss(model, *pair) for pair in batches) / count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses, model.state_dict()


def trained_by_torchtitan(group, folder, options):
    t = trainer(folder, spmd_backend="partial_dtensor", **options)
    start = weights(t)
    logged = steps(t, STEPS)
    end = weights(t)
    optimized = {n for o in t.optimizers for g in o.param_groups for n in g["param_names"]}
    shapes = {n: tuple(p.to_local().shape) for n, p in t.model_parts[0].named_parameters()}
    t.close()
    return start, [m["loss_metrics/global_avg_loss"] for m in logged], end, optimized, shapes


@pytest.mark.parametrize(
    ("options", "dp"),
    [
        ({}, 2),
        ({"tensor_parallel_degree": 2}, 1),
        ({"tensor_parallel_degree": 2, "enable_sequence_parallel": False}, 1),
    ],
    ids=str,
)
def test_two_ranks_train_as_the_formula_in_one_process(two_ranks, tmp_path, options, dp):
    (start, losses, end, optimized, shapes), other = two_ranks.run(
        2, trained_by_torchtitan, tmp_path, options
    )
    assert other[1] == losses
    expected, expected_end = trained_by_hand(start, dp)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), atol=1e-6, rtol=1e-6)
    assert optimized == set(start) == set(expected_end)
    assert shapes["lm_head.tempnet.proj.0.weight"] in {(4, V), (8, V // 2)}
    for name, exact in expected_end.items():
        torch.testing.assert_close(end[name], exact, atol=2e-5, rtol=1e-4)
        if "bias" not in name:
            assert (exact - start[name]).abs().max() > 1e-4, name


def resumed(group, folder):
    t = trainer(folder, spmd_backend="partial_dtensor")
    whole = steps(t, 3)
    end = weights(t)
    t.close()
    t = trainer(folder, spmd_backend="partial_dtensor")
    t.checkpointer.load(step=2)
    again = steps(t, 1)
    after = weights(t)
    t.close()
    keys = [k for k in whole[-1] if "temperature" in k]
    return whole, again, end, after, {k: whole[-1][k] for k in keys}


def test_training_goes_on_from_a_checkpoint_and_logs_temperatures(two_ranks, tmp_path):
    whole, again, end, after, stats = two_ranks.run(2, resumed, tmp_path)[0]
    key = "loss_metrics/global_avg_loss"
    assert again[0][key] == pytest.approx(whole[2][key], abs=1e-6)
    for name, p in end.items():
        torch.testing.assert_close(after[name], p, atol=1e-6, rtol=1e-5)
    assert 0.5 < stats["temperature/min"] < stats["temperature/mean"] < stats["temperature/max"] < 2
    assert {"temperature/at_min", "temperature/at_max"} <= set(stats)
    # The sharded checkpoint of torchtitan as one file, of which the TempNet is read.
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(tmp_path / "checkpoint/step-2", tmp_path / "step-2.pt")
    net = load_tempnet(tmp_path / "step-2.pt", tau_min=0.5, tau_max=2.0)
    assert net.proj[0].weight.shape == (8, V)


@pytest.fixture
def model():
    return build(add_tempnet(model_spec(), hidden_size=8, dropout=0.0))


@pytest.mark.parametrize("count", [None, torch.tensor(50)])
def test_loss_and_gradients_are_those_of_the_formula(model, count):
    tokens, labels = batch(0)
    loss, metrics = attached(model)(model(tokens), labels, count)
    loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected = plain_loss(model, tokens, labels) / (1 if count is None else count)
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    assert metrics == {}
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, atol=1e-5, rtol=1e-4)
        assert p.grad.abs().max() > 0, name


def test_nothing_but_the_tempnet_is_trained_in_a_frozen_model():
    model = build(add_tempnet(model_spec(), hidden_size=8, freeze_model=True))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"lm_head.tempnet.{name}" for name in model.lm_head.tempnet.state_dict()}
    attached(model)(model(batch(0)[0]), batch(0)[1])[0].backward()
    assert all(p.grad is not None for p in model.lm_head.tempnet.parameters())


def test_a_model_spec_is_copied_and_its_hugging_face_files_are_as_before():
    plain = model_spec()
    spec = add_tempnet(plain)
    assert type(plain.model.lm_head) is not TempNetLinear.Config
    assert plain.state_dict_adapter is not spec.state_dict_adapter
    state = build(spec).state_dict()
    own = {name: x for name, x in state.items() if "tempnet" not in name}
    assert len(own) < len(state)
    files = [s.state_dict_adapter(s.model, None).to_hf(x) for s, x in ((plain, own), (spec, state))]
    assert files[0].keys() == files[1].keys()


def test_a_tempnet_begins_as_one_of_the_package(model):
    net = model.lm_head.tempnet
    assert torch.equal(net.last.weight, torch.ones(1, 8)) and net.scaler.item() == 0
    for layer in (net.proj[0], net.proj[3]):
        bound = layer.in_features**-0.5
        assert bound / 2 < layer.weight.abs().max() <= bound
    assert load_tempnet(model.state_dict(), tau_min=0.5, tau_max=2.0).vocab_size == V


def test_validation_has_no_gradient_and_no_dropout():
    model = build(add_tempnet(model_spec(), hidden_size=8)).eval()
    tokens, labels = batch(0)
    with torch.no_grad():
        losses = [attached(model)(model(tokens), labels)[0] for _ in range(2)]
        assert model.lm_head(model(tokens)).shape == (2, LENGTH, V)  # logits, to generate
    assert losses[0] == losses[1] and not losses[0].requires_grad


def test_misuse_says_what_to_do(model):
    tokens, labels = batch(0)
    loss = TempNetLoss.Config(rho=RHO).build(compile_config=None)
    with pytest.raises(RuntimeError, match="set_lm_head"):
        loss(model(tokens), labels)
    with pytest.raises(TypeError, match=r"got Linear: set config.model_spec = add_tempnet"):
        loss.set_lm_head(build(model_spec()).lm_head)
    with pytest.raises(ValueError, match=r"TempNetLoss: rho must be below log\(64\) = 4.159"):
        TempNetLoss.Config(rho=5.0).build(compile_config=None).set_lm_head(model.lm_head)
    with pytest.raises(RuntimeError, match=r"temperature_stats needs a call"):
        model.lm_head.temperature_stats()
    with pytest.raises(ValueError, match=r"width 32, got shape \(2, 16, 64\).*_skip_lm_head"):
        attached(model)(torch.zeros(2, LENGTH, V), labels)
    with pytest.raises(ValueError, match=r"got TempNetLinear.Config: keep lm_head out"):
        add_tempnet(add_tempnet(model_spec()))
    model._skip_lm_head = False
    with pytest.raises(RuntimeError, match=r"trained without its TempNet: set config.loss"):
        model(tokens)
    assert "tempnet" in tempnet_param_group(1e-4).pattern


def odd_vocabulary(group, folder):
    spec = add_tempnet(model_spec(V + 1))
    return error_of(
        group,
        lambda _: trainer(
            folder, spec=spec, tensor_parallel_degree=2, spmd_backend="partial_dtensor"
        ),
    )


def full_dtensor(group, folder):
    def train(_):
        steps(trainer(folder, spmd_backend="full_dtensor"), 1)

    return error_of(group, train)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (odd_vocabulary, "multiple of parallelism.tensor_parallel_degree"),
        (full_dtensor, "got a DT"),
    ],
)
def test_parallelism_that_is_not_there_is_refused(two_ranks, tmp_path, function, says):
    for error in two_ranks.run(2, function, tmp_path):
        assert error.startswith("ValueError") and says in error, error
