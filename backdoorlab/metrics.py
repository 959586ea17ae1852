"""Clean accuracy, ASR and robust accuracy (RA), and the one evaluator that measures them.

ASR is the share of triggered test images (target class excluded) classified as the target, RA the
share of the same images classified correctly.

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
from .ranking import rank_quality
from .storage import reading

SUMMARY = ("clean_accuracy", "asr", "robust_accuracy")
"""The scores that every line of history and every table has."""
VERDICT = ("balanced_accuracy", "largest_share")
"""The scores by which a model that answers with one class is told from one that works. Records of
older versions do not have them."""
COLLAPSE = 0.2
"""Loss of clean or balanced accuracy from which on a model counts as destroyed. Of 516 such rows
of BackdoorBench's board, 286 look like successes by their ASR."""
COLLAPSED = (
    "20 points, or half, of the clean accuracy or of its mean over classes are lost, or all images"
    " get one class"
)
"""What `collapsed` asks, for readers of a result."""
ONE_ANSWER = 0.99
"""Share of the clean test images that get one class, from which on a model may be constant."""
CHANCE, CHANCE_OF_TWO = 1.5, 0.6
"""A model learned nothing if its accuracy < min(CHANCE / num_classes, CHANCE_OF_TWO). A constant
one has a balanced accuracy of 1 / num_classes."""

NO_ASR = {"none": "no attack, so no image has a trigger", "unknown": "its trigger is unknown"}
"""Attack of a record -> why its models have no ASR."""


@dataclass(frozen=True)
class Scores:
    """Scores of a model on the clean and the triggered test images, in [0, 1].

    Those of triggered images are None where there are none.
    """

    clean_accuracy: float
    """Share of clean test images classified correctly."""
    asr: float | None
    """Share of triggered images classified as the attacker's label. In all2one, none of them is of
    the target class."""
    robust_accuracy: float | None
    """Share of the same images classified correctly."""
    per_class: dict[str, list[float | None]]
    """The same by true class, and `other` = 1 - asr - robust_accuracy. None for a class without
    images."""
    triggered_predictions: list[int]
    """Number of triggered images classified as each class. It shows a trigger that now leads to
    another class."""
    cross: dict[str, float | None] | None = None
    """`accuracy` and `asr` on triggered images that the attack is not meant for (kind CROSS); None
    where there is none. `asr` is None in all2all."""
    balanced_accuracy: float | None = None
    """Clean accuracy of each class that has test images, averaged over classes. A class with 90 %
    of the images counts as much as any other."""
    largest_share: float | None = None
    """Share of the clean test images that are classified as the commonest answer. 1 is a model
    that answers with one class, whatever it is shown."""

    def summary(self) -> dict[str, float | None]:
        """Return clean accuracy, ASR and RA."""
        return {name: getattr(self, name) for name in SUMMARY}

    def outcome(self) -> dict[str, float | None]:
        """Return what defenses are compared by: the summary, and the scores of VERDICT."""
        return {name: getattr(self, name) for name in (*SUMMARY, *VERDICT)}

    def to_json(self) -> dict[str, Any]:
        """Return every score, as a record keeps it."""
        return asdict(self)


def why_no_asr(attack: str) -> str:
    """Say in a clause why a model has no ASR, by the attack of its record."""
    return NO_ASR.get(attack, "no test image could be triggered")


def der(before: Mapping[str, Any], after: Mapping[str, Any]) -> float | None:
    """Return the defense effectiveness rating, in [0, 1]; None without an ASR.

    0.5 is no effect; 1 is an ASR that falls from 1 to 0 at no cost in clean accuracy.

    Args:
        before: summary of the scores before the defense.
        after: summary of those after it.
    """
    if before["asr"] is None or after["asr"] is None:
        return None
    # Neither a higher ASR nor a higher accuracy counts.
    gain = max(0.0, before["asr"] - after["asr"])
    cost = max(0.0, before["clean_accuracy"] - after["clean_accuracy"])
    return (gain - cost + 1) / 2


def collapsed(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether a defense destroyed the model: it lost COLLAPSE, or half, of the clean or the
    balanced accuracy, or it answers with one class.

    Args:
        before: scores before the defense; those of VERDICT are used where both have them.
        after: scores after it.
    """
    kinds = ("clean_accuracy", "balanced_accuracy")
    lost = (_is_lost(before[kind], after[kind]) for kind in kinds if _have(kind, before, after))
    return any(lost) or is_constant(after)


def is_constant(scores: Mapping[str, Any]) -> bool:
    """Whether a model answers with one class, whatever it is shown.

    Where a class has 99 % of the images, an honest model gives as many the same answer. It knows
    the others, too, so its balanced accuracy is higher.
    """
    return (
        _have("largest_share", scores)
        and _have("balanced_accuracy", scores)
        and scores["largest_share"] >= ONE_ANSWER
        and scores["balanced_accuracy"] < CHANCE_OF_TWO
    )


def learned_nothing(scores: Scores, num_classes: int) -> bool:
    """Whether a model does little better than guessing, or than a constant answer."""
    accuracies = (scores.clean_accuracy, scores.balanced_accuracy)
    guessing = any(guesses(accuracy, num_classes) for accuracy in accuracies)
    return guessing or is_constant(scores.outcome())


def guesses(accuracy: float | None, num_classes: int) -> bool:
    """Whether an accuracy is little better than that of guessing; False where it is not known."""
    return accuracy is not None and accuracy < min(CHANCE / num_classes, CHANCE_OF_TWO)


def _is_lost(had: float, left: float) -> bool:
    # Rounded, for a loss of exactly COLLAPSE must not hang on the last bit.
    return left < had / 2 or round(had - left, 9) >= COLLAPSE


def _have(name: str, *scores: Mapping[str, Any]) -> bool:
    """Whether all of these scores have a value of that name."""
    return all(one.get(name) is not None for one in scores)


def score(
    clean_predictions: Tensor,
    clean_labels: Tensor,
    predictions: Tensor,
    triggered: Poison,
    num_classes: int,
) -> Scores:
    """Compute scores from predicted classes.

    Args:
        clean_predictions: int64 (N,), on the clean test images.
        clean_labels: int64 (N,).
        predictions: int64 (M,), on the triggered images.
        triggered: the triggered images; ASR and RA count those of kind POISON.
        num_classes: number of classes.
    """
    # Images that the attack is not meant for are scored apart.
    spared = triggered.kind == CROSS
    cross = _cross(predictions[spared], triggered) if bool(spared.any()) else None
    predictions, triggered = predictions[~spared], triggered.of_kind(POISON)

    # ASR and RA come from the same predictions, so their sum is at most 1.
    right = clean_predictions == clean_labels
    hit = predictions == triggered.labels
    robust = predictions == triggered.original_labels
    per_class = {
        "clean_accuracy": _by_class(right, clean_labels, num_classes),
        "asr": _by_class(hit, triggered.original_labels, num_classes),
        "robust_accuracy": _by_class(robust, triggered.original_labels, num_classes),
        "other": _by_class(~hit & ~robust, triggered.original_labels, num_classes),
    }
    # Of the clean images: each class counts once, and how often one answer is given.
    known = [share for share in per_class["clean_accuracy"] if share is not None]
    answers = torch.bincount(clean_predictions, minlength=num_classes)
    return Scores(
        clean_accuracy=right.double().mean().item(),
        asr=hit.double().mean().item() if len(hit) else None,
        robust_accuracy=robust.double().mean().item() if len(hit) else None,
        per_class=per_class,
        triggered_predictions=torch.bincount(predictions, minlength=num_classes).tolist(),
        cross=cross,
        balanced_accuracy=sum(known) / len(known) if known else None,
        largest_share=answers.max().item() / len(right) if len(right) else None,
    )


def _cross(predictions: Tensor, triggered: Poison) -> dict[str, float | None]:
    """Accuracy and ASR on the images that the attack is not meant for.

    In all2all the attacker has no label for them, so there is no ASR.
    """
    # In all2one all poisoned images have one label, that of the target.
    targets = triggered.of_kind(POISON).labels.unique()
    asr = _share(predictions == targets) if len(targets) == 1 else None
    return {"accuracy": _share(predictions == triggered.of_kind(CROSS).original_labels), "asr": asr}


def split_quality(
    flagged: Tensor, poison: Poison, suspicion: Tensor | None = None
) -> dict[str, Any]:
    """Measure how well a mask finds the poison.

    Args:
        flagged: bool (N,), over the training set.
        poison: its poisoned rows. Those of kind CROSS count as clean, and are also counted alone.
        suspicion: float (N,), the value behind the flags, higher for what is more suspicious.

    Returns:
        tpr, fpr and precision in [0, 1], None where their denominator is 0; the numbers `flagged`
        and `missed`; `cross_flagged`, the share of cross images that is flagged; and with a
        suspicion the scores of `ranking.rank_quality`.
    """
    # Cross images carry a trigger, but their true label: here they count as clean.
    flagged = flagged.cpu()
    poisoned, cross = poison.mask(len(flagged)), poison.mask(len(flagged), CROSS)
    return {
        "tpr": _share(flagged[poisoned]),
        "fpr": _share(flagged[~poisoned]),
        "precision": _share(poisoned[flagged]),
        "flagged": int(flagged.sum()),
        "missed": int((poisoned & ~flagged).sum()),
        "cross_flagged": _share(flagged[cross]),
        **({} if suspicion is None else rank_quality(suspicion, poisoned)),
    }


class Evaluator:
    """Scores models on one clean test set and one set of triggered images.

    It draws no random number. A model whose weights did not change since the last call is not run
    again.
    """

    def __init__(
        self, test: Split, triggered: Poison, num_classes: int, device: torch.device
    ) -> None:
        """Move the images to the device, where they fit.

        Args:
            test: the clean test set.
            triggered: the triggered test images.
            num_classes: number of classes.
            device: where models are.
        """
        self.labels, self.triggered = test.labels, triggered
        self.num_classes, self.device = num_classes, device
        self.test = to_device(test, device)
        self.triggered_split = to_device(triggered.triggered(), device)
        self._last: tuple[str, Scores] | None = None

    def __call__(self, model: nn.Module) -> Scores:
        """Score a model on both sets."""
        # The hash of all weights and buffers costs less than one pass over the test images.
        key = reading.tensor_hash(
            {name: value.detach().cpu() for name, value in model.state_dict().items()}
        )
        if self._last is None or self._last[0] != key:
            clean = predict(model, self.test, self.device)
            triggered = predict(model, self.triggered_split, self.device)
            self._last = key, score(clean, self.labels, triggered, self.triggered, self.num_classes)
        return self._last[1]


def predict(model: nn.Module, split: Split, device: torch.device) -> Tensor:
    """Predict classes in evaluation mode and in fp32. No pass is counted.

    The model's modes are restored. A model that answers NaN is refused, for argmax would make a
    class of it.

    Args:
        model: images (B, C, H, W) -> logits (B, K).
        split: N images.
        device: where the model is.

    Returns:
        int64 (N,) on the CPU.
    """
    # Each part has a mode of its own: a method may have frozen one of them.
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
    # Asked once for all batches: each question waits for a GPU.
    if torch.stack([lost for _, lost in answers]).any():
        raise UserError(
            "the model answers NaN: its training diverged; lower the learning rate, or try"
            " --precision fp32"
        )
    return torch.cat([classes for classes, _ in answers]).cpu()


def _answered(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return classes, int64 (N,), and whether any logit is NaN, bool (), both on the device."""
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
