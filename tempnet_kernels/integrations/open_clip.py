"""open_clip's loss with learned temperatures."""

import torch
import torch.distributed as dist

from tempnet_kernels.nn import RobustContrastiveLoss

NAME = "TempNetClipLoss"


class TempNetClipLoss(RobustContrastiveLoss):
    """:class:`tempnet_kernels.nn.RobustContrastiveLoss`, constructed and called as
    ``open_clip.loss.ClipLoss``. open_clip itself is not imported.

    Its gradients are those of ``ClipLoss(gather_with_grad=True)``: every rank's features get those
    of the loss of the whole batch, which each rank returns, also with ``local_loss``. With
    ``method="clip"`` the loss is ``ClipLoss`` at the model's logit_scale. With the other methods
    logit_scale is not used: freeze it, ``model.logit_scale.requires_grad_(False)``, before DDP and
    the optimizer take the model.

    Args:
        local_loss, cache_labels: taken and not needed.
        gather_with_grad: must be true with several processes.
        rank, world_size: must be those of ``torch.distributed``; 0 and 1 without it.
        use_horovod: must be false.
        num_samples: 0 for no state, so that open_clip's own loop, which has no ids, can call it; or
            the number of pairs of the training set, and then ``ids`` must be given.
        options: ``gamma``, ``rho``, ``method``, ``tau``, ``tau_min``, ``tau_max``,
            ``image_temp_gen``, ``text_temp_gen`` and ``backend`` of ``RobustContrastiveLoss``;
            ``rho`` must be given for isogclr and tempnet, the default, and be below the log of the
            negatives, the pairs of all ranks less one.

    The TempNets are parameters of this module, not of the model: the optimizer and the checkpoint
    must be given them, and with several processes this module is to be wrapped in
    ``DistributedDataParallel``; networks that differ by rank raise.

    Raises:
        ValueError: an argument is off; the message names it.

    Source: open_clip 3.3.0, ``open_clip/loss.py``; arXiv 2404.04575.
    """

    def __init__(
        self, local_loss=False, gather_with_grad=False, cache_labels=False, rank=0, world_size=1,
        use_horovod=False, *, num_samples=0, **options,
    ):  # fmt: skip
        if use_horovod:
            raise ValueError(
                f"{NAME}: use_horovod must be False: the processes exchange features through "
                "torch.distributed. Start them with torchrun, without --horovod"
            )
        started = dist.is_available() and dist.is_initialized()
        expected = (dist.get_rank(), dist.get_world_size()) if started else (0, 1)
        if (rank, world_size) != expected:
            raise ValueError(
                f"{NAME}: rank and world_size must be those of torch.distributed, {expected[0]} "
                f"and {expected[1]}, got {rank} and {world_size}: pass args.rank and "
                "args.world_size, after init_process_group"
            )
        if world_size > 1 and not gather_with_grad:
            raise ValueError(
                f"{NAME}: gather_with_grad must be True with {world_size} processes: the features "
                "of all of them get their gradient. Train with --gather-with-grad"
            )
        for option in ("process_group", "estimator"):
            if option in options:
                raise ValueError(f"{NAME}: {option} is not an option here; remove it")
        super().__init__(num_samples, **options)
        if self.method == "clip":
            if "tau" in options:
                raise ValueError(
                    f"{NAME}: tau is the model's for method 'clip': make the model with "
                    "init_logit_scale=-log(tau), and remove it here"
                )
            self.logit_scale = None  # the model's takes its place

    def forward(
        self, image_features, text_features, logit_scale, logit_bias=None, output_dict=False, *,
        ids=None, image_ids=None, text_ids=None, update_state=True,
    ):  # fmt: skip
        """The loss of a batch of pairs, float32 (float64 for float64 features), 0-d.

        Args:
            image_features, text_features: ``[B, D]``, normalised; of this rank. If their dtypes
                differ, as autocast may leave them, the narrower one is widened.
            logit_scale: 1 / tau as the model returns it, of one element; used by clip only.
            logit_bias: must be None.
            output_dict: return ``{"contrastive_loss": loss}``, of which open_clip adds up all
                values.
            ids, image_ids, text_ids, update_state: as in ``RobustContrastiveLoss.forward``. With
                features that are accumulated over several calls, ``update_state`` is to be True in
                one of them.

        Raises:
            ValueError, TypeError, IndexError: an argument is off; the message names it.
        """
        if logit_bias is not None:
            raise ValueError(
                f"{NAME}: logit_bias must be None: SigLIP's loss has no temperature per anchor. "
                "Make the model without init_logit_bias (train without --siglip)"
            )
        clip = self.method == "clip"
        if clip and logit_scale is None:
            raise ValueError(f"{NAME}: logit_scale must be given for method 'clip', got None")
        if not clip and getattr(logit_scale, "requires_grad", False):
            raise ValueError(
                f"{NAME}: logit_scale must not require a gradient for method {self.method!r}, "
                "which does not use it: call model.logit_scale.requires_grad_(False) before DDP "
                "and the optimizer take the model"
            )
        dtype = torch.promote_types(image_features.dtype, text_features.dtype)
        loss = super().forward(
            image_features.to(dtype), text_features.to(dtype), ids, image_ids=image_ids,
            text_ids=text_ids, update_state=update_state,
            logit_scale=logit_scale if clip else None,
        )  # fmt: skip
        return {"contrastive_loss": loss} if output_dict else loss
