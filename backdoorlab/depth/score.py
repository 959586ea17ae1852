"""One number from an audit: depth, and the summary of each test beside its controls."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from . import reactivate, similarity

COUNT = "5"
"""Poisoned images of the retuning from which depth is computed. At 20 even exact purification
comes back, at 1 a defense that is undone by five looks deep."""
SMALLEST = 0.2
"""Difference between the undefended and the clean model's P-ASR below which there is no depth."""

Tests = Mapping[str, Any]
"""Test -> what it returned, or {"why": clause} where it could not be made."""


def depth(model: float, clean: float, undefended: float) -> float | None:
    """Return 1 - (P-ASR(model) - P-ASR(clean)) / (P-ASR(undefended) - P-ASR(clean)).

    1 is a model that was never poisoned, 0 the undefended one; noise leads a little beyond both.
    None where the two controls differ by less than SMALLEST: the test tells nothing apart there.

    Args:
        model: P-ASR of the model under test, in [0, 1].
        clean: P-ASR of the clean model.
        undefended: P-ASR of the undefended model.
    """
    span = undefended - clean
    return 1 - (model - clean) / span if span >= SMALLEST else None


def p_asr(tests: Tests, count: str = COUNT, key: str = "retune") -> float | None:
    """Return the mean P-ASR over draws, None where the test was not made."""
    values = tests.get(key, {}).get("p_asr", {}).get(count)
    return fmean(values) if values else None


def summarise(tests: Tests, clean: Tests, undefended: Tests) -> dict[str, Any]:
    """Summarise the tests of a model beside those of the clean and the undefended one.

    Args:
        tests: of the model.
        clean: of the clean model.
        undefended: of the undefended model.

    Returns:
        depth, p_asr (n -> mean over draws), bn_asr (mean over draws), excess, t50, similarity;
        None for what does not exist.
    """
    # A control is compared with itself by other draws: with the same ones it would be exact.
    key = "check" if "check" in tests else "retune"
    parts = (p_asr(tests, key=key), p_asr(clean), p_asr(undefended))
    found = {
        "depth": None if None in parts else depth(*parts),  # type: ignore[arg-type]
        "p_asr": {count: p_asr(tests, count) for count in tests.get("retune", {}).get("p_asr", {})},
        "bn_asr": None,
        "t50": tests.get("path", {}).get("t50"),
        "excess": None,
        "similarity": None,
    }
    if _made("statistics", tests):
        found["bn_asr"] = fmean(tests["statistics"]["asr"])
    if _made("reactivate", tests, clean):
        found["excess"] = reactivate.excess(tests["reactivate"], clean["reactivate"])
    if _made("similarity", tests, clean):
        found["similarity"] = similarity.existence(tests["similarity"], clean["similarity"])
    return found


def reasons(tests: Tests, clean: Tests, undefended: Tests, names: Mapping[str, str]) -> list[str]:
    """Say in a clause each why numbers do not exist.

    Args:
        tests: of the model.
        clean: of the clean model.
        undefended: of the undefended model.
        names: test -> what it is called.
    """
    # A reason of the model itself comes before one of its controls.
    said = []
    for test, called in names.items():
        own = tests.get(test, {}).get("why")
        control = clean.get(test, {}).get("why")
        if own:
            said.append(f"no {called}: {own}")
        elif test in tests and control and test not in ("path", "statistics"):
            said.append(f"no {called} against a clean model: {control}")

    floor, ceiling = p_asr(clean), p_asr(undefended)
    if None not in (floor, ceiling, p_asr(tests)) and ceiling - floor < SMALLEST:  # type: ignore[operator]
        said.append(
            f"no depth: {COUNT} poisoned images give the clean model an ASR of {100 * floor:.0f} %"  # type: ignore[operator]
            f" and the undefended one {100 * ceiling:.0f} %, so the test cannot tell them apart"  # type: ignore[operator]
        )
    return said


def _made(test: str, *found: Tests) -> bool:
    return all(test in tests and "why" not in tests[test] for tests in found)
