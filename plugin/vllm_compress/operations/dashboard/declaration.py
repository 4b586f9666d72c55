"""What a panel is: its queries, unit and direction. `panels` and `operation` declare them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


def recorded(name: str, operation: str, by: str = "deployment") -> str:
    """Name the series that the rules record of a metric; a counter loses its `_total`."""
    return f"{by}:{name.removesuffix('_total')}:{operation}"


Unit = Literal[
    "count",
    "number",
    "bytes",
    "seconds",
    "ratio",
    "requests/s",
    "tokens/s",
    "watts",
    "joules",
    "money",
]
Style = Literal["solid", "dashed", "dotted"]


@dataclass(frozen=True)
class Query:
    """One recorded series. `legend` stands beside the deployment's name; `{{label}}` is filled in.

    `headline` is its column where deployments stand in a table, and its row in A against B.
    """

    series: str
    legend: str = ""
    headline: str = ""
    needs: str = ""
    style: Style = "solid"

    def expression(self, selector: str) -> str:
        """PromQL of the deployments that `selector`, such as `=~"$deployment"`, takes."""
        return f"{self.series}{{deployment{selector}}}"


@dataclass(frozen=True)
class Panel:
    """One chart. `better` is the direction that is good; `top` fixes the axis; `wide`: values that
    matter lie orders of magnitude apart, so the axis is logarithmic."""

    title: str
    help: str
    unit: Unit
    queries: tuple[Query, ...]
    better: Literal["lower", "higher", ""] = ""
    top: float | None = None
    wide: bool = False

    @property
    def needs(self) -> str:
        """Say what the panel needs to show anything; empty if nothing."""
        return self.queries[0].needs


@dataclass(frozen=True)
class Section:
    """Charts under one heading."""

    title: str
    panels: tuple[Panel, ...]


def one(name: str, operation: str, headline: str = "", needs: str = "") -> tuple[Query, ...]:
    """The one query of a panel."""
    return (Query(recorded(name, operation), headline=headline, needs=needs),)


def by(label: str, name: str, operation: str, needs: str = "") -> tuple[Query, ...]:
    """A panel's one query, a line for each value of a label beside the deployment's."""
    series = recorded(name, operation, f"deployment_{label}")
    return (Query(series, f"{{{{{label}}}}}", needs=needs),)


def quantiles(name: str, short: str = "") -> tuple[Query, ...]:
    """Queries of p50, p95 and p99, the first two as headlines where `short` names them."""

    def quantile(q: str, style: Style, headline: bool) -> Query:
        shown = f"{short} {q}" if short and headline else ""
        return Query(recorded(name, f"{q}_rate2m"), q, shown, style=style)

    return (
        quantile("p50", "dotted", True),
        quantile("p95", "solid", True),
        quantile("p99", "dashed", False),
    )
