"""Generation with transformers at predicted temperatures."""

import copy
import math

import pytest
import torch
from tiny_transformers import MODELS, RHO, V, assert_close, llama, network

from tempnet_kernels.integrations.transformers import TempNetLogitsProcessor, apply_tempnet
from tempnet_kernels.nn import TempNet

pytestmark = pytest.mark.usefixtures("one_thread")


def scores_of(tempnet, rows=3):
    z = 2 * torch.randn(rows, V)
    z[:, 5] = -math.inf
    tau = tempnet.eval()(z)
    assert tau.max() - tau.min() > 0.05
    return z, tau


def test_processor_divides_by_the_temperature():
    tempnet = network()
    z, tau = scores_of(tempnet)
    processor = TempNetLogitsProcessor(tempnet.train())
    got = processor(torch.zeros(3, 4, dtype=torch.long), z)
    assert tempnet.training
    expected = torch.log_softmax(z / tau[:, None], 1)
    assert (got[:, 5] == -math.inf).all() and got.dtype == torch.float32
    finite = expected.isfinite()
    assert_close(got[finite], expected[finite])
    assert torch.equal(processor.temperatures, tau[None])
    # float16 scores and a float16 network are calculated in float32.
    half = TempNetLogitsProcessor(copy.deepcopy(tempnet).half())
    z16 = z.half()
    got = half(torch.zeros(3, 4, dtype=torch.long), z16)
    tau = copy.deepcopy(tempnet).half().float().eval()(z16.float())
    expected = torch.log_softmax(z16.float() / tau[:, None], 1)
    assert got.dtype == torch.float32
    assert_close(got[finite], expected[finite])


def test_a_row_of_a_masked_vocabulary_stays_finite():
    z = torch.full((3, V), -math.inf)
    z[0, 3], z[1, 3:5] = 1.0, 2.0
    processor = TempNetLogitsProcessor(network(center="max"))
    got = processor(torch.zeros(3, 1, dtype=torch.long), z)
    assert processor.temperatures.isfinite().all() and torch.equal(got[2], z[2])
    assert_close(got[0, 3], torch.tensor(0.0))
    assert_close(got[1, 3:5], torch.tensor([0.5, 0.5]).log())
    assert not got.isnan().any()


@torch.no_grad()
def test_samples_are_distributed_as_softmax_of_z_over_tau():
    """Chi-square over 20,000 tokens that generate() drew."""
    torch.manual_seed(5)
    model = MODELS["llama"]().eval()
    model.lm_head.weight.mul_(40)
    tempnet = network(tau_min=0.2)
    prompt = torch.tensor([[7, 8, 9]])
    z = model(prompt).logits[0, -1]
    tau = tempnet.eval()(z)
    p = torch.softmax(z / tau, 0)
    processor = TempNetLogitsProcessor(tempnet)
    counts = torch.zeros(V)
    for _ in range(4):
        out = model.generate(
            prompt.expand(5000, 3), do_sample=True, top_k=0, max_new_tokens=1,
            logits_processor=[processor], pad_token_id=0,
        )  # fmt: skip
        counts += torch.bincount(out[:, -1], minlength=V)

    def chi_square(p):
        """Per degree of freedom; cells of fewer than 5 expected tokens are put together."""
        expected = 20_000 * p
        rare = expected < 5
        observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
        cells = expected > 0
        return ((observed - expected)[cells] ** 2 / expected[cells]).sum() / (cells.sum() - 1)

    # Of 50 to 96 cells the statistic is above 1.5 once in a thousand times at most.
    assert chi_square(p) < 1.5
    assert chi_square(torch.softmax(z, 0)) > 3  # what it would be without the temperature
    assert processor.temperatures.shape == (1, 5000)
    assert_close(processor.temperatures[0, 0], tau)


@torch.no_grad()
def test_beams_take_the_temperatures_of_the_logits():
    model = MODELS["llama"]().eval()
    model.lm_head.weight.mul_(40)
    prompt, options = torch.tensor([[7, 8, 9]]), {"num_beams": 3, "max_new_tokens": 4}
    with pytest.raises(ValueError, match="pass center='max'"):
        model.generate(prompt, logits_processor=[TempNetLogitsProcessor(network())], **options)
    for processor in (
        TempNetLogitsProcessor(network(), center="max"),
        TempNetLogitsProcessor(network(center="max")),
    ):
        model.generate(prompt, logits_processor=[processor], **options)
        assert processor.temperatures.shape == (4, 3)
        z = model(prompt).logits[0, -1]
        expected = network(center="max").eval()(z)
        assert_close(processor.temperatures[0], expected.expand(3))
    model.generate(prompt, logits_processor=[processor], do_sample=True, **options)
    assert processor.temperatures.shape[0] <= 4  # of the last generation only


@torch.no_grad()
def test_greedy_generation_computes_no_temperature(monkeypatch):
    model = MODELS["llama"]().eval()
    prompt = torch.tensor([[7, 8, 9]])
    expected = model.generate(prompt, max_new_tokens=5, do_sample=False)
    processor = TempNetLogitsProcessor(network(), greedy=True)
    monkeypatch.setattr(TempNet, "forward", None)
    got = model.generate(prompt, max_new_tokens=5, do_sample=False, logits_processor=[processor])
    assert torch.equal(got, expected)
    with pytest.raises(RuntimeError, match="needs a generation"):
        _ = processor.temperatures


@torch.no_grad()
def test_a_model_generates_as_before_in_training_mode():
    """The head is itself wherever no labels are given."""
    model = llama()
    prompt = torch.tensor([[7, 8, 9]])
    expected = model.generate(prompt, max_new_tokens=5, do_sample=False)
    apply_tempnet(model, rho=RHO)
    assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False), expected)


def test_processor_refuses_what_is_no_network():
    with pytest.raises(TypeError, match="must be a TempNet, got str"):
        TempNetLogitsProcessor("folder")
    with pytest.raises(ValueError, match="center must be None or 'max'"):
        TempNetLogitsProcessor(network(), center="mean")
