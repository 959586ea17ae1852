"""Threads and precision of all tests (make test-processors sets others), folders of their own, and
records that several files share."""

import os

os.environ["OMP_NUM_THREADS"] = os.environ.get("TEST_THREADS", "1")
os.environ.setdefault("BACKDOORLAB_PRECISION", "fp32")

from collections.abc import Iterator
from pathlib import Path

import helpers
import pytest
import torch

from backdoorlab.record import Record

torch.set_num_threads(helpers.THREADS)

# Threads that share one core round as they do on several, and wait for nobody else's.
worker = os.environ.get("PYTEST_XDIST_WORKER")
if worker and os.environ.get("TEST_ONE_CORE") and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this worker."""
    return tmp_path_factory.mktemp("session")


@pytest.fixture(autouse=True)
def own_folders(
    tmp_path: Path, session_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Records go to the test's own folder, nothing is read from the user's caches."""
    monkeypatch.setenv("BACKDOORLAB_RECORDS", str(tmp_path / "record"))
    monkeypatch.setenv("BACKDOORLAB_CACHE", str(session_folder / "cache"))
    monkeypatch.setenv("BACKDOORLAB_DATA", str(tmp_path / "no-downloads"))
    monkeypatch.delenv("BACKDOORLAB_PLUGINS", raising=False)
    yield
    torch.set_num_threads(helpers.THREADS)


@pytest.fixture(scope="session")
def tiny(session_folder: Path) -> Record:
    """A BadNets record that took a second to make; its model is next to untrained. Copy its folder
    before changing anything."""
    with helpers.environment(BACKDOORLAB_CACHE=session_folder / "cache"):
        return helpers.attack("badnet", "tiny", session_folder / "tiny", *helpers.TINY)


@pytest.fixture(scope="session")
def demo(session_folder: Path) -> Record:
    """The record of `make demo`: the digits with their own settings, a minute."""
    with helpers.environment(BACKDOORLAB_CACHE=session_folder / "cache"):
        return helpers.attack("badnet", "demo", session_folder / "demo", "--score_every", "0")


@pytest.fixture(scope="session")
def backdoored(session_folder: Path) -> Record:
    """A BadNets record that works: high clean accuracy and high ASR."""
    with helpers.environment(BACKDOORLAB_CACHE=session_folder / "cache"):
        return helpers.attack(
            "badnet",
            "backdoored",
            session_folder / "backdoored",
            *helpers.WORKING,
            "--patch_size",
            "4",
        )


@pytest.fixture(scope="session")
def clean(session_folder: Path) -> Record:
    """A record without an attack whose model works."""
    with helpers.environment(BACKDOORLAB_CACHE=session_folder / "cache"):
        return helpers.attack("none", "clean", session_folder / "clean", *helpers.WORKING)


@pytest.fixture(scope="session")
def small_flags(session_folder: Path) -> tuple[str, ...]:
    """Flags of an attack that takes half a second, on images of its own."""
    return helpers.small_flags(helpers.small_data(session_folder / "small-data"))


@pytest.fixture(scope="session")
def small(session_folder: Path, small_flags: tuple[str, ...]) -> Record:
    """A record of a few kilobytes with a result of DAU, which has a split. Copy its folder before
    changing anything."""
    with helpers.environment(BACKDOORLAB_CACHE=session_folder / "cache"):
        record = helpers.attack("badnet", "small", session_folder / "small", *small_flags)
        helpers.defend("dau", record, *helpers.short_flags("dau"))
        return record
