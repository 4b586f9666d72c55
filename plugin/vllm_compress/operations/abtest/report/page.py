"""report.html: one page that needs nothing else, no network and no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from vllm_compress.operations.abtest.replay.measure import PairOfAnswers
from vllm_compress.operations.abtest.report.document import (
    change,
    conclusion,
    limit_text,
    number,
    remarks,
    server_text,
)
from vllm_compress.operations.abtest.report.plots import VERDICT_COLOURS, distributions, interval

CSS = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2026; max-width: 1180px; margin: 32px auto;
       padding: 0 24px }
h1 { font-size: 24px; margin: 0 0 4px } h2 { font-size: 18px; margin: 36px 0 8px }
.muted { color: #666c75 } .a { color: #2f6db3 } .b { color: #b85f10 }
.verdict { border-left: 6px solid; padding: 12px 18px; margin: 20px 0; background: #f6f7f9;
           font-size: 17px }
table { border-collapse: collapse; width: 100% }
th { text-align: left; font-weight: 600; border-bottom: 2px solid #d5d9de; padding: 6px 10px }
td { border-bottom: 1px solid #eceef1; padding: 5px 10px; vertical-align: middle }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
tr.group td { font-weight: 600; background: #f6f7f9; padding-top: 8px }
td.change { white-space: nowrap; font-variant-numeric: tabular-nums }
td small { display: block; color: #666c75 }
.chip { font-weight: 600; white-space: nowrap }
svg.interval { display: block }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 20px }
figure { margin: 0 } figcaption { font-weight: 600; margin-bottom: 4px }
figure svg { width: 100%; height: auto }
.example { margin: 0 0 22px; border: 1px solid #e3e6ea; border-radius: 6px; padding: 12px 16px }
.outputs { display: grid; grid-template-columns: 1fr 1fr; gap: 20px; margin-top: 8px }
.text { white-space: pre-wrap; overflow-wrap: anywhere }
.same { color: #8a8f98 } .other { background: #fff0db }
li { margin: 4px 0 }
"""
METHOD = """
<li>Every prompt goes to both servers, {how}. The prompt is the unit of all intervals: tokens of one
prompt count as one cluster. Outputs are greedy; the first two requests to each server do not count;
no request finds its prefix in a cache, which is slower than service where prompts share one, for A
and B alike.</li>
<li><b>perplexity</b>, <b>kl</b> and <b>top1</b> are of the prompts' own tokens. KL is {kl}.</li>
<li><b>ttft</b> and <b>tpot</b>: A and B are medians, the change is the geometric mean of each
prompt's own B / A. Times are the client's, the network included. Their intervals allow for
neighbouring requests being alike.</li>
<li><b>throughput</b> is output tokens per second in which the server had anything to do, at the
load of this replay; <b>cost</b> follows from it and the price per hour.</li>
<li>Non-inferior: the whole {confidence} interval is on the good side of the margin. Inferior:
all of it is beyond. The comparison as a whole is as good as the worst judged metric. Metrics
without a margin are not judged.</li>
<li>This is look {look} at the comparison. Adding prompts until the verdict pleases would inflate
errors, so look k spends 2<sup>-k</sup> of those that are allowed: all looks together keep to the
confidence asked for. How many prompts the next one needs assumes that the value seen is the true
one, at 80% power; append them to the file and run the same command.</li>
"""


def page(report: Mapping[str, Any], pairs: Sequence[PairOfAnswers]) -> str:
    """The whole page."""
    sections = [_head(report), _metrics(report), _probes(report), _plots(pairs), _worst(report)]
    sections.append(_method(report))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>B against A: {escape(report['verdict'])}</title><style>{CSS}</style></head>"
        f"<body>{''.join(sections)}</body></html>\n"
    )


def _head(report: Mapping[str, Any]) -> str:
    colour = VERDICT_COLOURS[report["verdict"]]
    sides = "".join(
        f'<div><b class="{side}">{side.upper()}</b> {escape(server_text(report[side]))}</div>'
        for side in "ab"
    )
    notes = "".join(f"<div>{escape(remark)}.</div>" for remark in remarks(report))
    return (
        "<h1>Is B as good as A?</h1>"
        f'<div class="muted">{report["n"]} prompts of {escape(report["prompts"])}, {_how(report)}.'
        f'{notes}</div><div class="verdict" style="border-color:{colour}">'
        f"{_sentence(report, colour)}</div>{sides}"
    )


def _sentence(report: Mapping[str, Any], colour: str) -> str:
    verdict, rest = report["verdict"], conclusion(report).removeprefix(report["verdict"])
    return f'B is <b style="color:{colour}">{verdict}</b>{escape(rest)}'


def _how(report: Mapping[str, Any]) -> str:
    if report["rate"] is None:
        return "one at a time, to A and B in turn, which of them first by chance"
    return f"to both at the same moment, {report['rate']:g} per second as a Poisson process"


def _metrics(report: Mapping[str, Any]) -> str:
    lines, group = [], None
    for row in report["metrics"]:
        if row["group"] != group:
            group = row["group"]
            lines.append(f'<tr class="group"><td colspan="7">{escape(group)}</td></tr>')
        lines.append(_row(row))
    return (
        f"<h2>Metrics, with {100 * report['confidence']:.4g}% intervals</h2>"
        '<div class="muted">Dashed: no change. Red: worse than the margin allows. '
        "Each row has a scale of its own.</div>"
        '<table><thead><tr><th>metric</th><th class="n a">A</th><th class="n b">B</th>'
        '<th>B against A</th><th></th><th class="n">n</th><th>verdict</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


def _probes(report: Mapping[str, Any]) -> str:
    """What each kind of probe came to, and what A knew and B did not."""
    if not report["probes"]:
        return ""
    heads = ("asked", "right", "lost", "gained", "refused", "empty", "cut")
    rows, examples = [], []
    for entry in report["probes"]:
        cells = "".join(f'<td class="n">{_both(entry[head])}</td>' for head in heads)
        why = "".join(
            f"<small>{side.upper()}: {escape(entry['why'][side])}</small>"
            for side in "ab"
            if entry["why"][side]
        )
        rows.append(f"<tr><td>{escape(entry['kind'])}{why}</td>{cells}</tr>")
        examples += [_lost(entry["kind"], example) for example in entry["examples"]]
    titles = "".join(f'<th class="n">{head}</th>' for head in heads)
    return (
        '<h2>Probes</h2><div class="muted">A / B. Lost: A right, B wrong; gained: the other way '
        "round. Cut: max_tokens ended the answer.</div>"
        f"<table><thead><tr><th>kind</th>{titles}</tr></thead><tbody>{''.join(rows)}</tbody>"
        f"</table>{''.join(examples)}"
    )


def _both(value: Any) -> str:
    return f"{value['a']} / {value['b']}" if isinstance(value, Mapping) else str(value)


def _lost(kind: str, example: Mapping[str, Any]) -> str:
    outputs = "".join(
        f'<div><b class="{side}">{side.upper()}</b>'
        f'<div class="text">{escape(example[side])}</div></div>'
        for side in "ab"
    )
    return (
        f'<div class="example"><div class="muted">{escape(kind)}, {escape(example["where"])}</div>'
        f'<div class="text">{escape(example["ask"])}</div>'
        f'<div class="outputs">{outputs}</div></div>'
    )


def _row(row: Mapping[str, Any]) -> str:
    unit = f", {row['unit']}" if row["unit"] else ""
    verdict = ""
    if row["verdict"]:
        needs = f"; needs {row['needed']:,} prompts" if row["needed"] else ""
        verdict = (
            f'<span class="chip" style="color:{VERDICT_COLOURS[row["verdict"]]}">'
            f"{row['verdict']}</span><small>{limit_text(row)}{needs}</small>"
        )
    return (
        f"<tr><td>{row['metric']}<small>{escape(row['text'] + unit)}</small></td>"
        f'<td class="n">{number(row["a"])}</td><td class="n">{number(row["b"])}</td>'
        f'<td class="change">{_change(row)}</td><td>{interval(row)}</td>'
        f'<td class="n">{row["n"]}</td><td>{verdict}</td></tr>'
    )


def _change(row: Mapping[str, Any]) -> str:
    value, bracket, ends = escape(change(row)).partition(" [")
    return f"{value}<small>{bracket.strip()}{ends}</small>"


def _plots(pairs: Sequence[PairOfAnswers]) -> str:
    figures = "".join(
        f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"
        for title, svg in distributions(pairs)
    )
    return f'<h2>Prompt by prompt</h2><div class="plots">{figures}</div>'


def _worst(report: Mapping[str, Any]) -> str:
    if not report["worst"]:
        return "<h2>Where B differs most</h2><p>No output differs.</p>"
    return "<h2>Where B differs most, for the worse</h2>" + "".join(map(_example, report["worst"]))


def _example(example: Mapping[str, Any]) -> str:
    a, b = example["a"], example["b"]
    pairs = zip(a, b, strict=False)
    same = next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
    facts = [f"first {example['same_tokens']} output tokens are the same"]
    if example["nats_per_token"] is not None:
        facts.append(
            f"B finds the prompt {example['nats_per_token']:+.4f} nats per token unlikelier"
        )
    if example["scores"]:
        facts.append("score A {:g}, B {:g}".format(*example["scores"]))
    outputs = "".join(
        f'<div><b class="{side}">{side.upper()}</b><div class="text"><span class="same">'
        f'{escape(text[:same])}</span><span class="other">{escape(text[same:])}</span></div></div>'
        for side, text in (("a", a), ("b", b))
    )
    return (
        f'<div class="example"><div class="muted">{escape(example["where"])}: '
        f'{escape("; ".join(facts))}</div><div class="text">{escape(example["prompt"])}</div>'
        f'<div class="outputs">{outputs}</div></div>'
    )


def _method(report: Mapping[str, Any]) -> str:
    k = report["logprobs"]
    kl = (
        "exact, over the whole vocabulary"
        if k == -1
        else f"known within bounds, from the {k} likeliest tokens of both: the lower one counts "
        "all others as one; the upper one has them lose, on average, as much log-probability as "
        "the one that lost most at the same position; the interval spans both"
        if k
        else "not measured"
    )
    level = f"{100 * report['confidence']:.4g}%"
    text = METHOD.format(how=_how(report), kl=kl, confidence=level, look=report["look"])
    return f"<h2>How this was measured</h2><ul>{text}</ul>"
