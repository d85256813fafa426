"""What Ray Tune is handed: a searcher that gives it our trials, and a callback that keeps the books."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tuning.search import STEP, OptunaChooser

if TYPE_CHECKING:
    from tuning.driver import Books
    from tuning.expand import Trial

logger = logging.getLogger(__name__)

Next = Callable[[], "Trial | None"]


def make_feed(books: Books, following: Next) -> Any:
    """A Tune searcher that suggests the next trial until there is none, the budget is spent or the sweep is closed."""
    from ray.tune.search import Searcher

    from tuning.driver import payload

    class Feed(Searcher):  # type: ignore[misc]
        def suggest(self, trial_id: str) -> Any:
            trial = None if books.closed or books.spent() else following()
            if trial is None:
                return Searcher.FINISHED
            books.names[trial_id] = trial.name
            books.started.append(trial.name)
            logger.info("trial %s: %s %s", trial.name, trial.label, dict(trial.repeat) or "")
            return payload(books, trial)

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            """The ledger does that: it also sees what the scheduler stopped."""

        def save(self, checkpoint_path: str) -> None:
            """Nothing to save: a continued sweep reads its own records."""

        def restore(self, checkpoint_path: str) -> None:
            """See save."""

    return Feed()


def make_ledger(books: Books, chooser: OptunaChooser | None) -> Any:
    """A Tune callback that knows which trials run, and notes those that end without saying so themselves."""
    from ray.tune import Callback

    from tuning.driver import stopped_early

    class Ledger(Callback):  # type: ignore[misc]
        def _trial(self, trial: Any) -> Trial:
            return books.trials[books.names[trial.trial_id]]

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            books.running[self._trial(trial).name] = self._trial(trial)

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            metric, name = books.sweep.metric, self._trial(trial).name
            if STEP in result:
                books.reached[name] = int(result[STEP])
            if metric in result and STEP in result and "ended" not in result:
                report = {STEP: result[STEP], metric: result[metric]}
                books.reports.setdefault(name, []).append(report)
                logger.info("%s step %d: %s %.4f", name, report[STEP], metric, report[metric])

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            ours = self._trial(trial)
            books.running.pop(ours.name, None)
            ended = (trial.last_result or {}).get("ended")
            outcome = None
            if ended is None and not books.closed:
                outcome = stopped_early(books, ours)
            elif ended == "done":
                outcome = books.state.outcomes().get(ours.name)
                logger.info("%s (%s) is done: %s", ours.name, ours.label, short(outcome))
            if chooser is not None:
                chooser.tell(ours.name, outcome)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            ours = self._trial(trial)
            if trial.status != "ERROR":  # Tune tries again
                return
            books.running.pop(ours.name, None)
            books.state.fail(ours.name, f"its driver died: {last_line(trial.error_file)}")
            if chooser is not None:
                chooser.tell(ours.name, None)

    return Ledger()


def short(outcome: Any) -> str:
    """The scores of an outcome in a few words."""
    scores = (outcome or {}).get("scores", [])
    return "; ".join(f"{s['column']} mAP {s['record'].get('mAP', float('nan')):.4f}" for s in scores) or "no scores"


def last_line(path: str | None) -> str:
    """The last line of Tune's error file."""
    try:
        with open(path or "", encoding="utf-8") as file:
            lines = [line.strip() for line in file if line.strip()]
    except OSError:
        return "no traceback was kept"
    return lines[-1] if lines else "no traceback was kept"
