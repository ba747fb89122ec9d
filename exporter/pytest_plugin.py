"""A fixture for the test suites of others: a test fails when an artifact regresses.

def test_the_model_is_no_slower(convnext_gate):
    convnext_gate("baseline/tiny_fp16.xml", "build/tiny_fp16.xml", "p50_ms:5%")
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

if TYPE_CHECKING:
    from exporter.report import Report


@pytest.fixture
def convnext_gate() -> Callable[..., Report]:
    """`gate(base, head, *limits, **options)` compares two artifacts or two reports as `convnext-export compare` does.

    Limits are as for `--fail-on`; options are those of `exporter.compare.gate.GateOptions` (`batch=(1, 8)`,
    `threads=2`, `duration=6.0`, `data="val"`). The test fails, with the table, when a limit is exceeded; else
    the report is returned.
    """
    return _gate


def _gate(base: str | Path, head: str | Path, *limits: str, **options: Any) -> Report:
    from exporter.compare import gate
    from exporter.report.formats import markdown

    __tracebackhide__ = True
    plain = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in options.items()}
    checked = msgspec.convert({"fail_on": limits, **plain}, gate.GateOptions)
    report = gate.compare([Path(base), Path(head)], checked)
    if not report.passed:
        pytest.fail(f"{head} regressed against {base}\n\n{markdown.render([report])}", pytrace=False)
    return report
