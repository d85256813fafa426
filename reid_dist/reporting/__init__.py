"""One self-contained HTML page per run: plain data in, text out; no Ray, no store, no network (issue 2, item 12)."""

from reid_dist.reporting.figures import Curves, RankedItem, RankList, expert_usage, line_chart, spread_queries
from reid_dist.reporting.page import ReportInput, Section, render_report, render_search
from reid_dist.reporting.tables import metrics_table, table

__all__ = [
    "Curves",
    "RankList",
    "RankedItem",
    "ReportInput",
    "Section",
    "expert_usage",
    "line_chart",
    "metrics_table",
    "render_report",
    "render_search",
    "spread_queries",
    "table",
]
