"""SGLang's custom logit processor, by a stand-in of its interface: SGLang does not install here."""

import gc
import json
import os
import subprocess
import sys
from http import HTTPStatus
from pathlib import Path

import pytest
import torch
from serving_interfaces import (
    CustomLogitProcessor,
    FinishAbort,
    Request,
    V,
    module_with,
    network,
    overridden,
    plain_temperatures,
    probabilities,
    sglang_step,
)

from tempnet_kernels.nn import load_tempnet, save_tempnet


@pytest.fixture
def module(monkeypatch):
    batch = "sglang.srt.managers.schedule_batch"
    interface = "sglang.srt.sampling.custom_logit_processor"
    monkeypatch.setitem(sys.modules, batch, type(sys)(batch))
    sys.modules[batch].FINISH_ABORT = FinishAbort
    names = {"CustomLogitProcessor": CustomLogitProcessor}
    return module_with(monkeypatch, interface, names, "sglang")


@pytest.fixture
def string(module):
    """What a client sends."""
    return module.TempNetLogitProcessor.to_str()


@pytest.fixture(params=[None, "max"])
def tempnet(request):
    return network(request.param)


@pytest.fixture
def path(tempnet, tmp_path):
    save_tempnet(tempnet, tmp_path / "tempnet.safetensors")
    return str(tmp_path / "tempnet.safetensors")


def rows(n=4, columns=V):
    return 3 * torch.randn(n, columns)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_samples_from_the_tempered_softmax(string, tempnet, path, temperature):
    requests = [Request({"tempnet": path}, string, temperature) for _ in range(4)]
    z = rows()
    p = torch.softmax(sglang_step(z, requests).double(), 1)
    assert (p - probabilities(tempnet, z, temperature)).abs().max() < 1e-6
    assert (p - torch.softmax(z / temperature, 1)).abs().max() > 0.05
    assert all(r.to_finish is None for r in requests)


def test_rows_of_greedy_requests_and_of_those_without_it_are_untouched(string, tempnet, path):
    requests = [
        Request({"tempnet": path}, string, temperature=0),
        Request(None, None),
        Request({"tempnet": path}, string),
        Request({"other": 1}, None),
        Request({"tempnet": path}, string),
    ]
    z = rows(5)
    got = sglang_step(z, requests)
    assert torch.equal(got[[0, 1, 3]], z[[0, 1, 3]])
    assert (torch.softmax(got[[2, 4]], 1) - probabilities(tempnet, z[[2, 4]])).abs().max() < 1e-6


def test_greedy_requests_do_not_even_read_the_network(string, module, monkeypatch):
    monkeypatch.setattr("tempnet_kernels.integrations._serving.load_tempnet", None)
    requests = [Request({"tempnet": "nowhere"}, string, temperature=0) for _ in range(2)]
    z = rows(2)
    assert torch.equal(sglang_step(z, requests), z)
    assert all(r.to_finish is None for r in requests)


def test_draft_tokens_follow_their_request(string, tempnet, path):
    requests = [
        Request({"tempnet": path}, string, temperature=0),
        Request({"tempnet": path}, string),
    ]
    z = rows(6)
    got = sglang_step(z, requests, tokens=3)
    assert torch.equal(got[:3], z[:3])
    assert (torch.softmax(got[3:], 1) - probabilities(tempnet, z[3:])).abs().max() < 1e-6


def test_requests_of_one_batch_may_name_different_tempnets(string, tempnet, path, tmp_path):
    other = network(seed=9)
    torch.save(other.state_dict(), tmp_path / "published.pt")  # without its bounds
    settings = {"path": str(tmp_path / "published.pt"), "tau_min": 0.1, "tau_max": 5.0}
    other.tau_min, other.tau_max = 0.1, 5.0
    requests = [Request({"tempnet": t}, string) for t in (path, settings, path, settings)]
    z = rows()
    p = torch.softmax(sglang_step(z, requests).double(), 1)
    assert (p[::2] - probabilities(tempnet, z[::2])).abs().max() < 1e-6
    assert (p[1::2] - probabilities(other, z[1::2])).abs().max() < 1e-6


def test_a_process_reads_a_checkpoint_once(string, path, monkeypatch):
    """Though SGLang makes a processor anew for every batch."""
    read = []

    def load(source, **settings):
        read.append(source)
        return load_tempnet(source, **settings)

    monkeypatch.setattr("tempnet_kernels.integrations._serving.load_tempnet", load)
    for _ in range(3):
        sglang_step(rows(2), [Request({"tempnet": path}, string) for _ in range(2)])
    assert read == [path]


def test_masked_rows_stay_masked_and_hopeless_rows_stay_as_they_were(string, tempnet, path):
    z = rows(4)
    z[0, 3:] = -torch.inf
    z[1] = -torch.inf
    z[2, 7] = torch.nan
    got = sglang_step(z, [Request({"tempnet": path}, string) for _ in range(4)])
    assert (torch.softmax(got[[0, 3]], 1) - probabilities(tempnet, z[[0, 3]])).abs().max() < 1e-6
    assert torch.equal(got[1:3].nan_to_num(0.5), z[1:3].nan_to_num(0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_are_divided_by_a_float32_temperature(string, tempnet, path, dtype):
    z = rows().to(dtype)
    got = sglang_step(z, [Request({"tempnet": path}, string) for _ in range(4)])
    exact = z.double() / plain_temperatures(tempnet, z)
    unit = torch.finfo(dtype).eps * exact.abs().max()
    rounded = (z.float() / plain_temperatures(tempnet, z).float()).to(dtype)
    plain = (rounded - exact).abs().max()
    assert (got - exact).abs().max() <= 2 * (plain + unit)


def test_padding_of_the_vocabulary_is_divided_but_not_seen(string, tempnet, path):
    settings = {"path": path, "padded_vocabulary": True}
    z = rows(2, V + 8)
    got = sglang_step(z, [Request({"tempnet": settings}, string) for _ in range(2)])
    tau = plain_temperatures(tempnet, z[:, :V])
    torch.testing.assert_close(got, (z / tau).float(), rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (None, "ValueError", "custom_params must say which TempNet"),
        (5, "TypeError", "tempnet must be a path or a dict of path, tau_min"),
        ("nowhere.pt", "FileNotFoundError", "nowhere.pt does not exist"),
        ({"path": "x", "tau": 1}, "ValueError", "unknown key 'tau'; known are path"),
        ({"path": ["x"]}, "TypeError", "path of tempnet has the wrong type: ['x']"),
    ],
)
def test_misuse_aborts_its_request_and_the_others_go_on(
    string, tempnet, path, value, kind, message
):
    wrong = Request({"tempnet": value} if value else {"other": 1}, string)
    right = Request({"tempnet": path}, string)
    z = rows(2)
    got = sglang_step(z, [wrong, right])
    assert message in wrong.to_finish.message
    assert (wrong.to_finish.err_type, wrong.to_finish.status_code) == (kind, HTTPStatus.BAD_REQUEST)
    assert torch.equal(got[0], z[0]) and right.to_finish is None
    assert (torch.softmax(got[1:], 1) - probabilities(tempnet, z[1:])).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("columns", "message"), [(V - 1, "take the"), (V + 1, "padded_vocabulary")]
)
def test_columns_that_are_not_the_tempnets_abort_the_request(string, path, columns, message):
    request = Request({"tempnet": path}, string)
    z = rows(1, columns)
    assert torch.equal(sglang_step(z, [request]), z)
    assert f"must have the TempNet's {V} columns, got {columns}" in request.to_finish.message
    assert message in request.to_finish.message


def test_request_without_parameters_is_reported_once(string, path, caplog):
    """SGLang then gives no hold of the request by which to abort it."""
    z = rows(3)
    requests = [Request(None, string), Request(None, string), Request({"tempnet": path}, string)]
    for _ in range(2):
        got = sglang_step(z, requests)
    assert torch.equal(got[:2], z[:2]) and not torch.equal(got[2], z[2])
    (record,) = caplog.records
    assert record.levelname == "ERROR" and "pass custom_params=" in record.message


def test_request_that_ended_meanwhile_is_left_alone(string, module, path):
    params = Request({"tempnet": path}, string).custom_params
    gc.collect()
    z = rows(1)
    assert torch.equal(module.TempNetLogitProcessor()(z.clone(), [params]), z)


def test_called_directly_it_raises(module, tempnet, path):
    """Without a request there is nothing to abort."""
    processor, z = module.TempNetLogitProcessor(), rows(2)
    got = processor(z.clone(), [{"tempnet": path}] * 2)
    assert (torch.softmax(got, 1) - probabilities(tempnet, z)).abs().max() < 1e-6
    with pytest.raises(FileNotFoundError, match="nowhere"):
        processor(z, [{"tempnet": "nowhere"}] * 2)


def test_class_has_the_interface_and_travels_by_name(module, string):
    cls = module.TempNetLogitProcessor
    assert issubclass(cls, CustomLogitProcessor) and not cls.__abstractmethods__
    for method, own, theirs in overridden(cls, CustomLogitProcessor):
        assert own == theirs, method
    pickled = bytes.fromhex(json.loads(string)["callable"])
    assert b"tempnet_kernels.integrations.sglang" in pickled and len(pickled) < 200


def test_string_of_a_client_works_in_a_fresh_server_process(string, tmp_path):
    tempnet, path, z = network(), str(tmp_path / "tempnet.safetensors"), rows(2)
    save_tempnet(tempnet, path)
    program = f"""if True:
        import json, sys, types
        for name in ("sglang", "sglang.srt", "sglang.srt.sampling",
                     "sglang.srt.sampling.custom_logit_processor"):
            sys.modules[name] = types.ModuleType(name)
        import torch
        from serving_interfaces import CustomLogitProcessor
        sys.modules[name].CustomLogitProcessor = CustomLogitProcessor
        processor = CustomLogitProcessor.from_str({string!r})
        print(processor(torch.tensor({z.tolist()}), [{{"tempnet": {path!r}}}] * 2).tolist())
    """
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": f"{tests.parent}:{tests / 'support'}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    got = torch.tensor(json.loads(done.stdout))
    assert (torch.softmax(got, 1) - probabilities(tempnet, z)).abs().max() < 1e-6


def test_missing_sglang_says_what_to_install(monkeypatch):
    with pytest.raises(ImportError, match="pip install sglang"):
        module_with(monkeypatch, "sglang.srt", {}, "sglang")
