"""One self-contained HTML page of a run, or a sweep's leaderboard: `python -m jobs.report RUN_OR_SWEEP [out=FILE]`.

It joins what is stored: metrics, evaluations (jobs.evaluate), the card. Nothing is computed again, no model is loaded.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

from jobs._job import refuse_unknown_flags, run_job, split_words
from reid_dist.errors import UserError

USAGE = """usage: python -m jobs.report RUN|SWEEP [out=FILE] [data.root=URI]
  RUN    a run's folder or s3:// prefix, evaluated before by jobs.evaluate
  SWEEP  a sweep's folder or prefix (jobs.tune): leaderboard as Markdown, CSV, LaTeX and HTML, and the best recipe
  out=   where the page goes; default: report.html in the run
  trials=all   RUN is the name of a training with trials=all: one page of all divisions"""

logger = logging.getLogger("reid_dist.jobs.report")


def main(argv: list[str]) -> dict[str, Any]:
    from jobs._trials import TrialOptions, report_trials
    from jobs._words import split_options

    words, values, flags = split_words(argv, USAGE)
    refuse_unknown_flags(flags, set(), USAGE)
    several, values = split_options(TrialOptions, values, rest_allowed=True)
    options = dict(word.split("=", 1) for word in values)
    unknown = sorted(set(options) - {"out", "data.root"})
    if len(words) != 1 or unknown:
        raise UserError(f"unknown {', '.join(unknown)}. {USAGE.splitlines()[0]}" if unknown else USAGE.splitlines()[0])
    from tuning.board import is_sweep, write_board

    if several.trials is None and is_sweep(words[0]):
        return {"sweep": words[0], **write_board(words[0], options.get("out", ""))}
    out, root = options.get("out"), options.get("data.root")
    return report(words[0], out, root) if several.trials is None else report_trials(words[0], several.trials, out, root)


def report(uri: str, out: str | None = None, root: str | None = None) -> dict[str, Any]:
    """Write the page; returns the job's record."""
    from reid_dist.runs import Run

    run = Run.read(uri)
    evaluations = stored_evaluations(run)
    place = write_page(page_input(run.card(), run.metrics(), evaluations, root), run.store, out)
    return {"run": run.uri, "report": place, "evaluations": len(evaluations)}


def stored_evaluations(run: Any) -> list[dict[str, Any]]:
    """What jobs.evaluate stored in a run. Raises UserError when that is nothing."""
    found = [json.loads(run.store.read(entry.key)) for entry in run.store.list("evaluations/")]
    if not found:
        raise UserError(f"{run.uri} was not evaluated yet: python -m jobs.evaluate {run.uri}")
    return found


def write_page(page: Any, store: Any, out: str | None) -> str:
    """Render a page into the file `out`, else as report.html of `store`; returns the place."""
    from reid_dist.reporting import render_report

    text = render_report(page)
    if out:
        with open(out, "w", encoding="utf-8") as file:
            file.write(text)
    else:
        store.write("report.html", text.encode())
    place = out or f"{store.uri}/report.html"
    logger.info("report: %s (%.0f kB)", place, len(text) / 1000)
    return place


def page_input(
    card: dict[str, Any], metrics: list[dict[str, Any]], evaluations: list[dict[str, Any]], root: str | None
) -> Any:
    """The page's content from stored pieces."""
    import yaml

    from reid_dist import methods
    from reid_dist.reporting import ReportInput
    from reid_dist.reporting.sections import section_of

    recipe = card["recipe"]
    spec = methods.get(recipe["method"])
    trained = [e for e in evaluations if e["record"]["checkpoint"] != "start"]
    untrained = [e for e in evaluations if e["record"]["checkpoint"] == "start"]
    main_one = max(trained or untrained, key=lambda e: (e["record"]["step"], not e["record"].get("label")))
    scored = [*sorted(trained, key=lambda e: -e["record"]["step"]), *untrained]
    several = len({(e["record"]["protocol"], tuple(e["record"]["tables"])) for e in scored}) > 1
    named = {name: record for e in scored for name, record in _rows(e["record"], several)}
    record = main_one["record"]
    view, synthetic = _view(recipe, main_one, root)
    return ReportInput(
        title=f"{recipe['name']}: {spec.name} on {', '.join(record['tables'])}",
        summary=f"{spec.reference.paper}. {record['protocol']} retrieval with the weights of {record['checkpoint']}, "
        f"trained for {record['step']} steps on {recipe['training']['num_workers']} workers.",
        metrics=named,
        synthetic=synthetic,
        command=card["command"],
        recipe=yaml.safe_dump(recipe, sort_keys=False),
        provenance=_provenance(card, record),
        curves=_curves(metrics),
        rank_lists=[_rank_list(entry, view) for entry in main_one["lists"]],
        sections=[section_of(figure) for figure in [*main_one["figures"], *of_training(spec, metrics)]],
        metrics_note=f"Protocol {record['protocol']}; checkpoint chosen on: {record['selected_on']}.",
    )


def of_training(spec: Any, metrics: list[dict[str, Any]]) -> list[Any]:
    return list(spec.training_figures(metrics)) if spec.training_figures else []


def _rows(record: dict[str, Any], several: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of the metrics table: the record, and those of other conventions beside it."""
    name = _row_name(record, several)
    yield name, record
    for other, beside in record.get("beside", {}).items():
        yield f"{name} ({other})", beside


def _row_name(record: dict[str, Any], several: bool) -> str:
    name = "untrained" if record["checkpoint"] == "start" else f"step {record['step']}"
    name += f", trial {record['trial']}" if "trial" in record else ""
    name += f" ({record['label']})" if record.get("label") else ""  # expanded or re-ranked
    changed = [word for word in record.get("overrides", []) if word.startswith("model.")]
    name += f" ({', '.join(changed)})" if changed else ""
    return f"{name}, {'+'.join(record['tables'])}, {record['protocol']}" if several else name


def _view(recipe: dict[str, Any], evaluation: dict[str, Any], root: str | None) -> tuple[Any, bool]:
    from reid_dist.config import DataConfig, typed
    from reid_dist.data.leaks import tested
    from reid_dist.data.store import open_view

    data = typed(DataConfig, recipe["data"] | {"root": root or evaluation["data"]["root"]}, "data")
    view = tested(open_view(data, evaluation["data"]["tables"]))
    return view, any("synthetic" in table.facts.notes for table in view.tables)


def _rank_list(entry: dict[str, Any], view: Any) -> Any:
    import numpy as np

    from reid_dist.reporting import RankedItem, RankList
    from reid_dist.reporting.film import film_strips

    query, text = entry["query"], entry["query_kind"] == "text"
    rows = [item["row"] for item in entry["top"]]
    wanted = np.array([query["row"], *rows], dtype=np.int64)
    film = entry["gallery_kind"] == "tracklet"
    pictures = film_strips(view, wanted) if film else view.encoded(wanted)
    shows_text = entry["gallery_kind"] == "text"
    items = [
        RankedItem(
            correct=item["correct"],
            image=None if shows_text else picture,
            text=view.captions[item["row"]][item["part"]] if shows_text else "",
            label=f"id {item['pid']}",
            score=item["score"],
        )
        for item, picture in zip(entry["top"], pictures[1:], strict=True)
    ]
    caption = view.captions[query["row"]][query["part"]] if text else ""
    return RankList(items, caption, None if text else pictures[0], f"id {query['pid']}", ap=entry["ap"], film=film)


def _curves(metrics: list[dict[str, Any]]) -> list[Any]:
    from reid_dist.reporting import Curves

    steps = [m for m in metrics if m["kind"] == "step"]
    evals = [m for m in metrics if m["kind"] == "eval"]
    skip = {"kind", "step", "stage", "epoch", "lr", "rows", "rows_per_s", "time"}
    terms = list(dict.fromkeys(key for m in steps for key in m if key not in skip))

    def series(records: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
        return [m["step"] for m in records if key in m], [m[key] for m in records if key in m]

    curves = [
        Curves("Loss terms (weighted)", {term: series(steps, term) for term in terms}),
        Curves("Learning rate of the first group", {"lr": series(steps, "lr")}),
        Curves("Training speed, rows per second over all workers", {"rows/s": series(steps, "rows_per_s")}),
    ]
    if evals:
        names = ("rank1", "mAP", "mINP")
        curves.insert(1, Curves("Selection split", {name: series(evals, name) for name in names}, percent=True))
    return curves


def _provenance(card: dict[str, Any], record: dict[str, Any]) -> dict[str, str]:
    from datetime import UTC, datetime

    tables = card["data"] | record["tables"]
    return {
        "run": card["uri"],
        "identity": card["identity"],
        "data": "; ".join(
            f"{name}: {facts['rows']} rows, content {facts['content'][:12]}" for name, facts in tables.items()
        ),
        "code": f"{card['code']['digest'][:12]} (commit {card['code']['commit'] or 'unknown'})",
        "seed": str(card["recipe"]["seed"]),
        "started": datetime.fromtimestamp(card["created"], UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "attempts": f"{len(card['attempts'])}, restarts within them: {len(card['restarts'])}",
        "libraries": ", ".join(f"{name} {version}" for name, version in card["libraries"].items()),
    }


if __name__ == "__main__":
    run_job("report", main)
