"""DAU's losses against arithmetic, its pool and its heads on features with a planted group."""

import math
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.data import NO_AUGMENT, Split, to_float
from backdoorlab.errors import UserError
from backdoorlab.features import Features, predictions
from backdoorlab.groups import content, measuring, splitting
from backdoorlab.poison_search import anti_learning as detection
from backdoorlab.poison_search import pool as search
from backdoorlab.record import Record
from backdoorlab.repair import unlearning
from backdoorlab.run import Run
from backdoorlab.settings import methods

dau: Any = methods.load("defense", "dau").module
SEARCH = search.SearchConfig()
K = 10


def logits(
    n: int = 50, scale: float = 3.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    return scale * torch.randn(n, K, generator=draws, dtype=dtype), torch.randint(
        0, K, (n,), generator=draws
    )


def new_run(folder: Path, seed: int = 0) -> Run:
    return Run(folder, seed=seed, device=torch.device("cpu"), precision="fp32")


# --- losses


def test_cross_entropy_and_cce_are_their_definitions() -> None:
    z, y = logits()
    p = z.softmax(1).gather(1, y[:, None]).squeeze(1)
    assert torch.allclose(dau.cce(z, y), -torch.log(1 - p), rtol=1e-10, atol=1e-12)
    assert torch.allclose(dau.cross_entropy(z, y), -torch.log(p), rtol=1e-10, atol=1e-12)
    assert torch.allclose(
        dau.cross_entropy(z, y), F.cross_entropy(z, y, reduction="none"), rtol=1e-10
    )


def test_losses_take_heads_and_batches_of_any_shape() -> None:
    z, y = logits(24)
    for loss in (dau.cce, dau.cross_entropy):
        assert torch.allclose(loss(z.view(2, 3, 4, K), y.view(2, 3, 4)), loss(z, y).view(2, 3, 4))


def test_the_gradient_of_cce_is_the_odds_times_the_gradient_of_ascent() -> None:
    z, y = logits()
    z.requires_grad_()
    cce = torch.autograd.grad(dau.cce(z, y).sum(), z)[0]
    ascent = torch.autograd.grad(-dau.cross_entropy(z, y).sum(), z)[0]
    p = z.detach().softmax(1).gather(1, y[:, None])
    assert torch.allclose(cce, p / (1 - p) * ascent, rtol=1e-8, atol=1e-12)
    assert not torch.allclose(cce, ascent, rtol=0.1)


@pytest.mark.parametrize("certainty", [10.0, 30.0, 100.0, 1000.0])
def test_cce_pushes_where_the_backdoor_is_intact_and_clamping_does_not(certainty: float) -> None:
    z = torch.zeros(1, K)
    z[0, 3] = certainty
    z.requires_grad_()
    y = torch.tensor([3])
    loss = dau.cce(z, y)
    gradient = torch.autograd.grad(loss.sum(), z)[0]
    assert loss.item() == pytest.approx(certainty - math.log(K - 1), rel=1e-3)
    assert gradient[0, 3].item() == pytest.approx(1.0, rel=1e-3) and torch.isfinite(gradient).all()
    clamped = -(1 - z.softmax(1)[0, 3]).clamp_min(1e-7).log()
    if certainty >= 30:
        assert not torch.autograd.grad(clamped, z)[0].any(), (
            "the clamped form has no gradient exactly there"
        )


def test_cce_vanishes_once_the_label_is_unlearned_and_ascent_does_not() -> None:
    z = torch.zeros(1, K)
    z[0, 3] = -20.0
    z.requires_grad_()
    y = torch.tensor([3])
    assert torch.autograd.grad(dau.cce(z, y).sum(), z)[0].abs().max() < 1e-8
    assert torch.autograd.grad(-dau.cross_entropy(z, y).sum(), z)[0].abs().max() > 0.99


@pytest.mark.parametrize("loss", ["cce", "both", "gga"])
def test_unlearning_loss_by_hand(loss: str) -> None:
    # Two classes; p_y = 0.8 (clean), 0.5 (clean), 0.9, 0.001 (poison).
    p = torch.tensor([0.8, 0.5, 0.9, 0.001], dtype=torch.float64)
    z = torch.stack([torch.log(p / (1 - p)), torch.zeros(4, dtype=torch.float64)], 1)
    y, poisoned = torch.zeros(4, dtype=torch.int64), torch.tensor([False, False, True, True])
    config = dau.Config(loss=loss, alpha2=2.0, beta2=3.0, tau=0.2, ascent_cap=4.0)
    learned = 2.0 * (-math.log(0.8) - math.log(0.5))
    unlearned = {
        "cce": -math.log(0.1) - math.log(0.999),
        "gga": math.log(0.9) + math.log(0.001),
        # The second poison's cross-entropy is 6.9, above the cap of 4.
        "both": -math.log(0.1) - math.log(0.999) - 0.2 * (-math.log(0.9) + 4.0),
    }[loss]
    assert dau.unlearning_loss(z, y, poisoned, config).item() == pytest.approx(
        (learned + 3.0 * unlearned) / 4, rel=1e-9
    )
    uncapped = dau.Config(loss=loss, alpha2=2.0, beta2=3.0, tau=0.2, ascent_cap=None)
    difference = dau.unlearning_loss(z, y, poisoned, config) - dau.unlearning_loss(
        z, y, poisoned, uncapped
    )
    wanted = 3.0 * 0.2 * (-math.log(0.001) - 4.0) / 4 if loss == "both" else 0.0
    assert difference.item() == pytest.approx(wanted, abs=1e-9)


def test_the_cap_stops_the_push_of_ascent() -> None:
    z = torch.tensor([[-8.0, 0.0]], dtype=torch.float64, requires_grad=True)
    y, poisoned = torch.tensor([0]), torch.tensor([True])
    gradients = [
        torch.autograd.grad(
            dau.unlearning_loss(z, y, poisoned, dau.Config(loss="both", tau=1.0, ascent_cap=cap)), z
        )[0]
        .abs()
        .max()
        .item()
        for cap in (4.0, None)
    ]
    assert gradients[0] < 1e-3 and gradients[1] > 0.9


def test_an_unpoisoned_batch_is_plain_cross_entropy() -> None:
    z, y = logits()
    for loss in ("cce", "both", "gga"):
        value = dau.unlearning_loss(
            z, y, torch.zeros(len(y), dtype=torch.bool), dau.Config(loss=loss)
        )
        assert torch.allclose(value, F.cross_entropy(z, y))


def stationary(mixed: float, config: Any, steps: int = 4000) -> float:
    """p_y that gradient descent reaches for a tight cluster of which a fraction `mixed` is still in
    the clean part."""
    n = 100
    z = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    poisoned = torch.arange(n) >= round(mixed * n)
    labels = torch.zeros(n, dtype=torch.int64)
    optimizer = torch.optim.SGD([z], lr=1.0)
    for _ in range(steps):
        optimizer.zero_grad()
        dau.unlearning_loss(z.expand(n, -1), labels, poisoned, config).backward()
        optimizer.step()
    return z.softmax(1)[0, 0].item()


@pytest.mark.parametrize("mixed", [0.05, 0.2, 0.5])
def test_cce_alone_leaves_the_backdoor_at_the_mixed_in_share(mixed: float) -> None:
    assert stationary(mixed, dau.Config(loss="cce")) == pytest.approx(mixed, abs=2e-3)


@pytest.mark.parametrize("mixed", [0.05, 0.1, 0.3, 0.5])
def test_a_share_of_ascent_lowers_that_to_the_predicted_odds(mixed: float) -> None:
    tau = 0.2
    odds = max(0.0, (mixed - tau * (1 - mixed)) / (1 - mixed))
    found = stationary(mixed, dau.Config(loss="both", tau=tau, ascent_cap=None))
    assert found == pytest.approx(odds / (1 + odds), abs=5e-3)
    assert found < mixed - 0.02, "less than CCE alone leaves"


# --- statistics


@pytest.mark.parametrize("seed", range(8))
def test_two_means_is_the_best_cut(seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(41, generator=draws, dtype=torch.float64)
    x[: 5 + seed] += seed
    upper = splitting.two_means(x)

    def cost(mask: Tensor) -> float:
        return sum(float((x[part] - x[part].mean()).square().sum()) for part in (mask, ~mask))

    ordered = x.sort().values
    best = min(cost(x > cut) for cut in ordered[:-1])
    assert cost(upper) == pytest.approx(best, abs=1e-9)
    assert upper.any() and not upper.all() and x[upper].min() > x[~upper].max()


def test_the_main_direction_is_what_other_labels_do_not_do() -> None:
    """The largest variance is one that all labels share; a label's second group lies along a
    smaller one."""
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat_interleave(200)
    x = (
        torch.randn(800, 8, generator=draws, dtype=torch.float64) * torch.tensor([20.0] + [1.0] * 7)
        + 5 * labels[:, None]
    )
    x[:80, 3] += 8
    moved = torch.arange(200) < 80

    def along(x: Tensor) -> list[Tensor]:
        """Each label's samples along its main direction."""
        found = list(splitting.whiten(x, labels, 4))
        assert [w.label for w in found] == [0, 1, 2, 3]
        assert all(w.samples.shape == (8, 200) for w in found)
        return [splitting.main_directions(w.samples, 2)[0] @ w.samples for w in found]

    found = along(x)
    upper = splitting.two_means(found[0])
    assert torch.equal(upper, moved) or torch.equal(upper, ~moved)
    scaled = along(3 * x - 7)
    assert all(
        torch.allclose(a.abs(), b.abs(), atol=1e-6) for a, b in zip(found, scaled, strict=True)
    ), "in units of the other labels' spread"
    loud = splitting.two_means(x[:200, 0])
    assert 0.3 < (loud == moved).double().mean() < 0.7, "the largest variance shows nothing"


@pytest.mark.parametrize("labels", [[0] * 20, []])
def test_a_single_label_has_no_others_to_be_compared_with(labels: list[int]) -> None:
    x = torch.randn(len(labels), 3, generator=torch.Generator().manual_seed(0))
    y = torch.tensor(labels, dtype=torch.int64)
    assert not list(splitting.whiten(x, y, 2))
    if labels:
        assert not list(content.leave_one_out(x, y, 2, torch.Generator()))


def discriminant(x: Tensor, labels: Tensor, label: int = 0) -> content.Discriminant:
    generator = torch.Generator().manual_seed(0)
    found = content.leave_one_out(x, labels, int(labels.max()) + 1, generator)
    return next(one for one in found if one.label == label)


def test_variety_counts_classes_and_ignores_a_common_shift(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Mixed labels raise the temperature that samples choose, and the three sets are compared here.
    monkeypatch.setattr(content, "fitted_temperature", lambda *_: 1.0)
    draws = torch.Generator().manual_seed(0)
    true = torch.arange(6).repeat_interleave(400)
    x = 3 * F.one_hot(true, 12).float() + 0.8 * torch.randn(len(true), 12, generator=draws)
    pair, several = torch.arange(400, 1200, 3), torch.arange(400, 2400, 7)

    def variety(x: Tensor, group: Tensor) -> float:
        """Of samples that are given label 0."""
        labels = true.clone()
        labels[group] = 0
        part = torch.isin((labels == 0).nonzero().squeeze(1), group)
        return discriminant(x, labels).variety(part, torch.Generator().manual_seed(0))

    one = variety(x, torch.arange(400))
    assert one < variety(x, pair) < variety(x, several), "one class, two of five, all others"
    assert variety(x, several) == pytest.approx(1, abs=0.1) and one < 0.7
    assert variety(x, several[::20]) == pytest.approx(1, abs=0.2), "however few images show them"
    shifted, blended = x.clone(), x.clone()
    shifted[several] += 2
    blended[several] = 0.7 * x[several] + 2
    assert variety(shifted, several) == pytest.approx(variety(x, several), abs=0.03), "a patch"
    assert variety(blended, several) > 0.7, "a mixture"


def test_resemblance_names_the_class_that_a_group_comes_from() -> None:
    draws = torch.Generator().manual_seed(0)
    true = torch.arange(6).repeat_interleave(400)
    x = 3 * F.one_hot(true, 12).float() + 0.8 * torch.randn(len(true), 12, generator=draws)
    labels = true.clone()
    labels[1200:1300] = 0
    taken = torch.arange(500) >= 400
    found = discriminant(x, labels)
    belief, source = found.belief(taken)
    assert found.nearer(taken) > 3 and belief > 0.9 and source == 3
    style = torch.arange(400) < 200
    found = discriminant(x, true)
    assert found.nearer(style) < 1 and found.belief(style)[0] < 0.2, (
        "a control: half of a class's own images"
    )


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_robust_standard_deviations_have_no_unit(factor: float) -> None:
    values = [factor * (7 + x) for x in (-2.0, -1.0, 0.0, 1.0, 2.0)]
    assert search.robust_z(factor * 17, values) == pytest.approx(10 / 1.4826)
    outlier = [*values, factor * 1e6]
    assert search.robust_z(factor * 17, outlier) > 4, "one outlier changes little"


def test_all_labels_share_a_temperature_that_unseen_samples_choose() -> None:
    """Where there are as many dimensions as samples, a discriminant is surer than it is right."""
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(5).repeat_interleave(60)
    x = 0.5 * F.one_hot(labels, 200).float() + torch.randn(300, 200, generator=draws)
    found = list(content.leave_one_out(x, labels, 5, draws))
    assert len({one.temperature for one in found}) == 1 and found[0].temperature > 4
    plain = 2.5 * F.one_hot(labels, 5).float() + x[:, 100:105]
    few = list(content.leave_one_out(plain, labels, 5, draws))
    assert few[0].temperature < 2, "a control: in five dimensions it is not"


def test_information_is_in_nats() -> None:
    assert content.information(torch.eye(4).repeat(5, 1)) == pytest.approx(math.log(4), abs=1e-6), (
        "sure, and different"
    )
    assert content.information(torch.full((9, 4), 0.25)) == pytest.approx(0, abs=1e-6), "unsure"
    assert content.information(torch.eye(4)[:1].repeat(5, 1)) == pytest.approx(0, abs=1e-6), (
        "sure of one"
    )


# --- pool and heads on synthetic features

N_CLASS, PLANTED, TARGET = 80, 60, 3


def features(
    planted: int = PLANTED, *, foreign: bool = True, seed: int = 0
) -> tuple[Features, Tensor]:
    """Ten clean classes, and `planted` samples of label TARGET in a group of their own, with a
    mark. Returns them and the planted mask.

    foreign: early features of the planted samples are those of other classes, as poison's are;
    otherwise their own class's.
    """
    draws = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(K).repeat_interleave(N_CLASS), torch.full((planted,), TARGET)])
    is_planted = torch.arange(len(labels)) >= K * N_CLASS
    true = labels.clone()
    if foreign:
        others = torch.tensor([k for k in range(K) if k != TARGET])
        true[is_planted] = others[torch.arange(planted) % len(others)]
    n = len(labels)
    pooled = 4 * F.one_hot(labels, 16).float() + 0.3 * torch.randn(n, 16, generator=draws)
    pooled[is_planted, TARGET] -= 2
    pooled[is_planted, 12] += 6
    early = 3 * F.one_hot(true, 20).float() + 0.3 * torch.randn(n, 20, generator=draws)
    early[is_planted, 15] += 2
    head = head_of()
    return (
        Features(
            pooled,
            early,
            early.half(),
            (pooled @ head.weight.detach().T + head.bias.detach()),
            labels,
        ),
        is_planted,
    )


def pool_of(data: Features, run: Run, **changes: Any) -> Tensor:
    """The pool alone."""
    return search.search(data, K, dau.Config(**changes), run).pool


def head_of() -> nn.Linear:
    """A head that takes every sample, planted ones too, for its label."""
    head = nn.Linear(16, K)
    with torch.no_grad():
        head.weight.copy_(4 * torch.eye(K, 16))
        head.weight[TARGET, 12] = 4
        head.bias.zero_()
    return head


def test_the_search_finds_the_planted_group(tmp_path: Path) -> None:
    data, planted = features()
    assert (data.logits.argmax(1) == data.labels).all()
    run = new_run(tmp_path)
    pool, rest, one_class = search.search(data, K, dau.Config(), run)
    assert int(pool.sum()) >= PLANTED // 2 and not (pool & ~planted).any(), "pure"
    assert int(rest.sum()) >= N_CLASS // 2 and not (rest & planted).any()
    assert not one_class and (data.labels[rest] == TARGET).all()
    said = [note for note in run.notes if "taken for poison" in note]
    assert len(said) == 1 and f"label {TARGET}: a group shows" in said[0]
    assert f"{PLANTED} samples" in said[0]


@pytest.mark.parametrize("seed", range(5))
def test_the_search_finds_nothing_in_clean_features(tmp_path: Path, seed: int) -> None:
    data, _ = features(planted=0, seed=seed)
    run = new_run(tmp_path)
    assert not pool_of(data, run).any()
    assert any("no poison found" in note for note in run.notes)


@pytest.mark.parametrize("scale", [1e-2, 1e2])
def test_the_search_has_no_units(tmp_path: Path, scale: float) -> None:
    """The same features in other units, and of labels in another order, lead to the same pool."""
    data, _ = features()
    scaled = data._replace(early=scale * data.early, pooled=scale * data.pooled)
    found = [pool_of(one, new_run(tmp_path)) for one in (data, scaled)]
    assert found[0].any() and torch.equal(*found)


@pytest.mark.parametrize("most", [600, 12])
def test_poison_may_be_a_tenth_of_its_label_or_most_of_it(tmp_path: Path, most: int) -> None:
    data, planted = features(most)
    pool = pool_of(data, new_run(tmp_path))
    assert pool.any() and not (pool & ~planted).any()


@pytest.mark.parametrize("kept", [1, 8, SEARCH.label_samples - 1])
def test_labels_of_few_samples_are_left_alone(kept: int, tmp_path: Path) -> None:
    """Ten points in many dimensions are in two groups by chance, and a single one is in none at
    all. Beside them poison is found as ever."""
    data, planted = features(planted=0)
    few = Features(
        *(part.reshape(K, N_CLASS, *part.shape[1:])[:, :kept].flatten(0, 1) for part in data)
    )
    run = new_run(tmp_path)
    assert not pool_of(few, run).any()
    assert any(
        f"{K} labels have less than {SEARCH.label_samples} samples" in note for note in run.notes
    )
    data, planted = features()
    rare = (data.labels != 7) | (torch.arange(len(data.labels)) < 7 * N_CLASS + kept)
    pool = pool_of(Features(*(part[rare] for part in data)), new_run(tmp_path))
    assert int(pool.sum()) >= 20 and not (pool & ~planted[rare]).any()


def test_samples_that_are_all_alike_are_no_groups(tmp_path: Path) -> None:
    data, _ = features(planted=0)
    alike = data.labels == 4
    parts = [
        torch.where(alike.view(-1, *[1] * (part.ndim - 1)), part[alike][:1], part) for part in data
    ]
    assert not pool_of(Features(*parts), new_run(tmp_path)).any()


def test_labels_that_are_duplicates_of_each_other_are_no_poison(tmp_path: Path) -> None:
    data, _ = features(planted=0)
    order = torch.arange(len(data.labels))
    order[data.labels == 5] = order[data.labels == 4].flip(0)
    twin = Features(*(part[order] for part in data))._replace(labels=data.labels)
    assert not pool_of(twin, new_run(tmp_path)).any()


def test_two_styles_of_one_class_are_not_poison(tmp_path: Path) -> None:
    data, _ = features(foreign=False)
    run = new_run(tmp_path)
    assert not pool_of(data, run).any()
    assert any("no poison found" in note for note in run.notes)


def test_with_two_labels_the_search_says_what_it_cannot_tell(tmp_path: Path) -> None:
    data, planted = features()
    two = torch.isin(data.labels, torch.tensor([TARGET, TARGET + 1]))
    part = Features(*(value[two] for value in data))
    run = new_run(tmp_path)
    pool = search.search(
        part._replace(labels=(part.labels != TARGET).long()), 2, dau.Config(), run
    ).pool
    assert not (pool & ~planted[two]).any()
    assert any("fewer than 5 labels" in note for note in run.notes)


@pytest.mark.parametrize("foreign", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_small_group_is_found_by_its_variety_where_two_means_cut_the_label_elsewhere(
    tmp_path: Path, seed: int, foreign: bool
) -> None:
    """One in twenty of a label, three standard deviations away: images of other classes are poison,
    images of its own are not."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(K).repeat_interleave(400), torch.full((20,), TARGET)])
    planted = torch.arange(len(labels)) >= K * 400
    others = torch.tensor([k for k in range(K) if k != TARGET])
    true = (
        labels.masked_scatter(planted, others[torch.arange(20) % len(others)])
        if foreign
        else labels
    )
    early = 3 * F.one_hot(true, 20).float() + torch.randn(len(labels), 20, generator=draws)
    early[planted, 15] += 3

    label = next(w for w in splitting.whiten(early, labels, K) if w.label == TARGET)
    upper = splitting.two_means(splitting.main_directions(label.samples, 1)[0] @ label.samples)
    shares = [planted[labels == TARGET][half].double().mean().item() for half in (upper, ~upper)]
    assert max(shares) < 0.3, "its halves would both be clean"

    run = new_run(tmp_path)
    pool = pool_of(Features(early, early, early.half(), early, labels), run)
    if foreign:
        assert pool.any() and not (pool & ~planted).any()
    else:
        assert not pool.any() and any("no poison found" in note for note in run.notes)


@pytest.mark.parametrize("mark", [6.0, 0.0])
def test_a_group_of_one_class_is_poison_where_it_lies_far_from_all_labels(
    tmp_path: Path, mark: float
) -> None:
    """Clean-label poison shows its own class and a mark: nothing else is as far from the rest of a
    label in the last layer, and the rest is nearer to another label than to it. Without the mark
    the two groups are near each other, and two styles."""
    data, planted = features(foreign=False)
    spatial = data.spatial.float()
    spatial[planted, 12:18] += mark
    run = new_run(tmp_path)
    pool = pool_of(data._replace(spatial=spatial.half()), run)
    if mark:
        assert int(pool.sum()) >= 20 and not (pool & ~planted).any()
        assert any("far from the label's rest in the last layer" in note for note in run.notes)
    else:
        assert not pool.any()


@pytest.mark.parametrize(
    ("apart", "lacks", "ratio", "found"),
    [
        (2.0, 2.0, 2.5, True),
        # Controls: either alone is too little, unless the rest lies far nearer to another label.
        (2.0, -9.0, 2.5, False),
        (0.0, 2.0, 2.5, False),
        (2.0, -9.0, 5.0, True),
        (4.0, 4.0, 1.5, False),
    ],
)
def test_evidence_adds_up(apart: float, lacks: float, ratio: float, found: bool) -> None:
    """A picture that hides half of each image leaves less of the classes to be seen, so that
    neither their number nor the distance alone is far enough from other labels'."""

    def group(label: int, away: float, shown: float, rest_nearer: float) -> measuring.Group:
        sure = torch.arange(40) + 40 * label
        return measuring.Group(label, 40, 60, sure, sure, shown, away, 1.0, rest_nearer, 0.1, 3)

    spread = [k / 10 for k in range(-5, 6)]
    usual = [group(k, away, away, 1.0) for k, away in enumerate(spread, 1)]
    unit = 1.4826 * 0.3  # one robust standard deviation of `spread`
    odd = group(0, apart * unit, lacks * unit, ratio)
    measured = measuring.Measured([*usual, odd], [(40, away) for away in spread], 0)
    assert (not search.shows_many_classes(measured, search.SearchConfig())) and list(
        search.lies_apart(measured, search.SearchConfig())
    ) == [0] * found


SOURCE = 5


def one_class() -> tuple[Tensor, Features, Tensor]:
    """TaCT: early features with planted images of the target itself, and of class SOURCE. Some of
    labels 7 and 8 carry the trigger, too."""
    data, planted = features(foreign=False)
    covers = torch.isin(data.labels, torch.tensor([7, 8])) & (
        torch.arange(len(data.labels)) % 4 == 0
    )
    # More of what is in an image than of the trigger
    own = data.early + 3 * F.one_hot(data.labels, 20)
    own[covers, 15] += 2
    early = own.clone()
    early[planted, TARGET] -= 6
    early[planted, SOURCE] += 6
    return own, data._replace(early=early, spatial=early.half()), planted


def test_a_group_that_looks_like_one_other_class_is_poison_and_what_carries_its_trigger_is_not(
    tmp_path: Path,
) -> None:
    own, data, planted = one_class()
    run = new_run(tmp_path)
    pool, _, shows_one = search.search(data, K, dau.Config(), run)
    assert int(pool.sum()) >= 20 and not (pool & ~planted).any() and shows_one
    said = [note for note in run.notes if "taken for poison" in note]
    assert len(said) == 1 and f"label {TARGET}: a group looks like class {SOURCE} " in said[0]
    alike = data._replace(early=own, spatial=own.half())
    assert not search.search(alike, K, dau.Config(), new_run(tmp_path)).one_class, (
        "a control: the trigger on images of the target itself looks like no other class"
    )


def test_where_most_labels_hold_images_of_one_other_class_all_of_them_are_poison(
    tmp_path: Path,
) -> None:
    """All-to-all: the poison of each label comes from one class, and shows no variety."""
    data, _ = features(planted=0)
    poisoned = torch.arange(len(data.labels)) % N_CLASS < 24
    early = data.early.clone()
    early[poisoned, :K] = early[poisoned, :K].roll(4, 1)  # another class's place
    early[poisoned, 15] += 2
    run = new_run(tmp_path)
    pool = pool_of(data._replace(early=early, spatial=early.half()), run)
    assert int(pool.sum()) >= 50 and not (pool & ~poisoned).any()
    assert len(data.labels[pool].unique()) == K


def test_each_head_has_its_own_share_of_the_pool_drawn_from_the_seed(tmp_path: Path) -> None:
    pool = torch.arange(60) % 3 == 0
    first, other = (search.draw(pool, 0.5, 3, new_run(tmp_path, seed)) for seed in (0, 1))
    assert first.sum(1).tolist() == [10] * 3 and not (first & ~pool).any()
    assert not torch.equal(first[0], first[1]) and not torch.equal(first, other)
    assert torch.equal(first, search.draw(pool, 0.5, 3, new_run(tmp_path, 0)))
    assert torch.equal(search.draw(pool, 1.0, 1, new_run(tmp_path))[0], pool)


def test_heads_that_disagree_about_where_a_sample_goes_agree_that_its_label_is_gone() -> None:
    """Each sends it to another class, so every class has a low median; renormalised, the label
    would seem to be believed."""
    data, _ = features()
    labels, logits = data.labels[:1], 20.0 * torch.nn.functional.one_hot(data.labels[:1], K)
    heads = torch.full((K, 1, K), -30.0)
    for place, head in enumerate(heads):
        head[0, place] = 0.0
    heads[:, 0, labels[0]] = -9.0
    median = heads.log_softmax(-1).median(0).values
    one = Features(data.pooled[:1], data.early[:1], data.spatial[:1], logits, labels)
    assert median.logsumexp(1) < -5, "the control: medians are no distribution"
    assert detection.doubt(median, one, dau.Config()).item() == pytest.approx(9.0, abs=0.01)
    assert detection.lost_label(median, one, dau.Config()).all()


def test_heads_carry_the_pool_over_to_the_rest_of_the_group(tmp_path: Path) -> None:
    data, planted = features()
    pool = planted & (torch.arange(len(planted)) % 3 == 0)
    config = dau.Config(head_batch_size=64, head_epochs=30)
    found = {}
    for beta in (0.0, 1000.0):
        log_p = detection.anti_learn(data, pool, head_of(), beta, config, new_run(tmp_path))
        assert log_p.shape == data.logits.shape and log_p.max() <= 0
        found[beta] = log_p.gather(1, data.labels[:, None]).squeeze(1) < math.log(config.threshold)
    hidden = planted & ~pool
    assert found[1000.0][hidden].double().mean() >= 0.9, "the samples outside the pool are found"
    assert found[1000.0][~planted].double().mean() <= 0.02
    assert not found[0.0].any(), "without unlearning nothing is flagged"


def test_a_head_that_takes_the_rest_of_the_label_is_trained_again_with_more_weight_on_it(
    tmp_path: Path,
) -> None:
    """The rest of the label lies near the poison: what unlearns the one takes the other."""
    data, planted = features()
    rest = (data.labels == TARGET) & ~planted
    pooled = data.pooled.clone()
    pooled[rest] = 0.2 * pooled[rest] + 0.8 * pooled[planted].mean(0)
    near = data._replace(pooled=pooled)
    pool = planted & (torch.arange(len(planted)) % 3 == 0)
    config, shares = dau.Config(head_batch_size=64, head_epochs=30), []
    for weights in (None, torch.where(rest, config.rest_weight, 1.0)):
        run = new_run(tmp_path)
        log_p = detection.anti_learn(near, pool, head_of(), config.beta1, config, run, weights)
        flagged = detection.lost_label(log_p, near, config)
        assert flagged[planted].double().mean() >= 0.9
        shares.append(flagged[rest].double().mean().item())
        again = detection.takes_the_rest(flagged, rest, config, run)
        assert again == (shares[-1] > config.rest_flagged)
        assert again == any("trained again" in note for note in run.notes)
    assert shares[0] > config.rest_flagged > shares[1], shares
    assert not detection.takes_the_rest(flagged, torch.zeros_like(rest), config, run)


def test_anti_learning_leaves_the_models_own_head_alone_and_follows_the_seed(
    tmp_path: Path,
) -> None:
    data, planted = features()
    head, config = head_of(), dau.Config(head_epochs=2, heads=3)
    before = head.weight.detach().clone()
    runs = [
        detection.anti_learn(data, planted, head, 99.0, config, new_run(tmp_path, seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(head.weight, before)
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_a_pool_smaller_than_a_class_gets_its_mass_and_a_larger_one_no_more_than_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, planted = features()
    drawn: list[torch.Tensor] = []
    draw = torch.multinomial

    def seen(*args: Any, **options: Any) -> torch.Tensor:
        drawn.append(draw(*args, **options))
        return drawn[-1]

    monkeypatch.setattr(torch, "multinomial", seen)
    n = len(planted)
    small, large = planted & (torch.arange(n) % 10 == 0), torch.arange(n) < n // K
    for pool in (small, large):
        detection.anti_learn(
            data, pool, head_of(), 99.0, dau.Config(head_epochs=1, heads=2), new_run(tmp_path)
        )
    mass = small[drawn[0]].double().mean().item()
    assert mass == pytest.approx(1 / (K + 1), rel=0.3) and mass > 3 * small.double().mean().item()
    assert all(torch.equal(order.sort().values, torch.arange(n)) for order in drawn[1]), (
        "a pass over all samples, each once"
    )


def test_the_rate_of_the_port_s_head_does_not_fall(tmp_path: Path) -> None:
    data, planted = features()
    moved = []
    for decay in (True, False):
        config = dau.Config(heads=1, head_epochs=2, head_lr_decay=decay)
        end = detection.anti_learn(data, planted, head_of(), 99.0, config, new_run(tmp_path))
        moved.append((end - data.logits.log_softmax(1)).norm())
    assert moved[1] > moved[0]


def test_the_guard_for_labels_without_a_clean_sample_is_the_ports_to_switch_off(
    small: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        detection, "find_pool", lambda view, *_: search.alone(torch.arange(len(view.train)) < 3)
    )
    monkeypatch.setattr(detection, "lost_label", lambda _log_p, data, _config: data.labels == 2)
    found: dict[str, Any] = {}
    for breakdown in ("0.99", "1"):
        record = helpers.copy(small, tmp_path / breakdown)
        found[breakdown] = helpers.defend(
            "dau", record, *helpers.short_flags("dau"), "--breakdown", breakdown
        )
    assert (
        any("without a clean sample" in note for note in found["0.99"]["notes"])
        and found["0.99"]["split"]["flagged"] == 0
    )
    assert found["1"]["split"]["flagged"] > 0 and not any(
        "without a clean sample" in note for note in found["1"]["notes"]
    )


@pytest.mark.parametrize(("flags", "augmented"), [((), True), (("--yaml_path", "dau_port"), False)])
def test_the_port_unlearns_images_as_they_are(
    flags: tuple[str, ...],
    augmented: bool,
    small: Record,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its anti-learning, as ours, sees features of images as they are; so does its unlearning."""
    monkeypatch.setattr(
        detection, "find_pool", lambda view, *_: search.alone(torch.arange(len(view.train)) < 3)
    )
    monkeypatch.setattr(detection, "lost_label", lambda _log_p, data, _config: data.labels == 2)
    seen: list[bool] = []
    draw = unlearning.batches

    def watched(*arguments: Any, **options: Any) -> Any:
        seen.append(options["augment"] != NO_AUGMENT)
        return draw(*arguments, **options)

    monkeypatch.setattr(unlearning, "batches", watched)
    record = helpers.copy(small, tmp_path)
    assert record.augment() != NO_AUGMENT, "ordinary training of this record augments"
    helpers.defend(
        "dau", record, *helpers.short_flags("dau"), "--breakdown", "1", "--epochs", "1", *flags
    )
    assert seen and set(seen) == {augmented}


def test_a_head_that_is_not_linear_is_refused(tmp_path: Path) -> None:
    data, planted = features()
    with pytest.raises(UserError, match="ends in a linear layer, got Sequential"):
        detection.anti_learn(
            data, planted, nn.Sequential(nn.Linear(16, K)), 99.0, dau.Config(), new_run(tmp_path)
        )


# --- recovery


class Reader(nn.Module):
    """Batch normalisation of the pixels' means over rows, then the class whose row is brightest."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(K)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.mean((1, 3)))


def test_flagged_samples_are_read_without_what_they_have_in_common(tmp_path: Path) -> None:
    """Ten classes of images with one bright row; half have a trigger, a brighter row 0 on all of
    them, and the label 0."""
    draws = torch.Generator().manual_seed(0)
    truth = torch.randint(0, K, (2000,), generator=draws)
    images = torch.randint(0, 30, (2000, 1, K, K), generator=draws).to(torch.uint8)
    images[torch.arange(2000), 0, truth] += 60
    flagged = torch.arange(2000) % 2 == 0
    images[flagged, 0, 0] += 150
    train = Split(images, torch.where(flagged, 0, truth))
    model, run = Reader().eval(), new_run(tmp_path)
    with torch.no_grad():
        model.norm.running_mean, model.norm.running_var = (
            f(to_float(images[~flagged]).mean((1, 3)), 0) for f in (torch.mean, torch.var)
        )
    state = {name: value.clone() for name, value in model.state_dict().items()}

    control = predictions(model, train, run)
    assert (control[~flagged] == truth[~flagged]).all() and (control[flagged] == 0).all(), (
        "as the model is, it sees the trigger alone"
    )
    labels = dau.labels_without_trigger(model, train, flagged, False, run)
    assert (labels == truth).all()
    assert torch.equal(
        dau.labels_without_trigger(model, train, flagged, True, run)[flagged], control[flagged]
    ), "one class would go with the trigger"
    assert torch.equal(train.labels, torch.where(flagged, 0, truth)), (
        "the data that came in are left alone"
    )
    assert (
        all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        and not model.training
    )


@pytest.fixture(scope="module")
def blended(session_folder: Path) -> Record:
    """A Blended record of the digits, on which unlearning alone leaves triggered images misread:
    the picture hides half of the digit."""
    with helpers.environment(BACKDOORLAB_CACHE=session_folder / "cache"):
        flags = (*helpers.WORKING, "--alpha", "0.5")
        return helpers.attack("blended", "blended", session_folder / "blended", *flags)


@pytest.mark.parametrize("unlearned", [False, True])
def test_a_model_that_still_obeys_the_trigger_is_said(
    blended: Record, tmp_path: Path, unlearned: bool
) -> None:
    run = new_run(tmp_path)
    train = blended.train_poison.apply(blended.dataset().train)
    flagged = blended.train_poison.mask(len(train))
    given = Split(train.images, (train.labels + 1) % 10) if unlearned else train
    unlearning.note_what_stays(blended.model(), given, flagged, run)
    said = (
        f"of the {int(flagged.sum())} flagged samples still get their label: little was unlearned;"
        " raise --lr, or --epochs"
    )
    assert [said in note for note in run.notes] == ([] if unlearned else [True])


def test_recovery_gives_triggered_images_their_label_back(blended: Record, tmp_path: Path) -> None:
    before = blended.info["scores"]
    assert before["asr"] >= 0.9 and before["clean_accuracy"] >= 0.9, "the backdoor is there"
    record = helpers.copy(blended, tmp_path)
    flags = ("--score_every", "0")
    control, recovered = (
        helpers.defend(
            "dau", record, *flags, "--run_name", f"r{epochs}", "--recovery_epochs", epochs
        )
        for epochs in ("0", "4")
    )
    assert control is not None and recovered is not None and control["split"] == recovered["split"]
    assert control["after"]["robust_accuracy"] < 0.9, "there is something to recover"
    assert recovered["after"]["robust_accuracy"] >= control["after"]["robust_accuracy"] + 0.05
    assert recovered["after"]["asr"] <= max(control["after"]["asr"], 0.05)
    assert recovered["after"]["clean_accuracy"] >= before["clean_accuracy"] - 0.05
