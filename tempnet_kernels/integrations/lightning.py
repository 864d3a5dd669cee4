"""Temperatures in Lightning's logs, and the mistakes that would pass in silence there."""

try:
    from lightning.pytorch import Callback
    from lightning.pytorch.strategies import DeepSpeedStrategy
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
except ImportError:
    from pytorch_lightning import Callback
    from pytorch_lightning.strategies import DeepSpeedStrategy
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

from tempnet_kernels.nn import TemperatureStats, tempnet_param_groups

__all__ = ["TempNetCallback", "tempnet_param_groups"]

NAME = "TempNetCallback"


class TempNetCallback(Callback):
    """Logs the temperatures of the losses in a LightningModule, on the trainer's interval.

    For a loss that is the attribute ``loss`` of the LightningModule the names are
    ``loss/tau_mean``, ``_min``, ``_max``, ``_at_min`` and ``_at_max`` (:class:`TemperatureStats`);
    for a contrastive one ``loss/image_tau_mean`` and so on, for both sides. They are of the last
    batch of this rank, and stay on the device until a logger reads them. Rank 0 logs.

    Args:
        loss: the loss of which to log, a submodule of the LightningModule with
            ``temperature_stats``, as those of ``tempnet_kernels.nn`` are. Default: all there are.

    Raises:
        MisconfigurationException: from ``trainer.fit``, if the LightningModule holds no such loss,
            if trainable parameters of a loss are in none of the optimizers (not looked for with
            DeepSpeed, whose optimizer has copies), or if a loss was not called in an epoch.
    """

    def __init__(self, loss=None):
        self.loss = loss
        self._losses, self._hooks = {}, []
        self._in_batch, self._in_epoch = set(), set()

    def setup(self, trainer, pl_module, stage):
        """Find the losses, by name."""
        if stage != "fit":
            return
        found = {
            name: module
            for name, module in pl_module.named_modules()
            if hasattr(module, "temperature_stats") and self.loss in (None, module)
        }
        if not found:
            model = type(pl_module).__name__
            what = "it is None" if self.loss is None else f"got {type(self.loss).__name__}"
            raise MisconfigurationException(
                f"{NAME}: loss must be a submodule of {model} with temperature_stats, such as "
                f"TempNetCausalLMLoss; {what} and {model} has none such. Make it an attribute, "
                "self.loss = ..., so that Lightning moves, trains and saves it"
            )
        self._losses = found

        def called(name):
            def hook(*_):
                if trainer.training:
                    self._in_batch.add(name)
                    self._in_epoch.add(name)

            return hook

        self._hooks = [x.register_forward_hook(called(name)) for name, x in found.items()]

    def teardown(self, trainer, pl_module, stage):
        """Take the hooks off the losses."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._losses = [], {}

    def on_train_start(self, trainer, pl_module):
        """Look for the losses' parameters in the optimizers."""
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            return
        held = {
            p for optimizer in trainer.optimizers for g in optimizer.param_groups
            for p in g["params"]
        }  # fmt: skip
        for name, loss in self._losses.items():
            lost = [k for k, p in loss.named_parameters() if p.requires_grad and p not in held]
            if lost:
                raise MisconfigurationException(
                    f"{NAME}: the optimizers must hold the trainable parameters of {name}, but "
                    f"{lost[0]} and {len(lost) - 1} others are in none and would not be trained. "
                    "Give configure_optimizers' optimizer tempnet_param_groups(self, lr, "
                    "tempnet_lr=...), or freeze them with requires_grad_(False)"
                )

    def on_train_epoch_start(self, trainer, pl_module):
        self._in_epoch.clear()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._in_batch.clear()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Log, in the steps that Lightning's loggers write."""
        # Lightning's own callbacks ask the same; it is not waited for a device here.
        if trainer._logger_connector.should_update_logs:
            for name in sorted(self._in_batch):
                pl_module.log_dict(_values(name, self._losses[name].temperature_stats()))

    def on_train_epoch_end(self, trainer, pl_module):
        """Refuse an epoch without a call."""
        idle = sorted(self._losses.keys() - self._in_epoch)
        if idle:
            raise MisconfigurationException(
                f"{NAME}: {', '.join(idle)} must be called in training_step, as a module "
                f"(self.{idle[0]}(...)), but was not in epoch {trainer.current_epoch}: its TempNet "
                f"is not trained. Call it, or pass the loss that is called: {NAME}(loss)"
            )


def _values(name, stats):
    if isinstance(stats, TemperatureStats):
        return {f"{name}/tau_{key}": value for key, value in stats._asdict().items()}
    return {
        f"{name}/{side}_tau_{key}": value
        for side, of_side in stats._asdict().items()
        for key, value in of_side._asdict().items()
    }
