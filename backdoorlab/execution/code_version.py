"""The version of the code behind a result: a hash over the source files that compute it.

A commit says too much (a new sentence in the README changes it) and too little (files that differ
from it). This is the SHA-256 over the method's file, the files that run an attack and a defense,
and every file of the library that these import at their top, directly or through others. Files that
only say, show or store a number are left out. (Stored bytes are checksummed, so what stores them
cannot change a number silently.)
"""

import ast
import hashlib
from functools import lru_cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
SAYING = ("cli.py", "api.py", "__main__.py", "tables/", "report/", "bench/", "exchange/", "depth/")
"""What starts runs, says numbers, shows them, and measures finished ones."""
STORING = ("storage/",)
BESIDES = tuple(
    f"execution/{name}.py" for name in ("precision", "preview", "code_version", "tracking")
)
"""Parts of a run that change no number; which precision was chosen is part of every result."""
NOT_COMPUTING = (*SAYING, *STORING, *BESIDES)
"""Files and folders of the library that are left out."""


def code_version(method_file: Path) -> str:
    """Return 12 hex digits, the same wherever the same method and library are installed."""
    # The method's own file goes by its name, wherever it lies.
    contents: dict[str, bytes] = {}
    waiting = [PACKAGE / "execution" / "attack.py", PACKAGE / "execution" / "defense.py"]
    contents[f"method/{method_file.name}"] = source = method_file.read_bytes()
    waiting += _imported(method_file, source)

    # Follow the imports until no file is new.
    while waiting:
        path = waiting.pop()
        name = path.relative_to(PACKAGE).as_posix()
        if name not in contents and not name.startswith(NOT_COMPUTING):
            contents[name] = path.read_bytes()
            waiting += _imported(path, contents[name])

    digest = hashlib.sha256()
    for name in sorted(contents):
        digest.update(f"{name} {hashlib.sha256(contents[name]).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]


@lru_cache(maxsize=256)
def _imported(path: Path, source: bytes) -> tuple[Path, ...]:
    """Return the files of the library that a file of this content imports at its top.

    An import inside a function is for what is seldom needed, and is left out.
    """
    found = []
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            folder = path.parents[node.level - 1]
        elif node.module and node.module.split(".")[0] == PACKAGE.name:
            folder = PACKAGE.parent
        else:
            continue

        # A name that is imported may be a module or a function of one: both files are tried.
        module = folder.joinpath(*(node.module or "").split("."))
        for candidate in (module, *(module / alias.name for alias in node.names)):
            found += [
                file
                for file in (candidate.with_suffix(".py"), candidate / "__init__.py")
                if file.is_file()
            ]
    # The package's own __init__ computes nothing.
    return tuple(
        file for file in found if file.is_relative_to(PACKAGE) and file != PACKAGE / "__init__.py"
    )
