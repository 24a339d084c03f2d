"""How to train: every choice with its default, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError
from .flow import SAMPLINGS, WEIGHTINGS, LevelSettings, training_levels
from .optimizers import OPTIMIZERS, OptimizerSettings
from .rates import SCHEDULES, RateSettings


@dataclass(frozen=True)
class Settings(RateSettings, OptimizerSettings, LevelSettings):
    """Raises InputError for values that cannot work.

    num_epochs, max_train_steps   when it ends, whichever comes first
    repeat   how often an epoch shows each clip
    batch_size, gradient_accumulation_steps   clips in a batch; batches of each process in a step
    seed   all that is random follows from it
    save_steps, validation_steps, sample_steps   how often to save, validate and show samples, beside each epoch's end
    gradient_checkpointing   compute a block's inner results again in the backward pass, in place of keeping them
    offload_activations   keep what the backward pass needs in main memory
    tensorboard   write a log for TensorBoard too, beside the tables
    """

    num_epochs: int = 1
    max_train_steps: int | None = None
    repeat: int = 1
    batch_size: int = 1
    gradient_accumulation_steps: int = 1
    seed: int = 0
    save_steps: int | None = None
    validation_steps: int | None = None
    sample_steps: int | None = None
    gradient_checkpointing: bool = True
    offload_activations: bool = False
    tensorboard: bool = False

    def __post_init__(self):
        for name in COUNTS:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, but it has to be at least 1.")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}, but it cannot be negative. 0 does without.")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise InputError(f"There is no {name} '{getattr(self, name)}'. Choose one of {', '.join(known)}.")
        for name in ("shift", "logit_std", "lora_plus_ratio"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}, but it has to be above 0.")
        if not 0 < self.learning_rate <= 1:
            usual = "1, as it finds the rate by itself" if self.optimizer == "prodigy" else "a number such as 0.0001"
            raise InputError(f"learning_rate is {self.learning_rate}. Enter {usual}.")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay is {self.ema_decay}. Enter a number such as 0.999, or 0 for no average.")
        if self.offload_activations and not self.gradient_checkpointing:
            raise InputError("offload_activations goes with gradient_checkpointing. Switch both on, or both off.")
        if self.optimizer == "schedule_free" and self.lr_scheduler != "constant":
            raise InputError("The schedule_free optimizer takes the place of a schedule. Set lr_scheduler to constant.")
        if self.optimizer == "schedule_free" and self.ema_decay:
            raise InputError("The schedule_free optimizer averages by itself. Set ema_decay to 0.")
        if self.optimizer == "prodigy" and self.lora_plus_ratio != 1:
            raise InputError("prodigy finds one rate for all parameters. Set lora_plus_ratio to 1.")
        training_levels(self)  # the boundaries


COUNTS = (
    "num_epochs", "max_train_steps", "repeat", "batch_size", "gradient_accumulation_steps", "lr_cycles", "save_steps",
    "validation_steps", "sample_steps",
)  # fmt: skip
CHOICES = {
    "lr_scheduler": SCHEDULES,
    "optimizer": OPTIMIZERS,
    "timestep_sampling": SAMPLINGS,
    "timestep_weighting": WEIGHTINGS,
}
