"""A run's results as a table, as JSON, as JUnit XML and as a picture."""

from __future__ import annotations

import json
import textwrap
import time
from typing import Any
from xml.etree import ElementTree

from .lanes import Band, draw
from .results import FAILED, PASSED, UNJUDGED, Report, Result

__all__ = ["as_json", "as_junit", "as_picture", "summary", "table_head", "table_row"]

_NAME, _OUTCOME, _SECONDS, _WIDTH = 29, 19, 8, 120
_INDENT = " " * (_NAME + _OUTCOME + _SECONDS)


def table_head() -> str:
    """The table's first lines."""
    head = f"{'scenario':<{_NAME}}{'outcome':<{_OUTCOME}}{'seconds':>{_SECONDS - 2}}  figures"
    return f"{head}\n{'-' * _WIDTH}"


def table_row(result: Result) -> str:
    """A scenario's row: its outcome, the reason unless it passed, and the figures."""
    head = f"{result.name:<{_NAME}}{result.outcome:<{_OUTCOME}}{result.seconds:>{_SECONDS - 2}.1f}  "
    words = [result.why] if result.why else []
    figures = "; ".join(f"{name} {_plain(value)}" for name, value in result.figures.items() if value is not None)
    words += [figures] if figures else []
    lines = [line for text in words for line in textwrap.wrap(text, _WIDTH - len(_INDENT))] or [""]
    return "\n".join([head + lines[0], *(_INDENT + line for line in lines[1:])]).rstrip()


def summary(report: Report) -> str:
    """The table's last line."""
    counts = (f"{report.count(outcome)} {outcome}" for outcome in (PASSED, FAILED, UNJUDGED))
    return f"{'-' * _WIDTH}\n{', '.join(counts)}"


def as_json(report: Report) -> str:
    """Everything, lanes included."""
    found = {
        "suite": "llamacancel conformance",
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(report.began)),
        "url": report.url,
        "settings": report.settings,
        "server": report.profile,
        "undisturbed answers are always the same": report.repeats,
        "counts": {outcome: report.count(outcome) for outcome in (PASSED, FAILED, UNJUDGED)},
        "scenarios": [
            {
                "name": result.name,
                "claim": result.claim,
                "outcome": result.outcome,
                "why": result.why,
                "seconds": round(result.seconds, 3),
                "figures": result.figures,
                "lanes": [
                    {
                        "name": lane.name,
                        "spans": [[kind, round(start, 4), round(end, 4)] for kind, start, end in lane.spans],
                        "marks": [[kind, round(at, 4), label] for kind, at, label in lane.marks],
                    }
                    for lane in result.lanes
                ],
            }
            for result in report.results
        ],
    }
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def as_junit(report: Report) -> str:
    """JUnit XML: what could not be judged is skipped, with its reason."""
    suite = ElementTree.Element(
        "testsuite",
        name="llamacancel conformance",
        tests=str(len(report.results)),
        failures=str(report.count(FAILED)),
        errors="0",
        skipped=str(report.count(UNJUDGED)),
        time=f"{sum(result.seconds for result in report.results):.3f}",
        timestamp=time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(report.began)),
    )
    for result in report.results:
        case = ElementTree.SubElement(
            suite, "testcase", classname="conformance", name=result.name, time=f"{result.seconds:.3f}"
        )
        if result.outcome == FAILED:
            ElementTree.SubElement(case, "failure", message=_legal(result.why)).text = _legal(result.claim)
        elif result.outcome == UNJUDGED:
            ElementTree.SubElement(case, "skipped", message=_legal(result.why))
        lines = [result.claim, *(f"{name}: {_plain(value)}" for name, value in result.figures.items())]
        ElementTree.SubElement(case, "system-out").text = _legal("\n".join(lines))
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    ElementTree.indent(suites)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suites, encoding="unicode") + "\n"


def as_picture(report: Report) -> str:
    """An SVG with a band for each scenario."""
    bands = [
        Band(
            result.name,
            result.lanes,
            result.claim + (f" {result.why[0].upper()}{result.why[1:]}." if result.why else ""),
            result.outcome,
        )
        for result in report.results
    ]
    counts = ", ".join(f"{report.count(outcome)} {outcome}" for outcome in (PASSED, FAILED, UNJUDGED))
    return draw(
        bands,
        title=f"Cancellation conformance: {report.profile.get('model') or report.url}",
        note=f"{counts}. Each band shows the clients of the performance that was judged; time in seconds.",
    )


def _plain(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _legal(text: str) -> str:
    """Leave out what XML cannot hold."""
    return "".join(character for character in text if character in "\t\n" or ord(character) >= 32)
