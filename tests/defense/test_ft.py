"""Fine-tuning takes BackdoorBench's steps, and its adam is AMSGrad."""

from pathlib import Path
from typing import Any

import helpers
import pytest
import torch

from backdoorlab import engine
from backdoorlab.engine import Recipe
from backdoorlab.record import Record
from backdoorlab.run import Run
from backdoorlab.settings import methods
from backdoorlab.settings.parse import Trained, parse


@pytest.fixture(scope="module")
def attacked(session_folder: Path, small_flags: tuple[str, ...]) -> Record:
    with helpers.environment(BACKDOORLAB_CACHE=session_folder / "cache"):
        return helpers.attack("badnet", "tuned", session_folder / "tuned", *small_flags)


@pytest.mark.parametrize(("schedule_epochs", "second"), [("None", 0.005), ("100", 0.01)])
def test_every_image_is_in_a_step_and_the_cosine_ends_where_told(
    schedule_epochs: str,
    second: float,
    attacked: Record,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, rates = Run.step, []

    def watching(self: Run, optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        rates.append(optimizer.param_groups[0]["lr"])
        real(self, optimizer, *arguments)

    monkeypatch.setattr(Run, "step", watching)
    flags = ("--trusted_count", "28", "--batch_size", "10", "--epochs", "2", "--score_every", "0")
    result = helpers.defend(
        "ft",
        helpers.copy(attacked, tmp_path),
        *flags,
        "--schedule_epochs",
        schedule_epochs,
    )
    assert result is not None and result["image_passes"]["backward"] == 2 * 28
    assert rates == pytest.approx([0.01] * 3 + [second] * 3, rel=1e-3)


def test_the_defaults_are_backdoorbenchs() -> None:
    config = methods.load("defense", "ft").config_class()
    assert -(-2500 // config.batch_size) * config.epochs == 1000, "steps with 2,500 images"
    assert (config.lr, config.momentum, config.weight_decay) == (0.01, 0.9, 5e-4)


@pytest.mark.parametrize(("dataset", "amsgrad"), [("cifar10", True), ("digits", False)])
def test_adam_is_amsgrad_where_the_settings_are_backdoorbenchs(dataset: str, amsgrad: bool) -> None:
    config_class = methods.load("attack", "badnet").config_class
    argv = ["--dataset", dataset, "--client_optimizer", "adam"]
    config = parse(
        config_class, "badnet", "attack", argv, lambda c: Trained(c.dataset, c.epochs), "test"
    ).config
    recipe: Recipe = config.recipe()
    optimizer = engine.make_optimizer(torch.nn.Linear(1, 1), recipe)
    assert isinstance(optimizer, torch.optim.Adam) and optimizer.defaults["amsgrad"] == amsgrad
