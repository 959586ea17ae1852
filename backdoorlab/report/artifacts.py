"""Everything that a page or a figure shows of a measured model, read once and checked against the
manifest of its folder."""

import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ..errors import UserError
from ..record import Record
from ..storage import reading
from ..tables import rows as measured
from ..tables.rows import ORACLE, UNDEFENDED, Damaged, Only, Row, refuse

LARGEST_PART = 16 << 20
"""Largest size in bytes of a picture or a history on a page; ours have a few kilobytes."""
PNG = b"\x89PNG\r\n\x1a\n"
"""How a PNG begins."""


@dataclass(frozen=True)
class Cell:
    """One measured model with its files: a record as it was attacked, or one finished run of a
    defense on it."""

    number: int
    """From 0, in the order of the page."""
    row: Row
    record: Record
    info: Mapping[str, Any] = field(repr=False)
    """Content of record.json or result.json."""

    @property
    def undefended(self) -> bool:
        """Whether no defense was run."""
        return self.row.defense == UNDEFENDED

    @property
    def folder(self) -> Path:
        """The folder of its files."""
        record = self.record.folder
        return record if self.undefended else record / "defense" / self.row.defense / self.row.run

    @property
    def name(self) -> str:
        """The defense, followed by the run if that is not seed0, and by the mark of an oracle."""
        defense, run = self.row.defense, self.row.run
        return (defense if run in ("", "seed0") else f"{defense} {run}") + ORACLE * self.row.oracle

    @property
    def triggered_predictions(self) -> list[int] | None:
        """How many triggered test images are classified as each class.

        None if there are no triggered images, or if they were not counted.
        """
        scores = self.info["scores"] if self.undefended else self.info
        # A stranger's record may count other classes than it has.
        counts = scores.get("triggered_predictions")
        if counts and len(counts) != self.record.info["num_classes"]:
            raise reading.damaged(
                self.folder,
                f"triggered_predictions counts {len(counts)} classes, not"
                f" {self.record.info['num_classes']}",
            )
        return counts if counts and sum(counts) else None

    @property
    def splits(self) -> Mapping[str, Mapping[str, Any]]:
        """What the run reported of its splits of the training set.

        Name of the split -> tpr, fpr, precision (each may be None) and flagged.
        """
        return self.info.get("splits") or {}

    @property
    def notes(self) -> list[str]:
        """The sentences that the run left for its reader."""
        return list(self.info.get("notes") or [])

    @cached_property
    def history(self) -> pd.DataFrame:
        """The run's history, a row for each epoch; no row if nothing was kept.

        `stage` is text and every other column is numbers. `at` counts the epochs of all stages
        from 1.
        """
        content = self._part("history.csv")
        # A run without an epoch writes an empty file.
        if content is None or not content.strip():
            return pd.DataFrame({"at": []})

        with reading.one_line(self.folder / "history.csv"):
            found = pd.read_csv(io.BytesIO(content))

        # A stranger's text in a column of numbers becomes NaN.
        numbers = {
            str(name): pd.to_numeric(found[name], errors="coerce")
            for name in found
            if name != "stage"
        }
        stage = found["stage"].astype(str) if "stage" in found else ""
        return pd.DataFrame({**numbers, "stage": stage, "at": range(1, len(found) + 1)})

    @cached_property
    def pictures(self) -> dict[str, bytes]:
        """The run's sheets of images: name -> PNG."""
        found = {}
        for name in sorted(self.info["files"]):
            if name.endswith(".png"):
                content = self._part(name)
                if content is None or not content.startswith(PNG):
                    raise UserError(
                        f"{self.folder / name}: not a PNG. Restore it, or make it again with"
                        " --overwrite"
                    )
                found[name.removesuffix(".png")] = content
        return found

    @cached_property
    def suspicion(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What the defense split the training set by, and what is poison.

        Float (N,) and bool (N,) over the training set; None if the first was not kept or the second
        is not known.
        """
        if not self.record.known_poison or "split.safetensors" not in self.info["files"]:
            return None
        tensors, _ = reading.read_tensors(
            self.folder / "split.safetensors", entry=self.info["files"]["split.safetensors"]
        )

        # One number for each image, or it was made for another training set.
        values, size = tensors.get("suspicion"), self.row.train_size
        if values is None:
            return None
        if values.shape != (size,) or not values.dtype.is_floating_point:
            raise UserError(
                f"{self.folder / 'split.safetensors'}: damaged file (suspicion is not one number"
                f" for each of {size} training images)"
            )
        return values, self.record.train_poison.mask(size)

    def read(self) -> None:
        """Read all that a page shows, so that damage raises here and not while the page is made."""
        for _ in (self.history, self.pictures, self.suspicion, self.triggered_predictions):
            pass

    def _part(self, name: str) -> bytes | None:
        """Read a file and check it against the manifest; None if the manifest does not list it."""
        # The size is looked at first, so that nobody fills the memory.
        entry = self.info["files"].get(name)
        if entry is None:
            return None
        if entry["size"] > LARGEST_PART:
            raise UserError(
                f"{self.folder / name}: {entry['size']:,} bytes are more than a page takes in"
                f" ({LARGEST_PART:,}): leave this record out"
            )
        reading.check_file(self.folder, name, entry)
        return (self.folder / name).read_bytes()


def by_record(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    """Group cells by the name of their record, in the order given."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.row.record, []).append(cell)
    return found


def gather(
    records: Iterable[Record],
    only: Only | None = None,
    on_damage: Callable[[Damaged], None] = refuse,
) -> list[Cell]:
    """Read the cells of records in the order of `tables.rows.rows`, each record's own first.

    Args:
        records: The records to read.
        only: Results to read; None means all that are finished.
        on_damage: Called with each damaged result, which is then left out. The default raises. A
            result also counts as damaged if one of the files that a page shows is.
    """
    found: list[Cell] = []
    for record in records:
        # Of plain training nothing but its scores was kept.
        infos = [record.info, {"scores": record.info.get("plain_scores"), "files": {}}]
        for row, info in zip(measured.undefended(record), infos, strict=False):
            found.append(Cell(len(found), row, record, info))

        for folder, info in measured.finished(record, only, on_damage):
            # Reading everything here lets a damaged file leave out its own result only.
            cell = Cell(len(found), measured.defended(record, folder, info), record, info)
            try:
                cell.read()
            except UserError as error:
                on_damage(Damaged(record.name, folder.parent.name, folder.name, str(error)))
            else:
                found.append(cell)
    return found
