"""What attacks and defenses take: frozen fields, whose docstrings are --help, and the values that
they may have."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from tyro.conf import arg

from .data import Augment
from .device import Precision
from .engine import Recipe, Schedule
from .errors import UserError, suggest
from .storage.schema import LARGEST_SIDE

WHERE = [
    "save_folder_name",
    "result_file",
    "run_name",
    "dataset_path",
    "device",
    "record_root",
    "yaml_path",
    "track",
    "track_folder",
]
RUN_OPTIONS = frozenset([*WHERE, "overwrite", "debug", "subtask"])
"""Fields that say where and how to run, not what is computed: they are not kept in a record, nor
compared on resuming."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What every attack and defense takes."""

    dataset_path: str | None = None
    """Folder with parquet shards (columns img or image, label) or train/<class>/*.png. Defenses
    need it only where the cache lost the data."""
    seed: Annotated[int, arg(aliases=["--random_seed"])] = 0
    """Everything random is drawn from it."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """What training computes in; scores are always fp32. auto: bf16 where it is measured to be
    faster, or $BACKDOORLAB_PRECISION."""
    score_every: int = 1
    """Epochs between two evaluations on the test data; 0 evaluates only at the end. Never changes a
    result."""
    record_root: str | None = None
    """Folder of records; default $BACKDOORLAB_RECORDS, else record/ of the checkout, else
    ./record."""
    yaml_path: str | None = None
    """YAML file with flags as keys, or the name of a preset in resource/config/."""
    track: Literal["none", "tensorboard", "wandb", "mlflow"] = "none"
    """Send each line of history and the final scores there as well; never changes a result. Needs
    pip install 'backdoorlab[track]'."""
    track_folder: str = "runs"
    """Folder for what the tracker keeps on this machine."""
    overwrite: bool = False
    """Replace a finished result of the same name (a record takes its defenses' results along), or
    an unfinished one of another command."""
    debug: bool = False
    """Show a traceback with an error."""

    RANGES: ClassVar[dict[str, str]] = {"score_every": ">= 0"}
    """Field -> the values it may have; subclasses add theirs."""

    def check(self) -> None:
        """Refuse values out of range. None, where a field allows it, is left alone."""
        for owner in type(self).__mro__:
            for name, rule in vars(owner).get("RANGES", {}).items():
                value = getattr(self, name)
                for number in value if isinstance(value, (tuple, list)) else (value,):
                    if number is not None and not _within(number, rule):
                        raise UserError(
                            f"{name} must be {rule if rule[0] in '<>' else f'in {rule}'}, got"
                            f" {number}"
                        )

    def science(self) -> dict[str, Any]:
        """The fields that decide the result, as JSON."""
        return {
            f.name: as_json(getattr(self, f.name))
            for f in dataclasses.fields(self)
            if f.name not in RUN_OPTIONS
        }


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(MethodConfig):
    """An attack's data, model and training. Published settings by data set are in
    resource/config/."""

    save_folder_name: str = ""
    """Name of the record to write: record/<save_folder_name>. Required."""
    dataset: str = "digits"
    """digits, cifar10, cifar100, mnist, fashion_mnist, gtsrb, svhn, or any name with
    --dataset_path."""
    image_size: int | None = None
    """Side in pixels that all images are resized to; None keeps the data set's own."""
    grey: bool | None = None
    """One channel (True) or three (False); None keeps what the data set has."""
    model: Annotated[str, arg(aliases=["--architecture"])] = "preactresnet18"
    """preactresnet18, preactresnet10, or any timm model by name."""
    width: int | None = None
    """Channels of the first stage of preactresnet*; None is 64. 16 makes CIFAR-10 possible on a
    CPU."""
    mean: tuple[float, ...] | None = None
    """Normalisation, one number a channel in [0, 1] units; None measures it on the training
    images."""
    std: tuple[float, ...] | None = None
    """As mean; 1 leaves the values as they are."""
    epochs: int = 100
    """Passes over the training set."""
    batch_size: int = 128
    """Images a step."""
    lr: float = 0.01
    """Learning rate (the peak, with schedule onecycle)."""
    momentum: Annotated[float, arg(aliases=["--sgd_momentum"])] = 0.9
    """SGD's momentum."""
    weight_decay: Annotated[float, arg(aliases=["--wd"])] = 5e-4
    """L2 penalty."""
    optimizer: Annotated[Literal["sgd", "adam"], arg(aliases=["--client_optimizer"])] = "sgd"
    """Optimizer of the training."""
    schedule: Annotated[Schedule, arg(aliases=["--lr_scheduler"])] = "cosine"
    """LRSchedule of the learning rate."""
    schedule_epochs: int | None = None
    """Length of the cosine in epochs; None is the length of the training."""
    crop_padding: int = 4
    """Random crops out of images padded by so many pixels; 0 for none."""
    flip: bool = False
    """Random horizontal mirroring."""

    RANGES: ClassVar[dict[str, str]] = {
        "epochs": ">= 0",
        "batch_size": ">= 1",
        "lr": ">= 0",
        "momentum": ">= 0",
        "weight_decay": ">= 0",
        "schedule_epochs": ">= 1",
        "crop_padding": f"[0, {LARGEST_SIDE}]",
        "width": ">= 1",
        "image_size": f"[1, {LARGEST_SIDE}]",
        "mean": "[0, 1]",
        "std": "(0, 1]",
    }

    def recipe(self) -> Recipe:
        augment = Augment(self.crop_padding, self.flip)
        taken = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(Recipe) if f.name != "augment"
        }
        return Recipe(**taken, augment=augment)


@dataclass(frozen=True, kw_only=True)
class TriggerConfig(TrainingConfig):
    """What every attack with a trigger takes."""

    target_label: Annotated[int, arg(aliases=["--attack_target"])] = 0
    """Class that triggered images are to be taken for (all2one)."""
    label_mode: Annotated[Literal["all2one", "all2all"], arg(aliases=["--attack_label_trans"])] = (
        "all2one"
    )
    """all2one: every label becomes target_label. all2all: label y becomes y + 1."""


@dataclass(frozen=True, kw_only=True)
class AttackConfig(TriggerConfig):
    """What every poisoning attack takes that changes labels."""

    poison_rate: Annotated[float, arg(aliases=["--pratio"])] = 0.1
    """Share of the whole training set that is poisoned, in (0, 1]."""


@dataclass(frozen=True, kw_only=True)
class CoverConfig(AttackConfig):
    """An attack that also stamps images and leaves them their true label, so that the trigger alone
    does not decide."""

    cover_rate: float = 0.003
    """Share of the whole training set that is stamped and keeps its label, in [0, 1]; more makes
    the attack weaker and harder to find."""

    RANGES: ClassVar[dict[str, str]] = {"cover_rate": "[0, 1]"}


@dataclass(frozen=True, kw_only=True)
class CleanLabelConfig(TriggerConfig):
    """What every attack takes that poisons images of the target class only, and changes no
    label."""

    clean_label_ratio: float = 0.5
    """Share of the target class that is poisoned, in (0, 1]; at 1 the model sees no clean image of
    that class."""
    poison_rate: Annotated[float | None, arg(aliases=["--pratio"])] = None
    """The same as a share of the whole training set, in (0, 1], instead of clean_label_ratio."""

    RANGES: ClassVar[dict[str, str]] = {"clean_label_ratio": "(0, 1]"}


@dataclass(frozen=True, kw_only=True)
class JointConfig(AttackConfig):
    """What an attack that controls the training takes besides."""

    plain: bool = True
    """Also train an ordinary model on the stored training set: what training-time defenses are
    compared with. As long again."""


@dataclass(frozen=True, kw_only=True)
class DefenseConfig(MethodConfig):
    """What every defense takes. Data set and architecture come from the record."""

    result_file: str = ""
    """Name of the record to defend. Required."""
    run_name: str | None = None
    """Folder of the result below defense/<method>/; None is seed<seed>."""
    trusted_ratio: Annotated[float, arg(aliases=["--ratio"])] = 0.05
    """Trusted clean images, as a share of the training set (drawn from it uniformly). Read only by
    defenses that assume them."""
    trusted_count: int | None = None
    """Their number, instead of a share."""
    trusted_path: Annotated[str | None, arg(aliases=["--unl_set"])] = None
    """Folder of your own trusted images, <class>/*.png or parquet shards, instead of a draw from
    the training set."""


@dataclass(frozen=True, kw_only=True)
class SeedsConfig(DefenseConfig):
    """What a defense takes that is told of some training samples that they are clean ("seeds" in
    its ASSUMES)."""

    seeds_per_class: int = 10
    """Training samples of each class that are known to be clean."""

    RANGES: ClassVar[dict[str, str]] = {"seeds_per_class": ">= 0"}


def refuse_ranges(config_class: type[MethodConfig]) -> None:
    """UserError where RANGES has a name that is no field, or a rule that is none."""
    fields = [f.name for f in dataclasses.fields(config_class)]
    for name, rule in vars(config_class).get("RANGES", {}).items():
        if name not in fields:
            raise UserError(
                f"RANGES names {name!r}, which is no field of Config.{suggest(name, fields)}"
            )
        try:
            _within(0.0, rule)
        except (ValueError, TypeError, IndexError):
            raise UserError(
                f"RANGES of {name}: expected a rule such as '>= 0', '> 0' or '(0, 1]', got {rule!r}"
            ) from None


def _within(number: float, rule: str) -> bool:
    """Rules: ">= 0", "> 0", or an interval such as "(0, 1]". Infinity and NaN are in none."""
    if not math.isfinite(number):
        return False
    if rule[0] == ">":
        bound = float(rule.lstrip(">= "))
        return number >= bound if rule.startswith(">=") else number > bound
    low, high = (float(end) for end in rule[1:-1].split(","))
    above = low <= number if rule[0] == "[" else low < number
    return above and (number <= high if rule[-1] == "]" else number < high)


def as_json(value: Any) -> Any:
    """As JSON gives it back."""
    if isinstance(value, Mapping):
        return {str(key): as_json(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [as_json(part) for part in value]
    return (
        value.name if isinstance(value, Enum) else str(value) if isinstance(value, Path) else value
    )
