"""The Grafana dashboard of the examples: its queries, and the metrics and labels in them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["DASHBOARD", "panels", "queries", "selectors", "unknown_names", "variables"]

DASHBOARD = Path(__file__).parents[1] / "examples" / "grafana_dashboard.json"
# What Grafana puts in, with "All" chosen.
_FILLED = {"$model": ".+", "$instance": ".+", "$__rate_interval": "1m"}
# Prometheus adds them to what a server shows.
_SCRAPED = {"instance", "job"}


def panels() -> list[dict[str, Any]]:
    """All that show something."""
    return [p for p in json.loads(DASHBOARD.read_text())["panels"] if p["type"] != "row"]


def variables() -> dict[str, tuple[str, str]]:
    """Of the variables that are queries, the selector and the label whose values they list."""
    found = {}
    for variable in json.loads(DASHBOARD.read_text())["templating"]["list"]:
        if variable["type"] == "query":
            text = _fill(variable["query"]["query"])
            parts = re.fullmatch(r"label_values\((.+), (\w+)\)", text)
            assert parts is not None, text
            found[variable["name"]] = (parts[1], parts[2])
    return found


def queries() -> Iterator[tuple[str, str]]:
    """The title of a panel and one of its queries, as Prometheus gets it."""
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], _fill(target["expr"])


def selectors(query: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Metrics of a query, each with its labels: a value where one is asked for, else "".

    A metric may be a pattern: SGLang gives Prometheus 2 an underscore for the colon in its names.
    """
    grouped = {name for names in re.findall(r"\bby \(([\w, ]+)\)", query) for name in _words(names)}
    for metric, inside in re.findall(r"([a-zA-Z_:][\w:]*)?\{([^}]*)\}", query):
        matchers = re.findall(r'(\w+)(=~|=)"([^"]*)"', inside)
        values = {label: value if kind == "=" else "" for label, kind, value in matchers}
        patterns = [value for label, _, value in matchers if label == "__name__"]
        values.pop("__name__", None)
        yield metric or patterns[0], dict.fromkeys(grouped, "") | values


def unknown_names(query: str, samples: Mapping[str, Sequence[Mapping[str, str]]]) -> list[str]:
    """What a query names and a server does not show.

    Args:
        query: of Prometheus.
        samples: the labels of each sample of a metric, by its name.
    """
    found = list(selectors(query))
    wrong = [] if found else [f"no metric in {query}"]
    for metric, labels in found:
        wanted = {name: value for name, value in labels.items() if name not in _SCRAPED}
        shown = [s for name, many in samples.items() if re.fullmatch(metric, name) for s in many]
        if not any(all(v in (s.get(k), "") and k in s for k, v in wanted.items()) for s in shown):
            wrong.append(f"{metric}{wanted}")
    return wrong


def _fill(text: str) -> str:
    for name, value in _FILLED.items():
        text = text.replace(name, value)
    assert "$" not in text, text
    return text


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]
