"""The page of a sweep: leaderboard, parallel coordinates, learning curves, trials, and where the numbers come from."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import yaml
from markupsafe import Markup

from reid_dist.config import to_mapping
from reid_dist.reporting import leaderboard as tables
from reid_dist.reporting.figures import DASHES, Curves, line_chart
from reid_dist.reporting.page import ReportInput, Section, render_sections
from reid_dist.reporting.parallel import Line, parallel_coordinates
from reid_dist.reporting.tables import table
from reid_dist.runs import Run
from tuning.search import LOSS, history
from tuning.state import DONE
from tuning.sweep import Sweep

CURVES = len(DASHES)  # learning curves in a chart, best first: no two may look alike

Outcomes = Mapping[str, Mapping[str, Any]]


def make_page(
    sweep: Sweep, uri: str, board: tables.Leaderboard, planned: Mapping[str, Any], outcomes: Outcomes, best: str
) -> str:
    """The HTML page. `planned`, `outcomes`: the sweep's trials by name; `best`: the name of the best, or ""."""
    names = trial_names(planned)
    lines = [
        Line(names[name], o["setting"], o["value"], name == best, o["status"] == DONE)
        for name, o in outcomes.items()
        if set(o["setting"]) == set(sweep.axes)
    ]
    metric = sweep.metric or "metric"
    curves = learning_curves(sweep, outcomes, names)
    sections = [Section("Leaderboard", [tables.html(board)], " ".join(board.notes))]
    if sweep.axes:
        sections.append(Section("Settings", [parallel_coordinates(lines, list(sweep.axes), metric, sweep.mode)]))
    sections += [
        Section("Learning curves", [line_chart(chart) for chart in curves]),
        Section("Trials", [trials_table(sweep, planned, outcomes, best)]),
    ]
    runs = [Run.read(o["uri"]).facts for o in outcomes.values()]
    return render_sections(
        ReportInput(
            title=f"Sweep {sweep.name}", summary=summary(sweep, planned, outcomes, best), metrics={},
            synthetic=any(s.get("synthetic") for o in outcomes.values() for s in o["scores"]),
            command=next((facts["command"] for facts in reversed(runs)), "python -m jobs.tune"),
            recipe=yaml.safe_dump(to_mapping(sweep), sort_keys=False),
            provenance=provenance(uri, runs, outcomes), sections=sections,
        )
    )  # fmt: skip


def summary(sweep: Sweep, planned: Mapping[str, Any], outcomes: Outcomes, best: str) -> str:
    """How far it is, and what won."""
    text = f"{len(outcomes)} of {len(planned)} trials ended."
    if best:
        won = outcomes[best]
        text += f" Best on {won['selected_on']}: {won['label']}, {sweep.metric} {won['value']:.4f} (best.yaml beside this page)."
    return text


def trial_names(planned: Mapping[str, Any]) -> dict[str, str]:
    """What a reader calls each trial: its row, seed or division, and what it was trained on where that differs."""
    sources = {name: "+".join(facts["recipe"]["data"]["train"]) for name, facts in planned.items()}
    several = len(set(sources.values())) > 1
    return {
        name: " ".join(filter(None, [facts["label"], sources[name] if several else "", _words(facts["repeat"])]))
        for name, facts in planned.items()
    }


def learning_curves(sweep: Sweep, outcomes: Outcomes, names: Mapping[str, str]) -> list[Curves]:
    """The judged metric over steps, and the loss, of the first trials by value."""
    sign = -1.0 if sweep.mode == "max" else 1.0
    ordered = sorted(outcomes.items(), key=lambda item: _order(item[1].get("value"), sign))[:CURVES]
    judged: dict[str, Any] = {}
    losses: dict[str, Any] = {}
    for name, outcome in ordered:
        metrics, label = Run.read(outcome["uri"]).metrics(), names[name]
        if sweep.metric and sweep.metric != LOSS:
            reports = outcome.get("reports") or history(metrics, sweep.metric)
            judged[label] = ([r["step"] for r in reports], [r[sweep.metric] for r in reports])
        reports = history(metrics, LOSS)
        losses[label] = ([r["step"] for r in reports], [r[LOSS] for r in reports])
    first = f"The {CURVES} best trials by {sweep.metric}." if sweep.metric else f"The first {CURVES} trials."
    note = first if len(outcomes) > CURVES else ""
    chart = [Curves(f"{sweep.metric} on the selection split", judged, note=note)] if judged else []
    return [*chart, Curves("Training loss", losses, note=note)]


def _order(value: float | None, sign: float) -> float:
    return float("inf") if value is None else sign * value


def trials_table(sweep: Sweep, planned: Mapping[str, Any], outcomes: Outcomes, best: str) -> Markup:
    """Every trial: how it ended, or that it did not."""
    names = trial_names(planned)
    rows = []
    for name in planned:
        o = outcomes.get(name)
        if o is None:
            rows.append([names[name], "not ended", "-", "-", "-", "-", name])
            continue
        value = "-" if o.get("value") is None else f"{o['value']:.4f}{_scored_at(o)}"
        mark = "best" if name == best else o["status"]
        rows.append([names[name], mark, value, o["step"], round(o["seconds"]), f"{o['gpu_hours']:.3f}", name])
    head = ["", "end", sweep.metric or "metric", "step", "seconds", "GPU-hours", "run"]
    return Markup("<div class=names>{}</div>").format(table(head, rows))


def _scored_at(outcome: Mapping[str, Any]) -> str:
    """Where the value is an earlier checkpoint's than the last: its step."""
    step = str(outcome.get("checkpoint", "")).rpartition("-")[2]
    return f" (step {int(step)})" if step.isdigit() and int(step) != outcome["step"] else ""


def provenance(uri: str, runs: list[dict[str, Any]], outcomes: Outcomes) -> dict[str, str]:
    """Where the numbers come from: the union over all trials."""
    data = {
        f"{name}: {facts['rows']} rows, content {facts['content'][:12]}"
        for run in runs
        for name, facts in run["identity"]["data"].items()
    }
    libraries = {f"{name} {version}" for run in runs for name, version in run["libraries"].items()}
    created = [run["created"] for run in runs]
    return {
        "sweep": uri,
        "data": "; ".join(sorted(data)) or "-",
        "code": ", ".join(sorted({run["code"]["digest"][:12] for run in runs})) or "-",
        "seeds": ", ".join(map(str, sorted({run["recipe"]["seed"] for run in runs}))) or "-",
        "first trial": _day(min(created)) if created else "-",
        "last outcome": _day(max(o["time"] for o in outcomes.values())) if outcomes else "-",
        "time of all trials": f"{sum(o['seconds'] for o in outcomes.values()) / 3600:.2f} hours, "
        f"{sum(o['gpu_hours'] for o in outcomes.values()):.2f} GPU-hours",
        "libraries": ", ".join(sorted(libraries)) or "-",
    }


def _day(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _words(facts: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in facts.items())
