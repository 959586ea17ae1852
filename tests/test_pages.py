"""The pages of the site that are made from the code: complete, and readable as Markdown."""

from types import ModuleType
from typing import Literal

import helpers
import pytest

from backdoorlab.__main__ import COMMANDS
from backdoorlab.settings.help import groups


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    return helpers.script("docs/make/pages.py")


def test_every_method_has_a_page_with_its_options_and_its_code(pages: ModuleType) -> None:
    found = [method for role in pages.every_method().values() for method in role]
    assert len(found) > 40
    for method in found:
        page = pages.method_page(method)
        assert page.startswith("# ") and f"{method.kind}/{method.name}.py" in page
        for name in groups(method.config_class)["method"]:
            assert f"| `--{name}`" in page
        assert "def " in page.rpartition("## The algorithm")[2]

        # Every attack and defense is in a table, or has a page of its own.
        own = f"methods/{method.name}.md" in pages.committed()
        assert own or method.name == "none" or "## In the tables" in page, method.name


def test_a_row_and_a_paragraph_come_to_the_page_of_their_method(
    pages: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = "| name | ASR |\n|---|---|\n| `sig` | 1.5 |\n| `sig_two` | 2.5 |\n"
    texts = {
        "results/x.md": f"# Results of x\n\n{table}",
        "lab/x.md": f"# A note\n\n{table}",
        "methods/attacks_x.md": "# X\n\n**sig**: a wave, see [y](y.md).\n\n**other**: not this.\n",
    }
    monkeypatch.setattr(pages, "committed", lambda: texts)
    (method,) = (m for m in pages.every_method()["attack"] if m.name == "sig")
    page = pages.method_page(method)
    assert "[Results of x](../results/x.md)" in page and "| `sig` | 1.5 |" in page
    assert "A wave, see [y](../methods/y.md)." in page
    assert "2.5" not in page and "not this" not in page and "A note" not in page


def test_commands_and_shared_options_are_complete(pages: ModuleType) -> None:
    commands, options = pages.commands_page(), pages.options_page()
    for name in COMMANDS:
        assert f"\n## {name}\n" in commands
    assert "| `--format`, `-f` | `text` |" in commands
    assert "python -m backdoorlab table NAMES" in commands
    assert "| `--poison_rate`, `--pratio` | `0.1` | number |" in options
    assert "| `--epochs` | `100` | whole number >= 0 |" in options
    assert "`sgd`, `adam`" in options


def test_types_are_said_in_words(pages: ModuleType) -> None:
    assert pages.allowed(int, ">= 1") == "whole number >= 1"
    assert pages.allowed(float | None, "(0, 1]") == "number (0, 1] or None"
    assert pages.allowed(tuple[float, ...], None) == "several: number"
    assert pages.allowed(Literal["a", "b"], None) == "`a`, `b`"


def test_a_docstring_becomes_markdown(pages: ModuleType) -> None:
    docstring = """Title,
    of two lines.

    Text with a_b and *stress* and x * y <name>. A step
      1. does this,
         and more;
      2. does that.
    Then this.

    Departs: from `a_b`.
    """
    assert pages.prose(docstring) == (
        "Text with a\\_b and *stress* and x \\* y &lt;name>. A step\n\n"
        "1. does this, and more;\n\n"
        "2. does that.\n\n"
        "Then this.\n\n"
        "**Departs:** from `a_b`."
    )
