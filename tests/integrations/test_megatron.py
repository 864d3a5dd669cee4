"""apply_tempnet on the GPTModel of tiny_megatron.py, on gloo processes."""

import copy
import math
import multiprocessing

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, ParamKey, _get_param_groups
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import Float16Module
from processes import error_of
from tiny_megatron import RHO, B, Parallel, S, V, gpt, loss_of

from tempnet_kernels.integrations.megatron import (
    TempNetVocabParallelCrossEntropy,
    apply_tempnet,
)
from tempnet_kernels.nn import TempNet, load_tempnet, save_tempnet

TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}


def plain_formula(z, target, tempnet, rho=RHO):
    """Section 1 and 4 of the mathematics, written out in float64."""
    z, net = z.double(), copy.deepcopy(tempnet).double()
    x = torch.nn.functional.normalize(z.detach(), dim=-1)
    h = net.proj[3](torch.sigmoid(net.proj[0](x)))
    w = torch.softmax(h / net.scaler.exp(), -1)
    t = net.last((w - 1 / h.shape[-1]) * h).squeeze(-1)
    tau = net.tau_min + (net.tau_max - net.tau_min) * torch.sigmoid(t)
    lse = torch.logsumexp(z / tau[..., None], -1)
    z_y = z.gather(-1, target[..., None]).squeeze(-1)
    return tau * (lse + rho - math.log(z.shape[-1])) - z_y, net


def own_columns(x, tp, dim):
    return x.chunk(tp, dim)[parallel_state.get_tensor_model_parallel_rank()]


def the_loss_is_the_formula(group, tp):
    with Parallel(tp):
        generator = torch.Generator().manual_seed(2)
        whole = 3 * torch.randn(S, B, V, generator=generator)
        target = torch.randint(V, (S, B), generator=generator)
        tempnet = apply_tempnet_default()
        expected_z = whole.double().requires_grad_()
        expected, net = plain_formula(expected_z, target, tempnet)
        expected.sum().backward()
        tp_group = parallel_state.get_tensor_model_parallel_group()
        loss_fn = TempNetVocabParallelCrossEntropy(tempnet, RHO, tp_group).eval()
        z = own_columns(whole, tp, 2).clone().requires_grad_()
        loss = loss_fn(z, target, tp_group)
        loss.sum().backward()
        assert loss.shape == (S, B) and loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), expected, **TOLERANCE)
        torch.testing.assert_close(
            z.grad.double(), own_columns(expected_z.grad, tp, 2), **TOLERANCE
        )
        for (name, p), exact in zip(
            loss_fn.tempnet.named_parameters(), net.parameters(), strict=True
        ):
            exact = exact.grad
            if name == "proj.0.weight":
                exact = own_columns(exact, tp, 1)
            torch.testing.assert_close(p.grad.double(), exact, **TOLERANCE)
            assert p.grad.abs().max() > 1e-7, name
        half = z.detach().bfloat16().requires_grad_()
        loss = loss_fn(half, target)
        loss.sum().backward()
        return loss.dtype, half.grad.dtype, loss.detach()


def apply_tempnet_default():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TempNet(V, 0.3, 3.0, hidden_size=8)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_loss_and_gradients_are_those_of_the_formula(gloo, tp):
    results = gloo.run(4, the_loss_is_the_formula, tp)
    for loss_dtype, grad_dtype, loss in results:
        assert (loss_dtype, grad_dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(loss, results[0][2])  # equal on every rank


def train_gpt(group, tp):
    """Three steps -> (losses, the whole TempNet's state, gradient norm by rank)."""
    with Parallel(tp):
        model = gpt(tp)
        handle = apply_tempnet(model, rho=RHO, tempnet=apply_tempnet_default())
        handle.loss.eval()  # no dropout
        config = DistributedDataParallelConfig()
        ddp = DistributedDataParallel(model.config, config, model)
        assert all(hasattr(p, "main_grad") for p in handle.loss.parameters())
        own = list(handle.loss.parameters())
        rest = [p for name, p in model.named_parameters() if "tempnet" not in name]
        # Not Adam, whose first steps are the signs of gradients of any size.
        optimizer = torch.optim.SGD([{"params": rest, "lr": 1.0}, {"params": own, "lr": 30.0}])
        mask = torch.ones(B, S)
        mask[0, 0] = 0
        losses = []
        for step in range(3):
            ddp.zero_grad_buffer()
            rank = parallel_state.get_data_parallel_rank()
            size = parallel_state.get_data_parallel_world_size()
            # The same 4 batches per step, whatever the number of data-parallel ranks.
            mine = [step * 4 + i for i in range(rank, 4, size)]
            total = 0.0
            for i, seed in enumerate(mine):
                loss, _ = loss_of(ddp, seed, mask)
                with ddp.no_sync() if i + 1 < len(mine) else torch.enable_grad():
                    (loss / len(mine)).backward()
                total += loss.item() / len(mine)
            ddp.finish_grad_sync()
            for p in model.parameters():
                p.grad = p.main_grad
            losses.append(total)
            optimizer.step()
            optimizer.zero_grad()
        counted = {
            n: param_is_not_tensor_parallel_duplicate(p) for n, p in model.named_parameters()
        }
        losses = torch.tensor(losses, dtype=torch.float64)
        dist.all_reduce(losses, group=parallel_state.get_data_parallel_group())
        return losses / size, handle.loss.whole_tempnet().state_dict(), counted


def test_gpt_model_in_megatron_ddp_trains_alike_on_any_parallel_size(gloo):
    alone = gloo.run(4, train_gpt, 1)
    assert alone[0][0][0] > alone[0][0][2]
    start = apply_tempnet_default().state_dict()
    assert (alone[0][1]["proj.0.weight"] - start["proj.0.weight"]).abs().max() > 1e-3
    for tp in (2, 4):
        for rank, (losses, tempnet, counted) in enumerate(gloo.run(4, train_gpt, tp)):
            torch.testing.assert_close(losses, alone[0][0], rtol=1e-5, atol=1e-5)
            for name, x in tempnet.items():
                torch.testing.assert_close(x, alone[0][1][name], rtol=1e-5, atol=1e-5)
            # What the gradient norm counts: the divided layer on all ranks, the rest once.
            own = {
                n.split("tempnet_loss.tempnet.")[1]: c
                for n, c in counted.items()
                if ".tempnet." in n
            }
            first = rank % tp == 0
            assert own == {n: first or n == "proj.0.weight" for n in own} and len(own) == 7


def save_checkpoint(group, tp, folder):
    with Parallel(tp):
        model = gpt(tp, seed=3)
        handle = apply_tempnet(model, rho=RHO, tempnet=apply_tempnet_default())
        # Its writer starts a process, which a daemon such as those of the tests may not.
        own = multiprocessing.current_process()._config
        own["daemon"] = False
        dist_checkpointing.save(model.sharded_state_dict(), folder)
        own["daemon"] = True
        return loss_of(model.eval())[1].detach(), handle.loss.whole_tempnet().state_dict()


def load_checkpoint(group, tp, folder):
    with Parallel(tp):
        model = gpt(tp, seed=4)
        torch.manual_seed(5)  # another TempNet, which the checkpoint replaces
        handle = apply_tempnet(model, rho=RHO, tempnet=TempNet(V, 0.3, 3.0, hidden_size=8))
        loaded = dist_checkpointing.load(model.sharded_state_dict(), folder)
        model.load_state_dict(loaded)
        return loss_of(model.eval())[1].detach(), handle.loss.whole_tempnet().state_dict()


def test_checkpoint_loads_on_another_tensor_parallel_size(gloo, tmp_path):
    saved = gloo.run(4, save_checkpoint, 2, str(tmp_path))
    for tp in (1, 4):
        for losses, tempnet in gloo.run(4, load_checkpoint, tp, str(tmp_path)):
            torch.testing.assert_close(losses, saved[0][0], **TOLERANCE)
            for name, x in tempnet.items():
                assert torch.equal(x, saved[0][1][name]), name


@pytest.fixture
def alone(tmp_path):
    """This process as the only one of Megatron."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    with Parallel(1):
        yield
    dist.destroy_process_group()


def test_remove_restores_the_model(alone):
    model = gpt()
    before, names = loss_of(model)[1], list(model.state_dict())
    handle = apply_tempnet(model, rho=RHO)
    assert "tempnet_loss.tempnet.proj.0.weight" in model.state_dict()
    assert not torch.allclose(loss_of(model)[1], before)
    handle.remove()
    handle.remove()
    assert torch.equal(loss_of(model)[1], before) and list(model.state_dict()) == names
    assert "compute_language_model_loss" not in vars(model)
    apply_tempnet(model, rho=RHO).remove()


def test_remove_leaves_what_replaced_the_loss_later(alone):
    model = gpt()
    handle = apply_tempnet(model, rho=RHO)
    model.compute_language_model_loss = later = lambda labels, logits: logits
    with pytest.raises(RuntimeError, match="undo that first"):
        handle.remove()
    assert model.compute_language_model_loss is later


def test_copy_of_the_loss_trains_its_own_tempnet(alone):
    loss = apply_tempnet(gpt(), rho=RHO).loss
    copied = copy.deepcopy(loss)
    copied(torch.randn(S, B, V), torch.zeros(S, B, dtype=torch.int64)).sum().backward()
    assert copied.tempnet.last.weight.grad is not None and loss.tempnet.last.weight.grad is None


def test_default_tempnet_does_not_depend_on_the_generator_nor_move_it(alone):
    states = []
    for seed in (1, 2):
        model = gpt(seed=seed)
        before = torch.get_rng_state()
        states.append(apply_tempnet(model, rho=RHO).loss.tempnet.state_dict())
        assert torch.equal(torch.get_rng_state(), before)
    for name, x in states[0].items():
        assert torch.equal(x, states[1][name])


def test_bfloat16_model_gives_bfloat16_gradients(alone):
    model = gpt(bf16=True, params_dtype=torch.bfloat16)
    apply_tempnet(model, rho=RHO)
    wrapped = Float16Module(model.config, model)
    loss, losses = loss_of(wrapped)
    loss.backward()
    assert losses.dtype == torch.float32 and losses.isfinite().all()
    for name, p in model.named_parameters():
        assert p.grad.dtype == p.dtype == torch.bfloat16, name
    tau = model.tempnet_loss.temperature_stats()
    assert 0.5 < tau.min <= tau.max < 2.0


def test_tempnet_has_its_own_learning_rate_in_megatrons_optimizer(alone):
    model = gpt()
    apply_tempnet(model, rho=RHO)
    overrides = {ParamKey(name="*tempnet_loss.*"): {"max_lr": 1e-4, "min_lr": 1e-4, "wd_mult": 0.0}}
    groups = _get_param_groups([model], OptimizerConfig(lr=1e-2), overrides)
    (own,) = (g["params"] for g in groups if g["max_lr"] == 1e-4)
    assert {id(p) for p in own} == {id(p) for p in model.tempnet_loss.parameters()}


def test_whole_tempnet_is_saved_and_loaded(alone, tmp_path):
    model = gpt()
    loss = apply_tempnet(model, rho=RHO, tempnet=apply_tempnet_default()).loss
    save_tempnet(loss.whole_tempnet(), tmp_path / "tempnet.safetensors")
    loaded = load_tempnet(tmp_path / "tempnet.safetensors")
    z = torch.randn(3, V)
    assert torch.equal(loaded(z), loss.tempnet.eval()(z)) and loaded.tau_max == 3.0


def test_masked_tokens_give_the_tempnet_no_gradient(alone):
    model = gpt()
    loss = apply_tempnet(model, rho=RHO).loss
    (loss_of(model)[1] * torch.zeros(B, S)).sum().backward()
    assert all(p.grad.abs().max() == 0 for p in loss.parameters())


class OwnLoss(GPTModel):
    def compute_language_model_loss(self, labels, logits):
        return logits


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Float16Module(gpt(bf16=True).config, gpt()), TypeError, "bare model, before"),
        (lambda: gpt(post_process=False), ValueError, "only where post_process is true"),
        (lambda: gpt(mtp_num_layers=1), ValueError, "without multi-token prediction"),
    ],
)
def test_models_that_cannot_be_used_are_refused(alone, make, error, message):
    with pytest.raises(error, match=message):
        apply_tempnet(make(), rho=RHO)


def test_loss_that_was_replaced_is_refused(alone, monkeypatch):
    model = gpt()
    apply_tempnet(model, rho=RHO)
    with pytest.raises(ValueError, match=r"replaced already: undo that"):
        apply_tempnet(model, rho=RHO)
    model = gpt()
    monkeypatch.setattr(GPTModel, "compute_language_model_loss", lambda *_: None)
    with pytest.raises(ValueError, match="overridden or patched"):
        apply_tempnet(model, rho=RHO)
    assert not hasattr(model, "tempnet_loss")


def test_model_in_ddp_is_refused(alone):
    model = gpt()
    DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    with pytest.raises(RuntimeError, match="where the model is made"):
        apply_tempnet(model, rho=RHO)


def test_tempnet_of_another_vocabulary_is_refused(alone):
    with pytest.raises(ValueError, match=r"for 24 columns \(the vocabulary with"):
        apply_tempnet(gpt(), rho=RHO, tempnet=TempNet(V - 1))
    group = parallel_state.get_tensor_model_parallel_group()
    loss = TempNetVocabParallelCrossEntropy(TempNet(V), RHO, group)
    with pytest.raises(ValueError, match="padded"):
        loss(torch.randn(S, B, V - 1), torch.zeros(S, B, dtype=torch.int64), group)


def test_the_default_tempnet_leaves_the_generators_of_the_gpus_alone(alone, monkeypatch):
    model = gpt()
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    apply_tempnet(model, rho=RHO)
    assert not seeded
    assert torch.equal(torch.get_rng_state(), before)


def test_options_that_megatron_cannot_use_are_refused(alone):
    group = parallel_state.get_tensor_model_parallel_group()
    for option in ("reduction", "return_stats", "overwrite_logits"):
        with pytest.raises(ValueError, match=f"{option} is not an option"):
            TempNetVocabParallelCrossEntropy(TempNet(V), RHO, group, **{option: True})
    with pytest.raises(TypeError, match="apply_tempnet: tempnet must be a TempNet, got Linear"):
        apply_tempnet(gpt(), rho=RHO, tempnet=torch.nn.Linear(V, 1))
    with pytest.raises(TypeError, match="must be a TempNet, got Linear"):
        TempNetVocabParallelCrossEntropy(torch.nn.Linear(V, 1), RHO, group)


def tempnets_of_different_seeds(group):
    with Parallel(2):
        model = gpt(2)
        torch.manual_seed(dist.get_rank())
        return apply_tempnet(model, rho=RHO, tempnet=TempNet(V)).loss.whole_tempnet().state_dict()


def test_tempnets_that_differ_by_rank_become_one(gloo):
    states = gloo.run(4, tempnets_of_different_seeds)
    for state in states[1:]:
        for name, x in state.items():
            assert torch.equal(x, states[0][name]), name


def wrong_groups(group):
    with Parallel(2):
        other = dist.new_group(range(4))
        tp_group = parallel_state.get_tensor_model_parallel_group()
        loss = TempNetVocabParallelCrossEntropy(TempNet(V), RHO, tp_group)
        target = torch.zeros(S, B, dtype=torch.int64)
        return (
            error_of(other, lambda g: loss(torch.randn(S, B, V // 2), target, g)),
            error_of(other, lambda g: TempNetVocabParallelCrossEntropy(loss.tempnet, RHO, g)),
            error_of(tp_group, lambda g: loss(torch.randn(S, B, V), target, g)),
            error_of(tp_group, lambda g: apply_tempnet(gpt(2, parallel_output=False), rho=RHO)),
        )


def test_wrong_groups_and_gathered_logits_are_refused(gloo):
    parts = ("tp_group must be", "another process group", "12 columns", "parallel_output must be")
    for errors in gloo.run(4, wrong_groups):
        for error, part in zip(errors, parts, strict=True):
            assert error is not None and error.startswith("ValueError") and part in error
