"""The library from Python, with the names and the checks of the command line:

import backdoorlab as bl
record = bl.attack("badnet", save_folder_name="demo5", poison_rate=0.05)
result = bl.defend("dau", record, seed=1)
print(bl.table([record], mean=True))
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from .errors import UserError, suggest
from .execution.attack import attack_job, run_attack
from .execution.defense import defense_job, run_defense
from .record import Record, every_name, record_root
from .settings import methods
from .settings.parse import as_flags
from .tables import formats, layout
from .tables import rows as measured


def attack(method: str, **options: Any) -> Record:
    """Run attack/<method>.py and return its record. Options are its flags by name,
    `save_folder_name` among them.

    A mistake is a UserError (a ValueError), as is a finished record of that name without
    `overwrite=True`.
    """
    found = methods.load("attack", method)
    return run_attack(
        attack_job(found, as_flags(found.config_class, _plain(options), method), f"attack {method}")
    )


def defend(method: str, record: Record | str, **options: Any) -> dict[str, Any] | None:
    """Run defense/<method>.py on a record, or on the record of that name, and return what its
    result.json holds.

    Scores are fractions: result["after"]["asr"]. None where a `subtask` stops before there is a
    result.
    """
    found = methods.load("defense", method)
    place = (
        {"result_file": record}
        if isinstance(record, str)
        else {"result_file": record.name, "record_root": record.folder.parent}
    )
    return run_defense(
        defense_job(
            found,
            as_flags(found.config_class, _plain({**options, **place}), method),
            f"defense {method}",
        )
    )


def table(
    records: Sequence[Record | str] | Record | str | None = None,
    *,
    format: formats.Format = "text",
    mean: bool = False,
    worst: bool = False,
    root: str | None = None,
) -> str:
    """Records, or a single one, and what each defense left of them; `mean` over seeds, or the
    `worst` seed of each. None: every record in `root`.

    A damaged result is left out with a line on standard error, as is a damaged record where none
    was named.
    """
    if format not in get_args(formats.Format):
        raise UserError(
            f"format must be one of {', '.join(get_args(formats.Format))}, got"
            f" {format!r}.{suggest(format, get_args(formats.Format))}"
        )
    place = record_root(root)
    damaged: list[measured.Damaged] = []
    if records is None:
        found = measured.readable(every_name(place), place, damaged.append)
    else:
        named = [records] if isinstance(records, (str, Record)) else records
        found = [
            record if isinstance(record, Record) else Record.load(record, place) for record in named
        ]
    shown = layout.table(found, format, mean=mean, worst=worst, on_damage=damaged.append)
    layout.complain(damaged)
    return formats.render(shown, format)


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
