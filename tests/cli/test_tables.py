"""Tables of the terminal: they fit its width, and say which columns they leave out."""

import os
import pty
import re
import subprocess
import sys

import pytest

from exporter import report
from exporter.cli.console import WRAPPED
from exporter.report import tables
from exporter.report.columns import fitting
from tests.conftest import ROOT

DEMO = ROOT / "benchmarks" / "results" / "epyc-genoa-2-cores" / "demo"


@pytest.fixture(scope="module")
def reports():
    return [report.load(path) for path in sorted(DEMO.glob("*.report.json"))]


@pytest.mark.parametrize("width", [100, 160, 400])
@pytest.mark.parametrize("table", [tables.accuracy, tables.latency])
def test_kept_columns_fit_and_the_most_telling_ones_stay(table, width, reports):
    shown = table(reports)
    kept, fits = fitting(shown.columns, shown.rows, width, WRAPPED)
    names = [shown.columns[index] for index in kept]
    widths = [max(len(row[index]) for row in (shown.columns, *shown.rows)) for index in kept]
    assert fits
    assert sum(widths[:-1]) + min(widths[-1], 24) + 2 * (len(kept) - 1) <= width
    assert (names[0], names[-1]) == (shown.columns[0], "")
    if width == 400:
        assert len(kept) == len(shown.columns)
    if width == 100 and table is tables.latency:
        assert {"setting", "batch", "p50 ms", "× eager"} <= set(names)
        assert "load ms" not in names


@pytest.mark.parametrize("width", [20, 40, 80])
def test_a_table_wraps_rather_than_lose_its_verdict(width):
    columns = ("artifact", "metric", "case", "setting", "change", "95 % interval", "limit", "", "detail")
    row = ("a.onnx", "p50_ms", "batch 1", "cpu, 1 thread", "+50 %", "+31 … +70", "5 %", "regressed", "a long " * 20)
    kept, fits = fitting(columns, [row], width, WRAPPED)
    assert {"metric", "case", "change", "limit", "", "detail"} <= {columns[index] for index in kept}
    assert fits == (width == 80)


def test_a_terminal_shows_whole_rows_and_names_the_columns_that_it_lacks():
    code = (
        "from exporter import report; from exporter.cli.console import print_rows; from exporter.report import tables\n"
        "from pathlib import Path\n"
        f"reports = [report.load(path) for path in sorted(Path({str(DEMO)!r}).glob('*.report.json'))]\n"
        "print_rows(tables.latency(reports))\n"
    )
    controller, terminal = pty.openpty()
    environment = {**os.environ, "COLUMNS": "100", "TERM": "xterm", "NO_COLOR": "1"}
    subprocess.run([sys.executable, "-c", code], stdout=terminal, env=environment, cwd=ROOT, check=True)
    os.close(terminal)
    shown = b""
    try:
        while piece := os.read(controller, 1 << 16):
            shown += piece
    except OSError:  # the other end is closed
        pass
    lines = [line.rstrip() for line in re.sub(r"\x1b\[[\d;]*m", "", shown.decode()).splitlines()]
    assert max(len(line) for line in lines[:-1]) <= 100
    assert lines[-1].startswith("not shown in 100 columns: ")
    assert "load ms" in lines[-1]
    assert sum(line.startswith("custom_") for line in lines) == 7
