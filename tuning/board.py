"""The leaderboard of a stored sweep: gather outcomes, write Markdown, CSV, LaTeX, an HTML page and the best recipe."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from reid_dist import methods
from reid_dist.config import build_recipe, merge, to_mapping
from reid_dist.reporting import leaderboard as tables
from reid_dist.reporting.figures import Curves, line_chart
from reid_dist.reporting.page import ReportInput, Section, render_sections
from reid_dist.reporting.parallel import Line, parallel_coordinates
from reid_dist.reporting.tables import table
from reid_dist.runs import Run
from reid_dist.storage import open_store
from tuning.search import LOSS, history
from tuning.state import DONE, STOPPED, SweepState
from tuning.sweep import PaperFigure, Sweep, build_sweep

logger = logging.getLogger(__name__)

CURVES = 12  # learning curves on the page, best first

Outcomes = Mapping[str, Mapping[str, Any]]


def write_board(uri: str, out: str = "") -> dict[str, Any]:
    """Write everything into the sweep (or the page also to `out`); returns {"leaderboard", "best"}. Raises UserError."""
    state = SweepState.read(uri)
    index = state.index()
    sweep = build_sweep(index["sweep"])
    planned, found = state.planned(), state.outcomes()
    outcomes = {name: found[name] for name in index["trials"] if name in found}
    board = make_board(sweep, planned, outcomes)
    for name, text in {
        "md": tables.markdown(board),
        "csv": tables.comma_separated(board),
        "tex": tables.latex(board),
    }.items():
        state.store.write(f"leaderboard.{name}", text.encode())
    best = best_trial(sweep, {name: planned[name] for name in index["trials"] if name in planned}, outcomes)
    if best:
        state.store.write("best.yaml", best_recipe(sweep, planned[best], outcomes[best]).encode())
    page = make_page(sweep, state, board, planned, outcomes, best, len(index["trials"]))
    state.store.write("leaderboard.html", page.encode())
    if out:
        open_store(out.rpartition("/")[0] or ".").write(out.rpartition("/")[2], page.encode())
    logger.info("leaderboard: %s/leaderboard.{md,csv,tex,html}%s", state.uri, f", best recipe: {best}" if best else "")
    facts = (
        {"row": outcomes[best]["label"], "value": outcomes[best]["value"], "recipe": f"{state.uri}/best.yaml"}
        if best
        else None
    )
    return {"leaderboard": f"{state.uri}/leaderboard.html", "best": facts}


def columns_of(planned: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """(heading, protocol) -> heading of the table: the protocol is named where one heading has several."""
    pairs = dict.fromkeys((s["name"], s["protocol"]) for facts in planned.values() for s in facts["scorings"])
    headings = [heading for heading, _ in pairs]
    return {(h, p): h if headings.count(h) == 1 else f"{h} ({p})" for h, p in pairs}


def make_board(sweep: Sweep, planned: Mapping[str, Any], outcomes: Outcomes) -> tables.Leaderboard:
    """Average what is done. Trials that were stopped early have no score and are only counted."""
    columns = columns_of(planned)
    scores = [
        tables.Score(o["label"], columns[s["column"], s["protocol"]], s["record"], _words(o["repeat"]))
        for o in outcomes.values()
        for s in o["scores"]
    ]
    done = [o for o in outcomes.values() if o["status"] == DONE]
    stopped = [o for o in outcomes.values() if o["status"] == STOPPED]
    splits = sorted({str(o["selected_on"]) for o in done})
    notes = [f"Checkpoints were chosen on: {', '.join(splits) or 'nothing yet'} (none: the last checkpoint counts)."]
    if sweep.metric:
        split = "the training loss" if sweep.metric == LOSS else "the selection split, never on what the columns show"
        notes.append(f"Trials were compared by {sweep.metric} ({sweep.mode}) on {split}.")
    notes.append(f"{len(done)} trials done, {len(stopped)} stopped early by the scheduler ({sweep.scheduler.name}).")
    if any(s.get("synthetic") for o in done for s in o["scores"]):
        notes.append("Synthetic data: these scores are no evidence about published accuracy.")
    rows = list(dict.fromkeys([o["label"] for o in done]))
    return tables.build(sweep.name, scores, published(sweep.paper, rows), notes)


def published(figures: Sequence[PaperFigure], rows: Sequence[str]) -> list[tables.Published]:
    """The paper's figures, under the row they name; under the first row where they name none."""
    found = []
    for figure in figures:
        record = {name: value / 100 for name in ("rank1", "mAP") if (value := getattr(figure, name)) is not None}
        row = figure.label or (rows[0] if rows else "not run yet")
        found.append(tables.Published(row, figure.column, record, figure.source))
    return found


def best_trial(sweep: Sweep, planned: Mapping[str, Any], outcomes: Outcomes) -> str:
    """The best trial of the row with the best mean; "" where nothing is chosen.

    Rows whose trials are not all done (stopped early, failed) count only when no row is complete.
    """
    if not sweep.metric:
        return ""
    sign = 1.0 if sweep.mode == "max" else -1.0
    wanted: dict[str, int] = {}
    for facts in planned.values():
        wanted[facts["label"]] = wanted.get(facts["label"], 0) + 1
    values: dict[str, dict[str, float]] = {}
    for name, outcome in outcomes.items():
        if outcome["status"] == DONE and outcome.get("value") is not None:
            values.setdefault(outcome["label"], {})[name] = sign * float(outcome["value"])
    complete = {label: found for label, found in values.items() if len(found) == wanted.get(label)}
    rows = complete or values
    if not rows:
        return ""
    row = max(rows, key=lambda label: sum(rows[label].values()) / len(rows[label]))
    return max(rows[row], key=lambda name: rows[row][name])


def best_recipe(sweep: Sweep, facts: Mapping[str, Any], outcome: Mapping[str, Any]) -> str:
    """A recipe file that jobs.train takes: the trial's, with what it was scored on as data.test and places left to the user."""
    tests = [table for scoring in facts["scorings"] for table in scoring["test"]]
    recipe = merge(facts["recipe"], {"name": f"{sweep.name}-best", "data": {"test": list(dict.fromkeys(tests))}})
    recipe.pop("output")
    build_recipe(recipe, lambda name: methods.get(name).Config)  # what is written can be read
    head = (
        f"# The best of sweep {sweep.name}: row {outcome['label']!r}, {sweep.metric} {outcome['value']:.4f} on "
        f"{outcome['selected_on']}.\n# Trial {outcome['name']}.\n"
    )
    return head + yaml.safe_dump(to_mapping(recipe), sort_keys=False)


def make_page(
    sweep: Sweep, state: SweepState, board: tables.Leaderboard, planned: Mapping[str, Any], outcomes: Outcomes, best: str,
    total: int,
) -> str:  # fmt: skip
    """The HTML page."""
    lines = [
        Line(o["label"], o["setting"], o["value"], name == best)
        for name, o in outcomes.items()
        if set(o["setting"]) == set(sweep.axes)
    ]
    metric = sweep.metric or "metric"
    sections = [
        Section("Leaderboard", [tables.html(board)], " ".join(board.notes)),
        Section("Settings", [parallel_coordinates(lines, list(sweep.axes), metric)]),
        Section("Learning curves", [line_chart(curves) for curves in learning_curves(sweep, outcomes)]),
        Section("Trials", [trials_table(sweep, outcomes, best)]),
    ]
    first: dict[str, Any] = next(iter(planned.values()), {})
    synthetic = any(s.get("synthetic") for o in outcomes.values() for s in o["scores"])
    return render_sections(
        ReportInput(
            title=f"Sweep {sweep.name}", summary=f"{len(outcomes)} of {total} trials ended.", metrics={}, synthetic=synthetic,
            command=_command(outcomes) or "python -m jobs.tune", recipe=yaml.safe_dump(to_mapping(sweep), sort_keys=False),
            provenance={"sweep": state.uri, "first trial": str(first.get("uri", "none"))}, sections=sections,
        )
    )  # fmt: skip


def _command(outcomes: Outcomes) -> str:
    return next((Run.read(o["uri"]).facts["command"] for o in outcomes.values()), "")


def learning_curves(sweep: Sweep, outcomes: Outcomes) -> list[Curves]:
    """The judged metric over steps, and the loss, of the first trials by value."""
    sign = -1.0 if sweep.mode == "max" else 1.0
    ordered = sorted(outcomes.items(), key=lambda item: _order(item[1].get("value"), sign))[:CURVES]
    judged: dict[str, Any] = {}
    losses: dict[str, Any] = {}
    for name, outcome in ordered:
        metrics, label = Run.read(outcome["uri"]).metrics(), f"{outcome['label']} {_words(outcome['repeat'])}".strip()
        label = label if label not in losses else f"{label} ({name})"
        if sweep.metric and sweep.metric != LOSS:
            reports = outcome.get("reports") or history(metrics, sweep.metric)
            judged[label] = ([r["step"] for r in reports], [r[sweep.metric] for r in reports])
        reports = history(metrics, LOSS)
        losses[label] = ([r["step"] for r in reports], [r[LOSS] for r in reports])
    note = f"The first {CURVES} trials by {sweep.metric or 'order'}." if len(outcomes) > CURVES else ""
    first: list[Curves] = [Curves(f"{sweep.metric} on the selection split", judged, note=note)] if judged else []
    return [*first, Curves("Training loss", losses, note=note)]


def _order(value: float | None, sign: float) -> float:
    return float("inf") if value is None else sign * value


def trials_table(sweep: Sweep, outcomes: Outcomes, best: str) -> Any:
    """Every trial that ended."""
    rows = []
    for name, o in outcomes.items():
        value = "-" if o.get("value") is None else f"{o['value']:.4f}"
        mark = "best" if name == best else o["status"]
        rows.append(
            [
                name,
                o["label"],
                _words(o["repeat"]),
                mark,
                value,
                o["step"],
                round(o["seconds"]),
                round(o["gpu_hours"], 3),
            ]
        )
    header = ["trial", "row", "repeat", "end", sweep.metric or "metric", "step", "seconds", "GPU-hours"]
    return table(header, rows)


def _words(facts: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in facts.items())


def is_sweep(uri: str) -> bool:
    """Whether a sweep lives at a place. Raises UserError for a place that is none."""
    return SweepState(uri).exists
