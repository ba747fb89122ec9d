"""Reports as JUnit XML, which every CI shows: a suite for each report, a test case for each finding."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree as xml

from exporter.report import Finding, Report
from exporter.report.tables import name


def render(reports: Sequence[Report]) -> str:
    """The document."""
    suites = xml.Element("testsuites", name="convnext-export")
    for report in reports:
        suites.append(_suite(report))
    xml.indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + xml.tostring(suites, encoding="unicode") + "\n"


def _suite(report: Report) -> xml.Element:
    failures = sum(not finding.passed for finding in report.findings)
    facts = {"name": _text(name(report)), "tests": str(len(report.findings)), "failures": str(failures)}
    suite = xml.Element("testsuite", facts | {"errors": "0", "skipped": "0", "time": "0"})
    for finding in report.findings:
        suite.append(_case(report, finding))
    return suite


def _case(report: Report, finding: Finding) -> xml.Element:
    title = f"{finding.metric} ({finding.case})" if finding.case else finding.metric
    case = xml.Element("testcase", classname=_text(f"{name(report)}.{finding.check}"), name=_text(title), time="0")
    text = _text(finding.text)
    if finding.passed:
        xml.SubElement(case, "system-out").text = text
    else:
        xml.SubElement(case, "failure", message=text, type=_text(finding.check)).text = text
    return case


def _text(text: str) -> str:
    """Without the characters that XML 1.0 has no way to write."""
    return re.sub("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


RENDER = render
