"""The leaderboard of a stored sweep: gather outcomes, write Markdown, CSV, LaTeX, an HTML page and the best recipe."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from reid_dist import methods
from reid_dist.config import build_recipe, merge, to_mapping
from reid_dist.reporting import leaderboard as tables
from reid_dist.storage import open_store
from tuning.page import make_page
from tuning.search import LOSS
from tuning.state import DONE, STOPPED, SweepState
from tuning.sweep import PaperFigure, Sweep, build_sweep

logger = logging.getLogger(__name__)

Outcomes = Mapping[str, Mapping[str, Any]]


def write_board(uri: str, out: str = "") -> dict[str, Any]:
    """Write everything into the sweep (or the page also to `out`); returns {"leaderboard", "best"}. Raises UserError."""
    state = SweepState.read(uri)
    index = state.index()
    sweep = build_sweep(index["sweep"])
    known, found = state.planned(), state.outcomes()
    planned = {name: known[name] for name in index["trials"] if name in known}
    outcomes = {name: found[name] for name in planned if name in found}
    board = make_board(sweep, planned, outcomes)
    for name, text in {
        "md": tables.markdown(board),
        "csv": tables.comma_separated(board),
        "tex": tables.latex(board),
    }.items():
        state.store.write(f"leaderboard.{name}", text.encode())
    best = best_trial(sweep, planned, outcomes)
    if best:
        state.store.write("best.yaml", best_recipe(sweep, planned[best], outcomes[best]).encode())
    page = make_page(sweep, state.uri, board, planned, outcomes, best)
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
    ranked = ranking(sweep, planned, outcomes)
    done = [o for o in outcomes.values() if o["status"] == DONE]
    if ranked:
        done.sort(key=lambda o: ranked.index(o["label"]) if o["label"] in ranked else len(ranked))
    scores = [
        tables.Score(o["label"], columns[s["column"], s["protocol"]], s["record"], _words(o["repeat"]))
        for o in done
        for s in o["scores"]
    ]
    rows = list(dict.fromkeys(o["label"] for o in done))
    return tables.build(sweep.name, scores, published(sweep.paper, rows), make_notes(sweep, planned, outcomes))


def make_notes(sweep: Sweep, planned: Mapping[str, Any], outcomes: Outcomes) -> list[str]:
    """What a reader must know of the table: what chose, how many ended how, whether the data is synthetic."""
    done = [o for o in outcomes.values() if o["status"] == DONE]
    splits = sorted({str(o["selected_on"]) for o in done})
    chose = ", ".join(
        "the last checkpoint (no split chose)" if s == "none" else f"the best on split {s}" for s in splits
    )
    notes = [f"Checkpoint of each trial: {chose or 'none is done yet'}."]
    if sweep.metric:
        split = "the training loss" if sweep.metric == LOSS else "the selection split, never on what the columns show"
        notes.append(f"Trials were compared, and rows stand best first, by {sweep.metric} ({sweep.mode}) on {split}.")
    stopped = sum(o["status"] == STOPPED for o in outcomes.values())
    early = (
        f", {stopped} stopped early by the scheduler ({sweep.scheduler.name})" if sweep.scheduler.name != "none" else ""
    )
    notes.append(f"{len(done)} trials done{early}.")
    wanted = Counter(facts["label"] for facts in planned.values())
    partial = [row for row, n in Counter(o["label"] for o in done).items() if n < wanted[row]]
    if sweep.metric and partial:
        notes.append(
            f"Incomplete (trials of the row were stopped or are not done), so below the others: {', '.join(partial)}."
        )
    if any(s.get("synthetic") for o in done for s in o["scores"]):
        notes.append("Synthetic data: these scores are no evidence about published accuracy.")
    return notes


def published(figures: Sequence[PaperFigure], rows: Sequence[str]) -> list[tables.Published]:
    """The paper's figures, under the row they name; under the first row where they name none."""
    found = []
    for figure in figures:
        record = {name: value / 100 for name in ("rank1", "mAP") if (value := getattr(figure, name)) is not None}
        row = figure.label or (rows[0] if rows else "not run yet")
        found.append(tables.Published(row, figure.column, record, figure.source))
    return found


def ranking(sweep: Sweep, planned: Mapping[str, Any], outcomes: Outcomes) -> list[str]:
    """Row labels, best mean of the metric first; [] where nothing is chosen.

    Rows whose trials are not all done (stopped early, failed) come after all that are complete.
    """
    if not sweep.metric:
        return []
    wanted = Counter(facts["label"] for facts in planned.values())
    values: dict[str, list[float]] = {}
    for outcome in outcomes.values():
        if outcome["status"] == DONE and outcome.get("value") is not None:
            values.setdefault(outcome["label"], []).append(_sign(sweep) * float(outcome["value"]))
    return sorted(values, key=lambda row: (len(values[row]) < wanted[row], -sum(values[row]) / len(values[row])))


def best_trial(sweep: Sweep, planned: Mapping[str, Any], outcomes: Outcomes) -> str:
    """The best trial of the first row of the ranking; "" where nothing is chosen."""
    rows = ranking(sweep, planned, outcomes)
    values = {
        name: _sign(sweep) * float(o["value"])
        for name, o in outcomes.items()
        if rows and o["label"] == rows[0] and o["status"] == DONE and o.get("value") is not None
    }
    return max(values, key=lambda name: values[name]) if values else ""


def _sign(sweep: Sweep) -> float:
    return 1.0 if sweep.mode == "max" else -1.0


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


def is_sweep(uri: str) -> bool:
    """Whether a sweep lives at a place. Raises UserError for a place that is none."""
    return SweepState(uri).exists


def _words(facts: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in facts.items())
