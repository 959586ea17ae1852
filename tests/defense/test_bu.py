"""BU's parts against what they stand for: MINE on Gaussians, stacked layers against torch's,
stamps, places, the ascent."""

import math
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.data import Split
from backdoorlab.errors import UserError
from backdoorlab.execution.scores import ScoreLog
from backdoorlab.record import Record
from backdoorlab.repair import mesa, stacked
from backdoorlab.run import Run
from backdoorlab.settings import methods

bu: Any = methods.load("defense", "bu").module
K = 4


def new_run() -> Run:
    return Run(Path(), seed=0, device=torch.device("cpu"), precision="fp32")


@pytest.mark.parametrize(("correlation", "wanted"), [(0.8, 0.511), (0.5, 0.144), (0.0, 0.0)])
def test_mine_finds_the_information_of_correlated_gaussians(
    correlation: float, wanted: float
) -> None:
    """-log(1 - r^2) / 2 nats; the three estimates side by side are of the same pair."""
    torch.manual_seed(0)
    draws = torch.Generator().manual_seed(0)
    mine = stacked.Mine(3, 1, 1, 32)
    optimizer = torch.optim.Adam(mine.parameters(), lr=5e-3)

    def pairs(n: int) -> tuple[Tensor, Tensor]:
        a, noise = torch.randn(2, 3, n, 1, generator=draws)
        return a, correlation * a + math.sqrt(1 - correlation**2) * noise

    for _ in range(400):
        a, b = pairs(256)
        loss = mine.loss(a, pairs(256)[0], b)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        a, b = pairs(20_000)
        found = mine.information(a, pairs(20_000)[0], b)
    assert wanted == pytest.approx(-math.log(1 - correlation**2) / 2, abs=1e-3)
    assert torch.allclose(found, torch.full((3,), wanted), atol=0.06)


def test_stacked_layers_are_layers() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 20, 5)
    layer, norm = stacked.Stacked(3, 5, 7), stacked.StackedNorm(3, 7)
    single = [nn.BatchNorm1d(7) for _ in range(3)]
    for _ in range(3):
        x = torch.randn(3, 20, 5)
        h = layer(x)
        for i in range(3):
            assert torch.allclose(h[i], x[i] @ layer.weight[i] + layer.bias[i, 0], atol=1e-6)
        assert torch.allclose(norm(h), torch.stack([single[i](h[i]) for i in range(3)]), atol=1e-5)
    norm.eval()
    assert torch.allclose(
        norm(h), torch.stack([single[i].eval()(h[i]) for i in range(3)]), atol=1e-5
    )
    generators = mesa.Generators(2, 9, 16)
    assert generators(torch.rand(2, 5, 64)).shape == (2, 5, 9)
    with torch.no_grad():
        for parameter in generators.last.parameters():
            parameter.mul_(100)
        extreme = generators(torch.rand(2, 5, 64))
    assert extreme.min() >= 0 and extreme.max() <= 1


def test_a_square_is_pasted_where_it_is_told() -> None:
    x, patch = torch.rand(3, 2, 8, 8), torch.rand(3, 2, 3, 3, requires_grad=True)
    corners = torch.tensor([[0, 0], [5, 5], [2, 4]])
    seen = mesa.stamp(x, patch, corners, bu.Config())
    for i, (top, left) in enumerate(corners.tolist()):
        assert torch.equal(seen[i, :, top : top + 3, left : left + 3], patch[i])
        assert int((seen[i] != x[i]).sum()) == 18
    seen.sum().backward()
    assert patch.grad is not None and torch.equal(patch.grad, torch.ones_like(patch))
    whole = torch.rand(3, 2, 8, 8)
    assert torch.allclose(
        mesa.stamp(x, whole, corners, bu.Config(trigger="blend", blend_alpha=0.3)),
        0.7 * x + 0.3 * whole,
    )


def test_places_are_all_over_until_one_pays() -> None:
    for position in ("learnt", "random"):
        places, run = mesa.Places(2, (32, 32), 3, bu.Config(position=position)), new_run()
        owners = torch.arange(2).repeat_interleave(4000)
        first = places.draw(owners, run)
        assert first.min() == 0 and first.max() == 29 and len(first.unique(dim=0)) > 500
        for _ in range(20):
            corners = places.draw(owners, run)
            pays = (corners >= 24).all(1) & (owners == 1)
            places.learn(owners, corners, pays.float(), torch.ones(len(owners)))
        near = (places.draw(owners, run) >= 23).all(1).view(2, -1).float().mean(1)
        assert near[0] < 0.1 and (near[1] > 0.5) == (position == "learnt"), "and for its owner only"
        assert places.eval().draw(owners, run).max() <= 29


class Corner(nn.Module):
    """Class 1 for a bright top left pixel, class 0 else: a backdoor whose trigger and place are
    known."""

    def forward(self, x: Tensor) -> Tensor:
        hit = 8 * (x[:, 0, 0, 0] - 0.5)
        return torch.stack([-hit, hit, *[torch.full_like(hit, -20.0)] * (K - 2)], 1)


def test_the_reward_leaves_out_images_of_the_class_and_rewards_up_to_beta() -> None:
    x, y = torch.full((4, 1, 8, 8), 0.2), torch.tensor([0, 1, 1, 2])
    config, run = bu.Config(noise=0.0, position="random"), new_run()
    classes, beta = torch.tensor([1, 1, 2]), torch.tensor([0.9, 1e-4, 0.9])
    places = mesa.Places(3, (8, 8), 8, config)  # a trigger as large as the image has one place
    triggers = torch.full((3, 4, 64), 0.5)
    hits, slopes = mesa.reward(
        Corner(), x, y, triggers, places, classes, beta, (1, 8, 8), config, run
    )
    p = torch.sigmoid(torch.tensor(16 * (0.5 - 0.5)))
    slope = (16 * p * (1 - p) / 2).item()
    assert slopes[0, :, 0].tolist() == pytest.approx([slope, 0, 0, slope]), (
        "two images count, each for a half"
    )
    assert not slopes[0, :, 1:].any() and not slopes[1].any() and slopes[2].abs().max() < 1e-3
    # The first generator's squares light the corner: both images of another class are hit, of the
    # third's none
    triggers[0, :, 0] = 1.0
    hits, _ = mesa.reward(Corner(), x, y, triggers, places, classes, beta, (1, 8, 8), config, run)
    assert hits.item() == pytest.approx((1 + 0 + 0) / 3)


def test_recovery_finds_the_planted_trigger_and_its_place() -> None:
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 120, (64, 1, 8, 8), generator=draws, dtype=torch.uint8)
    split = Split(images, torch.arange(64) % K)
    run = Run(Path("/nowhere"), seed=0, device=torch.device("cpu"), precision="fp32")
    run.epochs = lambda stage, total, **parts: iter(range(total))  # type: ignore[method-assign]
    run._where = "test"
    torch.manual_seed(0)
    config = bu.Config(levels=(0.9,), search_epochs=120, search_lr=2e-3, hidden=32, trigger_size=2)
    found = mesa.recover_triggers(Corner(), split, split, (1, 2, 2), K, config, run)
    scores = found["scores"].squeeze(1)
    assert scores[1] > 0.7 and scores[2:].max() < 0.1, "its class, and no other"
    assert found["bank"][1, 0, :, 0, 0, 0].mean() > 0.6, "its first pixel is bright"
    assert (found["corners"][1, 0] == 0).all(1).float().mean() > 0.5, "and it is where it works"


@pytest.mark.parametrize("count", [2, 400])
def test_few_held_out_images_are_shown_many_triggers(count: int) -> None:
    """One trigger each would score a quarter of two images as 0, 1/2 or 1; and images of the class
    itself never count."""
    split = Split(
        torch.zeros(count + 1, 1, 8, 8, dtype=torch.uint8), torch.tensor([0] * count + [1])
    )
    triggers = torch.zeros(64, 1, 2, 2)
    triggers[:16] = 1
    score = mesa.hit_rate(
        Corner(), split, triggers, torch.zeros(64, 2, dtype=torch.long), 1, bu.Config(), new_run()
    )
    assert 0.15 < score < 0.35
    assert (
        mesa.hit_rate(
            Corner(),
            split.subset(torch.tensor([count])),
            triggers,
            torch.zeros(64, 2, dtype=torch.long),
            1,
            bu.Config(),
            new_run(),
        )
        == 0
    )


def test_importance_is_the_mean_slope_of_the_clean_loss() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, K)
    model = nn.Sequential(nn.Flatten(), layer)
    split = Split(torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8), torch.arange(12) % K)
    found = bu.importance(model, split, bu.Config(batch_size=4), new_run())
    wanted = torch.zeros_like(found[0])
    for start in (0, 4, 8):
        loss = F.cross_entropy(
            model(split.images[start : start + 4].float() / 255), split.labels[start : start + 4]
        )
        wanted += torch.autograd.grad(loss, layer.weight)[0].abs() / 3
    assert torch.allclose(found[0], wanted, atol=1e-6)


@pytest.mark.parametrize(("stop_asr", "passes"), [(None, 3), (0.5, 1)])
def test_unlearning_runs_to_its_end_unless_told_where_to_stop(
    stop_asr: float | None, passes: int, tmp_path: Path
) -> None:
    split = Split(torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8), torch.arange(12) % K)
    log = ScoreLog()
    run = Run(tmp_path, seed=0, device=torch.device("cpu"), callbacks=log.callbacks())
    layer = nn.Linear(64, K)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)  # every image is class 0, so triggers of class 1 turn none
    model = nn.Sequential(nn.Flatten(), layer)
    triggers, corners = torch.zeros(8, 1, 2, 2), torch.zeros(8, 2, dtype=torch.long)
    bu.unlearn(
        model,
        split,
        split,
        triggers,
        corners,
        1,
        bu.Config(epochs=3, lr=0.0, stop_asr=stop_asr),
        run,
    )
    assert [row["left"] for row in log.history] == [0.0] * passes


def test_what_bu_cannot_use_is_one_line(tiny: Record, tmp_path: Path) -> None:
    record = helpers.copy(tiny, tmp_path)
    with pytest.raises(
        UserError, match=r"trigger_size must lie in 1\.\.16 for these images, got 17"
    ):
        helpers.defend("bu", record, "--trigger_size", "17", "--score_every", "0")
    with pytest.raises(
        UserError, match=r"--levels: expected at least one number in \(0, 1\], got none"
    ):
        helpers.defend("bu", record, "--levels", "--score_every", "0")
    with pytest.raises(
        UserError,
        match=(
            r"BU tries every class as the target and needs trusted images of each, but there is"
            r" none of \["
        ),
    ):
        helpers.defend("bu", record, "--trusted_count", "5", "--score_every", "0")


def test_a_model_without_a_small_trigger_is_returned_as_it_was(
    clean: Record, tmp_path: Path
) -> None:
    """One that works: whatever is asked of a model that gives one answer to all images, every
    trigger leads to that."""
    record = helpers.copy(clean, tmp_path)
    flags = ("--search_epochs", "1", "--levels", "0.9", "--hidden", "16", "--score_every", "0")
    control = helpers.defend(
        "bu", record, *flags, "--accept", "0", "--epochs", "0", "--run_name", "control"
    )
    assert control is not None and not any("no trigger found" in note for note in control["notes"])
    result = helpers.defend("bu", record, *flags, "--accept", "0.9")
    assert result is not None and any("no trigger found" in note for note in result["notes"])
    assert result["after"]["clean_accuracy"] == result["before"]["clean_accuracy"]
    assert (record.folder / "defense" / "bu" / "seed0" / "triggers.png").stat().st_size > 100


def test_a_target_without_a_margin_is_doubted(
    tiny: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = helpers.copy(tiny, tmp_path)
    flags = (
        "--search_epochs",
        "1",
        "--levels",
        "0.9",
        "--hidden",
        "16",
        "--accept",
        "0",
        "--epochs",
        "0",
        "--score_every",
        "0",
    )
    for close, doubted in ((1.1, True), (-1.0, False)):
        monkeypatch.setattr(bu, "CLOSE", close)
        result = helpers.defend("bu", record, *flags, "--overwrite", "True")
        assert (
            result is not None
            and any("as easy a target" in note for note in result["notes"]) == doubted
        )
