"""Megatron-core's language models with learned temperatures."""

import torch
import torch.distributed as dist
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)

from tempnet_kernels.core.collectives import SharesGroup
from tempnet_kernels.nn import TempNet, TempNetCrossEntropyLoss
from tempnet_kernels.nn.checkpoint import settings_of, undivided

NAME = "TempNetVocabParallelCrossEntropy"
ATTRIBUTE = "tempnet_loss"  # of the model: the submodule that apply_tempnet adds


class TempNetVocabParallelCrossEntropy(SharesGroup, TempNetCrossEntropyLoss):
    """``fused_vocab_parallel_cross_entropy`` at the temperatures that a TempNet predicts.

    Holds the TempNet, whose first layer is divided over ``tp_group`` as the vocabulary is
    (:meth:`tempnet_kernels.nn.TempNet.shard`). Its parameters have what Megatron's gradient norm
    and checkpoints read: ``tensor_model_parallel`` and the like, and ``sharded_state_dict``.

    Args:
        tempnet: a :class:`TempNet` for all V columns of the logits, equal on every rank, or one
            that ``shard(tp_group)`` divided. It is divided in place.
        rho: KL radius in nats, in [0, log V).
        tp_group: the tensor-parallel group, of one rank too.
        options: ``ignore_index``, ``label_smoothing``, ``z_loss``, ``softcap`` and ``backend`` of
            :func:`tempnet_kernels.dro_cross_entropy`.

    ``log V`` counts the columns of all ranks, Megatron's padding of the vocabulary included. Where
    the padded columns have no weight, ``rho + log(V_padded / V)`` gives the loss of the V real
    ones.

    Raises:
        TypeError, ValueError: an argument is off; the message names it.

    Source: megatron-core 0.16.1, ``fusions/fused_cross_entropy.py``; arXiv 2404.04575.
    """

    def __init__(self, tempnet, rho, tp_group, **options):
        for option in ("reduction", "return_stats", "overwrite_logits"):
            if option in options:
                raise ValueError(
                    f"{NAME}: {option} is not an option here, where Megatron wants a loss per "
                    "token; remove it"
                )
        if not isinstance(tempnet, TempNet):
            raise TypeError(f"{NAME}: tempnet must be a TempNet, got {type(tempnet).__name__}")
        super().__init__(tempnet, rho, reduction="none", **options)
        if tempnet.process_group is None:
            tempnet.shard(tp_group)
        elif tempnet.process_group is not tp_group:
            raise ValueError(
                f"{NAME}: tempnet is divided over another process group than tp_group: pass one "
                "that is whole"
            )
        self.tp_group = tp_group
        weight = tempnet.proj[0].weight  # (hidden_size, V / tp)
        if not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=1, stride=1)

    @property
    def process_group(self):
        return self.tp_group

    def forward(self, vocab_parallel_logits, target, tp_group=None):
        """vocab_parallel_logits ``[s, b, V / tp]`` of a float dtype, target ``[s, b]`` over all V
        columns -> loss ``[s, b]`` in float32, equal on every rank of the group.

        tp_group: that of the constructor, or None. Megatron multiplies by its loss mask: a masked
        token then has no gradient, but counts in ``temperature_stats``.
        """
        if tp_group is not None and tp_group is not self.tp_group:
            raise ValueError(
                f"{NAME}: tp_group must be the group over which the TempNet is divided, got "
                "another: pass the same group to the constructor"
            )
        columns = self.tempnet.proj[0].in_features
        if vocab_parallel_logits.shape[-1] != columns:
            raise ValueError(
                f"{NAME}: vocab_parallel_logits must have {columns} columns, {self.vocab_size} of "
                f"the TempNet over {self.tp_group.size()} ranks, got shape "
                f"{tuple(vocab_parallel_logits.shape)}: make the TempNet for the padded "
                "vocabulary, and the model with parallel_output=True"
            )
        return super().forward(vocab_parallel_logits, target)

    @property
    def vocab_size(self):
        return self.tempnet.vocab_size

    def language_model_loss(self, labels, logits):
        """labels ``[b, s]``, logits ``[s, b, V / tp]`` -> loss ``[b, s]``, in the place of
        ``LanguageModule.compute_language_model_loss``."""
        loss = self(logits, labels.transpose(0, 1).contiguous())
        return loss.transpose(0, 1).contiguous()

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """For ``megatron.core.dist_checkpointing``, which loads it on any tensor-parallel size."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"tempnet.proj.0.weight": 1},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )

    @torch.no_grad()
    def whole_tempnet(self):
        """An undivided float32 copy on the CPU in evaluation mode, for
        :func:`tempnet_kernels.nn.save_tempnet` and generation. Every rank of the group must call
        it."""
        own = self.tempnet
        tensors = {name: x.float().cpu() for name, x in undivided(own).items()}
        hidden_size = own.proj[0].out_features
        whole = TempNet(own.vocab_size, hidden_size=hidden_size, **settings_of(own))
        whole.load_state_dict(tensors)
        return whole.eval()


class AppliedTempNet:
    """What :func:`apply_tempnet` returns: ``loss``, the submodule of the model, and
    ``remove()``."""

    def __init__(self, model, loss):
        self.model = model
        self.loss = loss

    def remove(self):
        """Give the model its own loss back, and take the TempNet out of it. Again: nothing. An
        optimizer or DDP that was made in between keeps the TempNet's parameters."""
        own = vars(self.model)
        if self.model._modules.get(ATTRIBUTE) is not self.loss:
            return
        if own.get("compute_language_model_loss") != self.loss.language_model_loss:
            raise RuntimeError(
                "apply_tempnet: remove must not undo what replaced compute_language_model_loss "
                "after apply_tempnet: undo that first"
            )
        del own["compute_language_model_loss"]
        delattr(self.model, ATTRIBUTE)


def apply_tempnet(model, *, rho, tempnet=None, **options):
    """Train ``model`` at learned temperatures: its ``compute_language_model_loss``, on this
    instance, becomes a :class:`TempNetVocabParallelCrossEntropy`, its submodule ``tempnet_loss``.

    Call it in the function that makes the model, where ``post_process`` is true, before
    ``Float16Module``, DDP and the optimizer take it; they and the checkpoint then see the TempNet.
    ``cross_entropy_loss_fusion`` of the configuration is no longer used. All parallel sizes are
    for the trainer as before: the loss is per token. In evaluation it is the same loss, without
    dropout, so that its exponential is no perplexity.

    Args:
        model: a ``GPTModel`` or another ``LanguageModule`` with the last pipeline stage.
        rho: KL radius in nats, in [0, log V); V counts the padded vocabulary,
            ``model.vocab_size``.
        tempnet: a :class:`TempNet` for ``model.vocab_size`` columns, of which the first
            data-parallel rank's counts; default ``TempNet(model.vocab_size)``, the same whatever
            the generators' state.
        options: those of :class:`TempNetVocabParallelCrossEntropy`.

    Returns:
        :class:`AppliedTempNet`.

    Raises:
        TypeError, ValueError, RuntimeError: the model cannot be used; the message says what to do.
    """
    _check(model, tempnet)
    if tempnet is None:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            # Not torch.manual_seed, which would seed the generators of every GPU too.
            torch.default_generator.manual_seed(0)
            tempnet = TempNet(model.vocab_size)
    tempnet.to(next(model.parameters()).device)
    loss = TempNetVocabParallelCrossEntropy(tempnet, rho, model.pg_collection.tp, **options)
    data_parallel = getattr(model.pg_collection, "dp_cp", None)
    if data_parallel is not None and data_parallel.size() > 1:
        for p in tempnet.parameters():
            dist.broadcast(p.detach(), group=data_parallel, group_src=0)
    loss.train(model.training)
    model.add_module(ATTRIBUTE, loss)
    model.compute_language_model_loss = loss.language_model_loss
    return AppliedTempNet(model, loss)


def _check(model, tempnet):
    name = "apply_tempnet"
    if not isinstance(model, LanguageModule):
        raise TypeError(
            f"{name}: model must be a megatron.core LanguageModule such as GPTModel, got "
            f"{type(model).__name__}: apply it to the bare model, before Float16Module and DDP"
        )
    if not model.post_process:
        raise ValueError(
            f"{name}: model must hold the last pipeline stage, got post_process=False: the other "
            "stages have no loss, call apply_tempnet only where post_process is true"
        )
    function = type(model).compute_language_model_loss
    if "compute_language_model_loss" in vars(model):
        raise ValueError(
            f"{name}: compute_language_model_loss of this model was replaced already: undo that "
            "(the handle's remove(), if it was apply_tempnet) first"
        )
    if getattr(function, "__module__", None) != LanguageModule.__module__:
        raise ValueError(
            f"{name}: {type(model).__name__}.compute_language_model_loss must be "
            "LanguageModule's, which was overridden or patched: call "
            f"{NAME} in your own loss instead"
        )
    if model.config.mtp_num_layers is not None:
        raise ValueError(
            f"{name}: mtp_num_layers must be None, got {model.config.mtp_num_layers}: the extra "
            "heads' logits go through the same loss, and the TempNet would learn their "
            "temperatures too. Train without multi-token prediction"
        )
    if any(hasattr(p, "main_grad") for p in model.parameters()):
        raise RuntimeError(
            f"{name}: model is in Megatron's DDP already, whose buffers would miss the TempNet: "
            "apply it where the model is made"
        )
    if not getattr(model, "parallel_output", True) and model.pg_collection.tp.size() > 1:
        raise ValueError(
            f"{name}: parallel_output must be True with {model.pg_collection.tp.size()} "
            "tensor-parallel ranks: the loss takes each rank's columns"
        )
    if tempnet is not None and not isinstance(tempnet, TempNet):
        raise TypeError(f"{name}: tempnet must be a TempNet, got {type(tempnet).__name__}")
    if tempnet is not None and tempnet.vocab_size != model.vocab_size:
        raise ValueError(
            f"{name}: tempnet must be for {model.vocab_size} columns (the vocabulary with "
            f"Megatron's padding, model.vocab_size), got {tempnet.vocab_size}"
        )
