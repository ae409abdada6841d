"""From measured rates to the limit, the ratios and the text of RESULTS.md; pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from benchmarks.common import Taken

# Column -> what an imagemill figure is divided by, in items/s: (precision of the figure, everything of the workload,
# the round, or None for the median of all).
Against = Callable[[str, Sequence[Taken], int | None], float | None]


def limit(precision: str, taken: Sequence[Taken], at: int | None = None) -> float | None:
    """What no program can pass that decodes, prepares and computes on the same cores: 1 / the sum of the parts' times.

    Each part alone on all cores, the best kind of each at that precision. None where a part was not measured. A
    workload without any forward pass is limited by the other two.
    """
    parts = [best_forward(precision, taken, at), best("decode", taken, "", at), best("prepare", taken, "", at)]
    if not any(one.measure.role == "forward" for one in taken):
        parts = parts[1:]
    if any(part is None for part in parts):
        return None
    return 1 / sum(1 / part for part in parts if part)


def best_forward(precision: str, taken: Sequence[Taken], at: int | None = None) -> float | None:
    """Items a second of the fastest runtime at that precision; "" for any."""
    return best("forward", taken, precision, at)


def best(role: str, taken: Sequence[Taken], precision: str = "", at: int | None = None) -> float | None:
    """Items a second of the fastest measure of a role, at one precision or at any.

    Which is the fastest say the medians, whatever round is asked for: the best of a round would be the luckiest.
    """
    found = [t for t in taken if t.measure.role == role and precision in ("", t.measure.precision)]
    if not found:
        return None
    fastest = max(found, key=lambda t: t.rate)
    return fastest.rate if at is None else fastest.rates[at]


def best_peer(precision: str, taken: Sequence[Taken], at: int | None = None) -> float | None:
    """Items a second of the fastest peer at any precision, however tuned."""
    measured = [t for t in taken if t.measure.role in PEERS]
    role = max(measured, key=lambda t: t.rate).measure.role if measured else ""
    return best(role, taken, "", at)


PEERS = ("ultralytics", "ultralytics tuned", "HF pipeline", "DataLoader", "Ray Data")
COLUMNS: dict[str, Against] = {
    "limit": limit,
    "bare forward": best_forward,
    "ultralytics": lambda precision, taken, at: best("ultralytics", taken, "", at),
    "ultralytics tuned": lambda precision, taken, at: best("ultralytics tuned", taken, "", at),
    "HF pipeline": lambda precision, taken, at: best("HF pipeline", taken, precision, at),
    "DataLoader": lambda precision, taken, at: best("DataLoader", taken, precision, at),
    "Ray Data": lambda precision, taken, at: best("Ray Data", taken, "", at),
    "best peer": best_peer,
}


def ratios(figure: Taken, taken: Sequence[Taken]) -> dict[str, float]:
    """Column -> the median over the rounds of an imagemill figure divided by it in the same round, where it was taken.

    Limit, bare forward, HF pipeline and DataLoader are those of the figure's own precision; ultralytics, Ray Data and
    the best peer are taken as they are.
    """
    same = _of(figure.measure.workload, taken)
    found = {}
    for name, against in COLUMNS.items():
        pairs = [(rate, against(figure.measure.precision, same, at)) for at, rate in enumerate(figure.rates)]
        quotients = [rate / value for rate, value in pairs if value]
        if quotients:
            found[name] = statistics.median(quotients)
    return found


def _of(workload: str, taken: Sequence[Taken]) -> list[Taken]:
    """What concerns a workload: its own measures, and decoding, which is the same for all."""
    return [t for t in taken if t.measure.workload == workload or t.measure.role == "decode"]


def text(title: Sequence[str], taken: Sequence[Taken], without: Sequence[tuple[str, str]]) -> str:
    """Everything as Markdown: how it was measured, the ratios, the gaps between shards, every median, what is left out.

    Args:
        title: lines about the machine and the run.
        without: (label, reason) of what could not be measured.
    """
    ours = [t for t in taken if t.measure.role == "imagemill"]
    parts = [
        "# Measured side by side",
        "\n".join(f"- {line}" for line in title),
        _ABOUT,
        "## imagemill divided by ...",
        _ratio_table(ours, taken),
        "## The limits",
        _limit_table(taken),
        "## Waiting",
        _waiting_table(ours),
        "## Every median",
        _median_table(taken),
    ]
    if without:
        parts += ["## Left out", "\n".join(f"- {label}: {reason}" for label, reason in without)]
    return "\n\n".join(part for part in parts if part) + "\n"


_ABOUT = """The medians of interleaved rounds; compare within this file only. A ratio is the median of the rounds' own
ratios, since the speed of a shared machine differs more between rounds than within one. The limit is 1 / (forward +
decode + prepare), each alone on all cores, which on a CPU they share; the forward pass is of one batch after another,
so a program that begins the next one on the cores that are free may pass it by a little. Peers are timed after their
first batch; imagemill from its first claim to the last commit, on a worker that holds the model. limit, bare forward,
HF pipeline and DataLoader are of the same precision as imagemill's row; the others are as fast as they come. Decoding
and the stub's jobs are measured by turns, several times a round, of which the mean time counts."""


def _ratio_table(ours: Sequence[Taken], taken: Sequence[Taken]) -> str:
    rows = []
    for figure in ours:
        found = ratios(figure, taken)
        if found:
            cells = [f"{found[name]:.2f}" if name in found else "" for name in COLUMNS]
            rows.append([f"{figure.measure.workload} {figure.measure.name}", f"{figure.rate:.1f}", *cells])
    return _table(["imagemill", "items/s", *(f"/ {name}" for name in COLUMNS)], rows)


def _limit_table(taken: Sequence[Taken]) -> str:
    rows = []
    for workload in dict.fromkeys(t.measure.workload for t in taken):
        same = _of(workload, taken)
        for precision in dict.fromkeys(t.measure.precision for t in same if t.measure.role in ("forward", "prepare")):
            if not precision and best_forward("", same):
                continue  # the row of prepare, which has no precision
            value = limit(precision, same)
            parts = (best_forward(precision, same), best("decode", same), best("prepare", same))
            cells = ["" if part is None else f"{part:.1f}" for part in (*parts, value)]
            rows.append([f"{workload} {precision}".rstrip(), *cells])
    return _table(["", "forward", "decode", "prepare", "limit, items/s"], rows)


def _waiting_table(ours: Sequence[Taken]) -> str:
    shares = {"idle": "device idle", "gap": "gaps / device"}
    seconds = {"claim_s": "row to claim, s", "whole_s": "row to end, s", "command_s": "command, s"}
    names = {**shares, **seconds}
    rows = [
        [f"{t.measure.workload} {t.measure.name}"]
        + [f"{t.figures[name]:.1%}" for name in shares]
        + [f"{t.figures[name]:.2f}" for name in seconds]
        for t in ours
        if set(names) <= set(t.figures)
    ]
    return _table(["imagemill", *names.values()], rows)


def _median_table(taken: Sequence[Taken]) -> str:
    rows = [
        [
            t.measure.workload,
            f"{t.measure.role} {t.measure.name}",
            f"{t.rate:.1f}",
            " ".join(f"{r:.1f}" for r in t.rates),
        ]
        for t in taken
    ]
    return _table(["workload", "measure", "items/s", "rounds"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return "nothing was measured"
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
