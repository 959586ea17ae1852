"""`--precision auto` is what is faster here, measured once; scores never depend on it."""

import json
import time
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from torch import Tensor, nn

from backdoorlab import models
from backdoorlab.data import Split
from backdoorlab.datasets.locations import cache_root
from backdoorlab.errors import UserError
from backdoorlab.execution import precision
from backdoorlab.execution.precision import Choice, Timing, choose, measure
from backdoorlab.metrics import Evaluator, predict
from backdoorlab.record import Record

CPU = torch.device("cpu")
NETWORK: dict[str, Any] = {"name": "preactresnet10", "width": 4, "image_shape": [1, 16, 16]}


@pytest.fixture(autouse=True)
def nothing_is_decided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKDOORLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BACKDOORLAB_PRECISION", "auto")


def small() -> models.Classifier:
    return models.build(
        "preactresnet10", num_classes=4, in_chans=1, mean=[0.5], std=[0.25], width=4
    )


class Works(nn.Module):
    """A layer whose passes in bf16 take `seconds`, the first `waits` of them `waiting`, and which
    takes next to nothing in fp32."""

    def __init__(self, seconds: float, waits: int = 0, waiting: float = 0.0) -> None:
        super().__init__()
        self.seconds, self.waits, self.waiting = seconds, waits, waiting
        self.calls, self.weight = 0, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            self.calls += 1
            if self.calls <= self.waits:
                time.sleep(self.waiting)
            end = time.process_time() + self.seconds
            while time.process_time() < end:
                pass
        return x * self.weight


def slow_in_bf16(seconds: float, layers: int) -> nn.Sequential:
    return nn.Sequential(*(Works(seconds) for _ in range(layers)), nn.Flatten(), nn.Linear(256, 4))


@pytest.mark.parametrize(
    ("bf16", "wanted"),
    [(0.5, "bf16"), (0.96, "bf16"), (0.98, "fp32"), (2.0, "fp32"), (None, "fp32")],
)
def test_auto_is_the_faster_one(
    bf16: float | None, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "backdoorlab.execution.precision.measure", lambda _model, _shape: Timing(2, 1.0, bf16)
    )
    assert choose("auto", CPU, small, **NETWORK).precision == wanted
    assert choose("fp32", CPU, small, **NETWORK) == Choice("fp32", "asked for")
    asked = choose("bf16", CPU, small, **NETWORK)
    assert asked.precision == "bf16" and ("slow on this processor" in asked.why) == (
        bf16 is None or bf16 > 1
    )


def test_what_is_slow_is_found_out_before_it_takes_long() -> None:
    """A processor without bf16 can take seconds a layer: the first such layer is the last."""
    network = slow_in_bf16(0.3, layers=20)
    began = time.perf_counter()
    found = measure(network, (1, 16, 16))
    assert found.bf16 is None and found.ratio == float("inf") and time.perf_counter() - began < 3
    tries = sum(layer.calls for layer in network if isinstance(layer, Works))
    assert tries == 3 + (torch.get_num_threads() > 1), (
        "three tries of one thread, of which the last one decides; several threads have one before"
    )
    bearable = measure(slow_in_bf16(0.003, layers=2), (1, 16, 16))
    assert bearable.bf16 is not None and bearable.ratio > 1.5, (
        "a control: slower, but measured to the end"
    )


def test_a_busy_machine_makes_no_precision_slow() -> None:
    """Time that the processor gives to others counts for neither; one step that is late by itself,
    the first or any other, decides nothing."""
    late = [Works(0.001, waits=3, waiting=0.5) for _ in range(2)]
    assert measure(nn.Sequential(*late, nn.Flatten(), nn.Linear(256, 4)), (1, 16, 16)).bf16

    class Once(Works):
        """Takes long in one of its passes in bf16, such as the first, which makes its kernels."""

        def __init__(self, slow: int) -> None:
            super().__init__(0.001)
            self.slow = slow

        def forward(self, x: Tensor) -> Tensor:
            late = torch.is_autocast_enabled("cpu") and self.calls == self.slow
            self.seconds = 0.3 if late else 0.001
            return super().forward(x)

    for slow in range(4):
        network = nn.Sequential(Once(slow), nn.Flatten(), nn.Linear(256, 4))
        assert measure(network, (1, 16, 16)).bf16, f"pass {slow}"


@pytest.mark.parametrize(
    ("of_two_threads", "wanted"),
    [
        ([(1.0, 0.8), (1.1, 0.9), (1.0, 0.7)], 0.7),
        ([(1.0, 0.8), (1.0, 1.2), (1.0, 0.9)], 2.0),
        ([(5.0, 0.9), (4.0, 3.0), (1.0, 0.9)], 2.0),
        ([(1.0, 0.8), (1.0, None)], 2.0),
    ],
    ids=["steady", "another one is faster", "some are late", "one falls behind"],
)
def test_one_thread_decides_where_several_do_not_agree(
    of_two_threads: list[tuple[float, float | None]],
    wanted: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a busy machine, threads that wait for one another can take several times as long, in
    either precision. Here two threads find what is given, and one finds that bf16 takes twice as
    long."""
    found = [(1.0, 1.0), (0.01, 0.01), (1.0, 1.0), *of_two_threads]
    used = []

    def pair(_model: nn.Module, images: Tensor) -> Timing:
        used.append(torch.get_num_threads())
        fp32, bf16 = found[len(used) - 1] if used[-1] == 2 else (1.0, 2.0)
        if bf16 is None:
            raise precision._Hopeless(fp32)
        return Timing(len(images), fp32, bf16)

    monkeypatch.setattr(precision, "_pair", pair)
    torch.set_num_threads(2)
    assert measure(small(), (1, 16, 16)).ratio == wanted
    assert torch.get_num_threads() == 2 and used[0] == 2
    assert (used[-1] == 1) == (wanted == 2.0)


def test_it_is_measured_once_for_each_network_and_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built: list[int] = []

    def build() -> nn.Module:
        built.append(1)
        return small()

    first = choose("auto", CPU, build, **NETWORK)
    assert choose("auto", CPU, build, **NETWORK) == first and len(built) == 1
    choose("auto", CPU, build, **NETWORK | {"width": 8})
    assert len(built) == 2
    choose("auto", CPU, build, **NETWORK, stem="stock")
    assert len(built) == 3
    choose("auto", CPU, build, **NETWORK, stem="small")
    assert len(built) == 3, "our own stem is what is timed where none is named"
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - threads)
    choose("auto", CPU, build, **NETWORK)
    assert len(built) == 4
    torch.set_num_threads(threads)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    choose("auto", CPU, build, **NETWORK)
    assert len(built) == 5


@pytest.mark.parametrize(
    "damage",
    [
        "{",
        "[]",
        '{"images": 2, "fp32": 1.0}',
        '{"images": 2, "fp32": 0.0, "bf16": 1.0}',
        '{"images": 2, "fp32": "1", "bf16": 1.0}',
    ],
)
def test_a_damaged_measurement_is_made_again(damage: str, tmp_path: Path) -> None:
    chosen = choose("auto", CPU, small, **NETWORK)
    (file,) = (tmp_path / "cache").glob("precision-*.json")
    whole = json.loads(file.read_text())
    assert whole["processor"] and whole["architecture"] == "preactresnet10" and whole["images"] >= 2
    file.write_text(damage)
    assert choose("auto", CPU, small, **NETWORK).precision in ("bf16", "fp32")
    assert json.loads(file.read_text()).keys() == whole.keys() and chosen.why


def test_a_cache_that_cannot_be_written_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BACKDOORLAB_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        assert choose("auto", CPU, small, **NETWORK).precision in ("bf16", "fp32")
        (line,) = capsys.readouterr().err.splitlines()
        assert "cannot be written" in line and line.endswith(
            "so the next run measures bf16 against fp32 again"
        )


def test_a_user_without_a_home_folder_is_told_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("BACKDOORLAB_CACHE")
    (tmp_path / "file").touch()
    for home in (homeless, lambda: tmp_path / "file", lambda: tmp_path / "file" / "below"):
        monkeypatch.setattr(Path, "home", home)
        with pytest.raises(UserError, match="set BACKDOORLAB_CACHE"):
            cache_root()
        assert choose("auto", CPU, small, **NETWORK).precision in ("bf16", "fp32")
        (line,) = capsys.readouterr().err.splitlines()
        assert "set BACKDOORLAB_CACHE" in line and "each run measures" in line

    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert cache_root() == tmp_path / "home" / ".cache" / "backdoorlab", "it can be made"
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UserError, match="set BACKDOORLAB_CACHE"):
        cache_root()
    (tmp_path / "home" / ".cache" / "backdoorlab").mkdir(parents=True)
    assert cache_root().is_dir(), "what is there can still be read"


def test_measuring_leaves_random_numbers_and_the_count_of_passes_alone() -> None:
    torch.manual_seed(0)
    state, passes = torch.get_rng_state(), (models.PASSES.forward, models.PASSES.backward)
    choose("auto", CPU, small, **NETWORK)
    assert (
        torch.equal(torch.get_rng_state(), state)
        and (models.PASSES.forward, models.PASSES.backward) == passes
    )
    small()
    assert not torch.equal(torch.get_rng_state(), state), "a control: building a network does draw"


def test_the_environment_says_what_auto_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKDOORLAB_PRECISION", "bf16")
    monkeypatch.setattr(
        "backdoorlab.execution.precision.measure", lambda _model, _shape: Timing(2, 1.0, None)
    )
    assert choose("auto", CPU, small, **NETWORK).precision == "bf16"
    assert choose("fp32", CPU, small, **NETWORK).precision == "fp32", "a flag comes first"
    monkeypatch.setenv("BACKDOORLAB_PRECISION", "fp16")
    with pytest.raises(
        UserError, match="BACKDOORLAB_PRECISION=fp16: expected one of auto, bf16, fp32"
    ):
        choose("auto", CPU, small, **NETWORK)


def test_a_run_says_what_it_computes_in_and_keeps_it(
    tiny: Record,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    record = helpers.copy(tiny, tmp_path / "record")
    monkeypatch.setattr(
        "backdoorlab.execution.precision.measure", lambda _model, _shape: Timing(2, 1.0, 1.5)
    )
    result = helpers.defend("ft", record, "--epochs", "1", "--trusted_count", "20")
    assert result is not None and result["precision"] == "fp32"
    why = "measured on this machine: a training step in bf16 takes 1.50 times as long as in fp32"
    assert result["precision_why"] == why and f"cpu, fp32 ({why})" in capsys.readouterr().err


def test_scores_of_one_set_of_weights_are_equal_whatever_surrounds_them() -> None:
    """On logits that lie closer than bf16 can tell apart."""
    torch.manual_seed(0)
    model = small()
    split = Split(
        torch.randint(0, 256, (200, 1, 16, 16), dtype=torch.uint8),
        torch.zeros(200, dtype=torch.int64),
    )
    with torch.no_grad():
        model.network.linear.weight *= 1e-3
        answers = model.eval()(split.images.float() / 255)
        model.network.linear.bias -= answers.mean(0)
    alone = predict(model, split, CPU)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = predict(model, split, CPU)
        with torch.no_grad():
            half = model.eval()(split.images.float() / 255).argmax(1)
    assert torch.equal(alone, inside) and len(alone.unique()) > 1
    assert not torch.equal(alone, half), "the control: a pass in bf16 answers otherwise"


def test_a_training_in_bf16_is_scored_in_fp32(tmp_path: Path) -> None:
    record = helpers.attack("badnet", "half", tmp_path, *helpers.TINY, "--precision", "bf16")
    assert record.info["precision"] == "bf16" and record.info["precision_why"].startswith(
        "asked for"
    )
    dataset = record.dataset()
    again = Evaluator(dataset.test, record.test_poison, dataset.num_classes, CPU)(record.model())
    assert again.to_json() == record.info["scores"]
    whole = helpers.attack("badnet", "whole", tmp_path, *helpers.TINY, "--precision", "fp32")
    assert whole.info["precision"] == "fp32"
    weights = [made.model().state_dict()["network.conv1.weight"] for made in (record, whole)]
    assert not torch.equal(*weights), "a control: bf16 did train otherwise"
