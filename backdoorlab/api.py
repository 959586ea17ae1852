"""The library from Python, with the names and the checks of the command line:

import backdoorlab as bl
record = bl.attack("badnet", save_folder_name="demo5", poison_rate=0.05)
result = bl.defend("dau", record, seed=1)
print(bl.table([record], mean=True))
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from . import config, forms, registry, results, runner, tables
from .errors import UserError, suggest
from .record import Record, every_name, record_root


def attack(method: str, **options: Any) -> Record:
    """Run attack/<method>.py and return its record. Options are its flags by name, `save_folder_name` among them.

    A mistake is a UserError (a ValueError), as is a finished record of that name without `overwrite=True`.
    """
    found = registry.load("attack", method)
    return runner.run_attack(runner.attack_job(found, config.as_flags(found.config_class, _plain(options), method), f"attack {method}"))


def defend(method: str, record: Record | str, **options: Any) -> dict[str, Any] | None:
    """Run defense/<method>.py on a record, or on the record of that name, and return what its result.json holds.

    Scores are fractions: result["after"]["asr"]. None where a `subtask` stops before there is a result.
    """
    found = registry.load("defense", method)
    place = {"result_file": record} if isinstance(record, str) else {"result_file": record.name, "record_root": record.folder.parent}
    return runner.run_defense(
        runner.defense_job(found, config.as_flags(found.config_class, _plain({**options, **place}), method), f"defense {method}")
    )


def table(
    records: Sequence[Record | str] | Record | str | None = None,
    *,
    format: forms.Format = "text",
    mean: bool = False,
    worst: bool = False,
    root: str | None = None,
) -> str:
    """Records, or a single one, and what each defense left of them; `mean` over seeds, or the `worst` seed of each. None: every record in `root`.

    A damaged result is left out with a line on standard error, as is a damaged record where none was named.
    """
    if format not in get_args(forms.Format):
        raise UserError(f"format must be one of {', '.join(get_args(forms.Format))}, got {format!r}.{suggest(format, get_args(forms.Format))}")
    place = record_root(root)
    damaged: list[results.Damaged] = []
    if records is None:
        found = results.readable(every_name(place), place, damaged.append)
    else:
        named = [records] if isinstance(records, (str, Record)) else records
        found = [record if isinstance(record, Record) else Record.load(record, place) for record in named]
    if mean or worst:
        shown = forms.render(tables.means(results.rows(found, on_damage=damaged.append), format, worst=worst), format)
    else:
        shown = tables.render(tables.rows(found, damaged.append), format)
    tables.complain(damaged)
    return shown


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
