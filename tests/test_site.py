"""The site builds without a warning and offline, and its search finds every method and flag."""

import html
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import helpers
import pytest

from backdoorlab.__main__ import COMMANDS
from backdoorlab.settings import methods
from backdoorlab.settings.parse import flag_names
from backdoorlab.settings.resources import Kind, home

needs_mkdocs = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")),
    reason="needs pip install -e '.[docs]'",
)
pytestmark = needs_mkdocs
KINDS: tuple[Kind, ...] = ("attack", "defense")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=helpers.CHECKOUT,
        env=os.environ | {"PYTHONPATH": str(helpers.CHECKOUT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def indexed(site: Path) -> dict[str, str]:
    """Return what the search knows of each page: titles and texts of all its sections."""
    found: dict[str, str] = {}
    for part in json.loads((site / "search" / "search_index.json").read_text())["docs"]:
        page = part["location"].partition("#")[0]
        words = re.sub(r"<[^>]+>", "", f"{part['title']} {part['text']}")
        found[page] = f"{found.get(page, '')} {html.unescape(words)}"
    return found


def test_search_finds_every_method_and_flag(site: Path) -> None:
    pages = indexed(site)
    everything = " ".join(pages.values())
    words = set(re.findall(r"\w+", everything))
    for kind in KINDS:
        for path in home(kind).glob("[a-z]*.py"):
            page = pages[f"methods/{path.stem}.html"]
            config_class = methods.from_file(kind, path).config_class
            assert f"{kind}/{path.name}" in page
            assert set(flag_names(config_class)) <= words

    for options, _ in COMMANDS.values():
        assert {name for name in flag_names(options) if len(name) > 1} <= words
    assert "no_such_flag" not in words


def test_pages_of_methods_have_their_own_options(site: Path) -> None:
    page = indexed(site)["methods/sau.html"]
    assert "--pgd_steps" in page and "sau_lite" in page  # its flag, its preset
    assert "--pgd_steps" not in indexed(site)["methods/ft.html"]


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    """No script, style sheet, font or picture of a page is on a server."""
    fetched = re.compile(
        r'<(?:script|img|iframe|source)[^>]* src="(?:https?:)?//|<link[^>]* href="'
    )
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        for tag in fetched.finditer(text):
            target = text[tag.end() - 2 : tag.end() + 60]
            assert "http" not in tag[0] and "//" not in target.split('"')[1], (page.name, target)
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(.?https?:|@import", sheet.read_text(encoding="utf-8"))
    assert fetched.search('<script src="https://x.org/y.js"></script>')  # the control
