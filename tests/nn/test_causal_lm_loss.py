"""TempNetCausalLMLoss: the shift of labels, the normalisation of a trainer, both inputs."""

import pytest
import torch
import torch.nn.functional as F

from tempnet_kernels import dro_cross_entropy
from tempnet_kernels.nn import TempNet, TempNetCausalLMLoss

B, T, V, D = 3, 7, 50, 16
RHO = 1.5


def make(device, **options):
    hidden = torch.randn(B, T, D, device=device, requires_grad=True)
    weight = torch.randn(V, D, device=device, requires_grad=True)
    labels = torch.randint(0, V, (B, T), device=device)
    labels[0, :3] = -100
    net = TempNet(V, hidden_size=24, dropout=0.0).to(device)
    return hidden, weight, labels, TempNetCausalLMLoss(net, RHO, **options)


def by_hand(hidden, weight, labels, net, normalizer=None, **options):
    """Position t against label t + 1, and nothing else."""
    z = hidden @ weight.T
    z, y = z[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return dro_cross_entropy(
        z, y, net(z), RHO, normalizer=normalizer, backend="reference", **options
    )


def gradients(loss, hidden, weight, module):
    return loss.detach(), *torch.autograd.grad(loss, [hidden, weight, *module.parameters()])


@pytest.mark.parametrize("number", [None, 33, "tensor"])
@pytest.mark.parametrize("kind", ["logits", "hidden"])
def test_equals_the_shifted_token_loss(kind, number, device):
    options = {"label_smoothing": 0.1, "z_loss": 1e-2}
    hidden, weight, labels, module = make(device, **options)
    by = None if number is None else 33
    number = torch.tensor(33) if number == "tensor" else number  # a trainer's: on the CPU
    expected = gradients(
        by_hand(hidden, weight, labels, module.tempnet, by, **options),
        hidden, weight, module,
    )  # fmt: skip
    if kind == "logits":
        loss = module(hidden @ weight.T, labels, number)
    else:
        loss = module(hidden, labels, number, weight=weight)
    for got, value in zip(gradients(loss, hidden, weight, module), expected, strict=True):
        assert value.abs().max() > 0
        torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-6)


def test_labels_that_are_shifted_already(device):
    hidden, weight, labels, module = make(device)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    expected = module(hidden, labels, weight=weight)
    assert torch.equal(module(hidden, None, weight=weight, shift_labels=shifted), expected)


def test_micro_batches_sum_to_the_whole_batch(device):
    hidden, weight, labels, module = make(device)
    count = (labels[:, 1:] != -100).sum()
    whole = module(hidden, labels, weight=weight)
    parts = [module(hidden[i, None], labels[i, None], count, weight=weight) for i in range(B)]
    torch.testing.assert_close(sum(parts), whole)


def test_bias_softcap_and_statistics(device):
    hidden, weight, labels, module = make(device, softcap=5.0, chunk_rows=4)
    bias = torch.randn(V, device=device)
    with pytest.raises(RuntimeError, match="TempNetCausalLMLoss: temperature_stats needs"):
        module.temperature_stats()
    loss = module(hidden, labels, weight=weight, bias=bias)
    stats = module.temperature_stats()
    capped = 5 * torch.tanh((hidden @ weight.T + bias) / 5)
    torch.testing.assert_close(module(capped, labels), loss, rtol=1e-5, atol=1e-6)
    for value, other in zip(stats, module.temperature_stats(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)
    tau = module.tempnet(capped)[:, :-1][labels[:, 1:] != -100]
    torch.testing.assert_close(stats.mean, tau.mean(), rtol=1e-5, atol=1e-6)


def test_parameters_and_checkpoint_are_the_networks(device):
    module = make(device)[3]
    names = {name.removeprefix("tempnet.") for name in module.state_dict()}
    assert names == set(module.tempnet.state_dict())
    assert "rho=1.5" in repr(module)


def test_misuse_says_what_to_do(device):
    hidden, weight, labels, module = make(device)
    with pytest.raises(ValueError, match=rf"must be logits of {V} columns, .*pass weight="):
        module(hidden, labels)
    with pytest.raises(ValueError, match=r"num_items_in_batch must be > 0, .*got 0: leave out"):
        module(hidden, labels, 0, weight=weight)
    with pytest.raises(TypeError, match="labels or shift_labels must be given"):
        module(hidden, None, weight=weight)
    with pytest.raises(ValueError, match=rf"TempNetCausalLMLoss: rho must be below log\({V}\)"):
        TempNetCausalLMLoss(TempNet(V), rho=20.0)
