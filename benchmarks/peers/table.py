"""The tables of what was timed: one for each case, and one of how ours compares with the best other in every case."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from benchmarks import racing
from benchmarks.peers import BATCHES, PEERS, VARIANTS, Case, Row

HEAD = "| model | median ms | p99 ms | × eager | × ours | of peak | cosine |\n|---|--:|--:|--:|--:|--:|--:|"


def load(folder: Path) -> list[Case]:
    """The cases in a folder, in order."""
    paths = [folder / f"{variant}-b{batch}.json" for variant in VARIANTS for batch in BATCHES]
    return [msgspec.json.decode(path.read_bytes(), type=Case) for path in paths if path.exists()]


def case_table(case: Case) -> str:
    """A row for each peer, ours in bold."""
    return "\n".join([HEAD, *(_line(row) for row in case.rows)]) + "\n"


def _line(row: Row) -> str:
    bold = "**" if row.name.startswith("ours") else ""
    if row.failure:
        return f"| {row.name} | – | – | – | – | – | cannot: {textwrap.shorten(row.failure, 100).replace('|', '/')} |"
    samples = [sample for launch in row.launches for sample in launch]
    median, p99 = np.quantile(samples, [0.5, 0.99])
    cells = (
        f"{bold}{row.name}{bold}",
        f"{median:.4g}",
        f"{p99:.4g}",
        _ratio(row.over_eager),
        _ratio(row.over_ours),
        "" if row.peak_pct is None else f"{row.peak_pct:.0f} %",
        "" if row.cosine is None else f"{row.cosine:.6f}",
    )
    return "| " + " | ".join(cells) + " |"


def _ratio(found: racing.Ratio | None) -> str:
    return "" if found is None else racing.words(found)


def summary(cases: Sequence[Case]) -> str:
    """How many times as fast ours is as the fastest other on the same runtime at the same precision, and as eager."""
    ours = [peer for peer in PEERS if peer.maker == "ours"]
    lines = ["| model | batch | " + " | ".join(peer.name for peer in ours) + " |", "|---|--:|" + "--:|" * len(ours)]
    for case in cases:
        rows = {row.name: row for row in case.rows}
        cells = []
        for peer in ours:
            eager = rows[peer.name].over_eager if peer.name in rows else None
            best = best_other(case, peer.name)
            cells.append(f"{best[1]:.2f} × {best[0]}, {eager[0]:.2f} × eager" if eager and best else "–")
        lines.append(f"| {case.variant} | {case.batch} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def best_other(case: Case, ours: str) -> tuple[str, float] | None:
    """The fastest other that is held against ours on its runtime, and how many times as fast as it ours is."""
    against = {peer.name for peer in PEERS if peer.ours == ours and peer.runtime in ("onnxruntime", "openvino")}
    found = [(row.name, 1 / row.over_ours[0]) for row in case.rows if row.name in against and row.over_ours]
    return min(((name.partition(",")[0], ratio) for name, ratio in found), key=lambda one: one[1], default=None)
