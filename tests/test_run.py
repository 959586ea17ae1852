"""Kill and continue, refuse and replace: one run from start to finish gives one result."""

import contextlib
import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch

from backdoorlab import config as configs
from backdoorlab import record as records
from backdoorlab.cli import main
from backdoorlab.errors import UserError, one_line
from backdoorlab.execution import environment
from backdoorlab.execution import stage as stages
from backdoorlab.execution.attack import attack_job, run_attack
from backdoorlab.execution.defense import defense_job, run_defense
from backdoorlab.execution.scores import ScoreLog
from backdoorlab.execution.stage import Job, made_on, open_stage
from backdoorlab.metrics import SUMMARY, VERDICT, Evaluator, Scores
from backdoorlab.poison import Poison
from backdoorlab.record import DefenderView, Record, defender_view, draw_seeds
from backdoorlab.run import BETWEEN_CHECKPOINTS, Run
from backdoorlab.settings import methods
from backdoorlab.storage import reading, writing

CPU = torch.device("cpu")
THREE = ("--image_size", "16", "--width", "4", "--epochs", "3", "--score_every", "0")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of a detector, which leaves no model, its split."""
    model = folder / "model.safetensors"
    return reading.read_tensors(model if model.exists() else folder / "split.safetensors")[0]


def same(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def kill_when(path: Path, arguments: list[str]) -> None:
    """Start `python ARGUMENTS` and kill it without warning once `path` is there."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env=helpers.child_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 240
        while not path.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        assert process.poll() is None, "it ended before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert path.exists()


def test_a_killed_attack_continues_to_the_same_bytes(tmp_path: Path) -> None:
    root = tmp_path / "record"
    whole = helpers.attack("badnet", "whole", root, *THREE)
    arguments = [
        str(helpers.CHECKOUT / "attack" / "badnet.py"),
        "--save_folder_name",
        "killed",
        "--record_root",
        str(root),
        *THREE,
    ]
    kill_when(root / "killed.partial" / "checkpoint-train.safetensors", arguments)
    assert not (root / "killed").exists()
    done = reading.read_tensors(root / "killed.partial" / "checkpoint-train.safetensors")[1]["done"]
    again = helpers.command(*arguments, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"continuing train after epoch {done} of 3" in again.stderr or done == 3
    killed = Record.load("killed", root)
    assert same(whole.folder, killed.folder)
    assert (
        killed.info["scores"] == whole.info["scores"]
        and killed.info["image_passes"] == whole.info["image_passes"]
    )
    assert not (root / "killed.partial").exists()
    for name in ("model", "train_poison", "test_poison"):
        assert reading.sha256(whole.folder / f"{name}.safetensors") == reading.sha256(
            killed.folder / f"{name}.safetensors"
        ), name


def test_a_killed_dau_continues_to_the_same_bytes(backdoored: Record, tmp_path: Path) -> None:
    flags = ("--epochs", "3", "--score_every", "0")
    record = helpers.copy(backdoored, tmp_path)
    whole = helpers.defend("dau", record, *flags, "--run_name", "whole")
    assert whole is not None and whole["image_passes"]["backward"] > 0, (
        "there was something to unlearn"
    )
    folder = record.folder / "defense" / "dau"
    arguments = [
        str(helpers.CHECKOUT / "defense" / "dau.py"),
        "--result_file",
        record.name,
        "--record_root",
        str(tmp_path),
    ]
    arguments += [*flags, "--run_name", "killed"]
    kill_when(folder / "killed.partial" / "checkpoint-unlearn.safetensors", arguments)
    assert not (folder / "killed").exists()
    result = helpers.defend("dau", record, *flags, "--run_name", "killed")
    assert result is not None
    assert same(folder / "whole", folder / "killed")
    for key in ("after", "split", "splits", "notes", "image_passes", "triggered_predictions"):
        assert result[key] == whole[key], key
    assert reading.sha256(folder / "whole" / "model.safetensors") == reading.sha256(
        folder / "killed" / "model.safetensors"
    )
    assert torch.equal(
        *(
            reading.read_tensors(folder / run / "split.safetensors")[0]["flagged"]
            for run in ("whole", "killed")
        )
    )


ROUNDS = ("--n_rounds", "4", "--batch_size", "24")
FORGET = ("--split", "oracle", "--epochs", "2", "--batch_size", "256")
INTERRUPTED = {
    "abl": (
        *("--isolation_epochs", "1", "--finetune_epochs", "2", "--unlearn_epochs", "2"),
        *("--batch_size", "256"),
    ),
    "asd": (
        "--stage1_epochs",
        "2",
        "--stage2_epochs",
        "1",
        "--stage3_epochs",
        "1",
        "--iterations",
        "3",
        "--batch_size",
        "8",
    ),
    "bu": (
        "--search_epochs",
        "4",
        "--levels",
        "0.9",
        "--hidden",
        "16",
        "--accept",
        "0",
        "--epochs",
        "2",
        "--batch_size",
        "24",
    ),
    "dbr": (
        *("--train_epochs", "1", "--apart_epochs", "1", "--epochs", "2"),
        *("--batch_size", "256"),
    ),
    "ibau": ROUNDS,
    "sau": ROUNDS,
    # A detector with a training of its own, and unlearners with a teacher or a cache.
    "isolation": ("--epochs", "2", "--batch_size", "256"),
    "scrub": (*FORGET, "--max_epochs", "1", "--decay_epochs", "1"),
    "bad_teacher": FORGET,
    "relearn": FORGET,
}


@pytest.mark.parametrize("method", sorted(INTERRUPTED))
def test_an_interrupted_defense_continues_to_the_same_weights(
    method: str, tiny: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle, and run again: networks, optimizers, schedule, pools and random state
    are those of the uninterrupted run."""
    flags = (*INTERRUPTED[method], "--score_every", "0")
    record = helpers.copy(tiny, tmp_path)
    whole = helpers.defend(method, record, *flags, "--run_name", "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 8)
        with pytest.raises(Stop):
            helpers.defend(method, record, *flags, "--run_name", "stopped")
    folder = record.folder / "defense" / method
    assert (
        list((folder / "stopped.partial").glob("checkpoint-*.safetensors"))
        and not (folder / "stopped").exists()
    )
    stopped = helpers.defend(method, record, *flags, "--run_name", "stopped")
    assert whole is not None and stopped is not None and stopped["after"] == whole["after"]
    assert stopped["image_passes"] == whole["image_passes"]
    assert same(folder / "whole", folder / "stopped")
    helpers.defend(method, record, *flags, "--run_name", "other", "--seed", "1")
    assert not same(folder / "whole", folder / "other")


class Stop(BaseException):
    """Not an Exception, as a signal is not."""


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    real, count = Run.step, [0]

    def stopping(self: Run, *args: Any) -> None:
        count[0] += 1
        if count[0] == step:
            raise Stop
        real(self, *args)

    monkeypatch.setattr(Run, "step", stopping)


@pytest.mark.parametrize(
    "flags",
    [
        ("--schedule", "onecycle", "--flip", "True"),
        ("--schedule", "cosine", "--optimizer", "adam", "--lr", "0.001"),
        ("--schedule", "plateau"),
        (
            "--schedule",
            "constant",
            "--model",
            "mobilenetv3_small_050",
            "--width",
            "None",
            "--batch_size",
            "256",
        ),
    ],
)
def test_an_interruption_within_an_epoch_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    """Dropout, batch statistics, momentum and schedule are all restored: one more epoch after the
    checkpoint is the same epoch."""
    root, two = tmp_path / "record", (*THREE, "--epochs", "2", *flags)
    whole = helpers.attack("badnet", "whole", root, *two)
    steps = 1442 // whole.info["config"]["batch_size"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, steps + steps // 2)
        with pytest.raises(Stop):
            helpers.attack("badnet", "stopped", root, *two)
    assert not (root / "stopped").exists() and (root / "stopped.partial").exists()
    stopped = helpers.attack("badnet", "stopped", root, *two)
    assert same(whole.folder, stopped.folder)
    assert not same(
        whole.folder, helpers.attack("badnet", "other", root, *two, "--seed", "1").folder
    )


def unfinished(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, 23)
        with pytest.raises(Stop):
            helpers.attack("badnet", "r", root, *helpers.TINY, "--epochs", "2")


def test_an_unfinished_run_is_continued_by_the_same_settings_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "record"
    unfinished(root, monkeypatch)
    for change, message in (
        (("--lr", "0.05"), "lr 0.1 -> 0.05"),
        (("--patch_size", "4"), "patch_size None -> 4"),
        (("--epochs", "3"), "epochs 2 -> 3"),
    ):
        with pytest.raises(UserError, match=rf"other settings \({message}\)"):
            helpers.attack("badnet", "r", root, *helpers.TINY, "--epochs", "2", *change)
    with pytest.raises(UserError, match="other settings"):
        helpers.attack("blended", "r", root, *helpers.TINY, "--epochs", "2")
    assert (root / "r.partial" / "checkpoint-train.safetensors").exists(), (
        "a refusal leaves it as it is"
    )
    record = helpers.attack("badnet", "r", root, *helpers.TINY, "--epochs", "2", "--debug", "True")
    assert record.info["config"]["lr"] == 0.1


def test_an_unfinished_run_is_continued_on_the_same_data_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was learnt from a poisoned folder would otherwise end in a record of the folder as it
    was cleaned."""
    data, root = helpers.small_data(tmp_path / "data"), tmp_path / "record"
    network = (
        "--model",
        "preactresnet10",
        "--width",
        "2",
        "--epochs",
        "2",
        "--batch_size",
        "16",
        "--score_every",
        "0",
    )
    flags = ("--suspicious", "True", "--dataset", "small", "--dataset_path", str(data), *network)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 8)
        with pytest.raises(Stop):
            helpers.attack("none", "r", root, *flags)
    shutil.move(data / "train" / "0" / "0.png", tmp_path / "0.png")
    with pytest.raises(UserError, match=r"other settings \(other data\)"):
        helpers.attack("none", "r", root, *flags)
    shutil.move(tmp_path / "0.png", data / "train" / "0" / "0.png")
    assert helpers.attack("none", "r", root, *flags).info["dataset"]["train_size"] == 96


def test_an_unfinished_defense_is_continued_with_the_same_trusted_images_only(
    tiny: Record, tmp_path: Path
) -> None:
    job = defense_job(
        methods.load("defense", "ft"),
        ["--result_file", "tiny", "--record_root", str(tiny.folder.parent)],
        "test",
    )
    target = tmp_path / "seed0"
    for trusted, message in (
        ("a", None),
        ("b", r"other settings \(other trusted images\)"),
        ("a", None),
    ):
        refused = pytest.raises(UserError, match=message) if message else contextlib.nullcontext()
        with (
            refused,
            open_stage(
                target, "result.json", job, {"record": "x", "trusted images": trusted}, "fp32", CPU
            ) as stage,
        ):
            (stage / "cached-something.safetensors").touch()
    marker = target.with_name("seed0.partial") / "run.json"
    kept = {key: value for key, value in reading.read_json(marker).items() if key != "inputs"}
    writing.write_json(marker, kept)
    with (
        pytest.raises(UserError, match=r"unfinished run of another one .'inputs' is missing"),
        open_stage(target, "result.json", job, {"record": "y"}, "fp32", CPU),
    ):
        pass
    with open_stage(
        target,
        "result.json",
        dataclasses.replace(job, config=dataclasses.replace(job.config, overwrite=True)),
        {"record": "y"},
        "fp32",
        CPU,
    ) as stage:
        assert {path.name for path in stage.iterdir()} == {"run.json"}, "it starts again"


@pytest.mark.parametrize(
    ("lost", "reason"),
    [
        (None, None),
        ("evaluation_seconds", "'evaluation_seconds' is missing"),
        ("progress", "'progress' is missing"),
        ("state", "'state' is missing"),
        ("done", "'done' is missing"),
        ("layers", "size mismatch"),
    ],
)
def test_a_checkpoint_of_another_version_is_refused_in_one_line(
    tmp_path: Path, lost: str | None, reason: str | None
) -> None:
    def done(outputs: int) -> list[int]:
        run = Run(tmp_path, seed=0, device=CPU, callbacks=ScoreLog().callbacks())
        model = torch.nn.Linear(2, outputs)
        optimizer = torch.optim.Adam(model.parameters())
        return list(run.epochs("train", 2, model=model, optimizer=optimizer))

    assert done(2) == [0, 1]
    path = tmp_path / "checkpoint-train.safetensors"
    tensors, meta = reading.read_tensors(path)
    # What is missing in it; a version whose layers differ has all of it.
    kept = {key: value for key, value in meta.items() if key != lost}
    writing.write_tensors(path, tensors, **{**kept, **({"done": 1} if lost != "done" else {})})
    if reason is None:
        assert done(2) == [1], "what is whole is continued"
        return
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        done(3 if lost == "layers" else 2)
    assert "unfinished run of another one" in str(caught.value)
    assert "\n" not in one_line(caught.value) and len(str(caught.value)) < 600


def test_cached_tensors_of_another_version_are_refused_in_one_line(tmp_path: Path) -> None:
    def cached() -> dict[str, torch.Tensor]:
        run = Run(tmp_path, seed=0, device=CPU, callbacks=ScoreLog().callbacks())
        return run.cached("split", lambda: {"flagged": torch.ones(2)})

    assert torch.equal(cached()["flagged"], cached()["flagged"])
    path = tmp_path / "cached-split.safetensors"
    tensors, meta = reading.read_tensors(path)
    writing.write_tensors(path, tensors, **{key: meta[key] for key in meta if key != "keys"})
    with pytest.raises(UserError, match=r"unfinished run of another one .'keys' is missing"):
        cached()


def test_a_run_that_went_on_elsewhere_says_all_its_machines(
    tiny: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bits depend on threads, device and versions: a record that kept the last would lie."""
    argv = ["--result_file", "tiny", "--record_root", str(tiny.folder.parent)]
    job = defense_job(methods.load("defense", "ft"), argv, "test")
    here = environment.machine(CPU) | {"kind": "cpu", "name": "X", "threads": 1, "commit": None}
    newer = {**here["versions"], "torch": "9.9"}

    said = []
    for changes in (
        {},
        {},
        {"threads": 2},
        {"threads": 2, "versions": newer},
        {"threads": 1, "versions": newer, "commit": "abc"},
        {"kind": "cuda", "name": "H", "threads": None, "commit": "abc"},
    ):
        facts = here | changes
        monkeypatch.setattr(stages, "machine", lambda _device, facts=facts: facts)
        with open_stage(tmp_path / "r", "result.json", job, {}, "fp32", CPU) as stage:
            (stage / "cached-something.safetensors").touch()
            said.append(made_on(stage))

    torch_version = here["versions"]["torch"]
    assert [made["device"] for made in said] == [
        "cpu (X, 1 threads)",
        "cpu (X, 1 threads)",
        "cpu (X, 1 -> 2 threads)",
        "cpu (X, 1 -> 2 threads)",
        "cpu (X, 1 -> 2 -> 1 threads)",
        "cpu (X, 1 threads) -> cpu (X, 2 threads) -> cpu (X, 1 threads) -> cuda (H)",
    ]
    assert [made["versions"]["torch"] for made in said] == [
        *[torch_version] * 3,
        *[f"{torch_version} -> 9.9"] * 2,
        f"{torch_version} -> 9.9 -> {torch_version}",
    ]
    assert said[0]["versions"] == here["versions"] and [made["commit"] for made in said] == [
        *[None] * 4,
        *["unknown -> abc"] * 2,
    ]


def test_an_interrupted_attack_records_both_thread_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_flags: tuple[str, ...]
) -> None:
    threads = torch.get_num_threads()
    stop_in_the_second_epoch(
        monkeypatch, lambda: helpers.attack("badnet", "r", tmp_path, *small_flags)
    )
    torch.set_num_threads(threads + 1)  # `own_folders` sets it back
    record = helpers.attack("badnet", "r", tmp_path, *small_flags)
    assert f", {threads} -> {threads + 1} threads)" in record.info["device"]


def test_overwrite_starts_an_unfinished_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "record"
    unfinished(root, monkeypatch)
    record = helpers.attack(
        "badnet", "r", root, *helpers.TINY, "--lr", "0.05", "--overwrite", "True"
    )
    assert record.info["config"]["lr"] == 0.05 and not (root / "r.partial").exists()


def test_with_nothing_to_overwrite_an_unfinished_run_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "record"
    unfinished(root, monkeypatch)
    helpers.attack("badnet", "r", root, *helpers.TINY, "--epochs", "2", "--overwrite", "True")
    assert "continuing train after epoch 1 of 2" in capsys.readouterr().err


TWO = (*helpers.TINY, "--epochs", "2", "--seed", "5", "--overwrite", "True")


def stopped_replacement(root: Path, tiny: Record, monkeypatch: pytest.MonkeyPatch) -> Record:
    """A finished record, and an unfinished run that is to replace it, stopped in its second
    epoch."""
    record = helpers.copy(tiny, root)
    stop_in_the_second_epoch(monkeypatch, lambda: helpers.attack("badnet", "tiny", root, *TWO))
    assert (root / "tiny.partial" / "checkpoint-train.safetensors").exists()
    return record


def stop_in_the_second_epoch(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> None:
    real = Run.epochs

    def epochs(self: Run, stage: str, total: int, **state: Any) -> Iterator[int]:
        for epoch in real(self, stage, total, **state):
            if epoch == 1:
                raise Stop
            yield epoch

    with monkeypatch.context() as patch:
        patch.setattr(Run, "epochs", epochs)
        with pytest.raises(Stop):
            work()


def test_a_stopped_replacement_continues_and_until_then_loses_nothing(
    tiny: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "record"
    whole = helpers.attack("badnet", "whole", tmp_path / "elsewhere", *TWO)
    old = weights(stopped_replacement(root, tiny, monkeypatch).folder)
    helpers.attack("none", "other", root, *helpers.TINY)
    assert (root / "tiny.partial" / "checkpoint-train.safetensors").exists(), (
        "a run beside it does not sweep it"
    )
    assert all(torch.equal(old[name], value) for name, value in weights(root / "tiny").items()), (
        "the old record is in place"
    )
    with pytest.raises(UserError, match="exists and is finished"):
        helpers.attack("badnet", "tiny", root, *TWO[:-2])
    begun = epochs_of(monkeypatch, lambda: helpers.attack("badnet", "tiny", root, *TWO))
    assert begun == [1], "the first epoch is not done again"
    assert same(whole.folder, root / "tiny") and not (root / "tiny.partial").exists()
    begun = epochs_of(monkeypatch, lambda: helpers.attack("badnet", "tiny", root, *TWO))
    assert begun == [0, 1], "with control: a finished one is made anew"


def test_a_stopped_replacement_of_a_result_continues(
    tiny: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, flags = (
        helpers.copy(tiny, tmp_path),
        ("--epochs", "2", "--score_every", "0", "--overwrite", "True"),
    )
    first = epochs_of(monkeypatch, lambda: helpers.defend("ft", record, *flags))
    stop_in_the_second_epoch(monkeypatch, lambda: helpers.defend("ft", record, *flags))
    helpers.defend("ft", record, *flags, "--run_name", "beside")
    assert first == [0, 1] and epochs_of(
        monkeypatch, lambda: helpers.defend("ft", record, *flags)
    ) == [1]


@pytest.mark.parametrize(
    "change", ["settings", "result", "code", "checkpoint", "marker", "no flag"]
)
def test_another_replacement_starts_again(
    change: str, tiny: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings, what is replaced, and the code must be the same, and what was saved must be
    whole."""
    root = tmp_path / "record"
    flags: tuple[str, ...] = TWO
    stopped_replacement(root, tiny, monkeypatch)
    stage = root / "tiny.partial"
    if change == "settings":
        flags = (*TWO, "--lr", "0.05")
    elif change == "result":
        os.rename(root / "tiny", root / "moved")
        helpers.attack("badnet", "elsewhere", root, *helpers.TINY, "--seed", "7")
        os.rename(root / "elsewhere", root / "tiny")
    elif change == "code":
        monkeypatch.setattr("backdoorlab.execution.stage.code_version", lambda _file: "another")
    elif change == "checkpoint":
        path = stage / "checkpoint-train.safetensors"
        path.write_bytes(path.read_bytes()[:-9])
    else:
        begun = reading.read_json(stage / "run.json")
        del begun["replaces"]
        (stage / "run.json").write_text("{" if change == "marker" else json.dumps(begun))
    assert epochs_of(monkeypatch, lambda: helpers.attack("badnet", "tiny", root, *flags)) == [0, 1]
    assert not stage.exists()


def test_what_replaced_the_same_result_first_lets_the_stage_be_swept(
    tiny: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "record"
    stopped_replacement(root, tiny, monkeypatch)
    shutil.copytree(root / "tiny.partial", tmp_path / "kept")
    helpers.attack("badnet", "tiny", root, *TWO)
    shutil.copytree(tmp_path / "kept", root / "tiny.partial")
    helpers.attack("none", "other", root, *helpers.TINY)
    assert not (root / "tiny.partial").exists()


def epochs_of(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> list[int]:
    """The epochs that a run begins."""
    begun, real = [], Run.epochs

    def epochs(self: Run, stage: str, total: int, **state: Any) -> Iterator[int]:
        for epoch in real(self, stage, total, **state):
            begun.append(epoch)
            yield epoch

    with monkeypatch.context() as patch:
        patch.setattr(Run, "epochs", epochs)
        work()
    return begun


def test_a_damaged_checkpoint_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "record"
    unfinished(root, monkeypatch)
    path = root / "r.partial" / "checkpoint-train.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(
        UserError, match=r"checkpoint-train.safetensors: damaged file .*--overwrite"
    ):
        helpers.attack("badnet", "r", root, *helpers.TINY, "--epochs", "2")


def test_a_finished_record_is_replaced_only_when_told_and_only_by_a_finished_one(
    tmp_path: Path, tiny: Record
) -> None:
    record = helpers.copy(tiny, tmp_path)
    before = weights(record.folder)
    with pytest.raises(UserError, match=r"exists and is finished.*--overwrite True"):
        helpers.attack("badnet", "tiny", tmp_path, *helpers.TINY)
    with pytest.raises(UserError, match="diverged"):
        helpers.attack(
            "badnet", "tiny", tmp_path, *helpers.TINY, "--lr", "1e30", "--overwrite", "True"
        )
    assert all(
        torch.equal(before[name], value) for name, value in weights(record.folder).items()
    ), "the old record outlives a failure"
    again = helpers.attack(
        "badnet", "tiny", tmp_path, *helpers.TINY, "--seed", "5", "--overwrite", "True"
    )
    assert again.info["seed"] == 5 and not all(
        torch.equal(before[name], value) for name, value in weights(again.folder).items()
    )
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.name != "record") == ["tiny"]


def test_a_foreign_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(UserError, match="not ours to replace"):
        helpers.attack("badnet", "thesis", tmp_path, *helpers.TINY, "--overwrite", "True")
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


def test_what_its_own_reader_refuses_is_not_published_and_its_training_is_kept(
    small: Record, small_flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One such record made `table` and `report` fail for all records."""
    root = tmp_path / "record"
    record = helpers.copy(small, root)
    defenses = record.folder / "defense" / "ft"
    for make, target, file in (
        (lambda: helpers.attack("badnet", "x", root, *small_flags), root / "x", "record.json"),
        (
            lambda: helpers.defend("ft", record, *helpers.short_flags("ft")),
            defenses / "seed0",
            "result.json",
        ),
    ):
        with monkeypatch.context() as patched:
            for module in ("attack", "defense"):
                patched.setattr(
                    f"backdoorlab.execution.{module}.made_on", lambda stage: {"device": 3}
                )
            with pytest.raises(
                UserError,
                match=(
                    rf"^not published, for it could not be read back: .*{file}: .*nothing usable on"
                    r" device.* run the same"
                ),
            ):
                make()
        stage = target.with_name(f"{target.name}.partial")
        assert not target.exists() and any(stage.glob("checkpoint-*")), (
            "what took the time is there"
        )
        make()
        assert (target / file).is_file() and not stage.exists(), (
            "a control: the same command goes on, and is done"
        )


def test_a_loss_that_is_no_number_stops_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "record"
    argv = ["--save_folder_name", "r", "--record_root", str(root), *helpers.TINY, "--lr", "1e30"]
    assert main(str(helpers.CHECKOUT / "attack" / "badnet.py"), argv) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert (
        "loss became nan" in line
        and "stage train, epoch 0" in line
        and "lower the learning rate" in line
    )
    assert not (root / "r").exists()


def test_a_defense_that_diverges_leaves_no_result(tiny: Record, tmp_path: Path) -> None:
    record = helpers.copy(tiny, tmp_path)
    with pytest.raises(UserError, match="diverged"):
        helpers.defend("ft", record, "--epochs", "3", "--lr", "1e30")
    assert not (record.folder / "defense" / "ft" / "seed0").exists()
    assert helpers.defend("ft", record, "--epochs", "1", "--run_name", "calm") is not None


def test_scoring_changes_no_weight_and_the_seed_decides_all(tmp_path: Path) -> None:
    root, two = tmp_path / "record", (*helpers.TINY, "--epochs", "2")
    runs = {
        every: helpers.attack("badnet", f"every{every}", root, *two, "--score_every", str(every))
        for every in (0, 1, 2)
    }
    assert same(runs[0].folder, runs[1].folder) and same(runs[0].folder, runs[2].folder)
    assert runs[0].info["scores"] == runs[1].info["scores"]
    assert runs[0].info["image_passes"] == runs[1].info["image_passes"], "evaluation is not charged"
    other = helpers.attack("badnet", "seed1", root, *two, "--seed", "1")
    assert not same(runs[0].folder, other.folder)
    assert not torch.equal(runs[0].train_poison.index, other.train_poison.index)
    lines = [(record.folder / "history.csv").read_text().splitlines() for record in runs.values()]
    assert [len(found) for found in lines] == [3, 3, 3]
    assert "clean_accuracy" in lines[1][0] and lines[1][1].count(",") == lines[1][0].count(",")


def test_the_state_before_a_run_does_not_matter(tmp_path: Path) -> None:
    root = tmp_path / "record"
    first = helpers.attack("badnet", "a", root, *helpers.TINY)
    torch.manual_seed(12345)
    torch.rand(7)
    assert same(first.folder, helpers.attack("badnet", "b", root, *helpers.TINY).folder)


def test_a_defense_repeats_itself(tiny: Record, tmp_path: Path) -> None:
    record, flags = helpers.copy(tiny, tmp_path), ("--epochs", "2")
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        helpers.defend("ft", record, *flags, "--run_name", run, "--seed", str(seed))
    folder = record.folder / "defense" / "ft"
    assert same(folder / "a", folder / "b") and not same(folder / "a", folder / "c")
    assert not same(folder / "a", record.folder), "fine-tuning did move the weights"


# --- once, notes, splits


def new_run(folder: Path, log: ScoreLog | None = None) -> Run:
    callbacks = (log or ScoreLog()).callbacks()
    return Run(folder, seed=0, device=torch.device("cpu"), precision="fp32", callbacks=callbacks)


def test_once_computes_once_and_restores_the_random_state(tmp_path: Path) -> None:
    calls: list[int] = []

    def compute() -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"x": torch.rand(3, generator=run.generator)}

    run = new_run(tmp_path)
    first = run.cached("thing", compute)
    run.note("after")
    after = torch.rand(2, generator=run.generator)
    run = new_run(tmp_path)
    again = run.cached("thing", compute)
    assert torch.equal(first["x"], again["x"]) and len(calls) == 1
    assert torch.equal(after, torch.rand(2, generator=run.generator)), (
        "draws after it are the same, too"
    )
    assert "after" not in run.notes
    assert not torch.equal(run.cached("other", compute)["x"], first["x"]) and len(calls) == 2


@pytest.mark.parametrize("name", ["my sheet", "", "a/b", ".hidden", "../x", "x" * 101, "sheet\n"])
def test_a_picture_whose_name_a_result_may_not_hold_is_refused_when_it_is_given(
    tmp_path: Path, name: str
) -> None:
    run = new_run(tmp_path)
    images = [torch.zeros(1, 1, 2, 2, dtype=torch.uint8)]
    with pytest.raises(
        UserError, match=re.escape(f"run.picture({name!r}): a name is of at most 100 letters")
    ):
        run.picture(name, images)
    assert not run.pictures
    run.picture("my_sheet-1.2", images)
    assert list(run.pictures) == ["my_sheet-1.2"], "a control"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda run: run.report_split(torch.tensor([0, 1, 2], dtype=torch.uint8)),
            "who is flagged as bool (3,), one for each training image, got uint8 (3,)",
        ),
        (lambda run: run.report_split(torch.tensor([0, 1, 1])), "got int64 (3,)"),
        (lambda run: run.report_split(torch.zeros(4, dtype=torch.bool)), "got bool (4,)"),
        (
            lambda run: run.report_split(
                torch.zeros(3, dtype=torch.bool), suspicion=torch.zeros(3, 2)
            ),
            "suspicion as float (3,), one for each",
        ),
        (
            lambda run: run.log(loss=torch.tensor(2.0)),
            (
                "run.log(loss=...): expected a number or a word, got float32 (): a tensor's number"
                " is its .item()"
            ),
        ),
        (
            lambda run: run.log(asr=0.5),
            "run.log(asr=...): the line of history has a asr of its own",
        ),
        (
            lambda run: run.watch(clean_accuracy=torch.tensor(0.5)),
            "run.watch(clean_accuracy=...): the line of history",
        ),
        (lambda run: run.note(3), "run.note(3): expected a sentence, got int"),
        (
            lambda run: run.picture("p", torch.zeros(3, 1, 4, 4, dtype=torch.uint8)),
            "expected rows of images, uint8 (n, C, H, W) each, got uint8 (1, 4, 4)",
        ),
        (
            lambda run: next(run.epochs("t/x y", 2)),
            (
                "run.epochs('t/x y'): a name is of at most 100 letters, digits, and _ . -, such as"
                " 'my_epochs'"
            ),
        ),
        (lambda run: run.cached("a/b", dict), "run.cached('a/b'): a name is of at most"),
    ],
)
def test_what_a_method_says_wrongly_is_refused_where_it_says_it(
    call: Callable[[Run], object], message: str, tmp_path: Path
) -> None:
    run = Run(tmp_path, seed=0, device=torch.device("cpu"), precision="fp32", train_size=3)
    with pytest.raises(UserError, match=re.escape(message)):
        call(run)
    assert (
        run.flagged is None and not run.notes and not run.pictures and not list(tmp_path.iterdir())
    )
    run.report_split(torch.tensor([True, False, False]), suspicion=torch.arange(3))
    run.log(loss=2.0, word="x", nothing=None)
    run.watch(mine=torch.tensor(0.5))
    run.note("a control")


def test_a_stage_of_another_length_is_refused(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    assert list(new_run(tmp_path).epochs("s", 2, model=model)) == [0, 1]
    assert list(new_run(tmp_path).epochs("s", 2, model=model)) == [], (
        "finished: nothing is trained again"
    )
    with pytest.raises(UserError, match="started with 2 epochs, not 3"):
        list(new_run(tmp_path).epochs("s", 3, model=model))


@pytest.mark.parametrize(
    ("between", "goes_on_at"), [(0.0, 2), (1000.0, 0)], ids=["each epoch", "the last alone"]
)
def test_where_checkpoints_are_rare_a_run_goes_on_further_back(
    between: float, goes_on_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, whose epochs can be shorter than the writing of a checkpoint."""
    monkeypatch.setitem(BETWEEN_CHECKPOINTS, "cpu", between)
    model = torch.nn.Linear(2, 2)
    with pytest.raises(Stop):
        for epoch in new_run(tmp_path).epochs("s", 4, model=model):
            if epoch == 2:
                raise Stop
    log = ScoreLog()
    again = new_run(tmp_path, log)
    assert list(again.epochs("s", 4, model=model)) == list(range(goes_on_at, 4))
    assert [row["epoch"] for row in log.history] == [0, 1, 2, 3]
    assert list(new_run(tmp_path).epochs("s", 4, model=model)) == [], (
        "the end of a stage is always kept"
    )


# --- no attribute leads from a method to a score


def reachable(*roots: object) -> list[object]:
    """Every object that attributes lead to: variables, slots, properties, items, and what bound
    methods and partial functions are made of. Names with double underscores, classes, functions
    and modules are left out."""
    waiting, found, seen = list(roots), [], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        found.append(value)  # kept, so that no other object gets its id
        match value:
            case types.ModuleType() | type() | types.FunctionType() | types.BuiltinFunctionType():
                pass
            case types.MethodType():
                waiting.append(value.__self__)
            case functools.partial():
                waiting += [value.func, *value.args, *value.keywords.values()]
            case Mapping():
                waiting += [*value.keys(), *value.values()]
            case list() | tuple() | set() | frozenset() | deque():
                waiting += value
            case str() | bytes() | int() | float() | None | torch.Tensor() | torch.dtype():
                pass
            case _:
                waiting += attributes(value)
    return found


def attributes(value: object) -> Iterator[object]:
    """Values of its variables and slots, and of properties that can be read."""
    slots = [name for base in type(value).__mro__ for name in vars(base).get("__slots__", ())]
    ours = type(value).__module__.startswith(("backdoorlab", "method"))
    properties = [
        name
        for base in type(value).__mro__
        for name, member in vars(base).items()
        if ours and isinstance(member, property)
    ]
    for name in {*getattr(value, "__dict__", {}), *slots, *properties}:
        if not name.startswith("__"):
            with contextlib.suppress(AttributeError, PermissionError):
                yield getattr(value, name)


MEASURED = {*SUMMARY, *VERDICT, "per_class", "tpr", "fpr", "precision", "missed", "train_poison"}
"""Keys under which scores, split qualities and poison are kept."""


def leaks(found: list[object], numbers: set[float], index: torch.Tensor) -> set[str]:
    """What of that a method must not have: by type, by key, by value."""
    wrong = set()
    for value in found:
        if isinstance(value, (Evaluator, Scores, Poison, ScoreLog, Record)):
            wrong.add(type(value).__name__)
        elif isinstance(value, dict) and MEASURED & set(value):
            wrong.add("a key")
        elif isinstance(value, float) and value in numbers:
            wrong.add("a number")
        elif isinstance(value, torch.Tensor) and says_poison(value, index):
            wrong.add("poison")
    return wrong


def says_poison(value: torch.Tensor, index: torch.Tensor) -> bool:
    """Whether a tensor lists the poisoned positions, or is their mask."""
    if value.dim() != 1:
        return False
    if value.dtype == torch.bool:
        value = value.nonzero().squeeze(1)
    return value.dtype == torch.int64 and torch.equal(value, index)


PLANTS: dict[str, tuple[Callable[[DefenderView, Run, ScoreLog], None], set[str]]] = {
    "a history": (
        lambda view, run, log: vars(run).update(history=log.history),
        {"a number", "a key"},
    ),
    "a number": (lambda view, run, log: vars(run).update(x=[log.history[-1]["asr"]]), {"a number"}),
    "qualities": (lambda view, run, log: vars(run).update(x=(log.splits,)), {"a number", "a key"}),
    "the log": (lambda view, run, log: vars(view).update(_x={"y": [log]}), {"ScoreLog"}),
    "a bound method": (
        lambda view, run, log: vars(run).update(
            _callbacks=dataclasses.replace(run._callbacks, save=log._save)
        ),
        {"ScoreLog"},
    ),
    "poison": (
        lambda view, run, log: vars(view.train).update(x=log._train_poison.index),  # type: ignore[union-attr]
        {"poison"},
    ),
}


@pytest.mark.parametrize("plant", [None, *PLANTS])
def test_no_attribute_leads_a_method_to_a_score_or_to_the_poison(
    plant: str | None, tiny: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method is looked at after it was scored and has reported a split; with controls, in which
    something is planted."""
    record, loaded = helpers.copy(tiny, tmp_path), methods.load("defense", "ft")
    logs: list[ScoreLog] = []
    found: list[object] = []

    def keeping(**arguments: Any) -> ScoreLog:
        logs.append(ScoreLog(**arguments))
        return logs[-1]

    def defend(view: DefenderView, config: Any, run: Run) -> torch.nn.Module:
        view.granted.update(everything.granted)  # type: ignore[attr-defined]
        model = real(view, config, run)
        flagged = torch.zeros(len(view.train), dtype=torch.bool)
        flagged[record.train_poison.index[::2]] = True
        flagged[:9] = True
        for _ in run.epochs("more", 1, model=model):
            run.report_split(flagged, suspicion=torch.rand(len(flagged)))
        if plant is not None:
            PLANTS[plant][0](view, run, logs[0])
        found.extend(reachable(view, run))
        return model

    real, everything = loaded.module.defend, whole_view(record)
    monkeypatch.setattr(loaded.module, "defend", defend)
    monkeypatch.setattr("backdoorlab.execution.defense.ScoreLog", keeping)
    argv = ["--result_file", record.name, "--record_root", str(tmp_path), "--epochs", "1"]
    result = run_defense(defense_job(loaded, argv, "test"))

    assert result is not None and [row["stage"] for row in logs[0].history][-1] == "more"
    measured = reachable(
        [{name: row.get(name) for name in SUMMARY} for row in logs[0].history],
        result["after"],
        logs[0].splits,
    )
    floats = {value for value in measured if isinstance(value, float)}
    numbers = {value for value in floats if round(value, 3) != value}  # others arise by chance
    assert len(numbers) > 4 and len(found) > 100
    wrong = leaks(found, numbers, record.train_poison.index)
    assert wrong == set() if plant is None else wrong >= PLANTS[plant][1]


def whole_view(record: Record) -> DefenderView:
    """All that any method can be given."""
    dataset = record.dataset()
    every = ("model", "train", "trusted", "seeds", "split")
    drawn = torch.Generator().manual_seed(0)
    seeds = draw_seeds(record.train_poison, dataset.train.labels, dataset.num_classes, 2, drawn)
    trusted = dataset.train.subset(torch.arange(40))
    split = torch.rand(len(dataset.train), generator=drawn) < 0.1
    return defender_view(record, dataset, every, trusted, torch.device("cpu"), seeds, split)


def test_a_method_cannot_read_its_scores(tiny: Record, tmp_path: Path) -> None:
    log = ScoreLog(train_poison=tiny.train_poison)
    run = Run(tmp_path, seed=0, device=torch.device("cpu"), callbacks=log.callbacks())
    assert run.report_split(torch.zeros(1442, dtype=torch.bool)) is None  # type: ignore[func-returns-value]
    assert log.splits["split"]["tpr"] == 0.0


def test_scores_of_a_run_survive_a_kill(tiny: Record, tmp_path: Path) -> None:
    """History, split qualities and evaluation time are part of a checkpoint, and a listener hears
    only of the lines that are new."""
    model, heard = torch.nn.Linear(2, 2), []
    logs = [
        ScoreLog(
            train_poison=tiny.train_poison,
            on_line=lambda place, row: heard.append((place, row["epoch"])),
        )
        for _ in range(2)
    ]
    for log, stop in zip(logs, (1, None), strict=True):
        run = Run(tmp_path, seed=0, device=torch.device("cpu"), callbacks=log.callbacks())
        with pytest.raises(Stop) if stop else contextlib.nullcontext():
            for epoch in run.epochs("s", 3, model=model):
                if epoch == stop:
                    raise Stop
                run.report_split(torch.zeros(1442, dtype=torch.bool), name=f"at{epoch}")
                log.evaluation_seconds += 1.0
    missed = len(tiny.train_poison)
    assert [row.get("at0_missed") for row in logs[1].history] == [missed, None, None]
    assert list(logs[1].splits) == ["at0", "at1", "at2"]
    assert logs[1].evaluation_seconds == 3.0
    assert heard == [(1, 0), (2, 1), (3, 2)]


def test_a_record_is_read_once_before_a_defense_starts(
    tiny: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, reads = helpers.copy(tiny, tmp_path), []
    real = records.read_folder

    def counting(folder: Path) -> Record:
        reads.append(folder)
        return real(folder)

    monkeypatch.setattr(records, "read_folder", counting)
    loaded = methods.load("defense", "ft")
    argv = ["--result_file", record.name, "--record_root", str(tmp_path), "--epochs", "1"]
    job = defense_job(loaded, argv, "test")
    assert run_defense(job) is not None and reads == [record.folder]
    again = Job(loaded, dataclasses.replace(job.config, run_name="again"))
    assert run_defense(again) is not None and len(reads) == 2, "a control: a job without its record"
    monkeypatch.setattr("backdoorlab.execution.defense.cache", lambda function: function)
    defense_job(loaded, argv, "test")
    assert len(reads) >= 4, "a control: the parser asks for it more than once"


# --- every option is read

READ_ELSEWHERE = {
    "debug": "by the command line",
    "yaml_path": "by the parser",
    "overwrite": "where something is there already, as tested above",
}
ATTACK_VARIANTS: dict[str, list[tuple[str, ...]]] = {
    "blind": [("--history", "2", "--loss_threshold", "9")],
    "inputaware": [("--mask_epochs", "1", "--generator_width", "4")],
    "lc": [("--surrogate_epochs", "1", "--pgd_steps", "2")],
    "lira": [("--trigger_epochs", "1")],
    "poison_ink": [("--encoder_steps", "10")],
    "ssba": [("--encoder_steps", "10")],
    "trojannn": [("--surrogate_epochs", "1", "--steps", "5")],
}
DEFENSE_VARIANTS: dict[str, list[tuple[str, ...]]] = {
    "abl": [("--isolation_epochs", "1", "--finetune_epochs", "1", "--unlearn_epochs", "1")],
    "anp": [("--iterations", "1")],
    "asd": [
        (
            "--stage1_epochs",
            "2",
            "--stage2_epochs",
            "1",
            "--stage3_epochs",
            "1",
            "--iterations",
            "1",
        )
    ],
    "bu": [
        ("--search_epochs", "1", "--accept", "0", "--epochs", "1"),
        ("--trigger", "blend", "--search_epochs", "1", "--hidden", "8", "--epochs", "1"),
    ],
    "dau": [
        # With its guard off, the head flags at least the pool, whatever model it is.
        (
            "--pool",
            "isolation",
            "--isolation_epochs",
            "1",
            "--breakdown",
            "1",
            "--loss",
            "both",
            "--epochs",
            "1",
            "--head_epochs",
            "5",
        ),
        ("--many_classes", "1e9", "--subtask", "anti_learning"),  # so that the other tests run
        # All that is not certain is flagged, some of the label's other group, too.
        ("--threshold", "0.99", "--rest_flagged", "0", "--subtask", "anti_learning"),
    ],
    "cognitive_distillation": [("--steps", "1")],
    "fct": [("--epochs", "1", "--apart_epochs", "1")],
    "dbr": [("--train_epochs", "1", "--apart_epochs", "1", "--epochs", "1")],
    "bti_dbf": [
        (
            *("--rounds", "1", "--generator_width", "2", "--identity_epochs", "1"),
            *("--mask_epochs", "1", "--invert_epochs", "1", "--unlearn_epochs", "1"),
        )
    ],
    "fp": [("--epochs", "1")],
    "fst": [("--epochs", "1")],
    "anti_learning": [
        (
            *("--pool", "isolation", "--isolation_epochs", "1"),
            *("--breakdown", "1", "--head_epochs", "5"),
        ),
        ("--many_classes", "1e9"),
        ("--threshold", "0.99", "--rest_flagged", "0"),
    ],
    "isolation": [("--epochs", "1")],
    **{
        method: [("--split", "oracle", "--epochs", "1")]
        for method in methods.with_role("unlearner")
        if method != "ssd"
    },
    "ssd": [("--split", "oracle")],
    "ft": [("--epochs", "1")],
    "ft_sam": [("--epochs", "1")],
    "ibau": [
        ("--n_rounds", "1", "--K", "2"),
        ("--n_rounds", "1", "--K", "2", "--solver", "fixed_point", "--augment", "True"),
    ],
    "nad": [("--teacher_epochs", "1", "--epochs", "1")],
    # Every trigger works, and each mask below the median is too small.
    "nc": [
        ("--search_epochs", "1", "--works", "0", "--index", "0", "--epochs", "1"),
    ],
    "npd": [("--epochs", "1")],
    "rnp": [("--unlearn_epochs", "1", "--recover_epochs", "1")],
    "sau": [("--n_rounds", "1")],
}


def recording(config: Any, seen: set[str]) -> Any:
    """The same config, noting every field that is asked for outside `science()` and `check()`,
    which go through all."""
    base = type(config)

    def get(self: Any, name: str) -> Any:
        if name in fields:
            seen.add(name)
        return object.__getattribute__(self, name)

    fields = {f.name for f in dataclasses.fields(base)}
    spy = type(
        "Spy",
        (base,),
        {
            "__getattribute__": get,
            "science": lambda _self: config.science(),
            "check": lambda _self: config.check(),
        },
    )
    found: Any = object.__new__(spy)
    for name in fields:
        object.__setattr__(found, name, getattr(config, name))
    return found


@pytest.mark.parametrize("method", sorted(methods.available("attack")))
def test_every_option_of_an_attack_is_read(method: str, tmp_path: Path) -> None:
    seen: set[str] = set()
    for k, flags in enumerate(ATTACK_VARIANTS.get(method, [()])):
        argv = [
            "--save_folder_name",
            f"r{k}",
            "--record_root",
            str(tmp_path),
            *helpers.TINY,
            *flags,
        ]
        job = attack_job(methods.load("attack", method), argv, "test")
        run_attack(Job(job.method, recording(job.config, seen)))
    assert {f.name for f in dataclasses.fields(job.config)} - seen <= set(READ_ELSEWHERE)


@pytest.mark.parametrize("method", sorted(methods.available("defense")))
def test_every_option_of_a_defense_is_read(method: str, backdoored: Record, tmp_path: Path) -> None:
    record, loaded = helpers.copy(backdoored, tmp_path), methods.load("defense", method)
    seen: set[str] = set()
    for k, flags in enumerate(DEFENSE_VARIANTS.get(method, [()])):
        argv = [
            "--result_file",
            record.name,
            "--record_root",
            str(tmp_path),
            "--run_name",
            f"r{k}",
            "--score_every",
            "0",
            *flags,
        ]
        job = defense_job(loaded, argv, "test")
        run_defense(Job(loaded, recording(job.config, seen)))
    unread = {f.name for f in dataclasses.fields(loaded.config_class)} - seen - set(READ_ELSEWHERE)
    shared = {f.name for f in dataclasses.fields(configs.DefenseConfig)}
    assert unread <= (
        {"trusted_ratio", "trusted_count", "trusted_path"} & shared
        if "trusted" not in loaded.assumes
        else set()
    )


def test_a_copy_of_a_run_folder_is_not_a_result(tiny: Record, tmp_path: Path) -> None:
    record = helpers.copy(tiny, tmp_path)
    helpers.defend("ft", record, "--epochs", "1")
    folder = record.folder / "defense" / "ft"
    with pytest.raises(UserError, match="exists and is finished"):
        helpers.defend("ft", record, "--epochs", "1")
    shutil.rmtree(folder / "seed0")
    (folder / "seed0").mkdir()
    with pytest.raises(UserError, match=r"holds no result.json, so it is not ours"):
        helpers.defend("ft", record, "--epochs", "1")
