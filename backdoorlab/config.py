"""Options of attacks and defenses: frozen dataclasses with ranges.

The docstring of a field is its `--help` text.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from tyro.conf import arg

from .data import Augment, Border
from .device import Precision
from .engine import Recipe, Schedule
from .errors import UserError, suggest
from .models import StemChoice
from .storage.schema import LARGEST_SIDE

WHERE = [
    "save_folder_name",
    "result_file",
    "run_name",
    "dataset_path",
    "dataset_config",
    "device",
    "record_root",
    "yaml_path",
    "track",
    "track_folder",
]
RUN_OPTIONS = frozenset([*WHERE, "overwrite", "debug", "subtask"])
"""Fields that cannot change a result. A record does not keep them, and a resumed run may differ in
them."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Options of every attack and defense."""

    dataset_path: str | None = None
    """Folder of the images: parquet shards (columns image or img, and label) or
    train/<class>/*.png. A defense needs it only if the data set is no longer in the cache."""
    dataset_config: str | None = None
    """Configuration of parquet shards to read, where the folder has several. None: the only one,
    or the default."""
    seed: Annotated[int, arg(aliases=["--random_seed"])] = 0
    """Seed of all random numbers."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """Number format of the training. auto: $BACKDOORLAB_PRECISION, else bf16 if a measurement
    shows that it is faster here, else fp32. Scores are always computed in fp32."""
    score_every: int = 1
    """Epochs between two evaluations on the test data; higher runs faster and logs fewer scores.
    0 evaluates only at the end. Never changes a result."""
    record_root: str | None = None
    """Folder of the records. None: $BACKDOORLAB_RECORDS, else record/ of the checkout, else
    ./record."""
    yaml_path: str | None = None
    """YAML file with option names as keys, or the name of a preset in resource/config/."""
    track: Literal["none", "tensorboard", "wandb", "mlflow"] = "none"
    """Also send each line of history and the final scores to this tracker. Never changes a result.
    Needs pip install 'backdoorlab[track]'."""
    track_folder: str = "runs"
    """Folder of the tracker's local files."""
    overwrite: bool = False
    """Replace a finished result of the same name, or an unfinished one with other options.
    Replacing a record also deletes the results of its defenses."""
    debug: bool = False
    """Show the traceback of an error."""

    RANGES: ClassVar[dict[str, str]] = {"score_every": ">= 0"}
    """Allowed values by field name, such as ">= 0" or "(0, 1]". A subclass lists its own fields."""

    def check(self) -> None:
        """Raise a `UserError` for a value outside its range. None is always accepted."""
        for name, rule in rules(type(self)):
            value = getattr(self, name)
            for number in value if isinstance(value, (tuple, list)) else (value,):
                if number is not None and not _within(number, rule):
                    allowed = rule if rule[0] in "<>" else f"in {rule}"
                    raise UserError(f"{name} must be {allowed}, got {number}")

    def science(self) -> dict[str, Any]:
        """Return the fields that can change the result, as JSON values."""
        return {
            f.name: as_json(getattr(self, f.name))
            for f in dataclasses.fields(self)
            if f.name not in RUN_OPTIONS
        }


def rules(config_class: type[Any]) -> list[tuple[str, str]]:
    """List field and allowed values of all RANGES of a class and its bases."""
    # Every class has RANGES of its own, which do not replace those of its bases.
    owners = (vars(owner) for owner in config_class.__mro__)
    return [rule for owner in owners for rule in owner.get("RANGES", {}).items()]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(MethodConfig):
    """Options of an attack's data, model and training.

    The published settings of a data set are in resource/config/.
    """

    save_folder_name: str = ""
    """Name of the new record, written to record/<save_folder_name>. Required."""
    dataset: str = "digits"
    """digits, cifar10, cifar100, mnist, fashion_mnist, gtsrb or svhn; with --dataset_path any
    name."""
    image_size: int | None = None
    """Resize all images to this side in pixels; higher costs more time. None keeps their size."""
    grey: bool | None = None
    """True: one channel. False: three channels. None: as in the data set."""
    model: Annotated[str, arg(aliases=["--architecture"])] = "preactresnet18"
    """preactresnet18, preactresnet10, or the name of any timm model."""
    width: int | None = None
    """Channels of the first stage of preactresnet*; higher fits more and costs more time. None
    is 64; 16 makes CIFAR-10 feasible on a CPU."""
    stem: StemChoice = "auto"
    """First layers of timm's networks on images of at most 64 pixels. small removes their stride,
    so that more of the image is left, and costs more time; stock keeps them as timm has them. auto
    is small where the network runs with it, else stock."""
    mean: tuple[float, ...] | None = None
    """Mean that the model subtracts, one number per channel in [0, 1] units. None: measured on
    the training images."""
    std: tuple[float, ...] | None = None
    """Standard deviation that the model divides by, one number per channel; 1 changes nothing.
    None: measured on the training images."""
    epochs: int = 100
    """Passes over the training set; more fit it better and cost more time."""
    batch_size: int = 128
    """Images per step; more give fewer, less noisy steps in an epoch."""
    lr: float = 0.01
    """Learning rate at the start (onecycle, triangular: at its peak); higher learns faster and may
    diverge."""
    momentum: Annotated[float, arg(aliases=["--sgd_momentum"])] = 0.9
    """Momentum of SGD; higher averages the gradient over more steps."""
    nesterov: bool = False
    """Nesterov's momentum, which looks one step ahead."""
    weight_decay: Annotated[float, arg(aliases=["--wd"])] = 5e-4
    """L2 penalty on the weights; higher keeps them smaller."""
    bias_lr: float = 1.0
    """Learning rate of the biases of batch normalisation, as a multiple of lr; higher learns
    faster in the first steps."""
    label_smoothing: float = 0.0
    """Share of a label's weight that is spread over all classes, in [0, 1)."""
    lookahead: bool = False
    """Train with slow weights that follow the fast ones every 5 steps, and ever more slowly."""
    optimizer: Annotated[Literal["sgd", "adam"], arg(aliases=["--client_optimizer"])] = "sgd"
    """Optimizer of the training."""
    amsgrad: bool = False
    """Adam's variant AMSGrad, whose steps never grow again after large gradients: BackdoorBench's
    adam, and so True for data sets with its settings."""
    schedule: Annotated[Schedule, arg(aliases=["--lr_scheduler"])] = "cosine"
    """Learning-rate schedule of the training."""
    schedule_epochs: int | None = None
    """Epochs in which the cosine schedule falls to 0; more keep the rate higher. None: the length
    of the training."""
    crop_padding: int = 4
    """Padding in pixels before a random crop back to size; more shifts the images further. 0 turns
    cropping off."""
    crop_border: Border = "zero"
    """What the padding shows: zero, or the image's own mirror image (reflect)."""
    flip: bool = False
    """Mirror half of the images horizontally, at random."""
    alternate_flip: bool = False
    """With flip: mirror each image in every other epoch, from a random start, in place of at
    random. Attacks that train by themselves mirror at random."""

    RANGES: ClassVar[dict[str, str]] = {
        "epochs": ">= 0",
        "batch_size": ">= 1",
        "lr": ">= 0",
        "momentum": ">= 0",
        "weight_decay": ">= 0",
        "bias_lr": "> 0",
        "label_smoothing": "[0, 1)",
        "schedule_epochs": ">= 1",
        "crop_padding": f"[0, {LARGEST_SIDE}]",
        "width": ">= 1",
        "image_size": f"[1, {LARGEST_SIDE}]",
        "mean": "[0, 1]",
        "std": "(0, 1]",
    }

    def recipe(self) -> Recipe:
        """Return the training options as the `Recipe` of `engine.train`."""
        # The other fields of a recipe are fields of this class, under the same names.
        names = {f.name for f in dataclasses.fields(Recipe)} - {"augment"}
        taken = {name: getattr(self, name) for name in names}
        return Recipe(**taken, augment=Augment(self.crop_padding, self.flip, self.crop_border))


@dataclass(frozen=True, kw_only=True)
class TriggerConfig(TrainingConfig):
    """Options of every attack with a trigger."""

    target_label: Annotated[int, arg(aliases=["--attack_target"])] = 0
    """Class that triggered images should be classified as. Not used by all2all."""
    label_mode: Annotated[Literal["all2one", "all2all"], arg(aliases=["--attack_label_trans"])] = (
        "all2one"
    )
    """all2one: every label becomes target_label. all2all: label y becomes y + 1, and the last
    label 0."""


@dataclass(frozen=True, kw_only=True)
class AttackConfig(TriggerConfig):
    """Options of every attack that changes labels."""

    poison_rate: Annotated[float, arg(aliases=["--pratio"])] = 0.1
    """Share of the whole training set that is poisoned, in (0, 1]; higher makes the attack stronger
    and easier to find."""


@dataclass(frozen=True, kw_only=True)
class CoverConfig(AttackConfig):
    """Options of an attack with cover samples: images with a trigger and their true label."""

    cover_rate: float = 0.003
    """Share of the whole training set that becomes cover samples, in [0, 1]; higher makes the
    attack weaker and harder to find."""

    RANGES: ClassVar[dict[str, str]] = {"cover_rate": "[0, 1]"}


@dataclass(frozen=True, kw_only=True)
class CleanLabelConfig(TriggerConfig):
    """Options of every clean-label attack: it poisons the target class and changes no label."""

    clean_label_ratio: float = 0.5
    """Share of the target class that is poisoned, in (0, 1]; higher makes the attack stronger. At 1
    the model sees no clean image of that class."""
    poison_rate: Annotated[float | None, arg(aliases=["--pratio"])] = None
    """Share of the whole training set that is poisoned, in (0, 1]. Replaces clean_label_ratio if
    given."""

    RANGES: ClassVar[dict[str, str]] = {"clean_label_ratio": "(0, 1]"}


@dataclass(frozen=True, kw_only=True)
class JointConfig(AttackConfig):
    """Options of every training-controlled attack."""

    plain: bool = True
    """Also train an ordinary model on the stored training set, the "before" of defenses that train
    from scratch. Doubles the time."""


@dataclass(frozen=True, kw_only=True)
class DefenseConfig(MethodConfig):
    """Options of every defense. Data set and architecture come from the record."""

    result_file: str = ""
    """Name of the record to defend. Required."""
    run_name: str | None = None
    """Name of the result's folder in defense/<method>/. None: seed<seed>."""
    trusted_ratio: Annotated[float, arg(aliases=["--ratio"])] = 0.05
    """Number of trusted clean images as a share of the training set, in (0, 1]; more help the
    defense. They are drawn uniformly. Only for defenses that assume trusted images."""
    trusted_count: int | None = None
    """Number of trusted images. Replaces trusted_ratio if given."""
    trusted_path: Annotated[str | None, arg(aliases=["--unl_set"])] = None
    """Folder of your own trusted images, <class>/*.png or parquet shards. Replaces the draw from
    the training set."""

    @property
    def only_scores(self) -> bool:
        """Whether to score the finished run again and do nothing else; for a method to override."""
        return False


@dataclass(frozen=True, kw_only=True)
class SeedsConfig(DefenseConfig):
    """Options of a defense that knows a few clean training samples ("seeds" in its ASSUMES)."""

    seeds_per_class: int = 10
    """Training samples of each class that are known to be clean; more help the defense."""

    RANGES: ClassVar[dict[str, str]] = {"seeds_per_class": ">= 0"}


@dataclass(frozen=True, kw_only=True)
class SplitConfig(DefenseConfig):
    """Options of a method that forgets a given split: an unlearner ("split" in its ASSUMES) needs
    one, and a defense without that word may have one."""

    split: str = ""
    """What is to be forgotten. Required. METHOD or METHOD/RUN: what that method flagged on the same
    record, with the same seed where no run is named. FILE: a .safetensors, .npy or .csv file of one
    bool for each training image, or of positions. oracle: the true poison; oracle:0.1: a tenth of
    it, drawn with the seed; oracle+0.05: with 5 % of the clean images by mistake, drawn likewise.
    none: nothing, which returns the model."""


def refuse_ranges(config_class: type[MethodConfig]) -> None:
    """Raise a `UserError` if RANGES names an unknown field or contains a malformed rule."""
    fields = [f.name for f in dataclasses.fields(config_class)]
    for name, rule in vars(config_class).get("RANGES", {}).items():
        if name not in fields:
            raise UserError(
                f"RANGES names {name!r}, which is no field of Config.{suggest(name, fields)}"
            )
        # A malformed rule fails on any number.
        try:
            _within(0.0, rule)
        except (ValueError, TypeError, IndexError):
            raise UserError(
                f"RANGES of {name}: expected a rule such as '>= 0', '> 0' or '(0, 1]', got {rule!r}"
            ) from None


def _within(number: float, rule: str) -> bool:
    """Tell whether a number fits a rule: ">= 0", "> 0", or an interval such as "(0, 1]".

    Infinity and NaN fit no rule.
    """
    if not math.isfinite(number):
        return False
    # A single bound, ">= a" or "> a".
    if rule[0] == ">":
        bound = float(rule.lstrip(">= "))
        return number >= bound if rule.startswith(">=") else number > bound

    # An interval, whose brackets say which ends belong to it.
    low, high = (float(end) for end in rule[1:-1].split(","))
    above = low <= number if rule[0] == "[" else low < number
    return above and (number <= high if rule[-1] == "]" else number < high)


def as_json(value: Any) -> Any:
    """Return the value that a round trip through JSON would give."""
    if isinstance(value, Mapping):
        return {str(key): as_json(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [as_json(part) for part in value]
    if isinstance(value, Enum):
        return value.name
    return str(value) if isinstance(value, Path) else value
