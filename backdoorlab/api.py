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
from .execution.output import lasting_output
from .record import Record, every_name, record_root
from .settings import methods
from .settings.parse import as_flags
from .tables import formats, layout, stored
from .tables import rows as measured


def attack(method: str, **options: Any) -> Record:
    """Run `attack/<method>.py` and return its record.

    Args:
        method: name of the attack.
        options: its flags by name; `save_folder_name` is required.

    Raises:
        UserError: a mistake in the options, or a finished record of that name without
            `overwrite=True`. It is a ValueError.
    """
    found = methods.load("attack", method)
    flags = as_flags(found.config_class, _plain(options), method)
    with lasting_output():
        return run_attack(attack_job(found, flags, f"attack {method}"))


def defend(method: str, record: Record | str, **options: Any) -> dict[str, Any] | None:
    """Run `defense/<method>.py` on a record.

    Args:
        method: name of the defense.
        record: a record, or its name.
        options: flags of the defense by name.

    Returns:
        The content of result.json; scores are in [0, 1], as `result["after"]["asr"]`, and of a
        detector as `result["split"]["auroc"]`. None if a `subtask` stops before there is a result.
    """
    found = methods.load("defense", method)
    # A record knows its folder, so it is found again whatever the root is.
    place = (
        {"result_file": record}
        if isinstance(record, str)
        else {"result_file": record.name, "record_root": record.folder.parent}
    )
    flags = as_flags(found.config_class, _plain({**options, **place}), method)
    with lasting_output():
        return run_defense(defense_job(found, flags, f"defense {method}"))


def table(
    records: Sequence[Record | str] | Record | str | None = None,
    *,
    format: formats.Format = "text",
    mean: bool = False,
    worst: bool = False,
    root: str | None = None,
) -> str:
    """Write a table of records and of the results of their defenses.

    A damaged result is left out with a line on stderr. So is a damaged record, unless it was named.

    Args:
        records: one or several, themselves or by name; None for every record in `root`.
        format: how the table is written.
        mean: show means over seeds.
        worst: show the worst seed of each defense.
        root: folder of records, as --record_root, or a store of results.
    """
    if format not in get_args(formats.Format):
        raise UserError(
            f"format must be one of {', '.join(get_args(formats.Format))}, got"
            f" {format!r}.{suggest(format, get_args(formats.Format))}"
        )

    # With no name given, a damaged record must not hide the others.
    place = record_root(root)
    damaged: list[measured.Damaged] = []
    found: Sequence[measured.Measured]
    if records is None:
        found = stored.readable(every_name(place), place, damaged.append)
    else:
        named = [records] if isinstance(records, (str, Record)) else records
        found = [
            record if isinstance(record, Record) else Record.load(record, place) for record in named
        ]

    shown = layout.table(found, format, mean=mean, worst=worst, on_damage=damaged.append)

    # On stderr, so that a table in a file stays a table.
    layout.complain(damaged)
    return formats.render(shown, format)


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Write paths as text, as a command line has them."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
