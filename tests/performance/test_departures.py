"""What performance/departures.py compares with ours is what it says, and it cannot do nothing."""

import math
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from safetensors.torch import load_file

from backdoorlab.data import Augment, Split
from backdoorlab.models import build
from backdoorlab.record import Record
from backdoorlab.run import Run
from backdoorlab.settings import methods


@pytest.fixture
def departures() -> Any:
    return helpers.script("performance/departures.py")


def module(name: str) -> Any:
    return methods.load("defense", name).module


def side(departures: Any, page: str, name: str) -> Any:
    """A row's side as published, by its name."""
    (found,) = (
        row.published
        for row in departures.DEPARTURES
        if row.page == page and row.published.name == name
    )
    return found


def weights(record: Record, method: str, name: str) -> dict[str, torch.Tensor]:
    return load_file(record.folder / "defense" / method / f"{name}-seed0" / "model.safetensors")


def tiny_split(count: int) -> Split:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return Split(images, torch.arange(count) % 3)


@pytest.mark.parametrize("method", ["asd", "bu", "ibau", "sau"])
def test_what_is_replaced_changes_the_weights(
    departures: Any, small: Record, tmp_path: Path, method: str
) -> None:
    """Ours, run again, ends in the same weights: the replaced functions are put back."""
    record = helpers.copy(small, tmp_path)
    flags = helpers.short_flags(method)
    if method == "bu":
        flags = (*flags, "--batch_size", "8")
    if method == "sau":
        # One step from either start ends elsewhere, and true labels of perturbed images count
        # where no image fools a model that answers one class.
        flags = (*flags, "--pgd_steps", "1", "--lambda2", "1")
    again = departures.Side("again")
    rows = [
        row
        for row in departures.DEPARTURES
        if row.page == method and not row.published.own_attack and not row.of_attack
    ]
    assert rows
    for one in [departures.OURS, *(row.published for row in rows), again]:
        departures.defended(one, method, record, 0, *flags)
    ours = weights(record, method, "ours")
    assert all(
        torch.equal(value, ours[key]) for key, value in weights(record, method, "again").items()
    )
    for row in rows:
        theirs = weights(record, method, row.published.name)
        assert any(not torch.equal(theirs[key], ours[key]) for key in ours), row.name


def test_a_function_that_nothing_calls_is_an_error(departures: Any) -> None:
    sau = module("sau")
    before = sau.start
    with (
        pytest.raises(AssertionError, match="start was never called"),
        departures.from_the_least(sau),
    ):
        pass
    assert sau.start is before
    with pytest.raises(AttributeError), departures.replaced(sau, "nowhere", lambda ours: ours):
        pass


def test_perturbations_of_sau_are_what_the_options_say(departures: Any) -> None:
    sau = module("sau")
    x, config = torch.zeros(2, 3, 4, 4), sau.Config(result_file="x")
    with departures.from_the_least(sau):
        assert (sau.start(x, 0.2, config, None) == -0.2).all()
    assert (sau.start(x, 0.2, config, None) == 0.2).all()
    for per_pixel, radius in ((False, 0.2), (True, 0.2 * 48)):
        with departures.in_l1_ball(sau, per_pixel):
            for size in (0.001, 0.4):
                delta = sau.allowed(torch.full_like(x, size), x, 0.2, config)
                expected = min(size * 48, radius)
                assert delta[0].abs().sum().item() == pytest.approx(expected, rel=1e-5)


def test_batch_statistics_of_bu_end_with_the_first_step(
    departures: Any, small: Record, tmp_path: Path
) -> None:
    """Two epochs of several steps each."""
    record = helpers.copy(small, tmp_path)
    flags = (*helpers.short_flags("bu"), "--batch_size", "8")
    every = departures.Side("every", ("--train_bn", "True"))
    first = side(departures, "bu", "first-step")
    for one in (departures.OURS, every, first):
        departures.defended(one, "bu", record, 0, *flags)
    seen = []
    for one in (departures.OURS, every, first):
        state = weights(record, "bu", one.name)
        start = load_file(record.folder / "model.safetensors")
        (key, *_) = (key for key in state if key.endswith("num_batches_tracked"))
        seen.append(int(state[key] - start[key]))
    assert seen[0] == 0 and seen[2] == 2 and seen[1] > 2


def test_asd_passes_are_split_without_changing_what_they_say(
    departures: Any, tmp_path: Path
) -> None:
    """In evaluation mode the five passes give the logits of two; in training each counts."""
    asd, split = module("asd"), tiny_split(6)
    model = build(
        "preactresnet10", num_classes=3, in_chans=3, mean=(0.5,) * 3, std=(0.25,) * 3, width=2
    )
    run = Run(tmp_path, seed=0, device=torch.device("cpu"))
    images = torch.rand(6, 3, 16, 16)
    (norm, *_) = (part for part in model.modules() if isinstance(part, torch.nn.BatchNorm2d))
    with departures.five_passes(asd):
        forward = asd.Forward(model, run, split, 10, 4, 6)
        copied = asd.Forward(model, run, split, 10, 6)
        with asd.statistics_of(model, 3):
            model.eval()
            for count in (4, 6):
                assert torch.allclose(forward(images[:count]), model(images[:count]), atol=1e-5)
            model.train()
            for call, count, passes in ((forward, 4, 2), (forward, 6, 3), (copied, 6, 1)):
                before = int(norm.num_batches_tracked or 0)
                call(images[:count])
                assert int(norm.num_batches_tracked or 0) - before == passes


def test_batches_of_ibau_are_drawn_once_for_step_two_only(departures: Any, tmp_path: Path) -> None:
    ibau, trusted = module("ibau"), tiny_split(10)
    run = Run(tmp_path, seed=0, device=torch.device("cpu"))
    config = ibau.Config(result_file="x", batch_size=4, delta_steps=7)
    given = (trusted, Augment(crop_padding=2), config, run)

    def order(batches: Any) -> list[int]:
        return [int(place) for batch in batches for place in batch.index]

    with departures.drawn_once(ibau):
        searched, first = ibau.search_batches(*given), order(ibau.one_pass(*given))
        assert len(list(searched)) == 7
        assert order(ibau.one_pass(*given)) == first and sorted(first) == list(range(10))
        assert order(ibau.search_batches(*given))[:10] != first
    assert order(ibau.one_pass(*given)) != first, "ours draws anew"


def test_poison_by_chance_spares_the_target(
    departures: Any, tmp_path: Path, small_flags: tuple[str, ...]
) -> None:
    """Ours poisons exactly the share of all images, the target class among them."""
    rates = dict(chance=side(departures, "asd", "by-chance"), ours=departures.OF_ALL)
    records = {
        name: departures.attacked(one, "badnet", 0, tmp_path, *small_flags, "--poison_rate", "0.3")
        for name, one in rates.items()
    }
    poison = {name: record.train_poison for name, record in records.items()}
    target = records["ours"].info["target"]
    assert (poison["ours"].original_labels == target).any()
    assert not (poison["chance"].original_labels == target).any()
    others = 64  # of 96 images, of three classes
    assert len(poison["ours"]) == round(0.3 * 96)
    assert abs(len(poison["chance"]) - 0.3 * others) < 4 * math.sqrt(0.3 * 0.7 * others)
    tests = [record.test_poison.index for record in records.values()]
    assert torch.equal(tests[0], tests[1]), "ASR is of the same images"


def test_a_row_is_read_back_and_not_run_again(
    departures: Any, small: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helpers.copy(small, tmp_path, "badnet-seed0")
    chosen = [row for row in departures.DEPARTURES if row.page == "ft" and not row.of_attack]
    monkeypatch.setattr(departures, "DEPARTURES", chosen)
    (row,) = departures.rows(["ft"], ["badnet"], [0], tmp_path)
    monkeypatch.delattr(departures, "run_defense")
    assert [row] == list(departures.rows(["ft"], ["badnet"], [0], tmp_path))
    assert row[1] == "badnet" and all(cell.count(" / ") == 2 for cell in row[2:])
