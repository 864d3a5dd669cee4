"""Hugging Face transformers, on tiny models with random weights."""

import copy

import pytest
import torch
from tiny_transformers import MODELS, RHO, SMALL, V, assert_close, batch, llama, network, plain
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tempnet_kernels.integrations.transformers import apply_tempnet
from tempnet_kernels.nn import TempNet, load_tempnet

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_the_formula_s(name, linear):
    model = MODELS[name]().train()
    inputs, tempnet = batch(), network()
    expected_model, expected_tempnet = copy.deepcopy(model), copy.deepcopy(tempnet)
    out = expected_model(input_ids=inputs["input_ids"])
    expected = plain(out.logits, inputs["labels"], expected_tempnet)
    if name == "mixtral":
        expected = expected + expected_model.router_aux_loss_coef * out.aux_loss
    expected.backward()

    handle = apply_tempnet(model, rho=RHO, tempnet=tempnet, linear=linear)
    out = model(**inputs)
    assert (out.logits is None) == linear
    assert_close(out.loss, expected)
    out.loss.backward()
    for got, p in zip(
        [*model.parameters()],
        [*expected_model.parameters(), *expected_tempnet.parameters()],
        strict=True,
    ):
        assert_close(got.grad, p.grad)
    assert handle.temperature_stats().max - handle.temperature_stats().min > 0.05

    model.eval()
    out = model(**inputs)
    assert out.logits.shape == (2, 9, V)
    assert_close(out.loss, expected)
    assert_close(
        model(**inputs, return_dict=False)[0], expected
    )  # a tuple, as before transformers 4


@pytest.mark.parametrize("linear", [True, False])
def test_number_of_items_and_shifted_labels(linear):
    model = llama()
    inputs, tempnet = batch(), network()
    logits = model(input_ids=inputs["input_ids"]).logits
    apply_tempnet(model, rho=RHO, tempnet=tempnet, linear=linear)
    expected = plain(logits, inputs["labels"], tempnet, normalizer=31)
    for items in (31, torch.tensor(31)):
        assert_close(model(**inputs, num_items_in_batch=items).loss, expected)
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    loss = model(**inputs, shift_labels=shifted, num_items_in_batch=31).loss
    assert_close(loss, expected)
    loss, logits = model(**inputs, num_items_in_batch=31, return_dict=False)[:2]
    assert_close(loss, expected)
    assert (logits is None) == linear
    with pytest.raises(ValueError, match="pass labels too"):
        model(input_ids=inputs["input_ids"], shift_labels=shifted)


def test_remove_leaves_nothing_behind():
    model, inputs = llama(), batch()
    model.lm_head.weight.requires_grad_(False)
    state = [k for k in model.__dict__ if k != "loss_type"], [*model.state_dict()]
    required = [p.requires_grad for p in model.parameters()]
    config = model.config.to_dict()
    expected = model(**inputs)
    handle = apply_tempnet(model, rho=RHO, freeze_model=True)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        f"tempnet.{n}" for n, _ in handle.tempnet.named_parameters()
    ]
    assert model(**inputs).loss != expected.loss
    handle.remove()
    assert ([k for k in model.__dict__ if k != "loss_type"], [*model.state_dict()]) == state
    assert [p.requires_grad for p in model.parameters()] == required
    assert model.config.to_dict() == config and "forward" not in model.lm_head.__dict__
    assert torch.equal(model(**inputs).loss, expected.loss)
    assert torch.equal(model(**inputs).logits, expected.logits)
    with pytest.raises(RuntimeError, match="removed before"):
        handle.remove()
    apply_tempnet(model, rho=RHO)


def test_a_copy_has_its_own_network():
    model, inputs = llama(), batch()
    apply_tempnet(model, rho=RHO, tempnet=network())
    loss = model(**inputs).loss
    other = copy.deepcopy(model)
    assert torch.equal(other(**inputs).loss, loss)
    nn.init.zeros_(other.tempnet.last.weight)
    assert not torch.equal(other(**inputs).loss, loss)
    assert torch.equal(model(**inputs).loss, loss)


@pytest.mark.parametrize("linear", [True, False])
def test_a_frozen_model_s_tempnet_learns(linear):
    model, inputs = llama(), batch()
    before = {k: x.clone() for k, x in model.state_dict().items()}
    apply_tempnet(model, rho=RHO, tempnet=network(), linear=linear, freeze_model=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(10):
        losses.append(model(**inputs).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 1e-3
    assert all(torch.equal(model.state_dict()[k], x) for k, x in before.items())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_save_pretrained_keeps_the_network(name, tmp_path):
    model, inputs = MODELS[name]().train(), batch()
    apply_tempnet(
        model, rho=RHO, tempnet=network(tau_min=0.1, tau_max=1.5, center="max"), linear=True
    )
    loss = model(**inputs).loss
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    assert not hasattr(loaded, "tempnet")
    with pytest.raises(ValueError, match=r"pass tempnet=load_tempnet\(folder\)"):
        apply_tempnet(loaded, rho=RHO)
    apply_tempnet(loaded, rho=RHO, tempnet=load_tempnet(tmp_path).train())
    assert loaded.tempnet.center == "max" and loaded.tempnet.tau_max == 1.5
    assert_close(loaded(**inputs).loss, loss)


def test_compiles_whole_and_with_gradient_checkpointing():
    model, inputs = llama(), batch()
    apply_tempnet(model, rho=RHO, tempnet=network())
    loss = model(**inputs).loss
    loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    for call in (torch.compile(model, fullgraph=True, backend="aot_eager"), model):
        if call is model:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        got = call(**inputs).loss
        got.backward()
        assert_close(got, loss)
        for p, grad in zip(model.parameters(), expected, strict=True):
            assert (p.grad - grad).abs().max() <= 1e-5 * grad.abs().max()


def test_what_other_packages_did_is_refused():
    def forward(self, input_ids=None, labels=None, **kwargs):
        """As Liger-Kernel's."""

    forward.__module__ = "liger_kernel.transformers.model.llama"
    model = llama()
    model.forward = forward.__get__(model)
    with pytest.raises(ValueError, match=r"replaced by liger_kernel.*fused_linear_cross_entropy"):
        apply_tempnet(model, rho=RHO)
    model = llama()
    model.loss_function = lambda **kwargs: None
    with pytest.raises(ValueError, match="ForCausalLMLoss, got <lambda>"):
        apply_tempnet(model, rho=RHO)
    model = llama()
    model.lm_head = nn.Sequential(model.lm_head)
    model.lm_head.weight = model.lm_head[0].weight
    with pytest.raises(ValueError, match=r"a Sequential .*pass linear=False"):
        apply_tempnet(model, rho=RHO)
    apply_tempnet(model, rho=RHO, linear=False)


def test_models_and_networks_that_do_not_fit_are_refused():
    bert = BertForMaskedLM(BertConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1,
                                      num_attention_heads=2, intermediate_size=8))  # fmt: skip
    with pytest.raises(ValueError, match="got ForMaskedLMLoss"):
        apply_tempnet(bert, rho=RHO, linear=False)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=V, d_model=8, d_kv=4, d_ff=8, num_layers=1,
                                             num_heads=2))  # fmt: skip
    with pytest.raises(TypeError, match="must be a decoder"):
        apply_tempnet(t5, rho=RHO)
    for wrapped in (nn.Sequential(llama()), nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="apply it before them"):
            apply_tempnet(wrapped, rho=RHO)
    model = llama()
    with pytest.raises(ValueError, match="for the 96 rows of the model's head, got one for 97"):
        apply_tempnet(model, rho=RHO, tempnet=TempNet(97))
    with pytest.raises(TypeError, match="load_tempnet"):
        apply_tempnet(model, rho=RHO, tempnet="folder")
    apply_tempnet(model, rho=RHO)
    with pytest.raises(ValueError, match="call remove"):
        apply_tempnet(model, rho=RHO)
    with pytest.raises(ValueError, match="pass it to apply_tempnet"):
        model(**batch(), ignore_index=0)


def test_logits_that_change_after_the_head_are_refused():
    model = CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.5)).train()
    inputs, tempnet = batch(), network()
    logits = model(input_ids=inputs["input_ids"]).logits
    handle = apply_tempnet(model, rho=RHO, tempnet=tempnet)
    with pytest.raises(RuntimeError, match=r"changes its logits.*linear=False"):
        model(**inputs)
    handle.remove()
    apply_tempnet(model, rho=RHO, tempnet=tempnet, linear=False)
    assert_close(model(**inputs).loss, plain(logits, inputs["labels"], tempnet))


def test_a_forward_replaced_afterwards_is_noticed():
    model, inputs = llama(), batch()
    apply_tempnet(model, rho=RHO)
    original = model.forward
    model.forward = lambda input_ids, labels: original(input_ids=input_ids)
    for mode in (True, False):
        with pytest.raises(RuntimeError, match=r"did not call model\.loss_function"):
            model.train(mode)(**inputs)


def test_a_compiled_model_is_not_compiled_again_in_every_step():
    model, inputs = llama(), batch()
    apply_tempnet(model, rho=RHO, tempnet=network())
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(12):  # beyond the limit of recompilations
        compiled(**inputs).loss.backward()
    assert len(graphs) == 1


class Scaled(Gemma2ForCausalLM):
    """Scales its logits before it caps them."""

    def __init__(self, config):
        super().__init__(config)
        self.lm_head.register_forward_hook(lambda head, args, output: 3 * output)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_scale_before_the_softcap_is_seen(compiled):
    config = Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=5.0)
    model = Scaled(config).train()
    apply_tempnet(model, rho=RHO, tempnet=network())
    if compiled:
        assert torch.compile(model, backend="aot_eager")(**batch()).loss.isnan()
    else:
        with pytest.raises(RuntimeError, match=r"changes its logits.*linear=False"):
            model(**batch())


def test_a_softcap_of_the_config_that_is_not_applied_is_seen():
    model = llama()
    model.config.final_logit_softcapping = 0.05
    apply_tempnet(model, rho=RHO, tempnet=network())
    with pytest.raises(RuntimeError, match="a softcap that its config has"):
        model(**batch())


def test_an_error_in_the_forward_leaves_the_head_as_it_was():
    model, inputs = llama(), batch()
    handle = apply_tempnet(model, rho=RHO, tempnet=network())
    expected = model(**inputs).loss
    with pytest.raises(IndexError):
        model(input_ids=inputs["input_ids"], labels=inputs["labels"] + V)
    hidden = torch.randn(1, 2, 16)
    assert model.lm_head(hidden).shape == (1, 2, V) and handle._hidden is None
    copy.deepcopy(model)
    assert torch.equal(model(**inputs).loss, expected)


def test_a_tuple_has_none_in_the_place_of_the_logits():
    model = MODELS["mixtral"]().train()
    apply_tempnet(model, rho=RHO, tempnet=network())
    _, aux_loss, logits = model(**batch(), return_dict=False)[:3]
    assert aux_loss.dim() == 0 and logits is None


def test_a_head_or_a_network_that_was_replaced_is_noticed():
    model = llama()
    apply_tempnet(model, rho=RHO, tempnet=network())
    model.resize_token_embeddings(100)
    with pytest.raises(RuntimeError, match="head was replaced"):
        model(**batch())
    model = llama()
    handle = apply_tempnet(model, rho=RHO, tempnet=network())
    model.tempnet = copy.deepcopy(model.tempnet)  # as PEFT's modules_to_save
    with pytest.raises(RuntimeError, match="call get_peft_model first"):
        model(**batch())
    model.tempnet = handle.tempnet
    ours = model.lm_head.forward
    model.lm_head.forward = lambda x: ours(x)
    with pytest.raises(RuntimeError, match="undo that first"):
        handle.remove()
    model.lm_head.forward = ours
    model.model.embed_tokens.weight.requires_grad_(False)
    handle.remove()
    assert not model.model.embed_tokens.weight.requires_grad  # frozen by someone else


def test_an_offloaded_head_and_replicas_are_refused():
    model = llama()
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match="without offloading its head"):
        apply_tempnet(model, rho=RHO)
    model = llama()
    apply_tempnet(model, rho=RHO)
    model._is_replica = True  # as torch.nn.DataParallel marks them
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        model(**batch())
