"""Hugging Face transformers: training with the robust loss, and generation at its temperatures."""

import copy
import inspect
import math

import torch
from torch import nn
from transformers import LogitsProcessor, TrainerCallback
from transformers.loss.loss_utils import ForCausalLMLoss

from tempnet_kernels.nn import TempNet, TempNetCausalLMLoss
from tempnet_kernels.nn.checkpoint import settings_of
from tempnet_kernels.ops.tempered_softmax import tempered_log_softmax

NAME = "tempnet"  # of the submodule, and of the entry of the model's config


def apply_tempnet(model, *, rho, tempnet=None, linear=True, freeze_model=False, **options):
    """Train a causal language model with the robust loss, at the temperatures of a TempNet.

    The model's own forward runs; where it is given labels, its loss is this one. The TempNet
    becomes ``model.tempnet``: the optimizer, DDP, FSDP and ``save_pretrained`` see its parameters.
    Call this on the bare model, before anything wraps it, and before the optimizer is made.

    Args:
        model: a causal language model of transformers whose loss is the usual one.
        rho: KL radius in nats, in [0, log V) of the model's V columns.
        tempnet: a :class:`tempnet_kernels.nn.TempNet` for as many columns as the model has logits;
            for a checkpoint that holds one, ``load_tempnet(folder)``. Default: a new one, float32.
        linear: in training mode the loss is computed from the hidden states and the head's weight,
            and the output has no logits. In evaluation mode, and with False, from the logits.
        freeze_model: only the TempNet is trained.
        options: ``label_smoothing``, ``z_loss``, ``chunk_rows``, ``ignore_index`` and ``backend``
            of :class:`tempnet_kernels.nn.TempNetCausalLMLoss`.

    Returns:
        A :class:`TempNetHandle`: ``handle.remove()`` undoes all of it.

    Raises:
        TypeError: the model is wrapped, or is not a causal language model of transformers.
        ValueError: rho is out of its bounds, the TempNet does not fit, there is one already, or
            another package has replaced the model's forward, head or loss. The message says what to
            do.
        RuntimeError: from the model, once it is called: its loss or its logits went past this one.

    Source: arXiv 2404.04575.
    """
    head = _check_model(model, linear)
    v = head.weight.shape[0]
    if tempnet is None:
        if getattr(model.config, NAME, None):
            raise ValueError(
                "apply_tempnet: the model's checkpoint has a TempNet (config.tempnet), which "
                "from_pretrained leaves out: pass tempnet=load_tempnet(folder), or "
                "`del model.config.tempnet` to begin with a new one"
            )
        tempnet = TempNet(v)
    if not isinstance(tempnet, TempNet):
        raise TypeError(
            f"apply_tempnet: tempnet must be a TempNet, got {type(tempnet).__name__}; "
            "load_tempnet(path) makes one of a checkpoint"
        )
    if tempnet.vocab_size != v:
        raise ValueError(
            f"apply_tempnet: tempnet must be for the {v} rows of the model's head, got one for "
            f"{tempnet.vocab_size}"
        )
    tempnet = tempnet.to(head.weight.device).train(model.training)
    return TempNetHandle(model, tempnet, rho, linear, freeze_model, options)


def _check_model(model, linear):
    """The model's head."""
    kind = type(model).__name__
    if hasattr(model, "get_base_model"):
        raise TypeError(
            f"apply_tempnet: model must not be a {kind}: apply it to model.get_base_model(), and "
            "save the TempNet, which is no adapter, with save_tempnet"
        )
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "loss_function"):
        raise TypeError(
            "apply_tempnet: model must be a causal language model of transformers, not wrapped "
            f"(DDP, FSDP, torch.compile: apply it before them), got {kind}"
        )
    if hasattr(model, NAME):
        raise ValueError(f"apply_tempnet: this {kind} has a TempNet: call remove() of its handle")
    head = model.get_output_embeddings()
    if head is None or getattr(model.config, "is_encoder_decoder", False):
        raise TypeError(f"apply_tempnet: model must be a decoder with a head, got {kind}")
    if head.weight.is_meta:
        raise ValueError(
            "apply_tempnet: the head's weight is not there (on the meta device: offloaded): load "
            "the model without offloading its head"
        )
    forward = inspect.unwrap(model.forward)
    if forward.__module__ not in {cls.__module__ for cls in type(model).__mro__}:
        raise ValueError(
            f"apply_tempnet: the forward of {kind} was replaced by {forward.__module__}, which may "
            "compute a loss of its own. Make the model without it (Liger-Kernel: "
            "fused_linear_cross_entropy=False; TRL: apply_tempnet before the trainer is made)"
        )
    if model.loss_function is not ForCausalLMLoss:
        name = getattr(model.loss_function, "__name__", type(model.loss_function).__name__)
        raise ValueError(
            f"apply_tempnet: the loss of {kind} must be transformers' ForCausalLMLoss, got {name}: "
            "the model is trained on something else than the next token, or its loss was replaced"
        )
    if linear and type(head) is not nn.Linear:
        raise ValueError(
            f"apply_tempnet: linear=True needs a head that is a torch.nn.Linear, got a "
            f"{type(head).__name__} (quantised, or with an adapter): pass linear=False"
        )
    return head


class TempNetHandle:
    """What :func:`apply_tempnet` did to a model. Of use are ``tempnet``, ``temperature_stats()``
    and ``remove()``."""

    def __init__(self, model, tempnet, rho, linear, freeze_model, options):
        self.model, self.linear = model, linear
        softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self.criterion = TempNetCausalLMLoss(tempnet, rho, softcap=softcap, **options)
        self.used = False  # the loss was called; whoever wants to know sets it back
        self._labels_at = list(inspect.signature(model.forward).parameters).index("labels")
        self._asked = self._skip = self._softcap_seen = False
        self._hidden = None  # what the head returned in place of logits
        self._logits = None  # what came of it
        self._frozen = [p for p in model.parameters() if p.requires_grad and freeze_model]
        for p in self._frozen:
            p.requires_grad_(False)
        setattr(model, NAME, tempnet)
        setattr(model.config, NAME, settings_of(tempnet))
        # Bound methods, which follow a deep copy of the model to the copy of this.
        model.loss_function = self.loss
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]
        self._head = model.get_output_embeddings()
        if linear:
            self._head_forward = self._head.__dict__.get("forward")  # of accelerate's device map
            self._compute = self._head.forward
            self._head.forward = self.head

    @property
    def tempnet(self):
        """The network, which is ``model.tempnet``."""
        return self.criterion.tempnet

    def temperature_stats(self):
        """:class:`tempnet_kernels.nn.TemperatureStats` of the last batch."""
        return self.criterion.temperature_stats()

    def remove(self):
        """Undo :func:`apply_tempnet`. The TempNet stays ``handle.tempnet``."""
        model = self.model
        if getattr(model, NAME, None) is None:
            raise RuntimeError("TempNetHandle.remove: it was removed before")
        if self.linear and self._head.__dict__.get("forward") != self.head:
            raise RuntimeError(
                "TempNetHandle.remove: another package has replaced the head's forward since "
                "(accelerate's hooks?): undo that first"
            )
        for hook in self._hooks:
            hook.remove()
        if self.linear:
            del self._head.forward
            if self._head_forward is not None:
                self._head.forward = self._head_forward
        del model._loss_function
        delattr(model, NAME)
        if hasattr(model.config, NAME):  # unless models share a config
            delattr(model.config, NAME)
        for p in self._frozen:
            p.requires_grad_(True)

    def loss(
        self, logits, labels, vocab_size=None, num_items_in_batch=None, *, shift_labels=None,
        ignore_index=None, **kwargs,
    ):  # fmt: skip
        """As transformers calls ``model.loss_function``. kwargs: what else the caller gave the
        model, which its own loss does not read either."""
        own = self.criterion.options["ignore_index"]
        if ignore_index not in (None, own):
            raise ValueError(
                f"apply_tempnet: ignore_index must be {own}, got {ignore_index}: pass it to "
                "apply_tempnet"
            )
        self.used = True
        self._asked = False
        options = {"shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        if not self._skip:
            return self.criterion(logits, labels, **options)
        hidden, self._logits = self._hidden, logits
        as_expected = self._only_capped(logits, hidden)

        def of_head(head):
            x = hidden.to(head.weight.device)
            return self.criterion(x, labels, weight=head.weight, bias=head.bias, **options)

        # Within the head's forward, for the duration of which FSDP has its weight.
        loss = self._head(hidden, inside=of_head)
        return loss if as_expected is None else torch.where(as_expected, loss, math.nan)

    def _only_capped(self, logits, hidden):
        """Whether the model did nothing but its softcap to what the head returned: None where that
        is known, else a 0-d tensor. The first call in eager mode raises if it did."""
        cap = self.criterion.softcap
        if cap is None and logits is hidden:
            return None
        compiling = torch.compiler.is_compiling()
        if cap is not None and hidden is not None and logits.shape == hidden.shape:
            if self._softcap_seen and not compiling:
                return None
            expected = torch.tanh(hidden.detach() / cap) * cap
            same = ((logits.detach() - expected).abs() <= 0.01 * cap).all()
            if compiling:  # which has no place for an error
                return same.to(hidden.device)
            self._softcap_seen = bool(same) and logits is not hidden
            if self._softcap_seen:
                return None
        if self.model.get_output_embeddings() is not self._head:
            raise RuntimeError(
                "apply_tempnet: the model's head was replaced (resize_token_embeddings?): call "
                "remove(), and apply_tempnet to the model as it is now"
            )
        raise RuntimeError(
            f"apply_tempnet: {type(self.model).__name__} changes its logits after the head (a "
            "scale, a cast, a slice; or a softcap that its config has and it does not apply), "
            "which the loss cannot see from the hidden states: pass linear=False"
        )

    def head(self, hidden, inside=None):
        """In place of the head's forward."""
        if inside is not None:
            return inside(self._head)
        if not self._skip:
            return self._compute(hidden)
        self._hidden = hidden
        return hidden

    def _before(self, model, args, kwargs):
        if getattr(model, "_is_replica", False):
            raise RuntimeError(
                "apply_tempnet: torch.nn.DataParallel runs replicas of one model in threads: use "
                "DistributedDataParallel (torchrun, accelerate launch) or one GPU"
            )
        if model.tempnet is not self.criterion.tempnet:
            raise RuntimeError(
                f"apply_tempnet: model.tempnet was replaced by a {type(model.tempnet).__name__} "
                "(PEFT's modules_to_save?), which would not be trained: call get_peft_model first "
                "and apply_tempnet to its get_base_model()"
            )
        i = self._labels_at
        labels = kwargs.get("labels", args[i] if len(args) > i else None)
        if labels is None and kwargs.get("shift_labels") is not None:
            raise ValueError(
                "apply_tempnet: the model computes a loss only where labels are given, got "
                "shift_labels alone: pass labels too"
            )
        self._asked = labels is not None
        self._skip = self.linear and self._asked and model.training

    def _after(self, model, args, output):
        asked, skip, logits = self._asked, self._skip, self._logits
        self._asked = self._skip = False
        self._hidden = self._logits = None
        if output is None:  # the forward has raised
            return None
        if asked:
            raise RuntimeError(
                f"apply_tempnet: {type(model).__name__} was given labels and did not call "
                "model.loss_function: its forward computes a loss of its own, or another package "
                "has replaced it since (TRL's SFTTrainer: use integrations.trl.TempNetSFTMixin)"
            )
        if not skip:
            return None
        if isinstance(output, tuple):
            return tuple(None if x is logits else x for x in output)
        return type(output)(**{k: x for k, x in output.items() if k != "logits"})


def handle_of(model):
    """The :class:`TempNetHandle` of a model; None without one."""
    handle = getattr(getattr(model, "loss_function", None), "__self__", None)
    return handle if isinstance(handle, TempNetHandle) else None


class TempNetCallback(TrainerCallback):
    """Logs the temperatures of the last batch with whatever the Trainer logs (``tau/mean``,
    ``tau/min``, ``tau/max``, ``tau/at_min``, ``tau/at_max``), and raises where the training goes
    past the TempNet.

    ``TempNetCallback(handle).attach(trainer)`` puts it before TensorBoard and the like, which would
    otherwise have reported already.
    """

    def __init__(self, handle):
        self.handle = handle

    def attach(self, trainer):
        """Returns self."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        """Raises ValueError where the Trainer's settings would leave the TempNet out."""
        self.handle.used = False
        if args.label_smoothing_factor:
            raise ValueError(
                "TempNetCallback: with label_smoothing_factor the Trainer computes its own loss "
                "from the logits: leave it 0 and pass label_smoothing to apply_tempnet"
            )
        wanted = [p for p in self.handle.tempnet.parameters() if p.requires_grad]
        if not wanted:
            raise ValueError(
                "TempNetCallback: no parameter of the TempNet requires a gradient (get_peft_model "
                "freezes all it finds: call it before apply_tempnet)"
            )
        # DeepSpeed and FSDP flatten or replace the parameters of the optimizer.
        if optimizer is None or args.deepspeed or args.fsdp:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not held.issuperset(map(id, wanted)):
            raise ValueError(
                "TempNetCallback: the optimizer does not have the TempNet's parameters: make it "
                "after apply_tempnet, of model.parameters()"
            )

    def on_step_end(self, args, state, control, **kwargs):
        """Raises RuntimeError where no loss of the step was the TempNet's."""
        if not self.handle.used:
            raise RuntimeError(
                "TempNetCallback: the Trainer computed the loss of this step without the TempNet "
                "(compute_loss_func, or a compute_loss of its own): leave those out; for TRL see "
                "tempnet_kernels.integrations.trl"
            )
        self.handle.used = False

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None or "loss" not in logs:
            return
        stats = {f"tau/{k}": x for k, x in self.handle.temperature_stats().floats().items()}
        logs.update(stats)
        if state.log_history:
            state.log_history[-1].update(stats)


class TempNetLogitsProcessor(LogitsProcessor):
    """Samples each token at its predicted temperature: ``log softmax(z / tau(z))`` of the scores.

    For ``model.generate(do_sample=True, logits_processor=[processor])``; top-k, top-p and the other
    warpers come after it, and ``temperature``, which belongs at 1, divides once more. In float32
    whatever the network's dtype; a score of -inf stays so. The result is normalised, so that the
    scores of beams, which have different temperatures, can be compared.

    Args:
        tempnet: a :class:`TempNet`, say ``load_tempnet(folder)`` or ``model.tempnet``. Its dropout
            is off here whatever its mode.
        center: "max" subtracts each row's largest score first, as the official generation does for
            every network; None: as ``tempnet.center``. Beam search passes log-probabilities in
            place of logits, which only "max" can do with.
        greedy: True where the generation has neither sampling nor beams: a temperature changes
            nothing then, and nothing is computed.

    Attributes:
        temperatures: ``[steps, rows]`` float32, of the last generation. The rows are those of the
            scores: with beams, of the hypotheses as they were ordered at that step.

    Source: arXiv 2404.04575; official code ``tempnet.py``, ``LLaMA_TempNet``.
    """

    def __init__(self, tempnet, *, center=None, greedy=False):
        if not isinstance(tempnet, TempNet):
            raise TypeError(
                f"TempNetLogitsProcessor: tempnet must be a TempNet, got {type(tempnet).__name__}"
            )
        if center not in (None, "max"):
            raise ValueError(
                f"TempNetLogitsProcessor: center must be None or 'max', got {center!r}"
            )
        if tempnet.proj[0].weight.dtype != torch.float32:
            tempnet = copy.deepcopy(tempnet).float()
        self.tempnet, self.greedy = tempnet, greedy
        self.center = tempnet.center if center is None else center
        self._steps, self._length = [], 0

    @property
    def temperatures(self):
        if not self._steps:
            raise RuntimeError("TempNetLogitsProcessor: temperatures needs a generation first")
        return torch.stack(self._steps)

    @torch.no_grad()
    def __call__(self, input_ids, scores):
        """input_ids ``[rows, length]``, scores ``[rows, V]`` -> ``[rows, V]`` float32."""
        if self.greedy:
            return scores
        z = scores.float()
        if input_ids.shape[1] <= self._length or not self._steps:  # another generation
            self._steps = []
            if self.center is None and bool((z.logsumexp(-1).abs() < 1e-3).all()):
                raise ValueError(
                    "TempNetLogitsProcessor: the scores are log-probabilities, as beam search "
                    "passes them, and the TempNet takes raw logits: pass center='max', which gives "
                    "the same for both"
                )
        self._length = input_ids.shape[1]
        largest = z.amax(-1, keepdim=True)  # (rows, 1)
        dead = largest == -math.inf  # nothing is left to sample, which generate() will say
        x = torch.where(dead, 0, z)
        if self.center != self.tempnet.center:  # a network of raw logits, centred here
            x = x - largest.masked_fill(dead, 0)
        training = self.tempnet.training
        self.tempnet.eval()
        tau = self.tempnet(x)  # (rows,)
        self.tempnet.train(training)
        self._steps.append(tau)
        return torch.where(dead, scores, tempered_log_softmax(z, tau))
