"""vLLM's two interfaces, by stand-ins: neither vLLM nor a GPU is here."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from serving_interfaces import (
    BatchUpdate,
    MoveDirectionality,
    SamplingParams,
    V,
    V1LogitsProcessor,
    V2LogitsProcessor,
    V2Sampler,
    module_with,
    network,
    overridden,
    plain_temperatures,
    probabilities,
    vllm_config,
)

from tempnet_kernels.integrations import _serving
from tempnet_kernels.nn import save_tempnet

V1_NAMES = {"LogitsProcessor": V1LogitsProcessor, "MoveDirectionality": MoveDirectionality}
SAMPLED, GREEDY = SamplingParams(), SamplingParams(temperature=0.0)
OPTED_OUT = SamplingParams(extra_args={"tempnet": False})


@pytest.fixture
def V2(monkeypatch):
    interface = "vllm.v1.worker.gpu.sample.logits_processor"
    names = {"LogitsProcessor": V2LogitsProcessor}
    return module_with(monkeypatch, interface, names, "vllm").TempNetLogitsProcessor


@pytest.fixture
def V1(monkeypatch):
    interface = "vllm.v1.sample.logits_processor"
    return module_with(monkeypatch, interface, V1_NAMES, "vllm_v1").TempNetLogitsProcessorV1


@pytest.fixture(params=["V2", "V1"])
def make(request):
    """(class, function that makes one from a value of additional_config)"""
    cls = request.getfixturevalue(request.param)

    def make(config, vocab_size=V):
        if request.param == "V2":
            return V2Sampler(cls, vllm_config(config), vocab_size=vocab_size).processor
        return cls(vllm_config(config, vocab_size=vocab_size), torch.device("cpu"), False)

    return cls, make


@pytest.fixture(params=[None, "max"])
def tempnet(request):
    return network(request.param)


@pytest.fixture
def config(tempnet, tmp_path):
    save_tempnet(tempnet, tmp_path / "tempnet.safetensors")
    return {"tempnet": str(tmp_path / "tempnet.safetensors")}


@pytest.fixture
def forbid_network(monkeypatch):
    def forward(self, logits):
        raise AssertionError("the network was evaluated")

    monkeypatch.setattr("tempnet_kernels.nn.TempNet.forward", forward)


def rows(n=4, columns=V):
    return 3 * torch.randn(n, columns)


def test_v2_samples_from_the_tempered_softmax(V2, tempnet, config):
    sampler, z = V2Sampler(V2, vllm_config(config)), rows()
    for slot in range(4):
        sampler.add(slot, SAMPLED)
    p = torch.softmax(sampler.step(z, [2, 0, 3, 1]).double(), 1)
    exact = probabilities(tempnet, z)
    assert (p - exact).abs().max() < 1e-6
    assert (p - torch.softmax(z, 1)).abs().max() > 0.05
    tau = plain_temperatures(tempnet, z)
    assert tau.max() - tau.min() > 0.05


def test_v2_drawn_tokens_have_the_tempered_frequencies(V2, tempnet, config):
    sampler, z, draws = V2Sampler(V2, vllm_config(config)), torch.randn(1, V), 40_000
    sampler.add(0, SAMPLED)
    processed = sampler.step(z, [0])
    noise = -torch.rand(draws, V).log().neg().log()
    observed = (processed + noise).argmax(1).bincount(minlength=V)

    def chi_square(p):
        return ((observed - p * draws) ** 2 / (p * draws)).sum() / (V - 1)

    assert chi_square(probabilities(tempnet, z)[0]) < 2
    assert chi_square(torch.softmax(z, 1)[0]) > 4


def test_v2_greedy_and_opted_out_rows_are_untouched_to_the_bit(V2, tempnet, config):
    sampler, z = V2Sampler(V2, vllm_config(config)), rows()
    for slot, params in enumerate([GREEDY, SAMPLED, OPTED_OUT, SAMPLED]):
        sampler.add(slot, params)
    got = sampler.step(z, [0, 1, 2, 3])
    assert torch.equal(got[[0, 2]], z[[0, 2]])
    assert (torch.softmax(got[[1, 3]], 1) - probabilities(tempnet, z[[1, 3]])).abs().max() < 1e-6


@pytest.mark.parametrize("params", [GREEDY, OPTED_OUT], ids=["greedy", "opted out"])
def test_v2_network_is_not_evaluated_where_no_request_wants_it(V2, config, forbid_network, params):
    sampler, z = V2Sampler(V2, vllm_config(config)), rows(2)
    sampler.add(0, params)
    sampler.add(1, params)
    sampler.add(2, SAMPLED)  # in the engine, but not in this step
    sampler.needs[:] = True  # another processor needs the logits
    assert torch.equal(sampler.step(z, [0, 1]), z)


def test_v2_recycled_slots_forget_their_last_request(V2, tempnet, config):
    sampler, z = V2Sampler(V2, vllm_config(config)), rows(2)
    sampler.add(1, SAMPLED)
    for params, divided in [(SAMPLED, True), (GREEDY, False), (SAMPLED, True), (OPTED_OUT, False)]:
        sampler.add(0, params)
        got = sampler.step(z, [0, 1])
        assert torch.equal(got[0], z[0]) is not divided
        assert not torch.equal(got[1], z[1])


def test_v2_draft_tokens_follow_their_request(V2, tempnet, config):
    """Speculative decoding: a request has a row for each draft token."""
    sampler, z = V2Sampler(V2, vllm_config(config)), rows(6)
    for slot, params in enumerate([GREEDY, SAMPLED, SamplingParams(temperature=2.0)]):
        sampler.add(slot, params)
    got = torch.softmax(sampler.step(z, [2, 0, 1], [3, 2, 1]).double(), 1)
    assert (got[:3] - probabilities(tempnet, z[:3], 2.0)).abs().max() < 1e-6
    assert (got[3:5] - torch.softmax(z[3:5].double(), 1)).abs().max() < 1e-6
    assert (got[5:] - probabilities(tempnet, z[5:])).abs().max() < 1e-6


def test_v2_masked_rows_stay_masked_and_hopeless_rows_stay_as_they_were(V2, tempnet, config):
    sampler, z = V2Sampler(V2, vllm_config(config)), rows(5)
    z[0, 3:] = -torch.inf  # a grammar leaves three tokens
    z[1] = -torch.inf
    z[2, 7] = torch.nan
    z[3, 7] = torch.inf
    for slot in range(5):
        sampler.add(slot, SAMPLED)
    got = sampler.step(z, range(5))
    assert (torch.softmax(got[[0, 4]], 1) - probabilities(tempnet, z[[0, 4]])).abs().max() < 1e-6
    assert torch.equal(got[0] == -torch.inf, z[0] == -torch.inf)
    assert torch.equal(got[1:4].nan_to_num(0.5), z[1:4].nan_to_num(0.5))


def test_chunks_of_rows_change_nothing(V2, tempnet, config, monkeypatch):
    sampler, z = V2Sampler(V2, vllm_config(config)), rows(7)
    for slot in range(7):
        sampler.add(slot, GREEDY if slot == 4 else SAMPLED)
    whole = sampler.step(z, range(7))
    monkeypatch.setattr(_serving, "CHUNK_BYTES", 3 * 4 * V)
    torch.testing.assert_close(sampler.step(z, range(7)), whole, rtol=1e-6, atol=0)


def test_v2_network_goes_to_the_device_with_the_first_request_that_samples(V2, config):
    """vLLM constructs processors where sleep mode owns all allocations."""
    sampler = V2Sampler(V2, vllm_config(config), device="meta")
    weight = sampler.processor._served.tempnet.proj[0].weight
    sampler.add(0, GREEDY)
    assert weight.device.type == "cpu"
    with torch.inference_mode():
        sampler.add(1, SAMPLED)
    assert sampler.processor._served.tempnet.proj[0].weight.device.type == "meta"


def v1_batch(processor, *params):
    added = [(i, p, None, []) for i, p in enumerate(params)]
    processor.update_state(BatchUpdate(len(params), added=added))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_v1_samples_from_the_tempered_softmax(V1, tempnet, config, temperature):
    """Its own temperature comes first there; the TempNet's is the same."""
    processor = V1(vllm_config(config), torch.device("cpu"), False)
    v1_batch(processor, *[SamplingParams(temperature)] * 4)
    z = rows()
    with torch.inference_mode():
        p = torch.softmax(processor.apply(z / temperature).double(), 1)
    assert (p - probabilities(tempnet, z, temperature)).abs().max() < 1e-6


def test_v1_follows_requests_that_leave_come_and_move(V1, config):
    generator, size = np.random.default_rng(0), 6
    processor = V1(vllm_config(config, max_num_seqs=size), torch.device("cpu"), False)
    batch, seen = {}, set()  # place -> parameters
    for _ in range(60):
        removed = [i for i in batch if generator.random() < 0.3]
        for i in removed:
            del batch[i]
        free = [i for i in range(size) if i not in batch]
        added = []
        for i in free[: generator.integers(3)]:
            batch[i] = (SAMPLED, GREEDY, OPTED_OUT)[generator.integers(3)]
            added.append((i, batch[i], None, []))
        moved = []
        while any(i not in batch for i in range(max(batch, default=-1))):  # vLLM closes the gaps
            a, b = max(batch), min(i for i in range(size) if i not in batch)
            batch[b] = batch.pop(a)
            moved.append((a, b, MoveDirectionality.UNIDIRECTIONAL))
        if len(batch) > 1:
            a, b = generator.choice(len(batch), 2, replace=False).tolist()
            batch[a], batch[b] = batch[b], batch[a]
            moved.append((a, b, MoveDirectionality.SWAP))
        processor.update_state(BatchUpdate(len(batch), removed, added, moved))
        processor.update_state(None)  # a step without a change
        z = rows(len(batch))
        got = processor.apply(z.clone())
        divided = [not torch.equal(got[i], z[i]) for i in range(len(batch))]
        assert divided == [batch[i] is SAMPLED for i in range(len(batch))]
        seen |= set(divided)
    assert seen == {True, False}


def test_v1_network_is_not_evaluated_where_no_request_wants_it(V1, config, forbid_network):
    processor, z = V1(vllm_config(config), torch.device("cpu"), False), rows(2)
    assert processor.is_argmax_invariant() is True
    v1_batch(processor, GREEDY, OPTED_OUT)
    assert torch.equal(processor.apply(z.clone()), z)


def test_v1_refuses_min_p_which_comes_before_it(V1, V2):
    V2.validate_params(SamplingParams(min_p=0.1))
    with pytest.raises(ValueError, match=r"min_p must be 0, got 0\.1.*Use top_p"):
        V1.validate_params(SamplingParams(min_p=0.1))
    for params in (
        SamplingParams(min_p=0.1, temperature=0.0),
        SamplingParams(min_p=0.1, extra_args={"tempnet": False}),
    ):
        V1.validate_params(params)


@pytest.mark.parametrize("value", [True, False, 1, 0])
def test_opting_out_is_a_boolean_or_what_http_makes_of_one(make, value):
    make[0].validate_params(SamplingParams(extra_args={"tempnet": value, "other": "x"}))


@pytest.mark.parametrize("value", ["no", "false", 2, None, ["x"], {"path": "x"}])
def test_other_values_of_opting_out_are_refused(make, value):
    with pytest.raises(ValueError, match="tempnet in extra_args must be true or false, got"):
        make[0].validate_params(SamplingParams(extra_args={"tempnet": value}))


def test_columns_that_are_not_the_tempnets_are_refused(make, config):
    with pytest.raises(
        ValueError, match=rf"must have the TempNet's {V} columns, got {V - 1}: take"
    ):
        make[1](config, V - 1)
    with pytest.raises(ValueError, match="the last 8 are padding, set padded_vocabulary to true"):
        make[1](config, V + 8)
    with pytest.raises(ValueError, match=rf"got {V - 1}"):
        make[1]({"tempnet": {"path": config["tempnet"], "padded_vocabulary": True}}, V - 1)


def test_padding_of_the_vocabulary_is_divided_but_not_seen(V2, tempnet, config):
    settings = {"tempnet": {"path": config["tempnet"], "padded_vocabulary": True}}
    sampler = V2Sampler(V2, vllm_config(settings), vocab_size=V + 8)
    for slot in range(2):
        sampler.add(slot, SAMPLED)
    z = rows(2, V + 8)
    z[1, V:] = -torch.inf
    got, tau = sampler.step(z, [0, 1]), plain_temperatures(tempnet, z[:, :V])
    torch.testing.assert_close(got, (z / tau).float(), rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (None, ValueError, "additional_config must say which TempNet.*--additional-config"),
        (3, TypeError, "tempnet must be a path or a dict of path, tau_min.*got 3"),
        ({"tau_min": 0.1}, ValueError, "tempnet must have a path"),
        ({"path": "x", "tau": 1}, ValueError, "unknown key 'tau'; known are path"),
        ({"path": 5}, TypeError, "path of tempnet has the wrong type: 5"),
        ({"path": "x", "tau_min": "low"}, TypeError, "tau_min of tempnet has the wrong type"),
        ("nowhere.safetensors", FileNotFoundError, "nowhere.safetensors does not exist"),
    ],
)
def test_settings_that_name_no_tempnet_stop_the_start(make, value, error, message):
    with pytest.raises(error, match=message):
        make[1]({"tempnet": value})
    with pytest.raises(ValueError, match="additional_config must say which TempNet"):
        make[1]({})


def test_bounds_that_the_checkpoint_lacks_are_asked_for_and_taken(make, tmp_path):
    tempnet = network()
    torch.save(tempnet.state_dict(), tmp_path / "published.pt")
    path = str(tmp_path / "published.pt")
    with pytest.raises(ValueError, match="does not say tau_min and tau_max"):
        make[1]({"tempnet": path})
    settings = {"path": path, "tau_min": 0.01, "tau_max": 1.2, "center": "max"}
    served = make[1]({"tempnet": settings})._served.tempnet
    assert (served.tau_min, served.tau_max, served.center) == (0.01, 1.2, "max")


@pytest.mark.parametrize(
    ("name", "interface"), [("V2", V2LogitsProcessor), ("V1", V1LogitsProcessor)]
)
def test_class_is_what_the_loader_accepts(name, interface, request):
    cls = request.getfixturevalue(name)
    assert issubclass(cls, interface) and not cls.__abstractmethods__
    for method, own, theirs in overridden(cls, interface):
        assert own == theirs, method
    assert pickle.loads(pickle.dumps(cls)) is cls  # to the engine's process
    assert getattr(sys.modules[cls.__module__], cls.__qualname__) is cls  # by module:class


@pytest.mark.parametrize(
    ("module", "other"), [("vllm", "vllm_v1:TempNet.*V1"), ("vllm_v1", "vllm:TempNet")]
)
def test_vllm_without_the_interface_says_what_to_use(module, other, monkeypatch):
    with pytest.raises(ImportError, match=f"pip install vllm.*{other}"):
        module_with(monkeypatch, "vllm.v1", {}, module)


def test_frontend_imports_it_without_touching_a_gpu_or_the_network():
    """vLLM's frontend imports it to validate requests, where CUDA must not be initialised."""
    program = """if True:
        import abc, sys, types
        for name in ("vllm", "vllm.v1", "vllm.v1.worker", "vllm.v1.worker.gpu",
                     "vllm.v1.worker.gpu.sample", "vllm.v1.worker.gpu.sample.logits_processor"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules[name].LogitsProcessor = type("LogitsProcessor", (abc.ABC,), {})
        import torch
        def refuse():
            raise AssertionError("CUDA was initialised")
        torch.cuda._lazy_init = refuse
        from tempnet_kernels.integrations.vllm import TempNetLogitsProcessor
        params = types.SimpleNamespace(temperature=1.0, extra_args=None)
        TempNetLogitsProcessor.validate_params(params)
        heavy = {"safetensors", "tempnet_kernels.triton.dro_cross_entropy", "transformers"}
        print(sorted(heavy & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
