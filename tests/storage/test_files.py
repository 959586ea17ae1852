"""Storage: files and folders are written as a whole or not at all, and every damage is noticed."""

import ast
import errno
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from torch import Tensor, nn

from backdoorlab.errors import UserError
from backdoorlab.storage import folders, locks, reading, writing


def tensors() -> dict[str, Tensor]:
    return {
        "f32": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
        "u8": torch.arange(256, dtype=torch.uint8).view(4, 64),
        "i64": torch.tensor([2**62, -1]),
        "bf16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3, 8, 8, dtype=torch.uint8),
    }


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(a[n], b[n]) for n in a
    )


def test_tensors_and_metadata_come_back_equal(tmp_path: Path) -> None:
    path, meta = tmp_path / "a.safetensors", {"list": [1, 2.5, None, "ö"], "nested": {"x": True}}
    writing.write_tensors(path, tensors(), **meta)
    found, found_meta = reading.read_tensors(path)
    assert equal(found, tensors()) and found_meta == meta
    changed = tensors()
    changed["f32"][0, 0] += 1
    assert not equal(found, changed)


def test_the_same_content_is_the_same_bytes(tmp_path: Path) -> None:
    for k in range(8):
        writing.write_tensors(tmp_path / f"{k}", tensors(), x=1)
    writing.write_tensors(tmp_path / "other", tensors(), x=2)
    hashes = {reading.sha256(tmp_path / f"{k}") for k in range(8)}
    assert len(hashes) == 1 and reading.sha256(tmp_path / "other") not in hashes


def test_views_and_shared_storage_are_written_in_full(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    given = {
        "whole": base,
        "again": base,
        "transposed": base.T,
        "row": base[1],
        "first": base[:1],
        "strided": base[:, ::2],
    }
    writing.write_tensors(tmp_path / "a", given)
    found, _ = reading.read_tensors(tmp_path / "a")
    assert equal(found, {name: tensor.contiguous() for name, tensor in given.items()})


def test_tied_weights_of_a_module_come_back(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    writing.write_tensors(tmp_path / "a", model.state_dict())
    found, _ = reading.read_tensors(tmp_path / "a")
    assert set(found) == set(model.state_dict()) and torch.equal(
        found["0.weight"], found["1.weight"]
    )


def test_a_flipped_bit_anywhere_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    writing.write_tensors(path, tensors(), note="x" * 40)
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")
    places = sorted(
        {
            *range(0, len(content), max(1, len(content) // 40)),
            *range(8),
            *range(8, 8 + header, header // 20),
            len(content) - 1,
        }
    )
    assert len(places) >= 60
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            found, _ = reading.read_tensors(path)
        except UserError as error:
            assert "weights.safetensors: damaged file" in str(error) and "\n" not in str(error)
        else:
            pytest.fail(
                f"a flipped bit at byte {place} of {len(content)} went unnoticed: {found.keys()}"
            )
    path.write_bytes(content)
    assert equal(reading.read_tensors(path)[0], tensors())


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 100, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "weights.safetensors"
    writing.write_tensors(path, tensors())
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(UserError, match=r"weights.safetensors: damaged file"):
        reading.read_tensors(path)


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match=r"foreign.safetensors: damaged file"):
        reading.read_tensors(tmp_path / "foreign.safetensors")
    with pytest.raises(FileNotFoundError):
        reading.read_tensors(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_holds_finite_numbers_only(tmp_path: Path, value: float) -> None:
    path = tmp_path / "a.json"
    writing.write_json(path, {"x": 1.5})
    with pytest.raises(ValueError, match="JSON compliant"):
        writing.write_json(path, {"x": value})
    assert reading.read_json(path) == {"x": 1.5}, "the old content is still there"
    path.write_text(json.dumps({"x": value}))
    with pytest.raises(UserError, match=r"a.json: damaged file"):
        reading.read_json(path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b'"text"', b"\xff\xfe{}", b"{'x': 1}", b"[" * 100_000]
)
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"record.json: damaged file"):
        reading.read_json(path)


def test_a_failed_write_leaves_the_old_content_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    writing.write_json(path, {"x": 1})

    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise OSError("disk full")

    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="disk full"):
                writing.write_json(path, {"x": 2})
        assert reading.read_json(path) == {"x": 1}
        assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
    writing.write_json(path, {"x": 2})
    assert reading.read_json(path) == {"x": 2}


def test_a_folder_is_published_whole_and_replaced_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    folders.publish(tmp_path / "one", tmp_path / "target")
    assert (tmp_path / "target" / "file").read_text() == "one" and not (tmp_path / "one").exists()
    real, calls = os.rename, []

    def second_fails(source: Any, target: Any) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError("disk full")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", second_fails)
        with pytest.raises(OSError, match="disk full"):
            folders.replace_folder(tmp_path / "two", tmp_path / "target")
    assert (tmp_path / "target" / "file").read_text() == "one", "the old folder is back"
    folders.replace_folder(tmp_path / "two", tmp_path / "target")
    assert (tmp_path / "target" / "file").read_text() == "two"
    assert [entry.name for entry in tmp_path.iterdir()] == ["target"]


def test_a_linked_folder_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    """Overwrite a link to a record on another disk, twice."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "file").write_text("old")
    root = tmp_path / "record"
    root.mkdir()
    for text in ("one", "two"):
        folders.remove(root / "target")
        (root / "target").symlink_to(tmp_path / "disk")
        (root / "new").mkdir()
        (root / "new" / "file").write_text(text)
        folders.replace_folder(root / "new", root / "target")
        assert (root / "target" / "file").read_text() == text and [
            entry.name for entry in root.iterdir()
        ] == ["target"]
    (root / ".x.trash").symlink_to(tmp_path / "disk")
    folders.tidy(root)
    assert [entry.name for entry in root.iterdir()] == ["target"] and (
        tmp_path / "disk" / "file"
    ).read_text() == "old"


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_optimizer_state_survives_pack_and_unpack(tmp_path: Path, kind: str) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        if kind == "sgd":
            return model, torch.optim.SGD(
                model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4
            )
        return model, torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.8, 0.99))

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        model(
            torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
        ).square().sum().backward()
        optimizer.step()

    model, optimizer = fresh()
    step(model, optimizer, 1)
    found: dict[str, Tensor] = {}
    packed = {
        name: writing.pack(part.state_dict(), found, name)
        for name, part in (("model", model), ("optimizer", optimizer))
    }
    writing.write_tensors(tmp_path / "state", found, state=packed)
    loaded, meta = reading.read_tensors(tmp_path / "state")
    other, other_optimizer = fresh()
    control, control_optimizer = fresh()
    for name, part in (("model", other), ("optimizer", other_optimizer)):
        part.load_state_dict(writing.unpack(meta["state"][name], loaded))
    control.load_state_dict(model.state_dict())
    for m, o in ((model, optimizer), (other, other_optimizer), (control, control_optimizer)):
        step(m, o, 2)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    )
    assert any(
        not torch.equal(a, b) for a, b in zip(model.parameters(), control.parameters(), strict=True)
    ), "the optimizer's memory matters"


def test_pack_keeps_keys_and_types_and_refuses_the_rest() -> None:
    value = {"a": [1, 2.5, None, True, "x"], 3: {"b": torch.ones(2)}, "empty": {}, "nothing": []}
    found: dict[str, Tensor] = {}
    back = writing.unpack(json.loads(json.dumps(writing.pack(value, found, "s"))), found)
    assert list(back) == ["a", 3, "empty", "nothing"] and back["a"] == [1, 2.5, None, True, "x"]
    assert (
        torch.equal(back[3]["b"], torch.ones(2)) and back["empty"] == {} and back["nothing"] == []
    )
    with pytest.raises(TypeError, match="cannot be saved in a checkpoint: object"):
        writing.pack({"x": object()}, {}, "s")


def _try_lock(folder: Path, answer: Any) -> None:
    try:
        with locks.locked(folder):
            answer.put("held")
    except UserError as error:
        answer.put(str(error))


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()

    def other_process() -> str:
        process = context.Process(target=_try_lock, args=(tmp_path / "run", answers))
        process.start()
        answer = answers.get(timeout=120)
        process.join()
        return str(answer)

    with locks.locked(tmp_path / "run"):
        with (
            pytest.raises(UserError, match=rf"being written by process {os.getpid()} on "),
            locks.locked(tmp_path / "run"),
        ):
            pass
        assert f"being written by process {os.getpid()} on " in other_process(), "it says who"
        with locks.locked(tmp_path / "other"):
            pass
    with locks.locked(tmp_path / "run"):
        pass
    assert other_process() == "held", "the lock ends with its block"


def test_what_windows_refuses_is_not_asked_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows opens no folder, flushes no file that is open for reading only, and has no flock.
    Control: without our special cases, these refusals are errors."""
    fcntl = pytest.importorskip("fcntl")
    real_open, real_sync = os.open, os.fsync

    def no_folder(path: Any, *args: Any, **kwargs: Any) -> int:
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "a folder", str(path))
        return real_open(path, *args, **kwargs)

    def written_only(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "not open for writing")
        real_sync(descriptor)

    def work(root: Path) -> None:
        (root / "live.partial").mkdir(parents=True)
        stage = root / "x.partial"
        with locks.locked(stage):
            writing.make_folder(stage / "final")
            writing.write_json(stage / "final" / "a.json", {})
            folders.put(stage / "final", root / "x")
        folders.sweep(root, lambda _stage: True)

    work(tmp_path / "here")
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["x"]
    monkeypatch.setattr(os, "open", no_folder)
    monkeypatch.setattr(os, "fsync", written_only)
    with pytest.raises(PermissionError):
        work(tmp_path / "refused")
    for module in ("writing", "folders"):
        monkeypatch.setattr(f"backdoorlab.storage.{module}.WINDOWS", True)
    with (
        pytest.raises(OSError, match="not open for writing"),
        open(tmp_path / "here" / "x" / "a.json", "rb") as stream,
    ):
        os.fsync(stream.fileno())
    monkeypatch.setattr("backdoorlab.storage.locks.fcntl", None)
    (tmp_path / "there").mkdir()
    work(tmp_path / "there")
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["live.partial", "x"], (
        "nobody can tell whether it is held"
    )


def unsaid(source: str) -> list[str]:
    """List calls that read or write text without an encoding."""
    calls = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    texts = [call for call in calls if call.func.attr in ("read_text", "write_text")]  # type: ignore[attr-defined]
    return [
        ast.unparse(call)
        for call in texts
        if "encoding" not in {keyword.arg for keyword in call.keywords}
    ]


def test_text_is_utf8_whoever_runs_us() -> None:
    assert unsaid("path.read_text()\npath.write_text('x', encoding='utf-8')") == [
        "path.read_text()"
    ], "it would be found"
    sources = [
        path
        for folder in ("backdoorlab", "attack", "defense")
        for path in sorted((helpers.CHECKOUT / folder).rglob("*.py"))
    ]
    assert len(sources) > 50
    assert {
        path.name: found for path in sources if (found := unsaid(path.read_text(encoding="utf-8")))
    } == {}


def test_remove_takes_files_folders_and_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    for name in ("folder", "file", "absent"):
        folders.remove(tmp_path / name)
    assert not list(tmp_path.iterdir())
