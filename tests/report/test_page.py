"""The page in a real browser: every mark, sorting, filtering, both widths, both schemes, and not
one request or complaint.

It needs Chromium and its driver (Debian: apt-get install chromium chromium-driver) and pip install
-e '.[dev]'; without them it is skipped.
"""

import importlib.util
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helpers
import pytest

from backdoorlab.__main__ import main
from backdoorlab.record import Record

CHROMIUM, DRIVER = (
    shutil.which("chromium") or shutil.which("chromium-browser"),
    shutil.which("chromedriver"),
)
MISSING = [
    name
    for name, found in (
        ("chromium", CHROMIUM),
        ("chromedriver", DRIVER),
        ("selenium", importlib.util.find_spec("selenium")),
    )
    if found is None
]
pytestmark = [
    pytest.mark.skipif(
        bool(MISSING),
        reason=(
            f"no {', '.join(MISSING)}: apt-get install chromium chromium-driver; pip install -e"
            " '.[dev]'"
        ),
    ),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
    " --disable-background-networking --disable-component-update --disable-sync"
)
WIDTHS = (400, 1280)
HOSTILE = (
    "</script><img src=x onerror=document.title='owned'><a href='https://example.com'>&lt;b&gt;"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = str(CHROMIUM)
    for flag in (*QUIET.split(), f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    driver.get("about:blank")
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(
    small: Record,
    small_flags: tuple[str, ...],
    session_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    with helpers.environment(BACKDOORLAB_CACHE=session_folder / "cache"):
        return written(small, small_flags, tmp_path_factory.mktemp("page"))


def written(small: Record, small_flags: tuple[str, ...], root: Path) -> Path:
    """Four records: DAU, ASD and two runs of fine-tuning; nothing; no attack; and one whose every
    word is hostile."""
    record = helpers.copy(small, root, "full")
    helpers.defend("dau", record, *helpers.short_flags("dau"))
    helpers.defend("asd", record, *helpers.short_flags("asd"))
    for seed in ("0", "1"):
        helpers.defend("ft", record, "--epochs", "2", "--trusted_ratio", "0.3", "--seed", seed)
    helpers.copy(small, root, "alone")
    place = small_flags.index("--patch_size"), small_flags.index("--poison_rate")
    clean = [
        flag
        for at, flag in enumerate(small_flags)
        if at not in (place[0], place[0] + 1, place[1], place[1] + 1)
    ]
    helpers.attack("none", "clean", root, *clean)
    hostile = helpers.copy(small, root, "<img src=x onerror=document.title='owned'>")
    info = json.loads((hostile.folder / "record.json").read_text())
    names = [f"{HOSTILE}{number}" for number in range(3)]
    helpers.edit_json(
        hostile.folder / "record.json",
        notes=[HOSTILE],
        device=HOSTILE,
        dataset=info["dataset"] | {"class_names": names, "name": "<b>digits<"},
    )
    target = root / "report.html"
    names = ["full", "alone", "clean", hostile.name]
    assert main(["report", *names, "--record_root", str(root), "--html", str(target)]) == 0
    return target


CELLS = 5 + 1 + 1 + 1


def visit(browser: Any, page: Path, width: int, scheme: str = "light") -> None:
    browser.get_log("browser"), browser.get_log("performance")  # what went before
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
    )
    browser.get(page.as_uri())
    wait(browser, "return document.documentElement.dataset.ready === 'yes'")


def wait(browser: Any, script: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 30).until(lambda driver: driver.execute_script(script), script)


def marks(browser: Any) -> int:
    return browser.execute_script(
        "return document.querySelectorAll('#accuracy_asr .scatterlayer .point').length"
    )


def column(browser: Any, table: str, title: str) -> list[str]:
    """What a table shows in one column, from above, hidden lines left out."""
    script = """
        const table = document.querySelector(`#${arguments[0]} table`);
        const at = [...table.tHead.rows[0].cells].findIndex((cell) => cell.textContent.trim() === arguments[1]);
        return [...table.tBodies[0].rows].filter((row) => !row.hidden).map((row) => row.cells[at].textContent);
    """
    return browser.execute_script(script, table, title)


def click(browser: Any, table: str, title: str) -> None:
    script = (
        "[...document.querySelectorAll(`#${arguments[0]} thead button`)].find((b) =>"
        " b.textContent.trim() === arguments[1]).click()"
    )
    browser.execute_script(script, table, title)


def choose(browser: Any, element: str, value: str) -> None:
    script = """
        const field = document.querySelector(arguments[0]);
        field.value = arguments[1];
        for (const name of ['input', 'change']) field.dispatchEvent(new Event(name, { bubbles: true }));
    """
    browser.execute_script(script, element, value)


@pytest.mark.parametrize("width", WIDTHS)
def test_marks_are_cells_and_nothing_is_asked_for_or_complained_of(
    browser: Any, page: Path, width: int
) -> None:
    visit(browser, page, width)
    assert (
        marks(browser)
        == CELLS
        == browser.execute_script("return document.querySelectorAll('#runs tr[data-cell]').length")
    )
    for name in browser.execute_script(
        "return [...document.querySelectorAll('#record option')].map((option) => option.value)"
    ):
        choose(browser, "#record", name)
        shown = browser.execute_script(
            "return [...document.querySelectorAll('#one article')].filter((a) => !a.hidden).map((a)"
            " => a.dataset.record)"
        )
        assert shown == [name]
        empty = browser.execute_script(
            "return [...document.querySelectorAll('#one article:not([hidden]) .plot')].filter((p)"
            " => !p.querySelector('svg.main-svg')).length"
        )
        assert empty == 0, "every panel is drawn"
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width, (
        "nothing sticks out"
    )
    assert browser.get_log("browser") == []
    asked = []
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked.append(message["params"]["request"]["url"])
    outside = [
        url
        for url in asked
        if not url.startswith(("data:", "blob:", "chrome:", "chrome-untrusted:"))
        and url != page.as_uri()
    ]
    assert page.as_uri() in asked and outside == []


def test_no_word_of_a_stranger_is_run_or_becomes_an_element(browser: Any, page: Path) -> None:
    visit(browser, page, 1280)
    hostile = "<img src=x onerror=document.title='owned'>"
    choose(browser, "#record", hostile)
    assert browser.title.startswith("Backdoor report") and "owned" not in browser.title
    assert browser.execute_script(
        "return [...document.images].every((image) => image.src.startsWith('data:image/png'))"
    )
    assert (
        browser.execute_script("return document.querySelectorAll('a[href^=http], svg a, b').length")
        == 0
    )
    ticks = browser.execute_script(
        "return [...document.querySelectorAll('#one article:not([hidden]) .xtick text')].map((t) =>"
        " t.textContent)"
    )
    assert any("</script><img src=x" in tick for tick in ticks), (
        "it is drawn as the text that it is"
    )


def test_links_of_an_injected_script_would_not_run(
    browser: Any, page: Path, tmp_path: Path
) -> None:
    """The policy stops what escaping would have missed: the control that the test above does not
    pass for want of a way in."""
    spoilt = tmp_path / "spoilt.html"
    spoilt.write_text(
        page.read_text().replace(
            "<main>",
            "<main><script>document.title='owned'</script><img src=x"
            " onerror=\"document.title='owned'\">",
        )
    )
    visit(browser, spoilt, 1280)
    assert "owned" not in browser.title
    assert any(
        "Content Security Policy" in entry["message"] for entry in browser.get_log("browser")
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_sorting_and_filtering(browser: Any, page: Path, width: int) -> None:
    visit(browser, page, width)
    click(browser, "runs", "clean acc")
    rising = [float(text) for text in column(browser, "runs", "clean acc") if text != "-"]
    assert rising == sorted(rising) and len(rising) == CELLS
    click(browser, "runs", "clean acc")
    shown = column(browser, "runs", "clean acc")
    falling = [float(text) for text in shown if text != "-"]
    assert falling == sorted(falling, reverse=True) and len(set(falling)) > 1
    assert set(shown[CELLS:]) == {"-"}, "what is missing stays at the end"
    click(browser, "runs", "record")
    assert column(browser, "runs", "record") == sorted(
        column(browser, "runs", "record"), key=lambda name: (name[0].isalpha(), name)
    )

    choose(browser, "[name=defense]", "ft")
    wait(
        browser,
        "return document.querySelectorAll('#accuracy_asr .scatterlayer .point').length === 2",
    )
    # The marks "not run" and COLLAPSED stand after the name without a space, the seed with one.
    assert {
        re.sub("(not| |COLLAPSED).*", "", text) for text in column(browser, "runs", "defense")
    } == {"ft"}
    assert column(browser, "means", "n") == ["2"], "two seeds are one mean"
    choose(browser, "[name=defense]", "")
    choose(browser, "#search", "clean none")
    assert set(column(browser, "runs", "record")) == {"clean"} and marks(browser) == 1
    choose(browser, "#search", "")
    assert marks(browser) == CELLS
    with_not_run = len(column(browser, "runs", "record"))
    browser.execute_script("document.getElementById('not-run').click()")
    assert len(column(browser, "runs", "record")) == CELLS < with_not_run
    assert (
        browser.execute_script("return document.getElementById('count').textContent")
        == f"{CELLS} of {CELLS} models"
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_charts_are_no_wider_than_their_boxes_after_a_filter_that_nothing_fits(
    browser: Any, page: Path, width: int
) -> None:
    script = """
        const plots = [...document.querySelectorAll(`main > figure .plot, article .plot`)].filter((p) => p.getClientRects().length);
        return plots.map((p) => [p, ...p.querySelectorAll('svg.main-svg')].map((e) => e.getBoundingClientRect().width));
    """
    said = (
        "return [...document.querySelectorAll('.nothing')].filter((p) => !p.hidden).map((p) =>"
        " p.parentElement.id).sort()"
    )
    visit(browser, page, width)
    before = browser.execute_script(script)
    for word in ("no such word", "asd"):
        choose(browser, "#search", word)
        assert browser.execute_script(said) == (
            ["accuracy_asr", "costs", "means", "runs"] if word != "asd" else []
        )
        choose(browser, "#search", "")
        assert browser.execute_script(said) == []
        after = browser.execute_script(script)
        assert len(after) == len(before) > 4 and all(
            len(sizes) > 1 and max(sizes[1:]) < sizes[0] + 1 for sizes in after
        ), after


def test_scores_are_in_sight_on_a_telephone(browser: Any, page: Path) -> None:
    """Without scrolling a table sideways; what is further right is announced by a shadow."""
    script = """
        const table = document.querySelector(`#${arguments[0]} table`), frame = table.parentElement.getBoundingClientRect();
        return [...table.tHead.rows[0].cells].filter((cell) => cell.getClientRects().length && cell.getBoundingClientRect().right <= frame.right + 1)
            .map((cell) => cell.textContent.trim().replace(' %', ''));
    """
    visit(browser, page, 400)
    for table in ("means", "runs"):
        seen = browser.execute_script(script, table)
        assert seen[0] == "attack" and {"defense", "clean acc", "ASR"} <= set(seen), (table, seen)
        frame = browser.execute_script(
            "const f = document.querySelector(`#${arguments[0]} .scroll`); return [f.clientWidth,"
            " f.scrollWidth]",
            table,
        )
        assert frame[1] > frame[0]
    assert "linear-gradient" in browser.execute_script(
        "return getComputedStyle(document.querySelector('.scroll')).backgroundImage"
    )


def test_the_first_line_calls_no_clean_data_poisoned(page: Path) -> None:
    assert "20 % of the training images poisoned where an attack is known." in page.read_text()


def test_the_buttons_of_a_chart_keep_it_on_this_machine(browser: Any, page: Path) -> None:
    visit(browser, page, 1280)
    offered = browser.execute_script(
        "return [...document.querySelectorAll('#accuracy_asr .modebar-btn')].map((b) =>"
        " b.dataset.title)"
    )
    assert offered and not [
        title for title in offered if "cloud" in title.lower() or "share" in title.lower()
    ]
    assert {title for title in offered if "Download" not in title} == {"Zoom", "Pan", "Reset axes"}


def test_text_can_be_read_on_light_and_on_dark(browser: Any, page: Path) -> None:
    """WCAG 2.1, 1.4.3: a contrast of 4.5 for every text in the tables, captions, headings and
    charts."""
    script = """
        const number = (text) => text.match(/[\\d.]+/g).map(Number);
        const share = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
        const bright = (c) => 0.2126 * share(c[0]) + 0.7152 * share(c[1]) + 0.0722 * share(c[2]);
        const ground = (e) => number(getComputedStyle(e).backgroundColor);
        const behind = (e) => { for (; e; e = e.parentElement) if (ground(e)[3] !== 0) return ground(e); return [255, 255, 255]; };
        const found = [];
        for (const e of document.querySelectorAll('h1, h2, p, td, th button, figcaption, li, summary, dt, a, label, .xtick text, .ytick text')) {
            if (!e.getClientRects().length || !e.textContent.trim()) continue;
            if (e.closest('#destinations')) continue;
            const style = getComputedStyle(e), ink = number(e.ownerSVGElement ? style.fill : style.color);
            const [a, b] = [bright(ink), bright(behind(e))].sort((u, v) => v - u);
            found.push([(a + 0.05) / (b + 0.05), e.tagName + ' ' + e.textContent.slice(0, 30)]);
        }
        return found;
    """
    seen = {}
    for scheme in ("light", "dark"):
        visit(browser, page, 1280, scheme)
        found = browser.execute_script(script)
        assert len(found) > 100 and min(found)[0] >= 4.5, min(found)
        seen[scheme] = browser.execute_script(
            "return getComputedStyle(document.body).backgroundColor"
        )
    assert seen["light"] != seen["dark"]
