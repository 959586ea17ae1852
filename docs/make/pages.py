"""Pages of the site that are made from the code: methods, commands, options.

Nothing here is typed by hand, so that a new method, flag or row has its place at the next build.
"""

import dataclasses
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from backdoorlab import config
from backdoorlab.__main__ import COMMANDS, METHODS
from backdoorlab.settings import help as option_help
from backdoorlab.settings import methods
from backdoorlab.settings.parse import aliases
from backdoorlab.settings.resources import Kind, home

DOCS = Path(__file__).parents[1]
ROLES: dict[str, str] = {
    "attack": "Attacks",
    "defense": "Defenses",
    "detector": "Detectors",
    "unlearner": "Unlearners",
}
"""Role of a method -> its heading in the navigation."""
CONFIGS = (
    config.MethodConfig,
    config.TrainingConfig,
    config.TriggerConfig,
    config.AttackConfig,
    config.CoverConfig,
    config.CleanLabelConfig,
    config.JointConfig,
    config.DefenseConfig,
    config.SeedsConfig,
    config.SplitConfig,
)
"""Options that several methods share, bases first."""


@functools.cache
def every_method() -> dict[str, list[methods.Method]]:
    """Return the methods of this checkout by role; plugins are left out."""
    found: dict[str, list[methods.Method]] = {role: [] for role in ROLES}
    kinds: tuple[Kind, ...] = ("attack", "defense")
    for kind in kinds:
        for path in sorted(home(kind).glob("[a-z]*.py")):
            method = methods.from_file(kind, path)
            found["attack" if kind == "attack" else method.role].append(method)
    return found


def title(method: methods.Method) -> str:
    """Return the title of a method's page, which begins with its name."""
    said = inspect.cleandoc(method.module.__doc__ or method.name).partition("\n\n")[0]
    said = " ".join(said.split()).rstrip(".")
    letters = re.sub(r"[\W_]", "", said).lower()
    named = letters.startswith(method.name.replace("_", ""))
    return said if named else f"{method.name}: {said}"


# Options.


def rows_of_options(config_class: type[Any], names: Iterable[str]) -> Iterator[list[str]]:
    """Yield flag, default, allowed values and meaning of each field, as Markdown cells."""
    hints = get_type_hints(config_class, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(config_class)}
    texts, ranges = option_help.texts(config_class), dict(config.rules(config_class))
    for name in names:
        # The field's own name first, then short forms and what BackdoorBench calls it.
        spellings = [f"--{name}", *aliases(hints[name])]
        given = fields[name]
        default = given.default
        if default is dataclasses.MISSING:
            factory = given.default_factory
            default = None if factory is dataclasses.MISSING else factory()
        yield [
            ", ".join(f"`{word}`" for word in spellings),
            f"`{spelt(default)}`",
            allowed(hints[name], ranges.get(name)),
            escaped(texts.get(name, "")),
        ]


def allowed(hint: Any, rule: str | None) -> str:
    """Say in a few words which values a type allows, within a range."""
    if get_origin(hint) is Annotated:
        return allowed(get_args(hint)[0], rule)
    if get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(hint))
    words = {bool: "True or False", int: "whole number", float: "number", str: "text"}
    if hint in words:
        return f"{words[hint]} {rule}".strip() if rule else words[hint]

    # Of a union, what is not None; of a tuple, what it contains.
    parts = [part for part in get_args(hint) if part not in (NoneType, ...)]
    said = [allowed(part, rule) for part in parts]
    several = "several: " * (get_origin(hint) is tuple)
    optional = " or None" * (NoneType in get_args(hint))
    return f"{several}{', '.join(dict.fromkeys(said))}{optional}" if said else str(hint)


def spelt(value: Any) -> str:
    """Return a default as it would be typed."""
    if isinstance(value, (tuple, list)):
        return " ".join(map(str, value)) or "none"
    return '""' if value == "" else str(value)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table; a bar within a cell is escaped."""
    columns = list(head)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


OPTION_HEAD = ("flag", "default", "allowed", "meaning")


def options(config_class: type[Any], names: Iterable[str]) -> str:
    """Return the table of these options, which docs/site.css stacks on a narrow screen."""
    rows = table(OPTION_HEAD, rows_of_options(config_class, names))
    return f'<div class="options" markdown>\n\n{rows}\n\n</div>'


# Prose.


def escaped(text: str) -> str:
    """Return text in which Markdown sees nothing but code spans, links and *stressed* words."""
    kept = r"(`[^`]*`|https?://[^\s)>]+[^\s)>.,;]|(?<!\S)\*[A-Za-z ]+\*(?!\w))"
    parts = re.split(kept, text)
    return "".join(
        part if number % 2 else re.sub(r"([*_\[\]\\])", r"\\\1", part).replace("<", "&lt;")
        for number, part in enumerate(parts)
    )


def prose(docstring: str) -> str:
    """Return the docstring of a method's file, without its title, as Markdown."""
    _, _, body = inspect.cleandoc(docstring).partition("\n\n")
    blocks: list[str] = []
    kind = ""
    for line in body.splitlines():
        # An indented number or dash begins an item of a list, and deeper lines continue it.
        item = re.match(r"\s+(\d+\.|-) (.*)", line)
        if item:
            blocks.append(f"{item[1]} {item[2]}")
            kind = "item"
        elif not line.strip():
            kind = ""
        elif (kind == "item" and line.startswith("    ")) or kind == "text":
            blocks[-1] += f" {line.strip()}"
        else:
            blocks.append(line.strip())
            kind = "text"

    said = [re.sub(r"^(Assumes|Departs[^:.]{0,60}|Kind):", r"**\1:**", escaped(b)) for b in blocks]
    return "\n\n".join(said)


# What the committed pages say of a method.


@functools.cache
def committed() -> dict[str, str]:
    """Return the committed pages by their path below docs/."""
    return {
        path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(DOCS.rglob("*.md"))
    }


def paragraph(name: str) -> tuple[str, str]:
    """Return the paragraph on a method that begins with its name in bold, and its page.

    Both are "" if there is none.
    """
    for page, words in committed().items():
        found = re.search(rf"(?ms)^\*\*{name}\*\*: (.+?)(?=^\*\*\w+\*\*: |\Z)", words)
        if found and page.startswith("methods/"):
            text = found[1].strip()
            # A formula keeps its small letter.
            word = re.match(r"[a-z]+\b(?! [+(])", text)
            return (text[0].upper() + text[1:] if word else text), page
    return "", ""


def rows_about(name: str) -> Iterator[tuple[str, str, list[str]]]:
    """Yield page, its title, and tables of the rows that begin with the name of a method."""
    for page, text in committed().items():
        if page.startswith("lab/"):
            continue
        heading = re.search(r"(?m)^# (.+)$", text)
        found = []
        for block in re.findall(r"(?m)(?:^\|.*\n){3,}", text):
            head, rule, *rows = block.splitlines()
            # A table that a command made has plain names; one with a PSNR is about attacks.
            plain = rf"|\| *{name} *\|" * ("PSNR" in block)
            mine = [row for row in rows if re.match(rf"\| *\[?`{name}`{plain}", row)]
            if mine:
                found.append(relative("\n".join([head, rule, *mine]), page))
        if found:
            yield page, heading[1] if heading else page, found


def relative(text: str, page: str) -> str:
    """Rewrite the links of a piece of a page for a page in methods/."""
    folder = Path(page).parent

    def moved(link: re.Match[str]) -> str:
        target = link[1]
        if re.match(r"[a-z]+:", target):
            return link[0]
        path, mark, anchor = target.partition("#")
        where = (folder / path).as_posix() if path else page
        return f"](../{where}{mark}{anchor})"

    return re.sub(r"\]\(([^)\s]+)\)", moved, text)


# Pages.


def method_page(method: methods.Method) -> str:
    """Return the page of a method that has none of its own."""
    parts = [f"# {title(method)}", command(method), prose(method.module.__doc__ or "")]
    if method.limits:
        parts.append(f"**Limits:** {escaped(method.limits)}")
    words, page = paragraph(method.name)
    if words:
        parts += ["## Definition", relative(words, page), NOTATION]
    return "\n\n".join(filter(None, [*parts, numbers(method), generated(method)])) + "\n"


NOTATION = "Notation: [the attacks](attacks.md)."


def command(method: methods.Method) -> str:
    """Return the command that runs a method, and what a defense assumes."""
    needs = {"train": "the training set", "model": "the poisoned model"}
    needs |= {"trusted": "a few trusted images", "seeds": "clean seeds of each class"}
    needs |= {"split": "a split of the training set"}
    if method.kind == "attack":
        return f"```\npython attack/{method.name}.py --save_folder_name X\n```"
    split = " --split DETECTOR" * (method.role == "unlearner")
    lines = f"```\npython defense/{method.name}.py --result_file X{split}\n```"
    return lines + f"\n\nGets: {', '.join(needs[word] for word in method.assumes)}."


def numbers(method: methods.Method) -> str:
    """Return what tables of other pages say of a method."""
    parts = ["## In the tables"]
    for page, heading, tables in rows_about(method.name):
        parts += [f"[{heading}](../{page}):", *tables]
    return "\n\n".join(parts) if len(parts) > 1 else ""


def generated(method: methods.Method) -> str:
    """Return the part of every method's page that is made from its file."""
    own, shared, run = option_help.groups(method.config_class).values()
    parts = ["## Options"]
    if own:
        parts.append(options(method.config_class, own))
    kind = "an attack" if method.kind == "attack" else "a defense"
    parts.append(
        f"{len(shared) + len(run)} more are those of every method of its kind:"
        f" [the options of {kind}](../reference/options.md)."
    )
    if presets := list(presets_of(method)):
        parts += ["Presets, for `--yaml_path`:", "\n".join(presets)]
    parts += ["## The algorithm, as it runs", source(method)]
    return "\n\n".join(parts)


def presets_of(method: methods.Method) -> Iterator[str]:
    """Yield a line for each preset of a method: its name and its first comment."""
    others = {other.name for found in every_method().values() for other in found}
    for path in sorted((home("attack").parent / "resource" / "config").glob("*.yaml")):
        if path.stem.startswith(f"{method.name}_") and path.stem not in others:
            comment = re.match(r"((?:#.*\n)+)", path.read_text(encoding="utf-8"))
            said = " ".join(re.sub(r"(?m)^# ?", "", comment[1]).split()) if comment else ""
            yield f"- `{path.stem}`: {escaped(said)}"


def source(method: methods.Method) -> str:
    """Return the code of a method's main function as a block."""
    names = ("stamp", "attack", "detect", "defend")
    function = next(found for name in names if (found := method.function(name)) is not None)
    code = textwrap.dedent(inspect.getsource(function)).rstrip()
    return f"From `{method.kind}/{method.name}.py`:\n\n```python\n{code}\n```"


def index_page() -> str:
    """Return the list of all methods."""
    parts = ["# Methods", "Each method is one file. Its page says the idea, what it assumes,"]
    parts[1] += " where it departs from the publication, its options and its numbers."
    for role, heading in ROLES.items():
        rows = [
            [f"[`{method.name}`]({method.name}.md)", escaped(method.title)]
            for method in every_method()[role]
        ]
        parts += [f"## {heading}", table(("method", "idea"), rows)]
    return "\n\n".join(parts) + "\n"


def commands_page() -> str:
    """Return the page of all commands with their options."""
    parts = ["# Commands", "`python -m backdoorlab COMMAND`, or `backdoorlab COMMAND`."]
    parts.append(
        "`attack NAME` and `defense NAME` run a method, as `python attack/NAME.py` does:"
        " [their options](options.md), and those on [the page of each method](../methods/index.md)."
    )
    assert set(METHODS) == {"attack", "defense"}
    for name, (config_class, _) in COMMANDS.items():
        fields = [f.name for f in dataclasses.fields(config_class)]
        parts += [f"## {name}", escaped(" ".join((config_class.__doc__ or "").split()))]
        positional = [field for field in fields if is_positional(config_class, field)]
        shown = " ".join(f"{field.upper()}" for field in positional)
        parts.append(f"```\npython -m backdoorlab {name} {shown}".rstrip() + "\n```")
        parts.append(options(config_class, [f for f in fields if f not in positional]))
        for field in positional:
            said = escaped(option_help.texts(config_class).get(field, ""))
            parts.append(f"`{field.upper()}`: {said}")
    return "\n\n".join(parts) + "\n"


def is_positional(config_class: type[Any], name: str) -> bool:
    """Whether an option of a command is given without its flag."""
    hint = get_type_hints(config_class, include_extras=True)[name]
    return "Positional" in repr(hint) or "OmitArgPrefix" in repr(getattr(hint, "__metadata__", ""))


def options_page() -> str:
    """Return the page of the options that methods share, by the class that declares them."""
    parts = [
        "# Options of every method",
        "Each class below has the fields of its bases as well. The options of one method are on"
        " [its page](../methods/index.md). Later layers win: defaults, the YAML file of the data"
        " set, `--yaml_path`, flags.",
    ]
    for config_class in CONFIGS:
        own = list(inspect.get_annotations(config_class))
        names = [f.name for f in dataclasses.fields(config_class) if f.name in own]
        said = escaped(" ".join((config_class.__doc__ or "").split()))
        parts += [f"## {config_class.__name__}", said, options(config_class, names)]
    return "\n\n".join(parts) + "\n"


API = """# Python

## The package

::: backdoorlab.api

## What a defense gets

::: backdoorlab.record.DefenderView

## What every method gets

::: backdoorlab.run.Run

## What an attack leaves

::: backdoorlab.record.Record

## Options

The fields of each class, their ranges and flags: [options](options.md).

::: backdoorlab.config.MethodConfig
    options:
      members: [RANGES, check, science]

::: backdoorlab.config.TrainingConfig
    options:
      members: [recipe]
"""

PAGES: dict[str, Callable[[], str]] = {
    "methods/index.md": index_page,
    "reference/commands.md": commands_page,
    "reference/options.md": options_page,
    "reference/python.md": lambda: API,
}
"""Page -> what makes it."""
