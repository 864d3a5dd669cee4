"""The token loss as modules."""

from torch import nn

from tempnet_kernels._ranks import SharesGroup
from tempnet_kernels.dro_cross_entropy import dro_cross_entropy
from tempnet_kernels.nn.tempnet import TemperatureStats


class DROCrossEntropyLoss(SharesGroup, nn.Module):
    """Module form of :func:`tempnet_kernels.dro_cross_entropy`; the options are its keywords.

    With a ``process_group`` the loss cannot be pickled, and its copies share the group.
    """

    def __init__(
        self, rho=0.0, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, reduction="mean",
        return_stats=False, overwrite_logits=False, process_group=None, backend="auto",
    ):  # fmt: skip
        super().__init__()
        self.rho = rho
        self.process_group = process_group
        self.options = {
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "reduction": reduction,
            "return_stats": return_stats,
            "overwrite_logits": overwrite_logits,
            "backend": backend,
        }

    def forward(self, logits, target, tau=1.0, *, row_weight=None, normalizer=None):
        """As :func:`tempnet_kernels.dro_cross_entropy`."""
        return dro_cross_entropy(
            logits,
            target,
            tau,
            self.rho,
            row_weight=row_weight,
            normalizer=normalizer,
            process_group=self.process_group,
            **self.options,
        )

    def extra_repr(self):
        return ", ".join(f"{k}={v!r}" for k, v in {"rho": self.rho, **self.options}.items())


class TempNetCrossEntropyLoss(nn.Module):
    """Token loss at the temperatures that ``tempnet`` predicts from the detached logits.

    Holds the TempNet, so that an optimizer, DDP and a checkpoint of this module see its
    parameters. The gradient of the logits is that of the loss at these temperatures; the TempNet
    learns from d loss / d tau = rho - KL.

    Args:
        tempnet: a module from logits ``[..., V]`` to temperatures ``[...]``, with ``tau_min`` and
            ``tau_max``.
        rho: KL radius in nats.
        options: the keywords of :class:`DROCrossEntropyLoss` but ``process_group``: the TempNet
            reads whole rows.
    """

    def __init__(self, tempnet, rho, **options):
        super().__init__()
        if options.get("process_group") is not None:
            raise ValueError(
                "TempNetCrossEntropyLoss: process_group must be None, since the TempNet reads "
                "whole rows of logits; pass its temperatures to dro_cross_entropy"
            )
        self.tempnet = tempnet
        self.loss = DROCrossEntropyLoss(rho, **options)
        self._tau = None
        self._live = None

    def forward(self, logits, target, *, row_weight=None, normalizer=None):
        """logits ``[..., V]``, target ``[...]`` -> the loss, or ``(loss, TokenStats)`` with
        ``return_stats``."""
        tau = self.tempnet(logits.detach())
        self._tau = tau.detach()
        self._live = target != self.loss.options["ignore_index"]
        return self.loss(logits, target, tau, row_weight=row_weight, normalizer=normalizer)

    def temperature_stats(self):
        """:class:`TemperatureStats` of the last batch, without waiting for a GPU."""
        if self._tau is None:
            raise RuntimeError("TempNetCrossEntropyLoss: temperature_stats needs a forward first")
        low, high = self.tempnet.tau_min, self.tempnet.tau_max
        return TemperatureStats.of(self._tau, low, high, self._live)
