"""TRL: supervised fine-tuning with the robust loss."""

from transformers import Trainer

from tempnet_kernels.integrations.transformers import handle_of


class TempNetSFTMixin:
    """``SFTTrainer`` whose loss is that of :func:`apply_tempnet`.

    SFTTrainer computes a loss of its own from the model's log-probabilities, past
    ``model.loss_function``. With this in front of it, the model's loss is used again::

        class TempNetSFTTrainer(TempNetSFTMixin, SFTTrainer):
            pass

        apply_tempnet(model, rho=...)
        TempNetSFTTrainer(model, args=SFTConfig(...), train_dataset=...).train()

    It logs the temperatures (``tau/mean``, ``tau/min``, ``tau/max``, ``tau/at_min``,
    ``tau/at_max``, of this process, averaged over the steps since the last log) and ``num_tokens``;
    SFTTrainer's ``entropy`` and ``mean_token_accuracy`` would need a second visit of the logits.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As SFTTrainer calls it. Raises RuntimeError where :func:`apply_tempnet` was not called,
        ValueError where the arguments of the trainer ask for another loss."""
        handle = handle_of(self.accelerator.unwrap_model(model))
        if handle is None:
            raise RuntimeError(
                "TempNetSFTMixin: the model has no TempNet: call apply_tempnet(model, rho=...) "
                "before the trainer is made (of a model it made itself: on trainer.model, before "
                "train())"
            )
        if (
            self.compute_loss_func is not None
            or self.label_smoother is not None
            or (self.args.loss_type != "nll")
        ):
            raise ValueError(
                "TempNetSFTMixin: the loss is that of apply_tempnet: leave out compute_loss_func, "
                "label_smoothing_factor (pass label_smoothing to apply_tempnet) and loss_type, got "
                f"loss_type={self.args.loss_type!r}"
            )
        coefficient = self.args.router_aux_loss_coef
        if coefficient not in (None, getattr(handle.model, "router_aux_loss_coef", None)):
            raise ValueError(
                "TempNetSFTMixin: the loss of the router is the model's own: set "
                "router_aux_loss_coef in the model's config before the model is made, got "
                f"{coefficient} in SFTConfig"
            )
        mode = "train" if self.model.training else "eval"
        inputs["use_cache"] = False  # of no use here, and gradient checkpointing warns of it
        metrics = self._metrics[mode]
        result = Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        for name, value in handle.temperature_stats().floats().items():
            metrics[f"tau/{name}"].append(value)
        if mode == "train":
            tokens = (
                inputs["attention_mask"].sum()
                if "attention_mask" in inputs
                else inputs["input_ids"].new_tensor(inputs["input_ids"].numel())
            )
            self._total_train_tokens += self.accelerator.gather_for_metrics(tokens).sum().item()
        metrics["num_tokens"] = [self._total_train_tokens]
        return result
