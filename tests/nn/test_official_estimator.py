"""RobustContrastiveLoss(estimator="official") against the official formulas, anchor by anchor."""

import math

import pytest
import torch
from robust_contrastive import SAMPLES, B, features, make


def official_gradients(image, text, taus, state, ids, epoch, gamma, rho):
    """The official estimate as its formulas read, in float64, anchor by anchor; updates ``state``
    (s and b per side). The floor of s is the official one."""
    image, text = (t.detach().double().requires_grad_() for t in (image, text))
    s = image @ text.T
    total, k_all = 0.0, []
    for side, scores, tau in (("image", s, taus[0]), ("text", s.T, taus[1])):
        ks = []
        for i, sample in enumerate(ids.tolist()):
            h = scores[i] - scores[i, i]
            x = (h / tau[i].double()).detach()
            old_s, old_b = state[side].get(sample, (0.0, 0.0))
            b = max(old_b, x.max().item())
            e = torch.exp(x - b)
            e[i] = 0
            new = e.sum().item()
            if epoch > 0:
                new = (1 - gamma) * old_s * math.exp(old_b - b) + gamma * new
            state[side][sample] = (new, b)
            w = e / max(new, 1e-14)
            total = total + (w * h).sum() / len(ids)
            ks.append(math.log(max(new, 1e-14) / (len(ids) - 1)) + b + rho - (w * x).sum().item())
        k_all.append(torch.tensor(ks, dtype=torch.float64))
    return (*torch.autograd.grad(total, (image, text)), *k_all)


@pytest.mark.parametrize("method", ["sogclr", "isogclr", "tempnet"])
def test_official_estimator_is_the_official_formula_over_20_steps(method):
    loss_fn = make(method, estimator="official", rho=1.0, gamma=0.8)
    networks = [loss_fn.image_temp_gen, loss_fn.text_temp_gen] if method == "tempnet" else []
    for network in networks:
        network.dropout = 0.0
    state = {"image": {}, "text": {}}
    for step in range(20):
        image, text = features()
        ids = torch.randperm(SAMPLES)[:B]  # some are first seen after epoch 0
        epoch = int(step >= 5)
        value = loss_fn(image, text, ids, epoch=epoch)
        parameters = list(loss_fn.parameters())
        grads = torch.autograd.grad(value, (image, text, *parameters))
        taus = [tau.expand(B) for tau in loss_fn._taus]
        expected = official_gradients(image, text, taus, state, ids, epoch, 0.8, 1.0)
        for g, e in zip(grads[:2], expected[:2], strict=True):
            assert (g - e).norm() <= 1e-5 * e.norm(), step
        if networks:  # they learn from k / B
            predicted = [n(f.detach()) for n, f in zip(networks, (image, text), strict=True)]
            weights = [k.float() / B for k in expected[2:]]
            wanted = torch.autograd.grad(predicted, parameters, weights)
            for g, e in zip(grads[2:], wanted, strict=True):
                assert (g - e).norm() <= 1e-4 * e.norm(), step
    for side, x in (("image", "I"), ("text", "T")):
        for sample, (s, b) in state[side].items():
            assert loss_fn.state.state_dict()[f"b_{x}"][sample] == pytest.approx(
                b, rel=1e-4, abs=1e-4
            )
            assert loss_fn.state.state_dict()[f"s_{x}"][sample] == pytest.approx(s, rel=1e-3)
