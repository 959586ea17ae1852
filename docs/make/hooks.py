"""What mkdocs does besides reading docs/: it adds the pages that are made from the code."""

import itertools
import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, os.fspath(Path(__file__).parent))
import pages

CHECKOUT = Path(__file__).resolve().parents[2]
PROJECT = {
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
    "CHANGELOG.md": "project/changelog.md",
}
"""Pages at the root of the checkout -> where they are on the site."""
ALONE = ("index.md", "tutorial.md", "glossary.md")
"""Pages that are a section of their own: they get the room of its navigation."""
ELSEWHERE = {**PROJECT, "README.md": "index.md"}
"""Files outside docs/ that a page may link to -> page of the site."""


def on_config(config: Any) -> Any:
    """Fill the sections `Methods` and `Results` of the navigation with what is there."""
    for section in config.nav:
        if "Methods" in section:
            section["Methods"] = methods_navigation()
        if "Results" in section:
            section["Results"] = results_navigation()
    return config


def methods_navigation() -> list[Any]:
    """Return the pages of methods by role, each after the pages that belong to it."""
    overviews = {
        "attack": ["attacks", "attacks_poisoning", "attacks_optimised", "attacks_training"],
        "defense": ["defenses", "repairs", "training_time"],
    }
    sections: list[Any] = ["methods/index.md"]
    for role, heading in pages.ROLES.items():
        found: list[Any] = [f"methods/{name}.md" for name in overviews.get(role, ())]
        for method in pages.every_method()[role]:
            found.append({method.name: f"methods/{method.name}.md"})
            found += sorted(
                page for page in pages.committed() if page.startswith(f"methods/{method.name}_")
            )
        sections.append({heading: found})
    return sections


def results_navigation() -> list[Any]:
    """Return the pages of results, their index first and the archive last."""
    found = [page for page in pages.committed() if page.startswith("results/")]
    old = [page for page in found if page.startswith("results/archive/")]
    new = sorted(
        set(found) - set(old), key=lambda page: (not page.endswith(("README.md", "index.md")), page)
    )
    return [*new, {"Archive": sorted(old)}]


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages, and those at the root of the checkout."""
    made = {name: make() for name, make in pages.PAGES.items()}
    for found in pages.every_method().values():
        for method in found:
            if f"methods/{method.name}.md" not in pages.committed():
                made[f"methods/{method.name}.md"] = pages.method_page(method)
    for name, page in PROJECT.items():
        made[page] = (CHECKOUT / name).read_text(encoding="utf-8")
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to where a file is on the site; add the generated part to a method's own page."""
    source = page.file.src_uri
    if source in ALONE:
        page.meta["hide"] = ["navigation"]
    elif source.startswith("results/"):
        page.meta["hide"] = ["toc"]  # wide tables get its room
    for method in itertools.chain.from_iterable(pages.every_method().values()):
        if source == f"methods/{method.name}.md" and source in pages.committed():
            markdown += f"\n\n{pages.generated(method)}\n"
    return relinked(markdown, source)


def on_page_content(html: str, **_: Any) -> str:
    """Mark the flag at the start of a code span, which the style sheet keeps on one line, and keep
    scores such as 98.6 / 0.0 / 97.2 on one."""
    html = re.sub(r"<code>(--\w+)", r'<code><span class="flag">\1</span>', html)
    return re.sub(r"(?<=\d) / (?=[\d<])", "\u00a0/\u00a0", html)


def relinked(markdown: str, source: str) -> str:
    """Rewrite links that leave docs/, in a page of the site.

    A file of the checkout that is no page of the site becomes a code span.

    Args:
        markdown: the page.
        source: its path below docs/, or on the site for a page from the root of the checkout.
    """
    origin = {page: name for name, page in PROJECT.items()}.get(source, f"docs/{source}")

    def lead(link: re.Match[str]) -> str:
        words, target = link[1], link[2]
        if re.match(r"[a-z]+:|#", target):
            return link[0]
        path, mark, anchor = target.partition("#")
        full = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))
        if full in ELSEWHERE:
            there = ELSEWHERE[full]
            anchor, mark = (anchor, mark) if full in PROJECT else ("", "")
        elif full.startswith("docs/"):
            there = full.removeprefix("docs/")
        else:
            return words if words.startswith("`") else f"{words} (`{full}`)"
        relative = posixpath.relpath(there, posixpath.dirname(source) or ".")
        return f"[{words}]({relative}{mark}{anchor})"

    # Code blocks and spans stay as they are.
    pieces = re.split(r"(^```.*?^```|`[^`\n]*`(?!\]\())", markdown, flags=re.M | re.S)
    return "".join(
        piece if piece.startswith("`") else re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", lead, piece)
        for piece in pieces
    )
