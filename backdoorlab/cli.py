"""The command line: it runs a method from its file, and turns every mistake into one line."""

import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError, one_line

if TYPE_CHECKING:
    from .config import DefenseConfig

TORCH_FLOOR = (2, 10)
"""Oldest version of torch that reads files of strangers safely."""


def main(file: str, argv: Sequence[str] | None = None) -> int:
    """Run the command line of a method file: `raise SystemExit(main(__file__))`.

    Args:
        file: the method's file; its folder is named attack or defense.
        argv: flags and values; None for those of the process.

    Returns:
        The exit code.
    """
    path = Path(file).resolve()
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(
        lambda: run_method(path.parent.name, path, arguments, f"{path.parent.name}/{path.name}"),
        arguments,
    )


def run_method(kind: str, path: Path, argv: Sequence[str], prog: str) -> int:
    """Run one attack or defense from its file, and print what came of it.

    Args:
        kind: "attack" or "defense".
        path: the method's file.
        argv: flags and values.
        prog: the command's name, for --help.

    Returns:
        The exit code.
    """
    # Imported here, as torch takes seconds, and as this file stands below all others.
    from .execution.attack import attack_job, run_attack
    from .execution.defense import defense_job, report, run_defense, run_of
    from .settings import methods
    from .tables import layout

    if kind == "attack":
        job = attack_job(methods.from_file("attack", path), argv, prog)
        record = run_attack(job)
        # The first row is the attacked model; the others are defenses of it.
        print(layout.text(layout.rows([record])[:1]))
        print(f"record written: {record.folder}")
        print(f"next: {next_command(prog, record.name, job.config.record_root)}")
    elif kind == "defense":
        job = defense_job(methods.from_file("defense", path), argv, prog)
        result = run_defense(job)
        if result is not None:
            print(report(result))
            # A detector leaves no model, and a collapsed one is of no use.
            if result["after"] is not None and not result["collapsed"]:
                print(
                    f"to use the model: {_export(job.config, job.method.name, run_of(job.config))}"
                )
    else:
        raise UserError(f"{path}: a method file lies in a folder named attack or defense")
    return 0


def next_command(prog: str, name: str, root: str | None, defense: str = "dau") -> str:
    """Write the command of a defense on a record, in the form in which the last one was typed."""
    script = prog.endswith(".py")
    start = f"python defense/{defense}.py" if script else f"python -m backdoorlab defense {defense}"
    return f"{start} --result_file {shlex.quote(name)}{_below(root)}"


def _below(root: str | None) -> str:
    """Write the flag of a folder of records that is not the usual one."""
    return f" --record_root {shlex.quote(root)}" if root else ""


def _export(config: "DefenseConfig", defense: str, run: str) -> str:
    """Write the command that makes a file of a defended model."""
    named = f" --run_name {shlex.quote(run)}" if run != "seed0" else ""
    return (
        f"python -m backdoorlab export {shlex.quote(config.result_file)} --defense {defense}{named}"
        f"{_below(config.record_root)} --weights FILE.safetensors"
    )


def _check_torch() -> None:
    """Refuse a torch in which a file can run code or corrupt memory, even with weights_only=True.

    See CVE-2025-32434 and CVE-2026-24747.
    """
    found = version("torch")
    if tuple(int(part) for part in found.split(".")[:2]) < TORCH_FLOOR:
        floor = ".".join(map(str, TORCH_FLOOR))
        raise UserError(
            f"torch {floor} or newer is needed to read files safely, found {found}: pip install -U"
            " torch torchvision"
        )


def guarded(command: Callable[[], int], argv: Sequence[str]) -> int:
    """Run a command, and print one line for whatever goes wrong; --debug True shows more.

    Args:
        command: returns the exit code.
        argv: flags and values, in which --debug is looked for.

    Returns:
        The command's exit code; 2 for bad input, 1 for a defect of ours, 130 for Ctrl-C.
    """
    from .execution.output import lasting_output

    # The flags may be what is wrong, so they are not parsed for this one.
    debug = "--debug True" in " ".join(argv).replace("=", " ")
    with lasting_output():
        return _guarded(command, debug)


def _guarded(command: Callable[[], int], debug: bool) -> int:
    try:
        _check_torch()
        code = command()
        # What a full disk does not take is an error here, and not a failure at exit.
        sys.stdout.flush()
        return code
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(one_line(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: run the same command again to continue", file=sys.stderr)
        return 130
    except Exception as error:
        from .settings.methods import raised_in

        # Name the method's file, if the error came from there.
        where = f", in {came}" if (came := raised_in(error)) else ""
        if isinstance(error, OSError) and error.errno is not None:
            if debug:
                traceback.print_exc()
            print(one_line(_refused_by_the_system(error, where)), file=sys.stderr)
            return 2
        if debug:
            raise
        first = (str(error).splitlines() or [""])[0]
        print(
            one_line(
                f"unexpected {type(error).__name__}: {first}{where} (pass --debug True to see"
                " where)"
            ),
            file=sys.stderr,
        )
        return 1


def _refused_by_the_system(error: OSError, where: str) -> str:
    """Say that a disk is full, or a folder another user's: no defect of ours."""
    place = f"{error.filename}: " if error.filename is not None else ""
    return (
        f"{place}{error.strerror}{where}. Nothing finished was changed; make room or choose another"
        " place, then run it again"
    )
