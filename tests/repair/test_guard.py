"""The guard of repairs: harm that trusted images show is undone, and nothing else is touched."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.data import Split, batches
from backdoorlab.execution.scores import ScoreLog
from backdoorlab.record import Record
from backdoorlab.repair.guard import ENOUGH, GuardConfig, guarded_epochs, harmed, upper_limit
from backdoorlab.run import Run
from backdoorlab.settings import methods
from backdoorlab.storage import reading

CPU = torch.device("cpu")
K = 4
OFF = GuardConfig(guard_drop=None)
GUARDED = ("bti_dbf", "bu", "fp", "fst", "ft", "ft_sam", "ibau", "nad", "nc", "npd", "sau")
LITE = ("bu", "ibau", "sau")


def images(count: int = 40) -> Split:
    """Grey 8x8 images of K classes, each with a bright band of its own."""
    labels = torch.arange(count) % K
    pixels = torch.randint(
        0, 90, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    for i, label in enumerate(labels.tolist()):
        pixels[i, :, 2 * label : 2 * label + 2] += 120
    return Split(pixels, labels)


class Bands(nn.Module):
    """A network that is right on all of `images`, with the parts that a guard could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.last = nn.BatchNorm2d(1), nn.Dropout(0.1), nn.Linear(64, K)
        with torch.no_grad():
            self.last.bias.zero_()
            self.last.weight.zero_()
            for label in range(K):
                self.last.weight[label, 16 * label : 16 * label + 16] = 0.1

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.drop(self.norm(x)).flatten(1))
        return found


def accuracy(model: nn.Module, split: Split) -> float:
    with torch.no_grad():
        answers = model.eval()(split.images.float() / 255).argmax(1)
    return (answers == split.labels).float().mean().item()


class Repair:
    """A repair of a few epochs, whose steps may do harm: the loss is ascended."""

    def __init__(
        self, folder: Path, *, lr: float, sign: float = -1.0, momentum: float = 0.9
    ) -> None:
        torch.manual_seed(0)
        folder.mkdir(exist_ok=True)
        self.log, self.split = ScoreLog(), images()
        self.run = Run(folder, seed=0, device=CPU, callbacks=self.log.callbacks())
        self.model, self.sign, self.steps = Bands(), sign, 0
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=momentum)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=4)
        self.rates: list[float] = []

    def __call__(
        self, config: GuardConfig, before_step: Callable[[int], None] = lambda _: None
    ) -> "Repair":
        for _ in guarded_epochs(
            self.run,
            "repair",
            4,
            self.split,
            config,
            self.model,
            self.optimizer,
            self.schedule,
        ):
            self.model.train()
            self.rates.append(self.optimizer.param_groups[0]["lr"])
            for batch in batches(self.split, 10, device=CPU, generator=self.run.generator):
                before_step(self.steps)
                self.steps += 1
                loss = self.sign * F.cross_entropy(self.model(batch.images), batch.labels)
                self.run.step(self.optimizer, loss)
            self.schedule.step()
        return self

    def state(self) -> dict[str, Tensor]:
        return {**self.model.state_dict(), "generator": self.run.generator.get_state()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


# --- how much harm is too much


def test_the_interval_is_wilsons() -> None:
    assert upper_limit(0, 5) == pytest.approx(1.96**2 / (5 + 1.96**2))
    assert upper_limit(5, 5) == pytest.approx(1.0)
    assert upper_limit(50, 100) == pytest.approx(0.5962, abs=1e-3)


@pytest.mark.parametrize(
    ("right", "before", "count", "harm"),
    [
        (80, 100, 100, False),  # a fifth less of 100 could be chance
        (800, 1000, 1000, True),
        (4, 5, 5, False),
        (3, 5, 5, False),
        (0, 5, 5, True),
        (90, 80, 100, False),
        (200, 430, 1000, True),  # a share of what there was: 43 % before
        (25, 100, 1000, True),
        (0, 0, 100, False),  # nothing to lose
    ],
)
def test_few_images_must_say_it_louder(right: int, before: int, count: int, harm: bool) -> None:
    assert harmed(right, before, count, 0.15) == harm


# --- what it undoes


def test_a_rate_that_destroys_the_network_is_lowered_until_it_does_not(tmp_path: Path) -> None:
    alone = Repair(tmp_path / "alone", lr=0.5)(OFF)
    assert accuracy(alone.model, alone.split) < 0.3, "a control: it does destroy it"
    guarded = Repair(tmp_path / "guarded", lr=0.5)(GuardConfig(guard_retreats=12))
    assert accuracy(guarded.model, guarded.split) >= 0.75
    notes = guarded.run.notes
    assert notes and "the attacked model 100.0 %" in notes[0] and "retreat 1 of 12" in notes[0]
    assert guarded.rates[0] == 0.5 and guarded.rates[1] == 0.25
    assert [row["epoch"] for row in guarded.log.history] == [0, 1, 2, 3], "none is lost"
    seen = guarded.log.history[-1]["trusted_accuracy"]
    assert seen == pytest.approx(accuracy(guarded.model, guarded.split))


def test_no_rate_is_low_enough_and_the_last_good_weights_are_left(tmp_path: Path) -> None:
    broken = Repair(tmp_path, lr=4.0)
    before = {name: value.clone() for name, value in broken.model.state_dict().items()}
    broken(GuardConfig(guard_retreats=2))
    assert equal(before, broken.model.state_dict()), "weights and batch statistics"
    assert broken.rates == [4.0, 2.0, 1.0] and len(broken.log.history) == 1
    assert "ends with them, after 2 retreats" in broken.run.notes[-1]
    assert broken.log.history[0]["trusted_accuracy"] == 1.0
    assert "loss" not in broken.log.history[0], "what was watched in an undone pass is dropped"


def test_a_lower_rate_stays_lower_along_the_schedule(tmp_path: Path) -> None:
    plain = Repair(tmp_path / "plain", lr=0.5)(OFF)
    slowed = Repair(tmp_path / "slowed", lr=0.5)(
        GuardConfig(guard_retreats=1, guard_factor=1e-6, guard_drop=0.3)
    )
    assert len(slowed.run.notes) == 1 and slowed.rates[0] == 0.5
    assert slowed.rates[1:] == pytest.approx([1e-6 * rate for rate in plain.rates])


@pytest.mark.parametrize("epochs", [2, 1])
def test_accuracy_that_comes_back_is_waited_for_until_the_last_epoch(
    epochs: int, tmp_path: Path
) -> None:
    repair = Repair(tmp_path, lr=0.1)
    seen: list[int] = []
    weight = repair.model.last.weight
    before = weight.detach().clone()
    arguments = (repair.split, GuardConfig(guard_retreats=1), repair.model, repair.optimizer)

    for epoch in guarded_epochs(repair.run, "repair", epochs, *arguments):
        seen.append(epoch)
        with torch.no_grad():
            weight.copy_(before if epoch else before * torch.tensor([[1.0], [1.0], [-1], [-1]]))
    assert torch.equal(weight, before)
    assert repair.log.history[0]["trusted_accuracy"] == (0.5 if epochs == 2 else 1.0)
    assert seen == ([0, 1] if epochs == 2 else [0, 0]) and len(repair.run.notes) == 4 - 2 * epochs


# --- what it leaves alone


def test_a_guard_that_never_steps_in_changes_no_bit(tmp_path: Path) -> None:
    """Batch statistics, dropout, shuffles and averages are those of a run without it."""
    off, on = (
        Repair(tmp_path / name, lr=0.05, sign=1.0)(config)
        for name, config in (("off", OFF), ("on", GuardConfig()))
    )
    assert not on.run.notes and "trusted_accuracy" in on.log.history[0]
    assert equal(off.state(), on.state())
    drawn = [torch.rand(3)]
    Repair(tmp_path / "again", lr=0.05, sign=1.0)(OFF)
    assert torch.equal(drawn[0], torch.rand(3)), "nor one of torch's own random numbers"
    other = Repair(tmp_path / "other", lr=0.06, sign=1.0)(OFF)
    assert not equal(off.state(), other.state()), "a control"


@pytest.fixture(scope="module")
def attacked(session_folder: Path, small_flags: tuple[str, ...]) -> Record:
    """A record of a few kilobytes; its model need not work here."""
    with helpers.environment(BACKDOORLAB_CACHE=session_folder / "cache"):
        return helpers.attack("badnet", "attacked", session_folder / "guarded", *small_flags)


def run_method(method: str, record: Record, name: str, *flags: str) -> tuple[dict[str, Any], Path]:
    """Run a defense for two epochs; return its result and its folder."""
    flags = (*helpers.short_flags(method), "--run_name", name, *flags)
    result = helpers.defend(method, record, *flags)
    assert result is not None
    return result, record.folder / "defense" / method / name


@pytest.mark.parametrize("method", GUARDED)
def test_methods_end_in_the_same_weights_with_and_without_it(
    method: str, attacked: Record, tmp_path: Path
) -> None:
    record = helpers.copy(attacked, tmp_path)
    (on, guarded), (off, free) = (
        run_method(method, record, name, "--guard_drop", drop)
        for name, drop in (("on", "0.99"), ("off", "None"))
    )
    weights = [reading.sha256(folder / "model.safetensors") for folder in (guarded, free)]
    assert weights[0] == weights[1] and on["after"] == off["after"]
    looked = ["trusted_accuracy" in (run / "history.csv").read_text() for run in (guarded, free)]
    assert looked == [True, False], "a control: the guard was there"
    assert on["image_passes"]["forward"] > off["image_passes"]["forward"]


# FP goes back to the model that it has pruned.
@pytest.mark.parametrize("method", sorted({*GUARDED} - {"fp"}))
def test_methods_end_in_the_attacked_model_where_all_they_do_is_harm(
    method: str, attacked: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = helpers.copy(attacked, tmp_path)
    monkeypatch.setattr("backdoorlab.repair.guard.harmed", lambda *_: True)
    original = record.model().state_dict()
    for name, drop in (("on", "0.15"), ("off", "None")):
        flags = ("--guard_drop", drop, "--guard_retreats", "1")
        result, folder = run_method(method, record, name, *flags)
        left = reading.read_tensors(folder / "model.safetensors")[0]
        assert equal(original, left) == (name == "on"), "a control: unguarded, weights move"
        back = [note for note in result["notes"] if "weights of the attacked model" in note]
        if method == "nad" and name == "on":  # its teacher goes back, too
            assert len(back) >= 2
        else:
            assert len(back) == (2 if name == "on" else 0)


# --- a killed run


class Stop(BaseException):
    """Not an Exception, as a signal is not."""


@pytest.mark.parametrize("killed", [3, 14, 30])
def test_a_killed_run_goes_on_to_the_same_weights(killed: int, tmp_path: Path) -> None:
    config = GuardConfig(guard_retreats=12)
    whole = Repair(tmp_path / "whole", lr=0.5)(config)
    assert len(whole.run.notes) > 1 and whole.steps > killed

    def kill(step: int) -> None:
        if step == killed:
            raise Stop

    with pytest.raises(Stop):
        Repair(tmp_path / "killed", lr=0.5)(config, kill)
    again = Repair(tmp_path / "killed", lr=0.5)(config)
    assert equal(whole.state(), again.state()) and again.run.notes == whole.run.notes

    def told(repair: Repair) -> list[dict[str, Any]]:
        return [
            {name: value for name, value in row.items() if name != "seconds"}
            for row in repair.log.history
        ]

    assert told(again) == told(whole)


# --- where it is on


def test_of_many_trusted_images_a_thousand_are_enough(tmp_path: Path) -> None:
    seen: list[int] = []

    class Counting(Bands):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return super().forward(x)

    model, run = Counting(), Run(tmp_path, seed=0, device=CPU)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in guarded_epochs(run, "s", 0, images(2 * ENOUGH + 4), GuardConfig(), model, optimizer):
        pass
    assert sum(seen) == 668


PUBLISHED = {
    "ft": ["ft_backdoorbench"],
    "ibau": ["ibau_backdoorbench", "ibau_notebook", "ibau_official"],
    "sau": ["sau_published"],
}


@pytest.mark.parametrize("method", GUARDED)
def test_it_is_on_by_default_and_off_in_published_presets(method: str) -> None:
    from backdoorlab.settings.parse import Trained, parse

    def drop(*flags: str) -> Any:
        config_class = methods.load("defense", method).config_class
        trained = lambda _config: Trained("digits", 20)  # noqa: E731
        return parse(config_class, method, "defense", flags, trained, "test").config.guard_drop

    assert drop() is not None
    for preset in PUBLISHED.get(method, []):
        assert drop("--yaml_path", preset) is None, preset
    for preset in (f"{method}_lite",) if method in LITE else ():
        assert drop("--yaml_path", preset) is not None, preset
