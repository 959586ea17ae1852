"""Everything that a page or a figure shows of one measured model, read once and checked against its
manifest."""

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
from ..tables.rows import UNDEFENDED, Damaged, Only, Row, refuse

LARGEST_PART = 16 << 20
"""Bytes of a picture or a history that a page takes in; ours have a few kilobytes."""
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Cell:
    """A record as it was attacked, or one finished run of a defense on it."""

    number: int
    """Its place on the page, from 0."""
    row: Row
    record: Record
    info: Mapping[str, Any] = field(repr=False)
    """record.json or result.json."""

    @property
    def undefended(self) -> bool:
        return self.row.defense == UNDEFENDED

    @property
    def folder(self) -> Path:
        return (
            self.record.folder
            if self.undefended
            else self.record.folder / "defense" / self.row.defense / self.row.run
        )

    @property
    def name(self) -> str:
        """The defense, and its run where that is not the plain one."""
        return (
            self.row.defense
            if self.row.run in ("", "seed0")
            else f"{self.row.defense} {self.row.run}"
        )

    @property
    def triggered_predictions(self) -> list[int] | None:
        """How many triggered test images end in each class; None where there is no triggered image,
        or nobody counted."""
        counts = (self.info["scores"] if self.undefended else self.info).get(
            "triggered_predictions"
        )
        if counts and len(counts) != self.record.info["num_classes"]:
            raise reading.damaged(
                self.folder,
                f"triggered_predictions counts {len(counts)} classes, not"
                f" {self.record.info['num_classes']}",
            )
        return counts if counts and sum(counts) else None

    @property
    def splits(self) -> Mapping[str, Mapping[str, Any]]:
        """Name -> tpr, fpr, precision (each may be None), flagged, of each split that the run
        reported."""
        return self.info.get("splits") or {}

    @property
    def notes(self) -> list[str]:
        return list(self.info.get("notes") or [])

    @cached_property
    def history(self) -> pd.DataFrame:
        """One line for each epoch, numbers only beside `stage`; empty where nothing was kept. `at`
        counts epochs over all stages, from 1."""
        content = self._part("history.csv")
        if content is None or not content.strip():  # a run without an epoch writes an empty one
            return pd.DataFrame({"at": []})
        with reading.one_line(self.folder / "history.csv"):
            found = pd.read_csv(io.BytesIO(content))
        numbers = {
            str(name): pd.to_numeric(found[name], errors="coerce")
            for name in found
            if name != "stage"
        }
        stage = found["stage"].astype(str) if "stage" in found else ""
        return pd.DataFrame({**numbers, "stage": stage, "at": range(1, len(found) + 1)})

    @cached_property
    def pictures(self) -> dict[str, bytes]:
        """Sheets that the run left: name -> PNG."""
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
        """float (N,), what the defense split the training set by, and bool (N,), what is poison;
        None where that was not kept or is not known."""
        if not self.record.known_poison or "split.safetensors" not in self.info["files"]:
            return None
        tensors, _ = reading.read_tensors(
            self.folder / "split.safetensors", entry=self.info["files"]["split.safetensors"]
        )
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
        """Read all that a page shows, so that what is damaged is met here."""
        for _ in (self.history, self.pictures, self.suspicion, self.triggered_predictions):
            pass

    def _part(self, name: str) -> bytes | None:
        """A file's content, as its manifest promises it; None where the manifest does not list
        it."""
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


def gather(
    records: Iterable[Record],
    only: Only | None = None,
    on_damage: Callable[[Damaged], None] = refuse,
) -> list[Cell]:
    """The cells of these records, each record's own first, in the order of `tables.rows.rows`,
    whose arguments these are.

    A result counts as damaged, too, if one of the files that a page shows of it is.
    """
    found: list[Cell] = []
    for record in records:
        # Nothing else of plain training was kept
        infos = [record.info, {"scores": record.info.get("plain_scores"), "files": {}}]
        for row, info in zip(measured.undefended(record), infos, strict=False):
            found.append(Cell(len(found), row, record, info))
        for folder, info in measured.finished(record, only, on_damage):
            cell = Cell(len(found), measured.defended(record, folder, info), record, info)
            try:
                cell.read()
            except UserError as error:
                on_damage(Damaged(record.name, folder.parent.name, folder.name, str(error)))
            else:
                found.append(cell)
    return found
