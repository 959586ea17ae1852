"""The documentation leads somewhere, and its pages are short.

It needs the standard library and pytest only, so that `pytest --noconftest tests/test_docs.py` runs
without torch.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
PACKAGE = CHECKOUT / "backdoorlab"
NAMED = ("README.md", "README_zh.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
PAGES = sorted([*(CHECKOUT / name for name in NAMED), *(CHECKOUT / "docs").rglob("*.md")])
FENCED = re.compile(r"^```.*?^```", re.M | re.S)
PROSE, LENGTH, NOTES = 1200, 1600, 2500
"""Most words of a page without and with its tables, and of a laboratory note; code does not count.
Scrolling through more takes a minute."""
SUFFIXES = (".json", ".csv", ".safetensors", ".yaml", ".png", ".md", ".txt", ".html", ".npy")
"""What a code span of a file ends with, where it looks like a name in a module."""


# What a page may name.


@cache
def anchors(text: str) -> set[str]:
    """The anchors of a Markdown page, as GitHub makes them from its headings."""
    found: set[str] = set()
    seen: dict[str, int] = {}
    for heading in re.findall(r"^#+ +(.+?) *$", FENCED.sub("", text), re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        count = seen.get(slug, 0)
        seen[slug] = count + 1
        found.add(f"{slug}-{count}" if count else slug)
    return found


@cache
def commands() -> set[str]:
    """The commands of `python -m backdoorlab`."""
    found: set[str] = set()
    for node in ast.parse((PACKAGE / "__main__.py").read_text()).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict):
            found |= {str(key.value) for key in node.value.keys if isinstance(key, ast.Constant)}
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "METHODS":
            found |= set(ast.literal_eval(node.value))
    assert {"table", "attack", "bench"} <= found
    return found


@cache
def targets() -> set[str]:
    """The targets of the Makefile."""
    return set(re.findall(r"^([a-z][a-z-]*):", (CHECKOUT / "Makefile").read_text(), re.M))


@cache
def names(module: Path) -> set[str]:
    """What a module defines or imports, and the methods and fields of its classes."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text())):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]):
                found.add(name)
            case ast.AnnAssign(target=ast.Attribute(attr=name)):
                found.add(name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                found.add(name)
            case ast.ImportFrom(names=imported):
                found |= {alias.asname or alias.name for alias in imported}
    return found


def resolves(parts: list[str]) -> bool:
    """Whether folders, a module and at most one name in it, in this order, are in the package."""
    place = PACKAGE
    for number, part in enumerate(parts):
        if (place / part).is_dir():
            place /= part
        elif (place / f"{part}.py").is_file():
            rest = parts[number + 1 :]
            return not rest or rest[0] in names(place / f"{part}.py")
        else:
            return part in names(place / "__init__.py")
    return True


# What a page names, and is not there.


def code(text: str) -> list[str]:
    """Code spans, and the lines of fenced blocks."""
    fenced = [line.strip() for block in FENCED.findall(text) for line in block.splitlines()[1:-1]]
    return fenced + re.findall(r"(?<!`)`([^`\n]+)`(?!`)", FENCED.sub("", text))


def dead_links(text: str, page: Path) -> Iterator[str]:
    """Relative links without a file or an anchor."""
    prose = re.sub(r"`[^`\n]*`", "", FENCED.sub("", text))
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        file = page.parent / path
        if not file.exists():
            yield f"link to {link}: no such file"
        elif anchor and anchor not in anchors(file.read_text() if path else text):
            yield f"link to {link}: no such heading"


def dead_commands(text: str) -> Iterator[str]:
    """Commands, scripts, presets and make targets that are not there. NAME stands for any."""
    pieces = code(text)
    for piece in pieces:
        for command in re.findall(r"-m backdoorlab ([a-z]\w*)", piece):
            if command not in commands():
                yield f"python -m backdoorlab {command}"
        for target in re.findall(r"^make ([a-z][a-z-]*)", piece):
            if target not in targets():
                yield f"make {target}"
        for preset in re.findall(r"--(?:yaml_path|config) ([a-z]\w*)(?![\w./])", piece):
            if not (CHECKOUT / "resource" / "config" / f"{preset}.yaml").is_file():
                yield f"preset {preset}"
    scripts = r"(?<![\w/>.])((?:attack|defense|performance|tests(?:/[a-z]+)?)/[a-z]\w*\.py)"
    for script in re.findall(scripts, text):
        if not (CHECKOUT / script).is_file():
            yield script


def dead_names(text: str) -> Iterator[str]:
    """Files, modules and names of the package that are not there."""
    for path in re.findall(r"(?<![\w/])backdoorlab/[\w/]+(?:\.py)?", text):
        if not (CHECKOUT / path).exists():
            yield path
    for dotted in re.findall(r"(?<![\w/.])backdoorlab\.([A-Za-z_][\w.]*\w)", text):
        if not resolves(dotted.split(".")):
            yield f"backdoorlab.{dotted}"
    for module, imported in re.findall(r"from backdoorlab\.([\w.]+) import ([\w, ]+)", text):
        for name in imported.split(","):
            known = name.strip().partition(" as ")[0]
            if not resolves([*module.split("."), known]):
                yield f"backdoorlab.{module}.{known}"

    # Short forms, `engine.Forward` or `storage/staging`: the first word is a module or a folder.
    for span in code(text):
        short = re.match(r"([a-z_]+)([./])([A-Za-z_]\w*(?:[./][A-Za-z_]\w*)*)", span)
        if short is None or short[0].endswith(SUFFIXES):
            continue
        folder = (PACKAGE / short[1]).is_dir()
        module = short[2] == "." and (PACKAGE / f"{short[1]}.py").is_file()
        if (folder or module) and not resolves(re.split(r"[./]", short[0])):
            yield short[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    dead = list(dead_links(text, page))
    if page.name != "CHANGELOG.md":  # it names what was, too
        dead += [*dead_commands(text), *dead_names(text)]
    assert not dead, "\n".join(dead)


def test_every_page_of_the_documentation_is_linked() -> None:
    """From the README, in any number of steps."""
    reached, todo = set(), [CHECKOUT / "README.md"]
    while todo:
        page = todo.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        links = re.findall(r"\]\(([^)\s#:]+)(?:#[^)\s]*)?\)", page.read_text())
        todo += [(page.parent / link).resolve() for link in links]
    assert set((CHECKOUT / "docs").rglob("*.md")) <= reached


def words(text: str) -> tuple[int, int]:
    """Return the words of a page without and with its tables."""
    text = FENCED.sub("", text)
    prose = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("|"))
    return len(prose.split()), len(text.split())


def too_long(text: str, page: str) -> bool:
    """Whether a page below docs/ is too long: notes may be longer, and tables of results."""
    prose, everything = words(text)
    if page.startswith("lab/"):
        return everything > NOTES
    looked_up = page.startswith(("results/", "glossary"))
    whole = everything > LENGTH and not looked_up
    return prose > PROSE or whole


def test_no_page_is_too_long() -> None:
    folder = CHECKOUT / "docs"
    pages = {page.relative_to(folder).as_posix(): page.read_text() for page in folder.rglob("*.md")}
    assert len(pages) > 30
    assert not {page: words(text) for page, text in pages.items() if too_long(text, page)}

    # Controls: of words, of rows, of code.
    assert too_long("word " * (PROSE + 1), "howto/x.md")
    assert too_long("| word | word |\n" * 400, "howto/x.md")
    assert too_long("word " * (NOTES + 1), "lab/x.md")
    assert not too_long("| word | word |\n" * 400, "results/x.md")
    assert not too_long("word " * NOTES, "lab/x.md")
    assert not too_long("```\n" + "word " * 2000 + "\n```\n", "howto/x.md")


def named_pages(text: str) -> list[str]:
    """Return the pages of docs/ that a source file names and that are not there."""
    found = re.findall(r"docs/[\w/]+\.md", text)
    return [page for page in found if not (CHECKOUT / page).is_file()]


def test_pages_that_the_code_names_are_there() -> None:
    folders = ("backdoorlab", "attack", "defense", "performance", "resource")
    sources = [p for name in folders for p in (CHECKOUT / name).rglob("*.*") if p.suffix != ".pyc"]
    texts = {p: p.read_text() for p in sources if p.suffix in (".py", ".yaml")}
    assert sum("docs/" in text for text in texts.values()) > 10
    assert not {str(p): dead for p, text in texts.items() if (dead := named_pages(text))}
    assert named_pages("as docs/nowhere.md says, and docs/glossary.md") == ["docs/nowhere.md"]


DEAD = """# A page

[file](docs/nowhere.md), [heading](README.md#nowhere), [own](#nowhere)
`python -m backdoorlab tabel`, `make demonstration`, `python attack/badnets.py`
`--yaml_path sau_light`, `backdoorlab/exchange/pickle.py`, `backdoorlab.benchmarks`
`data.place(split)`, `storage/holding`, `run.once`, `backdoorlab.data.place`
```
from backdoorlab.data import batches, place
from backdoorlab.config import DefensesConfig as Config
python -m backdoorlab tables demo
make tests
```
"""
ALIVE = """# A page

[file](docs/glossary.md), [heading](README.md#install), [own](#a-page), [web](https://x.org/y)
`python -m backdoorlab table`, `make demo`, `python attack/badnet.py`, `python attack/NAME.py`
`--yaml_path sau_lite`, `--yaml_path mine.yaml`, `backdoorlab/exchange/pickles.py`
`data.to_device(split)`, `storage/staging`, `run.cached`, `record.json`, `[link](nowhere.md)`
`/tmp/mine/attack/stripe.py`, `backdoorlab.attack`
```
from backdoorlab.data import batches, to_device
[list](nowhere.md)
make test PYTHON=python3.12
```
and these make sense.
"""


def test_what_is_dead_is_found_and_what_is_alive_is_not() -> None:
    page = CHECKOUT / "page.md"
    links = {link.split()[2].rstrip(":") for link in dead_links(DEAD, page)}
    assert links == {"docs/nowhere.md", "README.md#nowhere", "#nowhere"}
    assert not list(dead_links(ALIVE, page))
    assert sorted(dead_commands(DEAD)) == [
        "attack/badnets.py",
        "make demonstration",
        "make tests",
        "preset sau_light",
        "python -m backdoorlab tabel",
        "python -m backdoorlab tables",
    ]
    assert sorted(dead_names(DEAD)) == [
        "backdoorlab.benchmarks",
        "backdoorlab.config.DefensesConfig",
        "backdoorlab.data.place",
        "backdoorlab.data.place",
        "backdoorlab/exchange/pickle.py",
        "data.place",
        "run.once",
        "storage/holding",
    ]
    assert not [*dead_commands(ALIVE), *dead_names(ALIVE)]
