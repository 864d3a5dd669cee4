"""TempNets are found and read in the layouts that trainers and the official code write."""

import argparse
import json
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint as distributed_checkpoint

from tempnet_kernels.nn import ContrastiveTempNet, TempNet, load_tempnet, save_tempnet

V = 40
BOUNDS = {"tau_min": 0.01, "tau_max": 2.0}


class Arguments:
    """Of a training program: its class is not there when the checkpoint is read."""

    def __init__(self):
        self.rho = 8.5


def make(**options):
    net = TempNet(V, **BOUNDS, hidden_size=16, **options).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter)
    return net


def state_of(net, prefix="", scaler_shape=(1,), dtype=torch.float32):
    state = {prefix + name: x.detach().to(dtype) for name, x in net.state_dict().items()}
    state[prefix + "scaler"] = state[prefix + "scaler"].reshape(scaler_shape)
    return state


def official(net):
    """The official code's scaler is 0-d and float64."""
    return state_of(net) | {"scaler": net.scaler.detach().double().reshape(())}


def save(value, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)


def assert_same(got, net):
    z = torch.randn(6, V)
    assert net(z).std() > 1e-3, "a constant temperature tells nothing"
    assert torch.equal(got(z), net(z)) and not got.training
    assert all(p.dtype == torch.float32 for p in got.parameters())


def megatron(net, path, **others):
    model = {"language_model": {"embedding": {"weight": torch.zeros(V, 4)}}}
    model["tempnet_model"] = official(net)
    args = argparse.Namespace(tempnet_rho=8.5, params_dtype=torch.bfloat16, mode=Arguments())
    save({"args": args, "checkpoint_version": 3.0, "iteration": 10, "model": model} | others, path)


@pytest.mark.parametrize("center", [None, "max"])
def test_what_is_saved_is_loaded(tmp_path, center):
    net = make(center=center)
    save_tempnet(net, tmp_path / "a.safetensors")
    got = load_tempnet(tmp_path / "a.safetensors")
    assert_same(got, net)
    assert (got.tau_min, got.tau_max, got.center) == (0.01, 2.0, center)
    given = load_tempnet(str(tmp_path), tau_min=0.5, tau_max=5.0)
    assert (given.tau_min, given.tau_max, given.center) == (0.5, 5.0, center)


def test_sixteen_bits_are_saved_as_they_are_and_read_in_float32(tmp_path):
    net = make().half()
    save_tempnet(net, tmp_path / "a.safetensors")
    assert_same(load_tempnet(tmp_path), net.float())


@pytest.mark.parametrize("scaler_shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_any_float_type_and_either_scaler(scaler_shape, dtype):
    net = make().to(dtype).float()
    state = state_of(net, "module.tempnet.", scaler_shape, dtype)
    assert_same(load_tempnet(state, **BOUNDS), net)


def test_published_pair_of_files(tmp_path):
    net = make()
    save_file(state_of(net, "tempnet."), tmp_path / "tempnet.safetensors", {"format": "pt"})
    torch.save(state_of(net, "tempnet."), tmp_path / "tempnet.bin")
    for source in (tmp_path, tmp_path / "tempnet.bin", tmp_path / "tempnet.safetensors"):
        assert_same(load_tempnet(source, **BOUNDS), net)
        with pytest.raises(ValueError, match=r"does not say tau_min and tau_max.*0\.5 and 5\.0"):
            load_tempnet(source)


def test_sharded_hugging_face_folder(tmp_path):
    net, state = make(), {}
    state = state_of(net, "tempnet.") | {"model.embed_tokens.weight": torch.zeros(V, 4)}
    names = sorted(state)
    index = {}
    for i, part in enumerate((names[:4], names[4:])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, tmp_path / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (tmp_path / "model.safetensors.index.json").write_text(text)
    settings = BOUNDS | {"center": "max"}
    (tmp_path / "config.json").write_text(json.dumps({"tempnet": settings | {"rho": 5.0}}))
    got = load_tempnet(tmp_path)
    assert got.center == "max"
    got.center = None
    assert_same(got, net)


def test_network_beside_a_model_of_the_other_format(tmp_path):
    net = make()
    save_file({"model.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    save(state_of(net, "tempnet."), tmp_path / "tempnet.bin")
    save(Arguments(), tmp_path / "training_args.bin")
    assert_same(load_tempnet(tmp_path, **BOUNDS), net)


@pytest.mark.parametrize("ranks", [["00"], ["00", "01"], ["00_000", "00_001"]], ids=str)
def test_megatron_checkpoints(tmp_path, ranks):
    """The official code makes a TempNet on every stage of a pipeline and trains the last one's."""
    net, step = make(), tmp_path / "iter_0000010"
    for rank in ranks:
        held = net if rank == ranks[-1] or "_" not in rank else make()
        megatron(held, step / f"mp_rank_{rank}" / "model_optim_rng.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10\n")
    for source in (tmp_path, step, step / f"mp_rank_{ranks[-1]}" / "model_optim_rng.pt"):
        assert_same(load_tempnet(source, **BOUNDS), net)


def test_columns_of_tensor_parallel_ranks_are_put_together(tmp_path):
    net = make()
    for rank, part in enumerate(net.proj[0].weight.detach().chunk(2, 1)):
        state = state_of(net) | {"proj.0.weight": part.clone()}
        save({"model": {"tempnet": state}}, tmp_path / f"mp_rank_0{rank}" / "model_optim_rng.pt")
    assert_same(load_tempnet(tmp_path, **BOUNDS), net)


def test_copies_that_drifted_apart_raise(tmp_path):
    for rank in range(2):
        megatron(make(), tmp_path / f"mp_rank_0{rank}" / "model_optim_rng.pt")
    with pytest.raises(ValueError, match="2 ranks, so they hold copies that drifted apart"):
        load_tempnet(tmp_path, **BOUNDS)
    load_tempnet(tmp_path / "mp_rank_00" / "model_optim_rng.pt", **BOUNDS)


def test_deepspeed_checkpoints_of_the_official_code(tmp_path):
    """GPT-NeoX's: the TempNet beside a sequential model, and the states of random generators."""
    net, step = make(), tmp_path / "global_step10"
    module = {"sequential.0.word_embeddings.weight": torch.zeros(V, 4)}
    module |= {f"tempnet.{name}": x for name, x in official(net).items()}
    states = {
        "module": module,
        "args": {"num_layers": 2},
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
    }
    save(states, step / "mp_rank_00_model_states.pt")
    # The optimizer has no network, and its file is no part of it.
    save({"optimizer_state_dict": Arguments()}, step / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (tmp_path / "latest").write_text("global_step10")
    for source in (tmp_path, step, step / "mp_rank_00_model_states.pt"):
        assert_same(load_tempnet(source, **BOUNDS), net)


def test_a_shared_out_network_of_zero_3_is_refused(tmp_path):
    state = {name: torch.zeros(0) for name in state_of(make(), "tempnet.")}
    save({"module": state}, tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(ValueError, match=r"proj.0.weight .*\(hidden_size, V\), got \(0,\).*ZeRO-3"):
        load_tempnet(tmp_path, **BOUNDS)


def test_distributed_checkpoints(tmp_path):
    """As torchtitan and Megatron write them: the optimizer's state has the names too."""
    net, step = make(), tmp_path / "iter_0000010"
    state = {f"optimizer.state.exp_avg.{k}": x for k, x in state_of(net, "tempnet.").items()}
    state |= state_of(net, "tempnet.") | {"step": 3}
    distributed_checkpoint.save(state, checkpoint_id=step, no_dist=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    for source in (tmp_path, step):
        assert_same(load_tempnet(source, **BOUNDS), net)
    (step / ".metadata").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot read .*\.metadata"):
        load_tempnet(step, **BOUNDS)


def test_pickles_run_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return (shutil.copyfile, (str(tmp_path / "a.pt"), str(tmp_path / "b.pt")))

    net, allowed = make(), set(torch.serialization.get_safe_globals())
    save({"model": state_of(net), "evil": Evil()}, tmp_path / "a.pt")
    assert_same(load_tempnet(tmp_path / "a.pt", **BOUNDS), net)
    assert not (tmp_path / "b.pt").exists()
    assert set(torch.serialization.get_safe_globals()) == allowed
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert (tmp_path / "b.pt").exists(), "the pickle does run something"


def test_the_old_format_of_torch_save(tmp_path):
    net = make()
    torch.save(state_of(net), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert_same(load_tempnet(tmp_path / "a.pt", **BOUNDS), net)


def test_several_networks_are_named_and_chosen():
    first, second = make(), make()
    both = {"a": {"tempnet": state_of(first)}, "ema": {"tempnet": state_of(second)}}
    with pytest.raises(ValueError, match=r"one TempNet, got 2.*'a\.tempnet\.', 'ema\.tempnet\.'"):
        load_tempnet(both, **BOUNDS)
    assert_same(load_tempnet(both, prefix="ema.tempnet.", **BOUNDS), second)
    with pytest.raises(ValueError, match=r"prefix must be .*'a\.tempnet\.'.*got 'b\.'"):
        load_tempnet(both, prefix="b.", **BOUNDS)


def test_two_files_with_the_same_network_are_not_mixed(tmp_path):
    for epoch in (1, 2):
        save(state_of(make(), "tempnet."), tmp_path / f"epoch_{epoch}.pt")
    with pytest.raises(ValueError, match=r"epoch_1\.pt and .*epoch_2\.pt both hold"):
        load_tempnet(tmp_path, **BOUNDS)


def test_no_network(tmp_path):
    with pytest.raises(ValueError, match=r"got none in 1 tensors$"):
        load_tempnet({"model": {"weight": torch.zeros(2)}})
    state = ContrastiveTempNet(8).state_dict()
    contrastive = {f"loss.image_temp_gen.{name}": x for name, x in state.items()}
    with pytest.raises(ValueError, match=r"ContrastiveTempNets under 'loss\.image_temp_gen\.'"):
        load_tempnet(contrastive)
    with pytest.raises(ValueError, match="got none"):
        load_tempnet({"my_proj.0.weight": torch.zeros(2, 2), "my_last.weight": torch.zeros(1, 2)})
    with pytest.raises(FileNotFoundError, match=r"holds none of \*\.safetensors"):
        load_tempnet(tmp_path)
    with pytest.raises(FileNotFoundError, match="gone does not exist"):
        load_tempnet(tmp_path / "gone")
    (tmp_path / "latest").write_text("global_step3")
    with pytest.raises(FileNotFoundError, match="latest names global_step3, which is not there"):
        load_tempnet(tmp_path)


def test_a_tensor_that_is_missing_or_does_not_fit():
    state = state_of(make(), "tempnet.")
    with pytest.raises(ValueError, match=r"has no tempnet\.proj\.3\.bias"):
        load_tempnet({k: x for k, x in state.items() if k != "tempnet.proj.3.bias"}, **BOUNDS)
    with pytest.raises(ValueError, match=r"last\.weight .* \(1, 16\), got \(16, 1\)"):
        load_tempnet(state | {"tempnet.last.weight": torch.ones(16, 1)}, **BOUNDS)
    with pytest.raises(ValueError, match=r"scaler .* float dtype, got torch\.int64"):
        load_tempnet(state | {"tempnet.scaler": torch.ones(1, dtype=torch.int64)}, **BOUNDS)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
@pytest.mark.parametrize("size", [0, 7, 900])
def test_truncated_files(tmp_path, name, size):
    net = make()
    if name == "a.pt":
        save(state_of(net), tmp_path / name)
    else:
        save_tempnet(net, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:size])
    with pytest.raises(ValueError, match=r"a\.(pt|safetensors)"):
        load_tempnet(tmp_path / name, **BOUNDS)


def test_files_of_something_else(tmp_path):
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"weights": Arguments()}, protocol=4))
    with pytest.raises(ValueError, match=r"cannot read .*weights_only=False"):
        load_tempnet(tmp_path / "a.pt")
    save_tempnet(make(), tmp_path / "b.safetensors")
    (tmp_path / "config.json").write_text('["tempnet"]')
    with pytest.raises(ValueError, match=r"config\.json must be a JSON object"):
        load_tempnet(tmp_path)


def test_bounds_out_of_order_in_the_checkpoint_raise(tmp_path):
    save_file(state_of(make(), "tempnet."), tmp_path / "tempnet.safetensors")
    (tmp_path / "config.json").write_text('{"tempnet": {"tau_min": 2.0, "tau_max": 1.0}}')
    with pytest.raises(ValueError, match="tau_min"):
        load_tempnet(tmp_path)


def _save_shared_network(group, path, fsdp):
    torch.manual_seed(0)
    net = make()
    z = torch.randn(5, V)
    expected = net(z)
    if fsdp:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(net, mesh=init_device_mesh("cpu", (group.size(),)))
    else:
        net.shard(group)
    save_tempnet(net, path)
    torch.distributed.barrier(group)
    return torch.equal(load_tempnet(path)(z), expected)


@pytest.mark.parametrize("fsdp", [False, True], ids=["shard", "fsdp2"])
def test_a_network_that_ranks_share_is_saved_whole(gloo, tmp_path, fsdp):
    world = 4 if fsdp else 2
    assert all(gloo.run(world, _save_shared_network, tmp_path / "a.safetensors", fsdp))
