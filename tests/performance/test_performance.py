"""A faster step that computes something else is no gain: both sides of a benchmark agree where they
can."""

import copy
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import helpers
import pytest
import torch
from torch.utils.data import DataLoader

PERFORMANCE = helpers.CHECKOUT / "performance"


def test_the_published_round_of_ibau_and_ours_find_the_same_delta_and_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image that carries delta is drawn, each side by its own draw: with one image a hundred
    times over, both are free of chance."""
    published = helpers.script("performance/published.py")

    from backdoorlab.data import Augment, Split
    from backdoorlab.execution.scores import ScoreLog
    from backdoorlab.models import build
    from backdoorlab.record import DefenderView
    from backdoorlab.run import Run
    from backdoorlab.settings import methods

    torch.manual_seed(0)
    model = build(
        "preactresnet10", num_classes=5, in_chans=3, mean=(0.5,) * 3, std=(0.25,) * 3, width=4
    ).eval()
    image = torch.randint(
        0, 256, (1, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    trusted = Split(image.repeat(100, 1, 1, 1), torch.full((100,), 3))
    ibau = methods.load("defense", "ibau").module
    config = ibau.Config(
        n_rounds=1,
        batch_size=100,
        projected=False,
        clip_box=False,
        solver="fixed_point",
        quirks=True,
        optim="SGD",
        lr=1e-3,
    )
    log = ScoreLog()
    run = Run(tmp_path, seed=0, device=torch.device("cpu"), callbacks=log.callbacks())
    view = DefenderView("", 5, (3, 16, 16), (), Augment(), dict(model=model, trusted=trusted))
    ours = ibau.defend(view, config, run)
    theirs = copy.deepcopy(model)
    # Adam divides rounding by itself where a slope is 0
    monkeypatch.setattr(published.torch.optim, "Adam", published.torch.optim.SGD)
    length = published.ibau_round(theirs, DataLoader(published.Images(trusted), 100), (3, 16, 16))
    assert log.history[0]["delta"] == pytest.approx(length, rel=1e-4)
    assert length > 0.1 and log.history[0]["implicit"] > 0, "there was something to agree on"
    moved = [
        (a - before, b - before)
        for a, b, before in zip(
            ours.parameters(), theirs.parameters(), model.parameters(), strict=True
        )
    ]
    largest = max(b.abs().max().item() for _, b in moved)
    assert largest > 1e-5 and all(torch.allclose(a, b, atol=1e-3 * largest) for a, b in moved)


def test_every_convolution_of_a_step_is_counted() -> None:
    """PreAct-ResNet18 on CIFAR-10 takes .56 billion multiply-adds an image (He et al. and its CIFAR
    ports), nearly all in convolutions."""
    convolutions = helpers.script("performance/convolutions.py")

    shapes = convolutions._convolutions(convolutions.cifar_network(64, torch.device("cpu")))
    assert sum(shapes.values()) == 20 and [shape.first for shape in shapes] == [True] + [False] * (
        len(shapes) - 1
    )
    layers = sum(
        shape.operations // (2 if shape.first else 3) * count for shape, count in shapes.items()
    )
    assert layers / (2 * convolutions.BATCH) == pytest.approx(0.56e9, rel=0.01)


@pytest.mark.slow
def test_a_whole_attack_and_defense_are_compared(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    flags = ["--seeds", "1", "--rounds", "1", "--epochs", "1", "--width", "4", "--json", str(file)]
    done = subprocess.run(
        [sys.executable, str(PERFORMANCE / "whole.py"), *flags],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [len(row["ratios"]) for row in rows] == [1, 1] and all(row["median"] > 0 for row in rows)


def test_a_gpu_session_ends_in_time_and_packs_what_is_there(tmp_path: Path) -> None:
    gpu_session = helpers.script("performance/gpu_session.py")

    # Interrupted as by Ctrl-C, so that a bench can end by itself.
    log = tmp_path / "log.txt"
    script = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('told')"
    start = time.monotonic()
    assert gpu_session.run_until([sys.executable, "-c", script], log, start + 2) == 0
    assert time.monotonic() - start < 30 and log.read_text(encoding="utf-8") == "told\n"

    root, out = tmp_path / "record", tmp_path / "out"
    for place, size in (("a", 600), ("b", 600), ("a/defense/ft/seed0", 600), ("c", 5000)):
        (root / place).mkdir(parents=True, exist_ok=True)
        (root / place / "result.json").write_text("{}", encoding="utf-8")
        (root / place / "model.safetensors").write_bytes(bytes(size))
    out.mkdir()
    gpu_session.pack(root, out, part=1200, total=4000)
    with tarfile.open(out / "results.tar.gz") as archive:
        assert len(archive.getnames()) == 4, "every result, whatever the size of its model"
    packed = {}
    for path in sorted(out.glob("weights-*.tar")):
        with tarfile.open(path) as archive:
            packed[path.name] = archive.getnames()
    assert packed == {
        "weights-1.tar": ["a/model.safetensors", "b/model.safetensors"],
        "weights-2.tar": ["a/defense/ft/seed0/model.safetensors"],
    }, "attacked models first, and none that has no room"
