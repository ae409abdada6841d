"""From measured rates to the limit, the ratios and the text of RESULTS.md; pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.common import Taken

# Column -> what an imagemill figure is divided by: (precision of the figure, everything of the workload) -> items/s.
Against = Callable[[str, Sequence[Taken]], float | None]


def limit(precision: str, taken: Sequence[Taken]) -> float | None:
    """What no program can pass that decodes, prepares and computes on the same cores: 1 / the sum of the parts' times.

    Each part alone on all cores, the best kind of each at that precision. None where a part was not measured. A
    workload without any forward pass is limited by the other two.
    """
    parts = [best_forward(precision, taken), best("decode", taken), best("prepare", taken)]
    if not any(one.measure.role == "forward" for one in taken):
        parts = parts[1:]
    if any(part is None for part in parts):
        return None
    return 1 / sum(1 / part for part in parts if part)


def best_forward(precision: str, taken: Sequence[Taken]) -> float | None:
    """Items a second of the fastest runtime at that precision; "" for any."""
    return best("forward", taken, precision)


def best(role: str, taken: Sequence[Taken], precision: str = "") -> float | None:
    """Items a second of the fastest measure of a role, at one precision or at any."""
    rates = [t.rate for t in taken if t.measure.role == role and precision in ("", t.measure.precision)]
    return max(rates, default=None)


def best_peer(precision: str, taken: Sequence[Taken]) -> float | None:
    """Items a second of the fastest peer at any precision, however tuned."""
    rates = [best(role, taken) for role in PEERS]
    return max((rate for rate in rates if rate is not None), default=None)


PEERS = ("ultralytics", "ultralytics tuned", "HF pipeline", "DataLoader", "Ray Data")
COLUMNS: dict[str, Against] = {
    "limit": limit,
    "bare forward": best_forward,
    "ultralytics": lambda precision, taken: best("ultralytics", taken),
    "ultralytics tuned": lambda precision, taken: best("ultralytics tuned", taken),
    "HF pipeline": lambda precision, taken: best("HF pipeline", taken, precision),
    "DataLoader": lambda precision, taken: best("DataLoader", taken, precision),
    "Ray Data": lambda precision, taken: best("Ray Data", taken),
    "best peer": best_peer,
}


def ratios(figure: Taken, taken: Sequence[Taken]) -> dict[str, float]:
    """Column -> an imagemill figure divided by it, where there is something to divide by.

    Limit, bare forward, HF pipeline and DataLoader are those of the figure's own precision; ultralytics, Ray Data and
    the best peer are taken as they are.
    """
    same = _of(figure.measure.workload, taken)
    found = {name: against(figure.measure.precision, same) for name, against in COLUMNS.items()}
    return {name: figure.rate / value for name, value in found.items() if value}


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


_ABOUT = """The medians of interleaved rounds; compare within this file only. The limit is 1 / (forward + decode +
prepare), each alone on all cores: on a CPU they share the cores, so no program can pass it. Peers are timed after their
first batch; imagemill from its first claim to the last commit, on a worker that holds the model. limit, bare forward,
HF pipeline and DataLoader are of the same precision as imagemill's row; the others are as fast as they come."""


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
    names = {"idle": "device idle", "claim_s": "row to claim, s", "whole_s": "row to end, s", "command_s": "command, s"}
    rows = [
        [f"{t.measure.workload} {t.measure.name}", f"{t.figures['idle']:.1%}"]
        + [f"{t.figures[name]:.2f}" for name in list(names)[1:]]
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
