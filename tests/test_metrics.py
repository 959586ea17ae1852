"""Scores from predictions made by hand, and an evaluator that leaves no trace."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from backdoorlab import models
from backdoorlab.data import Split
from backdoorlab.metrics import (
    Evaluator,
    Scores,
    collapsed,
    der,
    learned_nothing,
    predict,
    score,
    split_quality,
)
from backdoorlab.poison import CROSS, POISON, Poison

CPU = torch.device("cpu")


def triggered(labels: list[int], original: list[int]) -> Poison:
    n = len(labels)
    images = torch.randint(
        0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
    )
    return Poison(
        torch.arange(n),
        images,
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(original, dtype=torch.int64),
        torch.ones(n).byte(),
    )


def test_scores_from_predictions_made_by_hand() -> None:
    clean_labels, clean = (
        torch.tensor([0, 0, 1, 1, 2, 2, 2, 2]),
        torch.tensor([0, 1, 1, 1, 2, 2, 0, 1]),
    )
    # Target 0; true classes 1 1 1 2 2: attacker wins twice, the truth survives twice, one image
    # ends elsewhere (class 3).
    poison = triggered([0] * 5, [1, 1, 1, 2, 2])
    found = score(clean, clean_labels, torch.tensor([0, 1, 3, 0, 2]), poison, 4)
    assert found.clean_accuracy == 5 / 8
    assert found.asr == 2 / 5
    assert found.robust_accuracy == 2 / 5
    assert found.per_class["clean_accuracy"] == [1 / 2, 1.0, 1 / 2, None]
    assert found.per_class["asr"] == [None, 1 / 3, 1 / 2, None]
    assert found.per_class["robust_accuracy"] == [None, 1 / 3, 1 / 2, None]
    assert found.per_class["other"] == [None, 1 / 3, 0.0, None]
    assert found.triggered_predictions == [2, 1, 1, 1]
    assert found.summary() == {"clean_accuracy": 5 / 8, "asr": 2 / 5, "robust_accuracy": 2 / 5}
    assert found.balanced_accuracy == pytest.approx(2 / 3), "of the three classes that have images"
    assert found.largest_share == 4 / 8
    assert found.outcome() == {
        **found.summary(),
        "balanced_accuracy": found.balanced_accuracy,
        "largest_share": 0.5,
    }
    assert found.to_json()["triggered_predictions"] == [2, 1, 1, 1]


def test_images_that_the_attack_is_not_meant_for_are_scored_alone() -> None:
    mixed = triggered([0, 0, 2, 1, 2], [1, 1, 2, 1, 2])
    mixed.kind[2:] = CROSS
    found = score(torch.tensor([0]), torch.tensor([0]), torch.tensor([0, 1, 0, 0, 2]), mixed, 3)
    assert (found.asr, found.robust_accuracy) == (0.5, 0.5) and found.triggered_predictions == [
        1,
        1,
        0,
    ]
    assert found.cross == {"accuracy": 1 / 3, "asr": 2 / 3}
    alone = score(
        torch.tensor([0]), torch.tensor([0]), torch.tensor([0, 1]), mixed.of_kind(POISON), 3
    )
    assert alone.cross is None and (alone.asr, alone.per_class) == (found.asr, found.per_class)


def test_all2all_is_scored_against_each_images_own_label() -> None:
    poison = triggered([1, 2, 0], [0, 1, 2])
    found = score(torch.tensor([0]), torch.tensor([0]), torch.tensor([1, 1, 0]), poison, 3)
    assert found.asr == 2 / 3 and found.robust_accuracy == 1 / 3


def test_without_a_triggered_image_there_is_no_asr() -> None:
    found = score(
        torch.tensor([0, 1]),
        torch.tensor([0, 0]),
        torch.zeros(0, dtype=torch.int64),
        triggered([], []),
        2,
    )
    assert (found.clean_accuracy, found.asr, found.robust_accuracy) == (0.5, None, None)
    assert found.triggered_predictions == [0, 0]


def scores(clean_accuracy: float, asr: float | None) -> dict[str, float | None]:
    return {"clean_accuracy": clean_accuracy, "asr": asr, "robust_accuracy": None}


@pytest.mark.parametrize(
    ("before", "after", "wanted"),
    [
        ((0.9182, 0.9379), (0.8743, 0.0448), 0.92460),  # printed as 92.46
        # Printed as 90.47: a gain in clean accuracy earns nothing
        ((0.8455, 0.9993), (0.8566, 0.1899), 0.90470),
        ((0.9, 0.8), (0.9, 0.8), 0.5),
        ((1.0, 1.0), (1.0, 0.0), 1.0),
        ((1.0, 0.0), (0.0, 0.0), 0.0),
        ((0.9, 0.5), (0.9, 0.7), 0.5),  # a rise in ASR costs nothing
        ((0.9, 0.5), (0.5, 0.1), 0.5),
    ],
)
def test_der_is_the_published_one(
    before: tuple[float, float], after: tuple[float, float], wanted: float
) -> None:
    assert der(scores(*before), scores(*after)) == pytest.approx(wanted, abs=5e-6)


def test_der_needs_an_attack() -> None:
    assert der(scores(0.9, None), scores(0.9, None)) is None


@pytest.mark.parametrize(
    ("before", "after", "wanted"),
    [
        (1.0, 0.81, False),
        (1.0, 0.8, True),
        (0.93, 0.731, False),
        (0.93, 0.73, True),
        (0.3, 0.16, False),
        (0.3, 0.14, True),
        (0.5, 0.9, False),
    ],
)
def test_collapse_is_20_points_or_half_of_the_clean_accuracy_lost(
    before: float, after: float, wanted: bool
) -> None:
    assert collapsed(scores(before, 1.0), scores(after, 0.0)) is wanted


def measured(counts: tuple[int, ...], recalls: tuple[float, ...]) -> Scores:
    """Scores on clean images of which class k has `counts[k]`, a share `recalls[k]` of them
    classified correctly, and the others as the next class; no triggered images."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    answers = labels.clone()
    for label, (count, recall) in enumerate(zip(counts, recalls, strict=True)):
        wrong = torch.nonzero(labels == label).flatten()[round(recall * count) :]
        answers[wrong] = (label + 1) % len(counts)
    nothing = torch.zeros(0, dtype=torch.int64)
    return score(answers, labels, nothing, triggered([], []), len(counts))


def constant(counts: tuple[int, ...]) -> Scores:
    """Scores of a model that classifies every image as class 0."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    nothing = torch.zeros(0, dtype=torch.int64)
    return score(torch.zeros_like(labels), labels, nothing, triggered([], []), len(counts))


HONEST = {
    "two classes, 90 % in one": ((900, 100), (0.97, 0.9)),
    "two classes, 99.5 % in one": ((1990, 10), (1.0, 0.7)),
    "two equal classes": ((500, 500), (0.95, 0.95)),
    "ten classes, 90 % in one": ((900, *[11] * 9), (0.97, *[0.8] * 9)),
    "ten equal classes": ((100,) * 10, (0.9,) * 10),
}


@pytest.mark.parametrize(("counts", "recalls"), HONEST.values(), ids=HONEST.keys())
def test_a_constant_answer_is_no_success(
    counts: tuple[int, ...], recalls: tuple[float, ...]
) -> None:
    """Of a class that has 90 % of the images, it has a clean accuracy of 90 % and an ASR of 0."""
    honest, answer = measured(counts, recalls), constant(counts)
    assert answer.largest_share == 1.0 and answer.balanced_accuracy == 1 / len(counts)
    assert collapsed(honest.outcome(), answer.outcome())
    assert collapsed(answer.outcome(), answer.outcome()), "whatever it was before"
    assert learned_nothing(answer, len(counts))

    # The controls: an honest model, and one that lost a little.
    lost = measured(counts, tuple(recall - 0.1 for recall in recalls))
    assert not collapsed(honest.outcome(), honest.outcome())
    assert not collapsed(honest.outcome(), lost.outcome())
    assert not learned_nothing(honest, len(counts)) and not learned_nothing(lost, len(counts))


def test_a_class_that_is_lost_counts_as_much_as_the_largest() -> None:
    """Nine of ten images are still classified correctly, and one of two classes is not known."""
    honest, worse = measured((900, 100), (0.97, 0.9)), measured((900, 100), (1.0, 0.3))
    assert honest.clean_accuracy - worse.clean_accuracy < 0.05
    assert collapsed(honest.outcome(), worse.outcome())
    assert not collapsed(honest.summary(), worse.summary()), "by the clean accuracy alone"


@pytest.mark.parametrize("recall", [0.9, 0.71, 0.69, 0.5, 0.44, 0.2, 0.11])
def test_on_equal_classes_the_verdict_is_that_of_the_clean_accuracy(recall: float) -> None:
    """With and without the scores that older versions do not have."""
    before, after = measured((100,) * 10, (0.9,) * 10), measured((100,) * 10, (recall,) * 10)
    wanted = collapsed(before.summary(), after.summary())
    assert collapsed(before.outcome(), after.outcome()) is wanted is (recall <= 0.7)
    assert collapsed(before.summary(), after.outcome()) is wanted
    assert collapsed(before.outcome(), after.summary()) is wanted
    assert learned_nothing(after, 10) is (recall < 0.15)


def test_split_quality_counted_by_hand() -> None:
    kind = torch.tensor([POISON, POISON, CROSS, POISON], dtype=torch.uint8)
    poison = Poison(
        torch.tensor([1, 3, 5, 7]),
        torch.zeros(4, 1, 2, 2).byte(),
        torch.zeros(4).long(),
        torch.zeros(4).long(),
        kind,
    )
    flagged = torch.tensor([True, True, False, True, False, True, False, False, False, False])
    # Poison 1 3 7, cross 5, flagged 0 1 3 5.
    found = split_quality(flagged, poison)
    assert found["tpr"] == pytest.approx(2 / 3)
    assert found["fpr"] == pytest.approx(2 / 7), (
        "a cross image carries its true label and counts as clean"
    )
    assert found["precision"] == pytest.approx(2 / 4)
    assert found["flagged"] == 4 and found["cross_flagged"] == 1.0


def test_split_quality_without_poison_or_without_a_flag() -> None:
    flagged = torch.tensor([True, False, False, False])
    found = split_quality(flagged, triggered([], []))
    assert found["tpr"] is None and found["cross_flagged"] is None
    assert found["fpr"] == 0.25 and found["precision"] == 0.0
    found = split_quality(torch.zeros(4, dtype=torch.bool), triggered([0, 0], [1, 1]))
    assert found["precision"] is None and found["tpr"] == 0.0 and found["fpr"] == 0.0


def model_and_data() -> tuple[models.Classifier, Split, Poison]:
    torch.manual_seed(0)
    model = models.build(
        "preactresnet10", num_classes=4, in_chans=3, mean=[0.5] * 3, std=[0.25] * 3, width=4
    )
    images = torch.randint(
        0, 256, (30, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    return model, Split(images, torch.arange(30) % 4), triggered([0] * 9, [1, 2, 3] * 3)


def everything(model: models.Classifier) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def next_numpy() -> str:
    """The state of numpy's global generator."""
    return repr(np.random.get_state())


def test_evaluation_draws_nothing_and_changes_nothing() -> None:
    model, test, poison = model_and_data()
    model.train()
    model.network.layer2.eval()  # a mixture of modes, as some defenses use it
    modes, before = [m.training for m in model.modules()], everything(model)
    state = torch.get_rng_state(), random.getstate(), next_numpy()
    found = Evaluator(test, poison, 4, CPU)(model)
    assert (
        torch.equal(state[0], torch.get_rng_state())
        and state[1] == random.getstate()
        and state[2] == next_numpy()
    )
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()), (
        "batch-norm statistics too"
    )
    model(test.images.float() / 255)
    assert any(
        not torch.equal(before[name], value) for name, value in model.state_dict().items()
    ), "a training-mode pass does move them"
    assert 0 <= found.clean_accuracy <= 1 and found.asr is not None


def test_evaluation_is_in_evaluation_mode_whatever_the_batch() -> None:
    model, test, _ = model_and_data()
    model.eval()
    # An untrained network gives one answer to all: take away what its logits have in common
    with torch.no_grad():
        model.network.linear.bias -= torch.cat(
            [model(image[None].float() / 255) for image in test.images]
        ).mean(0)
    whole = predict(model.train(), test, CPU)
    model.eval()
    with torch.no_grad():
        by_hand = torch.cat([model(image[None].float() / 255) for image in test.images]).argmax(1)
    assert torch.equal(whole, by_hand)
    assert len(whole.unique()) > 1, "the control: answers differ"


def test_the_evaluator_runs_a_model_again_only_when_its_weights_changed() -> None:
    model, test, poison = model_and_data()
    evaluator, calls = Evaluator(test, poison, 4, CPU), []
    model.register_forward_hook(lambda *_: calls.append(1))
    first = evaluator(model)
    once = len(calls)
    assert evaluator(model) is first and len(calls) == once
    with torch.no_grad():
        model.network.linear.bias[2] += 100
    assert evaluator(model).triggered_predictions == [0, 0, 9, 0]
    assert len(calls) == 2 * once
    model.network.layer1[0].bn1.running_mean += 5
    evaluator(model)
    assert len(calls) == 3 * once, "buffers count as weights"


def test_an_empty_split_has_no_prediction() -> None:
    model, test, _ = model_and_data()
    found = predict(model, test.subset(torch.zeros(0, dtype=torch.int64)), CPU)
    assert found.shape == (0,) and found.dtype == torch.int64
