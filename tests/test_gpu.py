"""What only a GPU can show. Skipped where there is none; on a machine that has one: pytest
tests/test_gpu.py"""

import copy
from pathlib import Path

import helpers
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backdoorlab.data import Split
from backdoorlab.device import seed_everything
from backdoorlab.engine import WORTH_A_GRAPH, Forward, Recipe, train
from backdoorlab.execution.scores import ScoreLog
from backdoorlab.models import PASSES, build
from backdoorlab.run import BETWEEN_CHECKPOINTS, Run
from backdoorlab.settings import methods

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

BATCH, EPOCHS = 32, 20
RATE = 0.005
"""Ten times as high, the loss leaps up to 1.5 and ends at .04 by luck."""


def made_up(count: int = 512) -> Split:
    """Images of four brightnesses, which are their labels."""
    labels = torch.arange(count) % 4
    noise = torch.randint(0, 60, (count, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    return Split((noise + 60 * labels.view(-1, 1, 1, 1)).to(torch.uint8).cuda(), labels.cuda())


def network(name: str = "preactresnet10", width: int | None = 8) -> nn.Module:
    torch.manual_seed(0)
    return build(
        name,
        num_classes=4,
        in_chans=3,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        width=width,
        image_size=16,
    ).cuda()


def a_run(folder: Path, precision: str = "fp32", log: ScoreLog | None = None) -> Run:
    """As the executor makes it: seeded, without TF32, without torch's words that we have
    answered."""
    seed_everything(0, torch.device("cuda"))
    return Run(
        folder,
        seed=0,
        device=torch.device("cuda"),
        precision=precision,  # type: ignore[arg-type]
        callbacks=(log or ScoreLog()).callbacks(),
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "width"), [("preactresnet10", 8), ("resnet18", None), ("vit_tiny_patch16_224", None)]
)
def test_a_captured_step_is_the_ordinary_one(
    name: str, width: int | None, precision: str, tmp_path: Path
) -> None:
    run, data = a_run(tmp_path, precision), made_up()
    images = data.images[:BATCH].float().div(255).to(memory_format=torch.channels_last)
    plain = network(name, width)
    other = copy.deepcopy(plain)
    before, counted = copy.deepcopy(plain.state_dict()), (PASSES.forward, PASSES.backward)
    drawn = torch.cuda.get_rng_state()
    forward = Forward(plain.train(), run, data, WORTH_A_GRAPH, BATCH)
    assert forward._graphs, "captured: the training is long enough"
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items()), (
        "capture leaves no trace"
    )
    assert torch.equal(drawn, torch.cuda.get_rng_state()) and counted == (
        PASSES.forward,
        PASSES.backward,
    )
    ordinary = Forward(other.train(), run, data, WORTH_A_GRAPH - 1, BATCH)
    assert not ordinary._graphs, "a control: too short"
    found = []
    for model, call in ((plain, forward), (other, ordinary)):
        start = PASSES.forward, PASSES.backward
        logits = call(images)
        F.cross_entropy(logits.float(), data.labels[:BATCH]).backward()
        assert (PASSES.forward - start[0], PASSES.backward - start[1]) == (BATCH, BATCH)
        found.append(
            (
                logits.detach().float(),
                [p.grad.clone() for p in model.parameters() if p.grad is not None],
                dict(model.named_buffers()),
            )
        )
    rtol, atol = (1e-3, 1e-4) if precision == "fp32" else (0.1, 0.05)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=rtol, atol=atol)
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        assert (ours - theirs).norm() <= (
            0.002 if precision == "fp32" else 0.1
        ) * theirs.norm() + 1e-6
    for key, buffer in found[0][2].items():
        torch.testing.assert_close(buffer, found[1][2][key], rtol=rtol, atol=atol)
    assert forward(images[:5]).shape == (5, 4), "a batch of another size goes the ordinary way"


def test_training_by_graphs_learns_and_counts_what_ordinary_training_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    for worth in (0, 10**9):
        monkeypatch.setattr("backdoorlab.engine.WORTH_A_GRAPH", worth)
        (tmp_path / str(worth)).mkdir()
        log = ScoreLog()
        run, model, data = a_run(tmp_path / str(worth), log=log), network(), made_up()
        train(model, data, Recipe(EPOCHS, BATCH, RATE), run)
        spent = run.spent()
        ends.append((log.history[-1]["loss"], spent.forward, spent.backward))
        assert ends[-1][0] < 0.05 < log.history[0]["loss"]
    assert ends[0][1:] == ends[1][1:] == (EPOCHS * 512, EPOCHS * 512)
    assert ends[0][0] == pytest.approx(ends[1][0], abs=0.02)


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BETWEEN_CHECKPOINTS, "cuda", 0.0)

    def dies(place: int, row: dict[str, object]) -> None:
        if place == 4:
            raise KeyboardInterrupt

    log, log_again = ScoreLog(on_line=dies), ScoreLog()
    run, model, data = a_run(tmp_path, log=log), network(), made_up()
    with pytest.raises(KeyboardInterrupt):
        train(model, data, Recipe(EPOCHS, BATCH, RATE), run)
    again = a_run(tmp_path, log=log_again)
    train(network(), data, Recipe(EPOCHS, BATCH, RATE), again)
    assert [row["epoch"] for row in log_again.history] == list(range(EPOCHS))
    assert log_again.history[-1]["loss"] < 0.05
    assert log_again.history[:3] == log.history[:3], "the first three epochs were not run again"


def test_on_a_gpu_not_every_short_epoch_writes_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    monkeypatch.setattr(
        "backdoorlab.storage.writing.write_tensors",
        lambda path, *args, **kwargs: written.append(path),
    )
    train(network(), made_up(), Recipe(EPOCHS, BATCH, RATE), a_run(tmp_path))
    assert len(written) == 1, "the last epoch's"


@pytest.mark.parametrize(
    ("attack", "worth"),
    [
        ("badnet", WORTH_A_GRAPH),
        ("badnet", 0),
        ("wanet", 0),
        ("inputaware", WORTH_A_GRAPH),
        ("blind", WORTH_A_GRAPH),
    ],
)
def test_attacks_and_every_defense_run(
    attack: str, worth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backdoorlab.engine.WORTH_A_GRAPH", worth)
    record = helpers.attack(
        attack,
        attack,
        tmp_path,
        "--width",
        "8",
        "--epochs",
        "10",
        "--device",
        "cuda:0",
        "--score_every",
        "0",
    )
    assert (
        record.info["device"].startswith("cuda") and record.info["scores"]["clean_accuracy"] > 0.5
    )
    for defense in methods.available("defense"):
        result = helpers.defend(
            defense,
            record,
            "--device",
            "cuda:0",
            "--score_every",
            "0",
            *helpers.short_flags(defense),
            "--precision",
            "auto",
        )
        assert result is not None
        assert result["kind"] == "detector" or result["after"]["asr"] is not None
        assert result["device"].startswith("cuda") and result["peak_memory_bytes"] > 2**20
