"""Hostile and damaged files: what is loaded equals what was written, or is refused in one line.

Nothing in them runs, and none of them fills the memory. docs/reference/reliability.md lists these
promises.
"""

import json
import os
import pickle
import random
import shutil
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
import yaml

from backdoorlab.__main__ import main
from backdoorlab.datasets import cache, cards
from backdoorlab.errors import UserError
from backdoorlab.exchange.verify import verify, verify_record
from backdoorlab.execution.defense import defense_job, run_defense
from backdoorlab.record import Record, build_model, read_folder, read_result
from backdoorlab.run import Run
from backdoorlab.settings import methods
from backdoorlab.settings.parse import read_yaml
from backdoorlab.storage import reading, writing
from backdoorlab.tables import layout

if sys.platform == "win32":
    pytest.skip("pipes and forks", allow_module_level=True)

Capture = pytest.CaptureFixture[str]
MIB = 1 << 20


def everything(folder: Path) -> Any:
    """Read all of a record and its result of DAU, as values that can be compared."""
    record = read_folder(folder)
    found = verify_record(record)
    if found.wrong:
        raise UserError(found.wrong[0])
    run = folder / "defense" / "dau" / "seed0"
    hashes = [
        reading.tensor_hash(vars(poison)) for poison in (record.train_poison, record.test_poison)
    ]
    hashes += [
        reading.tensor_hash(reading.read_tensors(path)[0])
        for path in (folder / "model.safetensors", run / "model.safetensors")
    ]
    return record.info, read_result(run), hashes


def payload(folder: Path) -> list[Path]:
    """List every file of a record and its results."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


# --- flipped bits


def test_one_flipped_bit_anywhere_is_caught(small: Record, tmp_path: Path) -> None:
    """Flip a bit in each kilobyte of every file, and in every eighth byte of record.json and
    result.json, which no manifest lists."""
    folder = tmp_path / "small"
    shutil.copytree(small.folder, folder)
    everything(folder)
    flips = 0
    for number, path in enumerate(payload(folder)):
        content = path.read_bytes()
        manifest = path.name in ("record.json", "result.json")
        for place in (
            range(number % 8, len(content), 8)
            if manifest
            else sorted({*range(0, len(content), 1024), len(content) - 1})
        ):
            damaged = bytearray(content)
            damaged[place] ^= 1 << (place * 5 % 8)
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=path.name) as caught:
                reading.read_sealed(path) if manifest else everything(folder)
            assert "\n" not in str(caught.value)
            flips += 1
        path.write_bytes(content)
    everything(folder)
    assert flips > 700
    print(f"{flips} flips, all caught")


@pytest.mark.slow
def test_every_bit_of_the_two_manifests_is_guarded(small: Record, tmp_path: Path) -> None:
    for source in (
        small.folder / "record.json",
        small.folder / "defense" / "dau" / "seed0" / "result.json",
    ):
        content, path = source.read_bytes(), tmp_path / source.name
        for place in range(8 * len(content)):
            damaged = bytearray(content)
            damaged[place // 8] ^= 1 << (place % 8)
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=path.name):
                reading.read_sealed(path)
        print(f"{8 * len(content)} flips of {path.name}, all caught")


# --- mutants


def mutant(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Change a file as a bad disk, a bad transfer or an attacker would."""
    size = len(content)
    at = rng.randrange(size)
    match rng.randrange(12):
        case 0:
            return content[:at]
        case 1:
            return content + rng.randbytes(rng.randrange(1, 64))
        case 2:
            return content[:at] + bytes(min(64, size - at)) + content[at + 64 :]
        case 3:
            return content[:at] + rng.randbytes(rng.randrange(1, 16)) + content[at:]
        case 4:
            return content[:at] + content[at + rng.randrange(1, 64) :]
        case 5:
            return rng.choice(others)
        case 6:
            return content[:at] + rng.choice(others)[at:]
        case 7:  # digits elsewhere in JSON, in a header or in numbers
            places = [i for i in range(min(size, 4096)) if 48 <= content[i] < 58] or [at]
            place = rng.choice(places)
            return content[:place] + b"%d" % rng.randrange(10) + content[place + 1 :]
        case 8:
            words = (
                b"NaN",
                b"1e999",
                b"null",
                b"true",
                b"-1",
                b"[]",
                b"{}",
                b'""',
                b"9" * 400,
                b"[" * 2000,
                b"\x1b[2J",
            )
            return content[:at] + rng.choice(words) + content[at:]
        case 9:
            length = struct.pack(
                "<Q", rng.choice((0, 1, size, max(0, size - 8), 1 << 20, 1 << 40, (1 << 64) - 1))
            )
            return length + content[8:]
        case 10:
            other = rng.randrange(size)
            swapped = bytearray(content)
            swapped[at], swapped[other] = swapped[other], swapped[at]
            return bytes(swapped)
        case _:
            damaged = bytearray(content)
            for _ in range(rng.randrange(1, 4)):
                damaged[rng.randrange(size)] ^= 1 << rng.randrange(8)
            return bytes(damaged)


@pytest.mark.parametrize(
    "count", [1000, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_a_mutant_is_equal_or_refused_in_one_line(
    count: int, small: Record, tmp_path: Path
) -> None:
    """Mutants of every file of a record and of a result."""
    folder = tmp_path / "small"
    shutil.copytree(small.folder, folder)
    original, paths, rng = everything(folder), payload(folder), random.Random(0)
    contents = {path: path.read_bytes() for path in paths}
    outcomes = {"equal": 0, "refused": 0}
    for number in range(count):
        path = paths[number % len(paths)]
        changed = mutant(contents[path], rng, [contents[other] for other in paths if other != path])
        path.write_bytes(changed)
        try:
            assert everything(folder) == original and changed == contents[path], (
                f"mutant {number} of {path.name} loads as something else"
            )
            outcomes["equal"] += 1
        except UserError as error:
            assert path.name in str(error) and "\n" not in str(error), str(error)
            outcomes["refused"] += 1
        path.write_bytes(contents[path])
    print(f"{count} mutants: {outcomes}, no wrong load, no traceback")
    assert outcomes["refused"] > 0.9 * count


def test_the_mutants_do_harm_where_nothing_is_verified(small: Record) -> None:
    """Control: mutants of the weights, read by safetensors alone, load as something else."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    path, rng, wrong = small.folder / "model.safetensors", random.Random(0), 0
    content = path.read_bytes()
    original = reading.tensor_hash(load(content))
    for _ in range(200):
        try:
            wrong += reading.tensor_hash(load(mutant(content, rng, [content[::-1]]))) != original
        except (SafetensorError, KeyError, ValueError, RuntimeError):
            continue
    print(f"{wrong} of 200 load as something else")
    assert wrong > 40


VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    3,
    10**30,
    1e308,
    "",
    "x",
    "../x",
    "\x1b[31m",
    [],
    [1],
    ["x"],
    [None],
    {},
    {"x": 1},
    [[1]],
    "digits",
    0.5,
]


def slots(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the paths to all values in nested JSON."""
    inside = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path] * bool(path) + [
        slot for key, item in inside for slot in slots(item, (*path, key))
    ]


@pytest.mark.parametrize(
    "count", [100, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_a_forged_record_with_a_fitting_checksum_is_one_line_at_most(
    count: int, small: Record, tmp_path: Path, capsys: Capture
) -> None:
    """Whoever makes a record can make its checksum fit. Any value anywhere must load, or be refused
    in one line, also where it is used later."""
    folder = tmp_path / "record" / "small"
    shutil.copytree(small.folder, folder)
    rng, refused = random.Random(0), 0
    run = folder / "defense" / "dau" / "seed0"
    for path in (folder / "record.json", run / "result.json"):
        content = path.read_bytes()
        value = {key: item for key, item in json.loads(content).items() if key != "checksum"}
        found = [slot for slot in slots(value) if len(slot) < 4]
        for _ in range(count):
            forged = json.loads(json.dumps(value))
            slot = rng.choice(found)
            place = forged
            for key in slot[:-1]:
                place = place[key]
            if rng.random() < 0.2 and isinstance(place, dict):
                del place[slot[-1]]
            else:
                place[slot[-1]] = rng.choice(VALUES)
            writing.write_sealed(path, forged)
            try:
                everything(folder)
                record = Record.load("small", folder.parent)
                record.model()
                record.augment()
                record.dataset()
                shown = layout.render(layout.rows([record]), "text")
                assert "\x1b" not in shown
            except UserError as error:
                assert "\n" not in str(error)
                refused += 1
        path.write_bytes(content)
    print(f"{refused} of {2 * count} forgeries refused")
    assert count // 4 < refused < 2 * count


# --- payloads


class Bomb:
    """Object that creates the file `canary` when it is unpickled."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (exec, (f"open({self.canary!r}, 'w').close()",))


def legacy(bomb: Bomb) -> bytes:
    stream = BytesIO()
    torch.save(bomb, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def modern(value: Any) -> bytes:
    stream = BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def archived(bomb: Bomb, form: str) -> bytes:
    stream, data = BytesIO(), pickle.dumps(bomb)
    if form == "zip":
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/version", "3")
    else:
        with tarfile.open(fileobj=stream, mode="w") as tar:
            entry = tarfile.TarInfo("storages")
            entry.size = len(data)
            tar.addfile(entry, BytesIO(data))
    return stream.getvalue()


def numpy_file(bomb: Bomb, many: bool) -> bytes:
    stream, array = BytesIO(), np.array([bomb], dtype=object)
    np.savez(stream, a=array) if many else np.save(stream, array)
    return stream.getvalue()


def in_safetensors(bomb: Bomb) -> bytes:
    """Make a well-formed tensor file of ours whose data and metadata are a pickle."""
    from safetensors.torch import save

    data = pickle.dumps(bomb)
    tensors = {"data": torch.frombuffer(bytearray(data), dtype=torch.uint8)}
    text = json.dumps({"pickle": data.hex()})
    return save(
        tensors, metadata={"backdoorlab": json.dumps([reading.tensor_hash(tensors, text), text])}
    )


def yaml_tag(canary: str) -> bytes:
    return f"!!python/object/apply:builtins.exec [\"open('{canary}', 'w').close()\"]\n".encode()


def payloads(canary: str) -> dict[str, tuple[bytes, Callable[[bytes], Any] | None]]:
    """Return name -> (content, the careless reader that it is made for)."""
    bomb = Bomb(canary)
    careless = lambda data: torch.load(BytesIO(data), weights_only=False)  # noqa: E731
    found: dict[str, tuple[bytes, Callable[[bytes], Any] | None]] = {
        f"pickle protocol {n}": (pickle.dumps(bomb, protocol=n), pickle.loads) for n in range(6)
    }
    found |= {
        "torch zip": (modern(bomb), careless),
        "torch legacy": (legacy(bomb), careless),
        "torch state dict": (modern({"network.conv1.weight": bomb}), careless),
        "torch list": (modern([bomb, torch.ones(2)]), careless),
        "zip by hand": (
            archived(bomb, "zip"),
            lambda d: pickle.loads(zipfile.ZipFile(BytesIO(d)).read("archive/data.pkl")),
        ),
        # One block of 512 bytes is the member's header
        "tar": (archived(bomb, "tar"), lambda d: pickle.loads(d[512:])),
        "npy": (numpy_file(bomb, False), lambda d: np.load(BytesIO(d), allow_pickle=True)),
        "npz": (numpy_file(bomb, True), lambda d: np.load(BytesIO(d), allow_pickle=True)["a"]),
        "yaml tag": (yaml_tag(canary), yaml.unsafe_load),
        "yaml in a key": (b"? " + yaml_tag(canary) + b": 1\n", None),
        "safetensors with a pickle in it": (
            in_safetensors(bomb),
            lambda d: pickle.loads(d[-len(pickle.dumps(bomb)) :]),
        ),
        "python": (f"open({canary!r}, 'w').close()".encode(), lambda d: exec(d)),
        "json of python": (json.dumps({"__reduce__": ["exec", canary]}).encode(), None),
        "pickle behind a safetensors length": (
            struct.pack("<Q", 2) + b"{}" + pickle.dumps(bomb),
            lambda d: pickle.loads(d[10:]),
        ),
        "pickle in base json": (
            b'{"schema": 2}\n' + pickle.dumps(bomb),
            lambda d: pickle.loads(d[14:]),
        ),
    }
    return found


def opened_everywhere(data: bytes, record: Record, root: Path) -> int:
    """Put a payload in place of each file that we read, and read it.

    Returns the number of files that were accepted, as plain data.
    """
    taken = 0

    def attempt(read: Callable[[], Any]) -> None:
        nonlocal taken
        try:
            read()
            taken += 1
        except (UserError, FileNotFoundError) as error:
            assert "\n" not in str(error)

    for source in payload(record.folder):
        folder = root / "small"
        shutil.copytree(record.folder, folder)
        path = folder / source.relative_to(record.folder)
        path.write_bytes(data)
        # A manifest that lists the payload with its own hash, so that the reader behind it is
        # reached, too.
        owner = path.parent / ("result.json" if "defense" in path.parts else "record.json")
        attempt(lambda folder=folder: everything(folder))  # type: ignore[misc]
        if path != owner and path.suffix == ".safetensors":
            listed = reading.read_json(owner)["files"]
            helpers.edit_json(
                owner,
                files={**listed, path.name: {"sha256": reading.sha256(path), "size": len(data)}},
            )
            attempt(lambda folder=folder: everything(folder))  # type: ignore[misc]
        shutil.rmtree(folder)
    for name in (
        "checkpoint-train.safetensors",
        "run.json",
        "meta.json",
        "train_images.npy",
        "classes.json",
        "mine.yaml",
    ):
        path = root / name
        path.write_bytes(data)
    attempt(lambda: reading.read_tensors(root / "checkpoint-train.safetensors"))
    attempt(lambda: reading.read_json(root / "run.json"))
    attempt(lambda: cache.read_cache(root, "mine"))
    attempt(lambda: cards.names_in_json(root, 3))
    attempt(lambda: read_yaml(root / "mine.yaml"))
    return taken


def test_no_payload_runs(small: Record, tmp_path: Path) -> None:
    """Try more than 20 files that run code in a careless reader, in every place that we read."""
    canary, fired, taken = tmp_path / "canary", 0, 0
    found = payloads(str(canary))
    for number, (data, _) in enumerate(found.values()):
        root = tmp_path / str(number)
        root.mkdir()
        taken += opened_everywhere(data, small, root)
        assert not canary.exists()
    for data, careless in found.values():
        if careless is not None:
            careless(data)
            fired += canary.exists()
            canary.unlink(missing_ok=True)
    print(
        f"{len(found)} payloads in every place: 0 ran, {taken} places read one as plain data; the"
        f" control ran {fired}"
    )
    assert len(found) > 20 and fired >= 18


# --- wrong data


def _dataset(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        info = reading.read_json(folder / "record.json")
        helpers.edit_json(folder / "record.json", dataset={**info["dataset"], **changes})

    return change


def _top(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: helpers.edit_json(folder / "record.json", **changes)


def _poison(name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def forge(folder: Path) -> None:
        path = folder / f"{name}.safetensors"
        tensors = dict(reading.read_tensors(path)[0])
        change(tensors)
        writing.write_tensors(path, tensors)
        listed = reading.read_json(folder / "record.json")["files"]
        helpers.edit_json(
            folder / "record.json",
            files={
                **listed,
                path.name: {"sha256": reading.sha256(path), "size": path.stat().st_size},
            },
        )

    return forge


def _set(
    key: str, value: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({key: value(tensors[key])})


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "other data": (_dataset(fingerprint="0" * 64), "fingerprint 000000000000"),
    "image shape": (
        _dataset(image_shape=[1, 16, 16]),
        "train_poison.safetensors.*images: expected",
    ),
    "number of images": (_dataset(train_size=95), "its data set has images"),
    "class count": (_top(num_classes=4), "not the weights of|4 classes"),
    "trigger size": (
        _poison("test_poison", _set("images", lambda x: x[:, :, :4, :4].contiguous())),
        "test_poison.safetensors.*images: expected",
    ),
    "images of float": (
        _poison("train_poison", _set("images", lambda x: x.float())),
        "train_poison.safetensors.*images: expected uint8",
    ),
    "label too large": (
        _poison("train_poison", _set("labels", lambda x: x + 3)),
        r"train_poison.safetensors.*label outside 0\.\.2",
    ),
    "negative label": (
        _poison("test_poison", _set("original_labels", lambda x: x - 3)),
        "test_poison.safetensors.*label outside",
    ),
    "index too large": (
        _poison("train_poison", _set("index", lambda x: x + 96)),
        "train_poison.safetensors.*index",
    ),
    "index twice": (
        _poison("train_poison", _set("index", lambda x: x * 0)),
        "train_poison.safetensors.*index",
    ),
    "unknown kind": (
        _poison("train_poison", _set("kind", lambda x: x + 7)),
        "train_poison.safetensors.*kind",
    ),
    "columns of two lengths": (
        _poison("train_poison", _set("labels", lambda x: x[1:].clone())),
        "train_poison.safetensors.*labels: expected",
    ),
    "a column too many": (
        _poison("train_poison", lambda t: t.update(extra=torch.ones(2))),
        "train_poison.safetensors.*extra: expected nothing",
    ),
    "no column": (
        _poison("train_poison", lambda t: t.clear()),
        "train_poison.safetensors.*expected",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_data_are_refused_before_training(
    case: str, small: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with hashes and checksums that fit, as whoever made it would leave them."""
    import re

    change, message = WRONG[case]
    change(helpers.copy(small, tmp_path).folder)
    begun: list[Any] = []

    def epochs(*args: Any, **_: Any) -> Any:
        begun.append(args)
        return iter(())

    monkeypatch.setattr(Run, "epochs", epochs)
    argv = ["--result_file", "small", "--record_root", str(tmp_path), *helpers.short_flags("ft")]
    with pytest.raises(UserError) as caught:
        run_defense(defense_job(methods.load("defense", "ft"), argv, "test"))
    assert re.search(message, str(caught.value)) and "\n" not in str(caught.value), str(
        caught.value
    )
    assert not begun
    helpers.copy(small, tmp_path / "sound")
    argv[3] = str(tmp_path / "sound")
    run_defense(defense_job(methods.load("defense", "ft"), argv, "test"))
    assert begun, "the same command reaches the training where nothing was changed"


# --- memory


def extra_memory(work: Callable[[], Any], said: Path) -> tuple[int, str]:
    """Run `work` in a forked child.

    Returns:
        (bytes by which its memory grew at most, how it ended).
    """

    def resident(key: str) -> int:
        return next(
            int(line.split()[1]) * 1024
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith(key)
        )

    pid = helpers.fork()
    if pid == 0:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
            before = resident("VmRSS")
            try:
                work()
                outcome = "taken"
            except (UserError, FileNotFoundError) as error:
                outcome = f"refused {error}"
            said.write_text(f"{resident('VmHWM') - before} {outcome}")
        except BaseException as error:
            said.write_text(f"0 broken {error!r}")
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    number, _, outcome = said.read_text().partition(" ")
    return int(number), outcome


def _sparse(name: str, size: int, listed: bool) -> Callable[[Path], None]:
    """Make a huge sparse file with a fitting header. `listed`: whether the manifest has its
    size."""

    def change(folder: Path) -> None:
        header = json.dumps(
            {"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
        ).encode()
        with open(folder / name, "wb") as stream:
            stream.write(struct.pack("<Q", len(header)) + header)
            stream.truncate(8 + len(header) + size)
        if listed:
            manifest = reading.read_json(folder / "record.json")["files"]
            entry = {"sha256": "0" * 64, "size": 8 + len(header) + size}
            helpers.edit_json(folder / "record.json", files={**manifest, name: entry})

    return change


def _header(text: bytes, listed: bool = True) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        manifest = reading.read_json(folder / "record.json")["files"]
        entry = {"sha256": reading.sha256(path), "size": path.stat().st_size}
        helpers.edit_json(folder / "record.json", files={**manifest, path.name: entry})

    return change


def _architecture(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        helpers.edit_json(
            folder / "record.json",
            architecture={**reading.read_json(folder / "record.json")["architecture"], **changes},
        )

    return change


def _raw(name: str, data: Callable[[], bytes]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(data())

    return change


BOMBS: dict[str, Callable[[Path], None]] = {
    "a sparse file of 8 GB": _sparse("model.safetensors", 8 << 30, listed=False),
    "a sparse file of 8 GB that the manifest lists": _sparse(
        "model.safetensors", 8 << 30, listed=True
    ),
    "a listed sparse poison of 8 GB": _sparse("train_poison.safetensors", 8 << 30, listed=True),
    "a network of width 100,000": _architecture(width=100_000),
    "a network of a billion classes": _top(num_classes=10**9),
    "a large network of timm": _architecture(name="resnet152", width=None),
    "JSON of 60 MB": _raw("record.json", lambda: b'{"x": [' + b"[]," * (20 * MIB) + b"0]}"),
    "JSON of small lists": _raw(
        "record.json", lambda: b'{"x": [' + b"[]," * (MIB + MIB // 4) + b"0]}"
    ),
    "JSON of nested lists": _raw("record.json", lambda: b"[" * MIB),
    "a header of 30 MB": _header(b'{"x": [' + b"[]," * (10 * MIB) + b"0]}"),
    "a header of a million lists": _header(b'{"x": [' + b"[]," * (MIB + MIB // 4) + b"0]}"),
    "a header of empty tensors": _header(
        b"{"
        + b",".join(
            b'"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % n for n in range(70_000)
        )
        + b"}"
    ),
    "a header that declares 2^62 bytes": _header(
        b'{"x":{"dtype":"U8","shape":[4611686018427387903],"data_offsets":[0,4611686018427387903]}}'
    ),
    "a header whose shape overflows": _header(
        b'{"x":{"dtype":"F64","shape":['
        + b"4611686018427387903," * 15
        + b'8],"data_offsets":[0,8]}}'
    ),
    "images of a million pixels a side": _dataset(image_shape=[1, 1_000_000, 1_000_000]),
    "images of 8192 pixels a side": _dataset(image_shape=[1, 8192, 8192], image_size=8192),
}


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure a peak"
)
@pytest.mark.parametrize("bomb", BOMBS)
def test_no_file_fills_the_memory(bomb: str, small: Record, tmp_path: Path) -> None:
    """Memory grows by at most twice what the sound manifest declares and 200 MB; all are
    refused."""
    folder = helpers.copy(small, tmp_path).folder
    declared = sum(entry["size"] for entry in small.info["files"].values())
    small.model()  # the first use imports
    BOMBS[bomb](folder)

    def read() -> None:
        record = Record.load("small", tmp_path)
        record.new_model()
        record.model()

    used, outcome = extra_memory(read, tmp_path / "said")
    print(f"{bomb}: {used / MIB:.0f} MiB, {outcome[:90]}")
    assert outcome.startswith("refused")
    assert used < 2 * declared + 200e6


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure a peak"
)
def test_the_measure_of_memory_sees_what_careless_reading_takes(
    small: Record, tmp_path: Path
) -> None:
    """Control: such files, parsed or built without a check of their size, do take memory."""
    text = b'{"x": [' + b"[]," * (4 * MIB) + b"0]}"
    used, outcome = extra_memory(lambda: json.loads(text), tmp_path / "said")
    assert outcome == "taken" and used > 250e6
    wide = {**small.info["architecture"], "width": 300}
    used, outcome = extra_memory(
        lambda: build_model(wide, small.info["dataset"]["image_shape"], 3), tmp_path / "said"
    )
    assert outcome == "taken" and used > 50e6


# --- files that change


def test_a_file_that_changes_after_it_was_verified_changes_nothing(
    small: Record, tmp_path: Path
) -> None:
    """What is checked is the memory that is used, and no map of a file that may still change."""
    record = helpers.copy(small, tmp_path)
    before = record.train_poison.images.clone()
    path = record.folder / "train_poison.safetensors"
    with open(path, "r+b") as stream:
        stream.write(bytes(path.stat().st_size))
    assert torch.equal(record.train_poison.images, before)
    other = record.model().state_dict()
    writing.write_tensors(
        record.folder / "model.safetensors", {name: value + 1 for name, value in other.items()}
    )
    with pytest.raises(UserError, match=r"model.safetensors: damaged file"):
        record.model()


def test_what_is_no_file_is_not_waited_for(small: Record, tmp_path: Path) -> None:
    folder = helpers.copy(small, tmp_path).folder
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        Record.load("small", tmp_path)
    with pytest.raises(UserError, match="not a regular file"):
        reading.read_json(folder / "model.safetensors")
    with pytest.raises(UserError, match="not a regular file"):
        reading.read_json(folder)


def test_a_record_without_its_own_checksum_is_refused(small: Record, tmp_path: Path) -> None:
    """Whatever its schema; and one of another schema is refused, whatever its checksum."""
    path = helpers.copy(small, tmp_path).folder / "record.json"
    info = {key: value for key, value in json.loads(path.read_text()).items() if key != "checksum"}
    for schema in (1, 2):
        path.write_text(json.dumps({**info, "schema": schema}))
        with pytest.raises(UserError, match=r"record\.json: damaged file \(no 'checksum'\)"):
            Record.load("small", tmp_path)
    writing.write_sealed(path, {**info, "schema": 1})
    with pytest.raises(UserError, match="schema 1, but this version reads schema 2"):
        Record.load("small", tmp_path)
    writing.write_sealed(path, info)
    assert Record.load("small", tmp_path).info["seed"] == 0, "the same fields, sealed"
    path.write_text(json.dumps({**info, "schema": 1, "checksum": "0" * 64}))
    with pytest.raises(UserError, match="does not match its own checksum"):
        Record.load("small", tmp_path)


# --- verify


def test_verify_says_ok_or_names_every_bad_file(
    small: Record, tmp_path: Path, capsys: Capture
) -> None:
    root = tmp_path / "record"
    for name in ("a", "b", "c"):
        shutil.copytree(small.folder, root / name)
    assert main(["verify"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"OK  {name}  10 files, 1 results of defenses" for name in "abc"
    ]
    assert verify("a", root).files == len(payload(root / "a"))
    (root / "a" / "preview.png").write_bytes(b"x")
    run = root / "b" / "defense" / "dau" / "seed0"
    shutil.copytree(run, root / "b" / "defense" / "dau" / "other")
    shutil.copytree(run, root / "b" / "defense" / "dau" / "begun.partial")
    (run / "model.safetensors").write_bytes(b"x")
    (root / "b" / "defense" / "dau" / "other" / "result.json").unlink()
    assert main(["verify"]) == 2
    out, err = capsys.readouterr()
    assert out.splitlines() == ["OK  c  10 files, 1 results of defenses"]
    assert len(err.splitlines()) == 3 and all(
        line.startswith("error: ") for line in err.splitlines()
    )
    for name in (
        "a/preview.png",
        "b/defense/dau/seed0/model.safetensors",
        "b/defense/dau/other/result.json",
    ):
        assert sum(name in line for line in err.splitlines()) == 1
    assert main(["verify", "c"]) == 0
    assert main(["verify", "d"]) == 2
    assert "no record 'd'" in capsys.readouterr().err


def test_weights_of_another_network_in_a_result_are_named(small: Record, tmp_path: Path) -> None:
    shutil.copytree(small.folder, tmp_path / "small")
    run = tmp_path / "small" / "defense" / "dau" / "seed0"
    writing.write_tensors(run / "model.safetensors", {"x": torch.ones(2)})
    listed = reading.read_json(run / "result.json")["files"]
    entry = {
        "sha256": reading.sha256(run / "model.safetensors"),
        "size": (run / "model.safetensors").stat().st_size,
    }
    helpers.edit_json(run / "result.json", files={**listed, "model.safetensors": entry})
    (line,) = verify("small", tmp_path).wrong
    assert "seed0/model.safetensors" in line and "expected" in line
