"""The Grafana dashboard as a file: what a server and Prometheus make of it is in tests/engine."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

from tests.dashboard import DASHBOARD, panels, queries, selectors, unknown_names, variables

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
DOCS = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()


def test_it_can_be_imported_beside_any_prometheus() -> None:
    """No part of it is of one Grafana: each asks the data source that a reader chooses."""
    whole = json.loads(DASHBOARD.read_text())
    (chosen,) = (v for v in whole["templating"]["list"] if v["type"] == "datasource")
    assert (chosen["name"], chosen["query"]) == ("datasource", "prometheus")
    assert "id" not in whole
    for panel in panels():
        assert panel["datasource"] == DATASOURCE
        assert all(target["datasource"] == DATASOURCE for target in panel["targets"])
    assert variables().keys() == {"model", "instance"}


def test_panels_have_a_place_and_a_description_each() -> None:
    whole = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in whole}) == len(whole)
    assert len({panel["title"] for panel in whole}) == len(whole)
    for one, other in combinations(whole, 2):
        assert not _overlap(one["gridPos"], other["gridPos"]), (one["title"], other["title"])
    for panel in panels():
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        assert len(panel["description"]) > 80
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs) > 0


def test_every_metric_of_ours_is_shown_and_every_query_can_be_narrowed() -> None:
    ours = set(re.findall(r"^\| `(sglang_prefix_\w+)", DOCS, re.MULTILINE))
    named = [found for _, query in queries() for found in selectors(query)]
    assert ours == {metric for metric, _ in named if metric.startswith("sglang_prefix_")}
    for metric, labels in named:
        assert labels.keys() >= {"model_name", "instance"}, metric


def test_names_that_a_server_does_not_show_are_found() -> None:
    shown: Any = {"a_total": [{"x": "1", "y": "2"}, {"x": "2"}]}
    assert not unknown_names('sum({__name__=~"a[:_]total", x="1"})', shown)
    assert unknown_names('sum({__name__=~"a:total", x="1"})', shown)
    assert not unknown_names('sum by (x) (rate(a_total{x="1", y=~".+", job=~".+"}[1m]))', shown)
    for wrong in ("b_total{}", 'a_total{x="3"}', 'a_total{x="2", y="2"}', "sum by (z) (a_total{})"):
        assert unknown_names(wrong, shown), wrong
    assert unknown_names("vector(1)", shown)


def _overlap(a: dict[str, int], b: dict[str, int]) -> bool:
    return all(a[k] < b[k] + b[size] and b[k] < a[k] + a[size] for k, size in ("xw", "yh"))
