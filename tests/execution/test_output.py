"""Standard output and error: a reader that ends, a closed stream or an old encoding stops no
work."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import helpers
import pytest

from backdoorlab.__main__ import main
from backdoorlab.cli import guarded
from backdoorlab.execution.output import lasting_output

SMALL_SCRIPT = """
import os, sys
from backdoorlab.execution.output import lasting_output
with {context}:
    for _ in range(3000):
        print("a line of a training, and some more of it", file=sys.stderr, flush=True)
        print("a line of a result, and some more of it")
open({done!r}, "w").write("worked")
"""


def shell(script: str, redirections: str, folder: Path, **environment: str) -> str:
    """Run a Python script as `python -c SCRIPT REDIRECTIONS` in a shell; return what it prints."""
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -c "$SCRIPT" {redirections}'],
        cwd=helpers.CHECKOUT,
        env=helpers.child_environment(SCRIPT=script, **environment),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "redirections", ["2>&1 | head -1", "| head -1", "2>&1 >/dev/null | head -1"]
)
def test_work_goes_on_when_its_reader_ends(redirections: str, tmp_path: Path) -> None:
    for context, worked in (("lasting_output()", True), ("open(os.devnull)", False)):
        done = tmp_path / context
        said = shell(SMALL_SCRIPT.format(context=context, done=str(done)), redirections, tmp_path)
        assert done.exists() == worked, said
        assert not (worked and "BrokenPipeError" in said), said


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a fork need not import torch again")
def test_a_command_goes_on_when_its_reader_ends(
    small_flags: tuple[str, ...], tmp_path: Path
) -> None:
    """A whole training whose output nobody reads is finished, with exit code 0."""
    argv = ["attack", "badnet", "--save_folder_name", "r", "--record_root", str(tmp_path)]
    pid = helpers.fork()
    if not pid:
        code = 99
        try:
            unread, output = os.pipe()
            os.close(unread)
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(output, number)
                setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115
            code = main([*argv, *small_flags])
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (tmp_path / "r" / "record.json").exists()


def test_a_closed_standard_error_leads_nowhere(tmp_path: Path) -> None:
    """The next file that is opened would get its number, and what libraries print."""
    file = tmp_path / "file"
    script = (
        "import os, sys\n"
        "from backdoorlab.execution.output import lasting_output\n"
        "from tqdm import tqdm\n"
        "assert sys.stderr is None and sys.stdout is None\n"
        "with lasting_output():\n"
        "    tqdm.write('a line', file=sys.stderr); print('another')\n"
        f"    stream = open({str(file)!r}, 'w')\n"
        "    stream.write(str(stream.fileno() > 2) + str(sys.stderr.isatty()))\n"
    )
    shell(script, "<&- >&- 2>&-", tmp_path)
    assert file.read_text() == "TrueFalse"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_character_that_an_encoding_lacks_is_escaped(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    with lasting_output():
        print("90.00 ± 1 † 猫")
    assert sys.stdout is stream and stream.errors == "strict", "and afterwards as before"
    shown = raw.getvalue().decode(encoding)
    assert shown.startswith("90.00 ") and "\\u732b" in shown
    with pytest.raises(UnicodeEncodeError):
        print("猫")


class Failing(io.StringIO):
    """A stream whose every write fails."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, _text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


def test_a_result_that_a_full_disk_does_not_take_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A log may be lost, but not a table that is redirected to a file."""

    def printed(stream: str, number: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(sys, stream, Failing(number))
            with lasting_output():
                print("a line", file=getattr(sys, stream))

    for gone in (("stdout", errno.EPIPE), ("stderr", errno.EPIPE), ("stderr", errno.ENOSPC)):
        printed(*gone)
    with pytest.raises(OSError, match="No space"):
        printed("stdout", errno.ENOSPC)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_command_whose_output_does_not_fit_the_disk_fails_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> int:
        print("a table")
        return 0

    assert guarded(command, []) == 0, "a control"
    full = open("/dev/full", "w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", full)
    assert guarded(command, []) == 2 and sys.stdout is full
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "No space left" in line
    with pytest.raises(OSError, match="No space"):
        full.close()


def test_a_run_inside_of_another_wraps_nothing_twice() -> None:
    seen: list[Any] = []
    with lasting_output():
        seen.append(sys.stderr)
        with lasting_output():
            seen.append(sys.stderr)
        seen.append(sys.stderr)
    assert seen[0] is seen[1] is seen[2] is not sys.stderr
