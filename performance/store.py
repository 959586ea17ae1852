"""Keep the JSON of records in a store, from which the pages of docs/results/ are made.

    python performance/store.py RECORDS STORE --command "python -m backdoorlab bench --config GRID"

RECORDS is a folder of records. Each record in it is verified, and its JSON, with that of its
defenses and audits, replaces what STORE has of a record of that name; other records stay. Data,
weights and histories are left out, and of audits the tests that their summary is made of. Tables
read a store as they read records:

    python -m backdoorlab table --record_root STORE
"""

import argparse
import fnmatch
import getpass
import json
import re
import shutil
import socket
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from backdoorlab.errors import UserError, one_line
from backdoorlab.record import Record, every_name, read_result
from backdoorlab.storage import reading, writing
from backdoorlab.tables import audits
from backdoorlab.tables.rows import result_folders
from backdoorlab.tables.stored import STORED, files

PATH = re.compile(r"(?<![\w./:~])(?:~|/[\w.\-]+|[A-Za-z]:\\[\w.\-]+)[/\\][\w.\-/\\]*")
"""An absolute path of some machine, as far as it can be told from a fraction or a web address."""
SHORTEST = 4
"""Letters of a name of a machine or a user from which on it is looked for; `root` is no secret."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument(
        "--command",
        required=True,
        help="what measured the records; several commands separated by semicolons",
    )
    parser.add_argument("--only", default="*", help="records of such names, as in a shell")
    options = parser.parse_args(argv)
    try:
        kept = keep(options.records, options.store, options.command, options.only)
    except UserError as error:
        print(one_line(error), file=sys.stderr)
        return 2
    models = sum(name.endswith(("record.json", "result.json")) for name in kept)
    size = sum((options.store / name).stat().st_size for name in kept)
    print(f"{options.store}: {len(kept)} files, {size:,} bytes, {size // max(1, models):,} a model")
    return 0


def keep(records: Path, store: Path, command: str, only: str = "*") -> dict[str, str]:
    """Copy what tables need of every finished record.

    Args:
        records: the folder of records.
        store: where to; made if it is missing.
        command: what measured the records.
        only: a pattern of names, as in a shell.

    Returns:
        Every file of the store, and its SHA-256.
    """
    names = fnmatch.filter(every_name(records), only)
    if not names:
        raise UserError(f"no record in {records} has a name like {only}")
    for name in names:
        # What is damaged is refused here, and not found out when a page is made.
        record = Record.load(name, records)
        # Results on an earlier record of that name are no results on this one.
        shutil.rmtree(store / name, ignore_errors=True)
        copied = partial(_copy, record.folder, store / name)
        copied(record.folder / "record.json")
        audited = sorted((record.folder / "controls").glob("*.json"))
        for folder in result_folders(record.folder):
            read_result(folder)
            copied(folder / "result.json")
            audited += sorted(folder.glob(audits.FILE))

        for file in audited:
            audits.read_file(file)
            copied(file, details=("tests",))

    found = files(store)
    writing.write_sealed(store / STORED, {"command": command, "files": found})
    return found


def _copy(record: Path, store: Path, file: Path, details: Sequence[str] = ()) -> None:
    """Copy one JSON file of a record byte for byte, or sealed anew without what is left out.

    Args:
        record: its folder.
        store: what becomes of that folder.
        file: the file.
        details: keys whose content is emptied.
    """
    content = reading.read_sealed(file)
    shorter = without_paths({key: value for key, value in content.items() if key != "checksum"})
    shorter |= {key: {} for key in details}
    _refuse_names(file, shorter)
    target = store / file.relative_to(record)
    writing.make_folder(target.parent)
    writing.write_sealed(target, shorter)


def without_paths(value: Any) -> Any:
    """Cut absolute paths in the texts of a JSON value to their last part."""
    if isinstance(value, str):
        return PATH.sub(lambda found: re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], value)
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    return value


def _refuse_names(path: Path, content: Any) -> None:
    """Raise a UserError if the name of this machine or of its user is in a file."""
    text = json.dumps(content)
    for name in {socket.gethostname(), getpass.getuser()} - {"root"}:
        if len(name) >= SHORTEST and re.search(rf"\b{re.escape(name)}\b", text):
            raise UserError(f"{path}: has the name {name} of this machine or its user in it")


if __name__ == "__main__":
    raise SystemExit(main())
