"""What an operator watches beside a deployment's measures: speculation, gateways, quality."""

from __future__ import annotations

from vllm_compress.metrics.series import NAMES, PREFIX
from vllm_compress.operations.dashboard.declaration import (
    Panel,
    Query,
    Section,
    by,
    one,
    recorded,
)

GATEWAY = "a scraped gateway: `vllm-compress gateway --run --metrics-port`"
DRAFT = "a draft: `vllm-compress serve --draft`"
QUALITY = "results of `vllm-compress compare --metrics`"

_GATEWAY = PREFIX + "gateway_"
SHARE = recorded(f"{_GATEWAY}share_ratio", "max")
UP, DOWN = (recorded(PREFIX + what, "sum") for what in ("up", "down"))
STARTS = recorded(f"{PREFIX}starts", "sum2m")

OPERATION = (
    Section(
        "Speculation",
        (
            Panel(
                "Drafted tokens accepted",
                "Share of the tokens written ahead that the model itself would have said.",
                "ratio",
                one(NAMES.accepted_tokens, "ratio_rate2m", "Accepted", DRAFT),
                better="higher",
                top=1.0,
            ),
            Panel(
                "Drafted tokens",
                "Tokens written ahead per second.",
                "tokens/s",
                one(NAMES.draft_tokens, "rate2m", needs=DRAFT),
            ),
        ),
    ),
    Section(
        "Gateway",
        (
            Panel(
                "Answers by code",
                "What the gateway's clients got, per second, by HTTP status.",
                "requests/s",
                by("code", f"{_GATEWAY}requests", "rate2m", GATEWAY),
            ),
            Panel(
                "Time at the gateway",
                "p95 from a request's first byte to the last one of its answer.",
                "seconds",
                one(f"{_GATEWAY}request_seconds", "p95_rate2m", needs=GATEWAY),
                better="lower",
                wide=True,
            ),
            Panel(
                "Requests asked again",
                "Per second: a server did not answer, so another one was asked.",
                "requests/s",
                one(f"{_GATEWAY}repeated", "rate2m", needs=GATEWAY),
                better="lower",
            ),
            Panel(
                "Servers that get requests",
                "That answer the probes of a gateway, of the one that sees fewest.",
                "count",
                one(f"{_GATEWAY}servers_up", "min", needs=GATEWAY),
            ),
            Panel(
                "Share of the users",
                "Whom `vllm-compress rollout` moves.",
                "ratio",
                (Query(SHARE, headline="Users", needs=GATEWAY),),
                top=1.0,
            ),
        ),
    ),
    Section(
        "Quality",
        (
            Panel(
                "Against the original",
                "Metrics of the last comparison: kl in nats per token, the others as `compare` has "
                "them, most of them B relative to A.",
                "number",
                by("metric", f"{PREFIX}quality", "value", QUALITY),
                wide=True,
            ),
            Panel(
                "Verdict",
                "Of the last comparison: 1 non-inferior, 0 undecided, -1 inferior.",
                "number",
                one(f"{PREFIX}quality_verdict", "min", "Verdict", QUALITY),
                better="higher",
            ),
        ),
    ),
)
# Vertical lines in every chart: what changed for a deployment, and when.
MARKS = {"rollout": SHARE, "start": STARTS}
