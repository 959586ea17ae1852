"""What is measured, and the one evaluator that measures it.

All scores are fractions in [0, 1], per image, in evaluation mode and in fp32, whatever precision
trained. ASR and RA come from the same stored triggered images and one forward pass. Definitions:
BackdoorBench (Wu et al., NeurIPS 2022) for ASR and RA, FT-SAM (Zhu et al., ICCV 2023) for DER.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .data import Split, in_order, to_device
from .errors import UserError, described
from .models import paused
from .poison import CROSS, POISON, Poison
from .storage import reading

SUMMARY = ("clean_accuracy", "asr", "robust_accuracy")
"""The scores that every line of history and every table has."""
COLLAPSE = 0.2
"""Loss of clean accuracy from which on a model counts as destroyed: of 516 such rows of
BackdoorBench's board, 286 look like successes by ASR."""


@dataclass(frozen=True)
class Scores:
    """What a model does on the clean and on the triggered test images; None where there is no
    triggered image."""

    clean_accuracy: float
    asr: float | None
    """Share of triggered images that get the attacker's label (none of them is of the target class
    in all2one)."""
    robust_accuracy: float | None
    """Share of the same images that get their true label."""
    per_class: dict[str, list[float | None]]
    """The same by true class, and `other` = 1 - asr - robust_accuracy; None for a class without
    images."""
    triggered_predictions: list[int]
    """How many triggered images end in each class: a trigger may be moved instead of removed."""
    cross: dict[str, float | None] | None = None
    """Images with the trigger that the attack is not meant for (kind CROSS in the test set); None
    where there is none. `accuracy`: share with the true label. `asr`: share with the attacker's,
    None in all2all."""

    def summary(self) -> dict[str, float | None]:
        return {name: getattr(self, name) for name in SUMMARY}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def der(before: Mapping[str, Any], after: Mapping[str, Any]) -> float | None:
    """Defense effectiveness rating in [0, 1]: 0.5 is no effect, 1 is ASR from 1 to 0 at no cost in
    clean accuracy."""
    if before["asr"] is None or after["asr"] is None:
        return None
    gain = max(0.0, before["asr"] - after["asr"])
    cost = max(0.0, before["clean_accuracy"] - after["clean_accuracy"])
    return (gain - cost + 1) / 2


def collapsed(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """A defense that costs COLLAPSE of clean accuracy, or half of it where there was less, has not
    defended anything."""
    had, left = before["clean_accuracy"], after["clean_accuracy"]
    return left < had / 2 or round(had - left, 9) >= COLLAPSE


def score(
    clean_predictions: Tensor,
    clean_labels: Tensor,
    predictions: Tensor,
    triggered: Poison,
    num_classes: int,
) -> Scores:
    """Scores from predictions: int64 (N,) on the clean test images, int64 (M,) on the triggered
    ones, of which ASR counts those of kind POISON."""
    spared = triggered.kind == CROSS
    cross = _cross(predictions[spared], triggered) if bool(spared.any()) else None
    predictions, triggered = predictions[~spared], triggered.of_kind(POISON)
    right = clean_predictions == clean_labels
    hit = predictions == triggered.labels
    robust = predictions == triggered.original_labels
    per_class = {
        "clean_accuracy": _by_class(right, clean_labels, num_classes),
        "asr": _by_class(hit, triggered.original_labels, num_classes),
        "robust_accuracy": _by_class(robust, triggered.original_labels, num_classes),
        "other": _by_class(~hit & ~robust, triggered.original_labels, num_classes),
    }
    return Scores(
        clean_accuracy=right.double().mean().item(),
        asr=hit.double().mean().item() if len(hit) else None,
        robust_accuracy=robust.double().mean().item() if len(hit) else None,
        per_class=per_class,
        triggered_predictions=torch.bincount(predictions, minlength=num_classes).tolist(),
        cross=cross,
    )


def _cross(predictions: Tensor, triggered: Poison) -> dict[str, float | None]:
    """Accuracy and ASR on the images that the attack is not meant for, whose own attacker's label
    only all2one knows."""
    targets = triggered.of_kind(POISON).labels.unique()
    asr = _share(predictions == targets) if len(targets) == 1 else None
    return {"accuracy": _share(predictions == triggered.of_kind(CROSS).original_labels), "asr": asr}


def split_quality(flagged: Tensor, poison: Poison) -> dict[str, Any]:
    """How well a bool (N,) mask finds the poison; cross images count as clean in `fpr` and are also
    shown alone.

    tpr, fpr and precision are None where their denominator is empty.
    """
    flagged = flagged.cpu()
    poisoned, cross = poison.mask(len(flagged)), poison.mask(len(flagged), CROSS)
    return {
        "tpr": _share(flagged[poisoned]),
        "fpr": _share(flagged[~poisoned]),
        "precision": _share(poisoned[flagged]),
        "flagged": int(flagged.sum()),
        "missed": int((poisoned & ~flagged).sum()),
        "cross_flagged": _share(flagged[cross]),
    }


class Evaluator:
    """Scores models on one clean test set and one set of triggered images, without drawing a random
    number.

    A model whose weights did not change since the last call is not run again.
    """

    def __init__(
        self, test: Split, triggered: Poison, num_classes: int, device: torch.device
    ) -> None:
        self.labels, self.triggered, self.num_classes, self.device = (
            test.labels,
            triggered,
            num_classes,
            device,
        )
        self.test, self.triggered_split = (
            to_device(test, device),
            to_device(triggered.triggered(), device),
        )
        self._last: tuple[str, Scores] | None = None

    def __call__(self, model: nn.Module) -> Scores:
        key = reading.tensor_hash(
            {name: value.detach().cpu() for name, value in model.state_dict().items()}
        )
        if self._last is None or self._last[0] != key:
            clean = predict(model, self.test, self.device)
            triggered = predict(model, self.triggered_split, self.device)
            self._last = key, score(clean, self.labels, triggered, self.triggered, self.num_classes)
        return self._last[1]


def predict(model: nn.Module, split: Split, device: torch.device) -> Tensor:
    """Predicted classes in fp32, int64 (N,) on the CPU. The model's modes are as before afterwards;
    no pass is counted.

    A model that answers NaN is refused: the largest of such answers is by convention the first, and
    would pass for a class.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode(), torch.autocast(device.type, enabled=False), paused():
            answers = [_answered(model(batch.images)) for batch in in_order(split, device)]
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not answers:
        return torch.zeros(0, dtype=torch.int64)
    if torch.stack([lost for _, lost in answers]).any():
        raise UserError(
            "the model answers NaN: its training diverged; lower the learning rate, or try"
            " --precision fp32"
        )
    return torch.cat([classes for classes, _ in answers]).cpu()


def _answered(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The classes, int64 (N,), and whether any answer is NaN, bool (), both where the model is: to
    ask at once would wait for a GPU."""
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise UserError(
            "a model answers with one number for each image and class, (N, num_classes), got"
            f" {described(logits)}"
        )
    return logits.argmax(1), logits.isnan().any()


def _by_class(hits: Tensor, classes: Tensor, num_classes: int) -> list[float | None]:
    return [_share(hits[classes == label]) for label in range(num_classes)]


def _share(hits: Tensor) -> float | None:
    return hits.double().mean().item() if len(hits) else None
