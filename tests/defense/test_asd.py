"""ASD's split and MixMatch against their definitions."""

import copy
from pathlib import Path
from typing import Any

import helpers
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.data import NO_AUGMENT, Batch, Split
from backdoorlab.errors import UserError
from backdoorlab.models import build
from backdoorlab.record import DefenderView, Record, draw_seeds
from backdoorlab.run import Run
from backdoorlab.settings import methods

asd: Any = methods.load("defense", "asd").module
CPU = torch.device("cpu")
N, K = 600, 10


def new_run() -> Run:
    return Run(Path(), seed=0, device=CPU, precision="fp32")


def setting(**changes: Any) -> tuple[Split, DefenderView, Any, Any]:
    """Random images and labels, a view with one seed of each class, a config and a model."""
    draws = torch.Generator().manual_seed(0)
    train = Split(
        torch.randint(0, 256, (N, 1, 16, 16), generator=draws, dtype=torch.uint8),
        torch.arange(N) % K,
    )
    view = DefenderView(
        "preactresnet10",
        K,
        (1, 16, 16),
        tuple("0123456789"),
        NO_AUGMENT,
        {"train": train, "seeds": torch.arange(K)},
    )
    torch.manual_seed(0)
    model = build("preactresnet10", num_classes=K, in_chans=1, mean=(0.5,), std=(0.25,), width=4)
    return train, view, asd.Config(**changes), model


def test_the_clean_pool_grows_as_published() -> None:
    """Ten of each label every five epochs beside the seeds for 60 epochs, then half of all for
    60."""
    losses, labels, seeds = torch.rand(50_000), torch.arange(50_000) % K, torch.arange(100)
    config = asd.Config()
    sizes = [
        int(
            asd.class_aware(
                losses, labels, seeds, config.grow * (epoch // config.grow_every), K
            ).sum()
        )
        for epoch in (0, 4, 5, 9, 10, 55, 59)
    ]
    assert sizes == [100, 100, 200, 200, 300, 1200, 1200]
    assert int(asd.lowest(losses, labels, config).sum()) == 25_000
    assert (config.stage1_epochs, config.stage2_epochs, config.stage3_epochs) == (60, 30, 30)


def test_each_stage_takes_what_it_says() -> None:
    train, view, config, model = setting(
        stage1_epochs=2, stage2_epochs=1, stage3_epochs=1, grow=3, grow_every=1
    )
    losses = asd.split_losses(model, train, new_run())
    first, grown, half, meta = (
        asd.clean_pool(epoch, model, train, view.seeds, view, config, new_run())[0]
        for epoch in range(4)
    )
    assert first.nonzero().squeeze(1).tolist() == list(range(K)), "seeds alone"
    assert (
        grown[view.seeds].all()
        and torch.bincount(train.labels[grown], minlength=K).tolist() == [4] * K
    )
    for label in range(K):
        members = (train.labels == label) & ~first
        assert losses[members & grown].max() <= losses[members & ~grown].min(), (
            "the lowest of each label"
        )
    assert int(half.sum()) == int(meta.sum()) == N // 2
    assert losses[half].max() <= losses[~half].min() and not torch.equal(half, meta)


def test_split_losses_are_of_the_images_as_they_are() -> None:
    train, _, _, model = setting()
    model.train()
    assert torch.equal(
        asd.split_losses(model, train, new_run()), asd.split_losses(model, train, new_run())
    )
    logits = model.eval()(train.images[:5].float() / 255)
    assert torch.allclose(
        asd.split_losses(model, train, new_run())[:5],
        asd.symmetric_cross_entropy(logits, train.labels[:5]),
        atol=1e-5,
    )


def test_the_reverse_cross_entropy_of_a_wrong_answer_is_9_21() -> None:
    sure = 100 * F.one_hot(torch.tensor([3, 3]), K).double()
    wrong, right = asd.symmetric_cross_entropy(sure, torch.tensor([4, 3])).tolist()
    assert wrong == pytest.approx(0.1 * 100 + 9.2103, abs=1e-3) and right == pytest.approx(0)
    logits, labels = torch.randn(8, K, dtype=torch.float64), torch.arange(8)
    p, onehot = logits.softmax(1), F.one_hot(labels, K).double()
    plain = 0.1 * F.cross_entropy(logits, labels, reduction="none") - (
        p * onehot.clamp_min(1e-4).log()
    ).sum(1)
    assert torch.allclose(asd.symmetric_cross_entropy(logits, labels), plain)


def test_the_copy_learns_late_layers_only_and_the_model_nothing() -> None:
    train, view, config, model = setting()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learned = asd.learned_copy(model, train, view, config, new_run()).state_dict()
    changed = {name for name, value in learned.items() if not torch.equal(value, before[name])}
    late = ("network.layer3", "network.layer4", "network.linear")
    assert changed and all(name.startswith(late) for name in changed), "early statistics stay, too"
    assert {name for name in learned if name.startswith(late) and "shortcut" not in name} <= changed
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "least"),
    [("vgg19_bn", 0.9), ("densenet121", 0.8), ("resnet18", 0.9), ("convnext_atto", 0.9)],
)
def test_late_layers_are_most_of_a_network_whatever_its_stages_are(name: str, least: float) -> None:
    """A VGG's stages are its poolings, which hold no weights."""
    with torch.device("meta"):
        model = build(
            name,
            num_classes=K,
            in_chans=3,
            mean=(0.5,) * 3,
            std=(0.25,) * 3,
            width=None,
            image_size=32,
        )
    late, everything = (
        {id(p): p.numel() for p in part.parameters()} for part in (asd.late_layers(model), model)
    )
    assert set(late) < set(everything) and sum(late.values()) >= least * sum(everything.values())


class Linear(nn.Module):
    """A network without statistics, whose loss can be computed by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(256, K)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.layer(x.flatten(1))


def parts(model: nn.Module) -> tuple[Batch, Batch, Batch]:
    draws = torch.Generator().manual_seed(1)
    return tuple(
        Batch(torch.rand(6, 1, 16, 16, generator=draws), torch.arange(6), torch.arange(6))
        for _ in range(3)
    )  # type: ignore[return-value]


def test_mixmatch_without_mixing_is_its_two_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = Linear(), asd.Config()
    x, u1, u2 = parts(model)
    monkeypatch.setattr(asd, "beta", lambda alpha, generator: 1.0)
    loss = asd.mixmatch(model, model, x, u1, u2, 3.0, K, config, new_run())
    with torch.no_grad():
        p = [model(u.images).softmax(1) for u in (u1, u2)]
        mean = (p[0] + p[1]) / 2
        guess = mean.square() / mean.square().sum(1, keepdim=True)
        squared = torch.cat([q - guess for q in p]).square().mean()
    assert loss.item() == pytest.approx(
        (F.cross_entropy(model(x.images), x.labels) + 3 * squared).item(), rel=1e-5
    )


def test_mixmatch_mixes_all_images_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Linear()
    x, u1, u2 = parts(model)
    monkeypatch.setattr(asd, "beta", lambda alpha, generator: 0.3)
    asd.mixmatch(model, model, x, u1, u2, 1.0, K, asd.Config(), new_run())
    images = torch.cat([x.images, u1.images, u2.images])
    other = torch.randperm(18, generator=new_run().generator)
    assert [len(seen) for seen in model.seen] == [12, 18], "one guess, one mixed batch"
    assert torch.allclose(model.seen[1], 0.7 * images + 0.3 * images[other], atol=1e-6), (
        "l is at least a half"
    )


def test_a_step_moves_batch_statistics_as_the_published_five_passes_do() -> None:
    """Two passes of the guess and three of the mixed batch, all of the same images here."""
    _, _, _, model = setting()
    images = torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    twins = [copy.deepcopy(model).train() for _ in range(3)]
    with torch.no_grad():
        for passes in (asd.GUESS_PASSES, asd.MIXED_PASSES):
            with asd.statistics_of(twins[0], passes):
                twins[0](images)
            twins[2](images)
        for _ in range(5):
            twins[1](images)

    ours, published, plain = (
        torch.cat([b.flatten() for name, b in twin.named_buffers() if "running" in name])
        for twin in twins
    )
    assert torch.allclose(ours, published, atol=1e-5)
    assert not torch.allclose(plain, published, atol=1e-2), "a control: two ordinary passes"


def test_a_balanced_split_takes_the_share_of_each_label() -> None:
    labels = torch.tensor([0] * 10 + [1] * 20)
    values = torch.arange(30.0)
    even = asd.lowest(values, labels, asd.Config(balanced=True))
    assert torch.bincount(labels[even]).tolist() == [5, 10]
    assert even.nonzero().squeeze(1).tolist() == [*range(5), *range(10, 20)]
    whole = asd.lowest(values, labels, asd.Config())
    assert torch.bincount(labels[whole]).tolist() == [10, 5], "a control: by value alone"


def test_reestimated_statistics_are_those_of_the_images_that_are_split() -> None:
    train, view, config, model = setting(reestimate=True, stage1_epochs=0)
    with torch.no_grad():
        model(torch.zeros(6, 1, 16, 16))  # running statistics of other images
    as_is = asd.split_losses(model, train, new_run())
    kept = copy.deepcopy(model.state_dict())
    _, losses = asd.clean_pool(0, model, train, view.seeds, view, config, new_run())
    assert not torch.allclose(losses, as_is, atol=1e-3)
    assert all(torch.equal(now, kept[name]) for name, now in model.state_dict().items()), (
        "the model keeps its own"
    )


def test_the_unlabelled_weight_ends_near_15(
    monkeypatch: pytest.MonkeyPatch, tiny: Record, tmp_path: Path
) -> None:
    weights: list[float] = []
    real = asd.mixmatch

    def spy(*values: Any) -> Tensor:
        weights.append(values[5])
        return real(*values)

    monkeypatch.setattr(asd, "mixmatch", spy)
    record = helpers.copy(tiny, tmp_path)
    flags = (
        "--stage1_epochs",
        "2",
        "--stage2_epochs",
        "1",
        "--stage3_epochs",
        "1",
        "--iterations",
        "5",
        "--batch_size",
        "8",
        "--grow_every",
        "5",
        "--score_every",
        "0",
    )
    helpers.defend("asd", record, *flags)
    assert (
        len(weights) == 20
        and weights == sorted(weights)
        and weights[0] == 0
        and weights[-1] == pytest.approx(15 * 19 / 20)
    )
    history = pd.read_csv(record.folder / "defense" / "asd" / "seed0" / "history.csv")
    assert (
        list(history["split_flagged"][:2]) == [1442 - 100] * 2
        and history["split_flagged"][3] == 721
    )
    assert (history["split_missed"] <= 144).all() and history["split_missed"][0] == 0, (
        "no poison among the seeds"
    )


def test_beta_draws_have_their_moments() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([asd.beta(0.75, generator) for _ in range(4000)])
    assert draws.mean().item() == pytest.approx(
        0.5, abs=0.02
    ) and draws.var().item() == pytest.approx(1 / (4 * (2 * 0.75 + 1)), abs=0.005)
    assert draws.min() >= 0 and draws.max() <= 1


def test_the_sampler_repeats_nothing_before_all_were_seen() -> None:
    pool = torch.tensor([3, 5, 8, 13])
    order = asd.endless(pool, 10, torch.Generator().manual_seed(0))
    assert (
        len(order) == 10
        and sorted(order[:4].tolist()) == sorted(order[4:8].tolist()) == pool.tolist()
    )
    assert order[:4].tolist() != order[4:8].tolist()


def test_sharpening_leaves_a_distribution() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2]])
    assert torch.allclose(asd.sharpen(p, 0.5), torch.tensor([[0.25, 0.09, 0.04]]) / 0.38)
    assert torch.allclose(asd.sharpen(p, 1.0), p)


def test_seeds_are_clean_and_too_few_of_them_are_one_line(tiny: Record) -> None:
    labels = tiny.dataset().train.labels
    seeds = draw_seeds(tiny.train_poison, labels, K, 10, torch.Generator().manual_seed(0))
    assert (
        torch.bincount(labels[seeds]).tolist() == [10] * K
        and not torch.isin(seeds, tiny.train_poison.index).any()
    )
    with pytest.raises(
        UserError,
        match=(
            r"expected 500 clean seeds of each class, but class 0 has \d+ clean samples: lower"
            r" --seeds_per_class"
        ),
    ):
        draw_seeds(tiny.train_poison, labels, K, 500, torch.Generator().manual_seed(0))


def test_an_empty_pool_is_one_line(tiny: Record, tmp_path: Path) -> None:
    record = helpers.copy(tiny, tmp_path)
    with pytest.raises(
        UserError, match=r"the clean pool \(D_C\) of epoch 0 is empty: give more --seeds_per_class"
    ):
        helpers.defend(
            "asd", record, "--seeds_per_class", "0", "--iterations", "1", "--score_every", "0"
        )
