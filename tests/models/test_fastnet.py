"""The network that is trained in ten epochs, and what its recipe adds to every training."""

import dataclasses
import itertools
from pathlib import Path

import helpers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from backdoorlab import engine, models
from backdoorlab.data import Augment, Split, batches, to_bytes
from backdoorlab.engine import Lookahead, LRSchedule, Recipe, make_optimizer
from backdoorlab.errors import UserError
from backdoorlab.models import Classifier
from backdoorlab.record import Record, defender_view
from backdoorlab.run import Run
from backdoorlab.settings import methods

CPU = torch.device("cpu")


def network(width: int = 8, channels: int = 3) -> Classifier:
    torch.manual_seed(0)
    mean, std = [0.4] * channels, [0.25] * channels
    return models.build(
        "fastnet", num_classes=10, in_chans=channels, mean=mean, std=std, width=width
    )


def photos(n: int = 64, channels: int = 3, side: int = 16) -> Tensor:
    """Smooth random images, whose neighbouring pixels are alike: uint8 (n, C, side, side)."""
    draws = torch.Generator().manual_seed(1)
    coarse = torch.rand(n, channels, 4, 4, generator=draws)
    return to_bytes(F.interpolate(coarse, size=side, mode="bilinear"))


def new_run(folder: Path, seed: int = 0) -> Run:
    return Run(folder, seed=seed, device=CPU, precision="fp32")


# --- the network


@pytest.mark.parametrize(("width", "million"), [(32, 33), (64, 118)])
def test_a_pass_costs_what_the_paper_says(width: int, million: int) -> None:
    with FlopCounterMode(display=False) as counter:
        network(width)(torch.zeros(1, 3, 32, 32))
    assert counter.get_total_flops() / 2e6 == pytest.approx(million, rel=0.02)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_first_layer_whitens_patches(channels: int) -> None:
    model, images = network(channels=channels), photos(channels=channels)

    def moments() -> Tensor:
        """Second moments of the first half of the filters' answers on the images."""
        x = (images.float() / 255 - model.mean) / model.std
        answers = F.conv2d(x, model.network.whiten.weight)[:, : 4 * channels]
        rows = answers.transpose(0, 1).flatten(1).double()
        return rows @ rows.T / rows.shape[1]

    before = moments()
    models.fit_input(model, images)
    found = moments()
    off = found - found.diagonal().diag()
    assert off.abs().max() < 1e-3, "no two directions go together"
    assert found[0, 0] == pytest.approx(1, abs=0.01), "the strongest has variance 1"
    assert (before - before.diagonal().diag()).abs().max() > 0.05, "a control: at random they do"

    weight = model.network.whiten.weight
    assert torch.equal(weight[: 4 * channels], -weight[4 * channels :]), "both signs"
    assert not weight.requires_grad, "it stays as it is"


def test_a_group_starts_as_the_identity_on_its_input() -> None:
    group, x = network().network.group2, torch.rand(2, 8, 6, 6)
    assert torch.allclose(group.conv1(x)[:, :8], x, atol=1e-6)
    assert not torch.allclose(group.conv1(x)[:, 8:16], x, atol=0.1), "a control"


@pytest.mark.parametrize("side", [8, 9, 28, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_it_takes_small_and_grey_images(side: int, channels: int) -> None:
    model = network(channels=channels)
    x = torch.rand(2, channels, side, side)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert pooled.shape == (2, 32)
    assert torch.allclose(model(x), model.get_classifier()(pooled))
    assert len(model.stages()) == 3


@pytest.fixture(scope="module")
def fast_flags(small_flags: tuple[str, ...]) -> list[str]:
    """Flags of an attack on `small_data` with this network and all that its recipe has."""
    where = small_flags.index("--model")
    recipe = "--schedule triangular --nesterov True --lookahead True --label_smoothing 0.2"
    augment = "--bias_lr 8 --crop_padding 2 --crop_border reflect --flip True --alternate_flip True"
    network = ["--model", "fastnet", *recipe.split(), *augment.split()]
    return [*small_flags[:where], *network, *small_flags[where + 2 :]]


@pytest.fixture(scope="module")
def fast(
    fast_flags: list[str], session_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Record:
    with helpers.environment(BACKDOORLAB_CACHE=session_folder / "cache"):
        return helpers.attack("badnet", "fast", tmp_path_factory.mktemp("fast"), *fast_flags)


@pytest.mark.parametrize("method", methods.available("defense"))
def test_every_defense_runs_on_it(method: str, fast: Record, tmp_path: Path) -> None:
    record = helpers.copy(fast, tmp_path)
    pool = ("--pool", "model_loss") if method == "dau" else ()
    result = helpers.defend(method, record, *helpers.short_flags(method), *pool)
    assert result is not None
    if methods.load("defense", method).role != "detector":
        assert 0 <= result["after"]["clean_accuracy"] <= 1


@pytest.mark.parametrize("method", ["wanet", "bpp", "inputaware", "blind", "lc"])
def test_attacks_with_a_training_of_their_own_run_on_it(
    method: str, fast_flags: list[str], tmp_path: Path
) -> None:
    drop = fast_flags.index("--patch_size")
    flags = [*fast_flags[:drop], *fast_flags[drop + 2 :]]
    names = {
        field.name for field in dataclasses.fields(methods.load("attack", method).config_class)
    }
    short = {"surrogate_epochs": "1", "mask_epochs": "1", "finetune_epochs": "1", "steps": "1"}
    given = [x for name, value in short.items() if name in names for x in (f"--{name}", value)]
    record = helpers.attack(method, method, tmp_path, *flags, *given)
    assert record.info["architecture"]["name"] == "fastnet"


def test_every_new_model_is_fitted_to_its_training_images(fast: Record) -> None:
    """By an attack, and by a defense that trains anew; a record's weights come as they were."""
    record = fast
    stored = record.model().network.whiten.weight
    fitted = record.new_model()
    assert not torch.equal(stored, fitted.network.whiten.weight), "a control: random filters"
    models.fit_input(fitted, record.dataset().train.images)
    assert torch.allclose(stored, fitted.network.whiten.weight)

    poisoned = record.train_poison.apply(record.dataset().train)
    models.fit_input(fitted, poisoned.images)
    view = defender_view(record, record.dataset(), ("train",), None, CPU)
    assert torch.equal(view.new_model().network.whiten.weight, fitted.network.whiten.weight)


# --- the recipe


def test_the_triangle_rises_to_its_peak_and_falls() -> None:
    recipe = Recipe(epochs=10, batch_size=10, lr=2.0, schedule="triangular")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=recipe.lr)
    schedule = LRSchedule(optimizer, recipe, 100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.after_step()
    assert rates[0] == pytest.approx(0.4) and max(rates) == rates[23] == pytest.approx(2.0)
    assert rates[99] == pytest.approx(2 * 0.07, rel=0.2)
    assert rates == [*sorted(rates[:24]), *sorted(rates[24:], reverse=True)]


def test_biases_of_batch_normalisation_have_a_rate_of_their_own() -> None:
    recipe = Recipe(epochs=1, batch_size=8, lr=0.1, weight_decay=0.01, bias_lr=64)
    model = network()
    rest, biases = make_optimizer(model, recipe).param_groups
    expected = {id(m.bias) for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert {id(p) for p in biases["params"]} == expected and len(expected) == 6
    assert len(rest["params"]) + 6 == len(list(model.parameters()))
    assert biases["lr"] == pytest.approx(6.4)
    pulls = [group["lr"] * group["weight_decay"] for group in (rest, biases)]
    assert pulls[0] == pytest.approx(pulls[1]), "the decay of both is the same"

    # With a schedule that sets its own peak, too.
    schedule = LRSchedule(
        optimizer := make_optimizer(model, recipe),
        dataclasses.replace(recipe, schedule="onecycle", epochs=10),
        80,
    )
    optimizer.step()
    schedule.after_step()
    slow, fast = (group["lr"] for group in optimizer.param_groups)
    assert fast == pytest.approx(64 * slow)

    with pytest.raises(UserError, match=r"--bias_lr 64 .* this network has none: leave it out"):
        make_optimizer(nn.Linear(2, 2), recipe)


def test_lookahead_is_the_published_rule() -> None:
    """Every five steps the slow weights move, by .95^5 (t/T)^3 less than all the way, and are
    taken; the last step takes them as they are."""
    recipe = Recipe(epochs=2, batch_size=4, lr=1.0, lookahead=True)
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    lookahead = Lookahead(model, recipe, 26)  # 12 steps
    fast, slow = 0.0, 0.0
    for step in range(1, 13):
        fast += step
        model.weight.data += step
        lookahead.after_step()
        if step in (5, 10):
            slow += (1 - 0.95**5 * (step / 12) ** 3) * (fast - slow)
            fast = slow
        if step == 12:
            fast = slow
        assert model.weight.item() == pytest.approx(fast, rel=1e-5)

    plain = nn.Linear(1, 1, bias=False)
    before = plain.weight.item()
    Lookahead(plain, dataclasses.replace(recipe, lookahead=False), 26).after_step()
    assert plain.weight.item() == before, "a control: without it nothing moves"


def test_a_killed_training_goes_on_with_the_same_slow_weights(tmp_path: Path) -> None:
    images = photos(40)
    split = Split(images, torch.arange(40) % 10)
    recipe = Recipe(
        epochs=4,
        batch_size=8,
        lr=0.1,
        lookahead=True,
        schedule="triangular",
        augment=Augment(2, True, "reflect"),
        alternate_flip=True,
    )

    def trained(folder: Path, stop_after: int | None) -> dict[str, Tensor]:
        folder.mkdir(exist_ok=True)
        model, run = network(), new_run(folder)
        if stop_after is not None:
            epochs = run.epochs

            def some(*arguments: object, **state: object) -> object:
                for epoch in epochs(*arguments, **state):  # type: ignore[arg-type]
                    if epoch == stop_after:
                        raise KeyboardInterrupt
                    yield epoch

            run.epochs = some  # type: ignore[method-assign, assignment]
        engine.train(model, split, recipe, run)
        return model.state_dict()

    whole = trained(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed", 2)
    continued = trained(tmp_path / "killed", None)
    assert all(torch.equal(whole[name], continued[name]) for name in whole)


def test_label_smoothing_and_nesterov_reach_the_training(tmp_path: Path) -> None:
    split = Split(photos(40), torch.arange(40) % 10)
    plain = Recipe(epochs=1, batch_size=8, lr=0.1)
    ends = []
    for number, recipe in enumerate(
        (
            plain,
            plain,
            dataclasses.replace(plain, label_smoothing=0.2),
            dataclasses.replace(plain, nesterov=True),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        model = network()
        engine.train(model, split, recipe, new_run(folder))
        ends.append(model.network.linear.weight)
    assert torch.equal(ends[0], ends[1]), "a control: the same recipe ends the same"
    assert not torch.equal(ends[0], ends[2]) and not torch.equal(ends[0], ends[3])


# --- the images


def test_a_reflected_border_is_torchs() -> None:
    images, padding = photos(6, side=9), 3
    split = Split(images, torch.zeros(6, dtype=torch.int64))
    frame = F.pad(images.float(), [padding] * 4, mode="reflect").to(torch.uint8)
    draws = torch.Generator().manual_seed(2)
    (batch,) = batches(
        split, 6, device=CPU, generator=draws, augment=Augment(padding, border="reflect")
    )
    windows = frame.unfold(2, 9, 1).unfold(3, 9, 1)
    for image, place in zip(to_bytes(batch.images), batch.index.tolist(), strict=True):
        every = windows[place].flatten(1, 2).transpose(0, 1)
        assert any(torch.equal(image, window) for window in every)
    with pytest.raises(UserError, match="reflected border of 9 pixels needs larger images"):
        next(batches(split, 6, device=CPU, generator=draws, augment=Augment(9, border="reflect")))


@pytest.mark.parametrize("alternate", [True, False])
def test_an_image_is_mirrored_in_every_other_epoch(alternate: bool, tmp_path: Path) -> None:
    images = torch.zeros(200, 1, 8, 8, dtype=torch.uint8)
    images[:, :, :, 0] = 255
    split, seen = Split(images, torch.arange(200) % 2), list[Tensor]()

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 2)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x[:, 0, 0, 7] == 1)
            return self.linear(x.flatten(1))

    # In order, so that the epochs can be compared image by image.
    recipe = Recipe(
        epochs=4, batch_size=200, lr=0.0, augment=Augment(flip=True), alternate_flip=alternate
    )
    run = new_run(tmp_path)
    orders = []
    randperm = torch.randperm

    def kept(*arguments: int, generator: torch.Generator) -> Tensor:
        orders.append(randperm(*arguments, generator=generator))
        return orders[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randperm", kept)
        engine.train(Watching(), split, recipe, run)
    epochs = [mirrored[order.argsort()] for mirrored, order in zip(seen, orders, strict=True)]
    changed = [a ^ b for a, b in itertools.pairwise(epochs)]
    assert all(bool(change.all()) for change in changed) == alternate
    assert 60 < int(epochs[0].sum()) < 140, "from a random start"
