"""Shows a comparison: a table for the terminal, and one self-contained HTML file.

Both show the report that `engine.assemble` makes. Text from a guest or a script is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from vmishim.foreign import printable
from vmishim.output import show
from vmishim.plural import counted

Report = dict[str, Any]

ANSWERS = {
    "reference": "reference for the others",
    "same": "the same, byte for byte",
    "moved": "the same, except for memory that changed meanwhile",
    "differ": "DIFFERENT",
    "failed": "FAILED",
    "nothing": "nothing was asked",
}
RESULTS = {
    "agreed": "All backends gave the same answers.",
    "moved": "All backends gave the same answers, except for memory that changed between the runs.",
    "differ": "The answers differ.",
    "error": "A backend failed.",
    "nothing": "The script asked the guest nothing, so there is nothing to compare.",
}
MEANING = {
    "agent-scalar": "one request per read",
    "agent-page": "one request per page, which is kept",
    "agent-batch": "one request per list",
    "ramfile": "vmishim's reader, on the RAM file",
    "native": "the genuine LibVMI bindings, on the RAM file",
}


def summary(report: Report) -> str:
    """The result in one sentence."""
    return RESULTS["moved" if report["result"] == "agreed" and report["moved"] else report["result"]]


TIMES_NATIVE = "times native's"
"""The one ratio of a report: a time divided by that of the genuine bindings in the same comparison."""


def table(report: Report) -> None:
    """Print the table and the notes below it."""
    columns = ("BACKEND", "-READS", "-PAGES", "REQUESTS", "BYTES", "CONNECT", "TIME", TIMES_NATIVE.upper(), "ANSWERS")
    rows = [
        (
            row["name"],
            *(number(row[name]) for name in ("reads", "pages", "requests", "bytes")),
            milliseconds(row["connecting"]),
            milliseconds(row["reading"]),
            ratio(row["reading_ratio"]),
            ANSWERS[row["answers"]],
        )
        for row in report["backends"]
    ]
    show(columns, rows, elsewhere="the report that -o writes has all")
    for line in words(report):
        print(printable(line))


def words(report: Report) -> Iterator[str]:
    """The notes below the table."""
    yield ""
    yield (
        f"Guest {report['guest']}; IDS {report['machine']}. Times are medians of {counted(report['runs'], 'run')}, "
        f"{TIMES_NATIVE}: the backend's time divided by native's; "
        + ("the RAM file was read while the guest was stopped" if report["stopped"] else "the guest kept running")
        + f"; {counted(report['rounds'], 'round')}."
    )
    for each in report["missing"]:
        yield f"no {each['name']}: {each['why']}"
        if each["remedy"]:
            yield f"   -> {each['remedy']}"
    for row in report["backends"]:
        if row["failed"]:
            yield f"{row['name']} failed: {row['failed']}"
        elif row["unexplained"]:
            yield (
                f"{row['name']} differs from {report['reference']} in {counted(row['unexplained'], 'place')}; "
                f"it made {counted(row['calls'], 'call')}:"
            )
            for each in [each for each in row["first"] if not each["explained"]][:5]:
                yield f"   {each['call']}: {value(each['reference'])}, here {value(each['other'])}"
        elif row["differences"]:
            each = row["first"][0]
            yield (
                f"{row['name']}: {counted(row['differences'], 'difference')} because of memory that other backends saw "
                f"change, "
                f"first {each['call']}: {value(each['reference'])}, here {value(each['other'])}"
            )
    status = {row["status"] for row in report["backends"] if not row["failed"]}
    if status - {0}:
        yield f"the script ended with exit status {', '.join(map(str, sorted(status)))}"
        if report["result"] == "nothing":
            yield from report["backends"][0]["errors"].splitlines()[-1:]
    yield summary(report)


def value(told: str | None) -> str:
    """An answer, or \"nothing\" if there was none."""
    return "nothing" if told is None else told


def number(count: int | None) -> str:
    """A count, or a dash if there is none."""
    return "-" if count is None else f"{count:,}"


def milliseconds(time: float | None) -> str:
    """A time."""
    if time is None:
        return "-"
    return f"{time:,.{2 if time < 10 else 1 if time < 100 else 0}f} ms"


def ratio(of: float | None) -> str:
    """A ratio."""
    return "-" if of is None else f"{of:.{2 if of < 10 else 1 if of < 100 else 0}f}x"


# HTML.

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --faint: #5f6872; --line: #d9dee4; --paper: #ffffff; --card: #f6f8fa;
  --good: #1a7f4b; --bad: #c4312b; --moved: #8a6100; --one: #2f6fb3; --two: #d08a2e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --faint: #9aa4af; --line: #343b44; --paper: #14181d;
  --card: #1c2229; --good: #4cc38a; --bad: #ff7b72; --moved: #e0b04c; --one: #6ea8e0; --two: #e3a857; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2.25rem 0 .5rem; }
p { margin: .35rem 0; } .faint { color: var(--faint); font-size: .9rem; }
.result { display: inline-block; margin: 1rem 0 .5rem; padding: .35rem .8rem; border-radius: .4rem; font-weight: 600;
  border: 1px solid currentColor; }
.agreed { color: var(--good); } .moved { color: var(--moved); }
.differ, .error, .failed, .nothing { color: var(--bad); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { color: var(--faint); font-weight: 600; }
td { white-space: nowrap; }
th { vertical-align: bottom; }
td.text:first-child { min-width: 10rem; }
td.text { white-space: normal; }
.text { text-align: left; }
code { font: .85em ui-monospace, monospace; overflow-wrap: anywhere; }
figure { margin: 1rem 0; padding: .75rem 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; }
figcaption { font-size: .9rem; color: var(--faint); margin-top: .5rem; }
.bar { display: grid; grid-template-columns: 9.5rem 1fr; gap: .1rem .6rem; align-items: center; padding: .2rem 0;
  font-size: .9rem; }
.bar .track { display: flex; align-items: center; }
.bar i { flex: none; height: 1.1rem; min-width: 2px; }
.bar i.one { background: var(--one); border-radius: 0 2px 2px 0; }
.bar i.two { background: var(--two); border-radius: 2px 0 0 2px; }
.bar .told { flex: none; color: var(--faint); margin-left: .5rem; white-space: nowrap; }
@media (max-width: 44rem) {
  body { padding: 1rem .75rem 3rem; }
  .bar { grid-template-columns: 1fr; padding: .3rem 0; }
  thead { display: none; }
  table, tbody, tr, td { display: block; width: auto; }
  tr { border-bottom: 1px solid var(--line); padding: .5rem 0; }
  td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .1rem 0; }
  td[data-title]::before { content: attr(data-title); color: var(--faint); flex: none; }
  td.text { text-align: right; } td.text:first-child { display: block; text-align: left; }
}
"""


def page(report: Report) -> str:
    """The report as one HTML file."""
    result = report["result"]
    colour = "moved" if result == "agreed" and report["moved"] else result
    command = " ".join([report["script"], *report["arguments"]])
    body = [
        f"<h1>One script, {len(report['backends'])} backends for the same memory</h1>",
        f"<p><code>{_text(command)}</code> on <b>{_text(report['domain'])}</b>, {_text(report['guest'])}</p>",
        f"<p class='faint'>Read from {_text(report['machine'])}; {_text(report['when'])}; "
        f"vmishim {_text(report['vmishim'])}</p>",
        f"<p class='result {colour}'>{_text(summary(report))}</p>",
        *_rows(report),
        *_plots(report),
        *_differences(report),
        *_missing(report),
        "<h2>How to read this</h2>",
        *(f"<p>{paragraph}</p>" for paragraph in _notes(report)),
    ]
    title = _text(f"{command}: {summary(report)}")
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _text(told: object) -> str:
    return escape(printable(str(told)))


def _rows(report: Report) -> Iterator[str]:
    counts, both = ("reads", "pages", "requests", "bytes"), ("connect and time", f"both, {TIMES_NATIVE}")
    titles = (*counts, "connect", "time", TIMES_NATIVE, *both)
    yield "<div class='wide'><table><thead><tr><th class='text'>backend</th>"
    yield "".join(f"<th>{_text(title)}</th>" for title in titles) + "<th class='text'>answers</th></tr></thead><tbody>"
    for row in report["backends"]:
        cells = [number(row[name]) for name in counts]
        cells += [milliseconds(row["connecting"]), milliseconds(row["reading"]), ratio(row["reading_ratio"])]
        cells += [milliseconds(row["whole"]), ratio(row["whole_ratio"])]
        answers = row["answers"]
        good = "agreed" if answers == "same" else "faint"
        colour = answers if answers in ("differ", "failed", "moved") else good
        yield (
            f"<tr><td class='text'><b>{_text(row['name'])}</b><br>"
            f"<span class='faint'>{MEANING[row['name']]}</span></td>"
            + "".join(_cell(title, cell) for title, cell in zip(titles, cells, strict=True))
            + _cell("answers", ANSWERS[answers], f"text {colour}")
            + "</tr>"
        )
    yield "</tbody></table></div>"


def _cell(title: str, told: str, kind: str = "") -> str:
    """A cell that names its column where a page is too narrow for columns."""
    return f"<td class='{kind}' data-title='{_text(title)}'><span>{_text(told)}</span></td>"


def _plots(report: Report) -> Iterator[str]:
    rows = [row for row in report["backends"] if row["whole"] is not None]
    if rows:
        yield "<h2>Time of one run</h2><figure>" + _bars(rows)
        yield "<figcaption>Medians, linear scale. <span style='color:var(--two)'>&#9632;</span> connecting, which "
        yield "includes finding out about the kernel; <span style='color:var(--one)'>&#9632;</span> the script's own "
        yield "work.</figcaption></figure>"
    asked = [row for row in report["backends"] if row["requests"]]
    if asked:
        reads = max(row["reads"] for row in asked)
        requests = [(row["name"], row["requests"], number(row["requests"])) for row in asked]
        carried = [(row["name"], row["bytes"], counted(row["bytes"], "byte")) for row in asked]
        yield "<h2>What went over the network</h2><figure>" + _logarithmic(
            [("reads by the script", reads, number(reads)), *requests]
        )
        yield "<figcaption>Requests to the agent, connecting included. Logarithmic scale.</figcaption></figure>"
        yield "<figure>" + _logarithmic(carried)
        yield "<figcaption>Bytes, both ways, sealed. Logarithmic scale.</figcaption></figure>"


def _bars(rows: Sequence[dict[str, Any]]) -> str:
    most = max(row["whole"] for row in rows) or 1.0
    return "".join(
        _bar(
            row["name"],
            f"{milliseconds(row['connecting'])} + {milliseconds(row['reading'])}",
            two=row["connecting"] / most,
            one=(row["whole"] - row["connecting"]) / most,
        )
        for row in rows
    )


def _logarithmic(rows: Sequence[tuple[str, int, str]]) -> str:
    most = math.log10(max(10, *(count for _, count, _ in rows)))
    return "".join(_bar(name, told, one=math.log10(max(count, 1)) / most) for name, count, told in rows)


def _bar(name: str, told: str, *, one: float, two: float = 0.0) -> str:
    """A bar of one part or two, in shares of the longest, and its figures in words."""
    parts = (("two", two), ("one", one))
    # The rest of the line is for the figures.
    drawn = "".join(f"<i class='{kind}' style='width:{55 * share:.2f}%'></i>" for kind, share in parts if share > 0)
    told = f"<span class='told'>{_text(told)}</span>"
    return f"<div class='bar'><span>{_text(name)}</span><span class='track'>{drawn}{told}</span></div>"


def _differences(report: Report) -> Iterator[str]:
    for row in report["backends"]:
        if row["failed"]:
            yield f"<h2>{_text(row['name'])} failed</h2><p><code>{_text(row['failed'])}</code></p>"
        if not row["first"]:
            continue
        yield f"<h2>Where {_text(row['name'])} and {_text(report['reference'])} differ</h2>"
        yield f"<p>{counted(row['differences'], 'difference')}, {row['unexplained']:,} not explained; the first:</p>"
        yield "<div class='wide'><table><thead><tr><th class='text'>call</th>"
        yield f"<th class='text'>{_text(report['reference'])}</th><th class='text'>{_text(row['name'])}</th>"
        yield "<th class='text'></th></tr></thead><tbody>"
        for each in row["first"]:
            why = (
                "changed meanwhile, or follows from that"
                if each["explained"]
                else "<span class='differ'>differs</span>"
            )
            cells = (each["call"], value(each["reference"]), value(each["other"]))
            yield "<tr>" + "".join(f"<td class='text'><code>{_text(cell)}</code></td>" for cell in cells)
            yield f"<td class='text'>{why}</td></tr>"
        yield "</tbody></table></div>"


def _missing(report: Report) -> Iterator[str]:
    if report["missing"]:
        yield "<h2>Missing backends</h2>"
    for each in report["missing"]:
        remedy = f"<br><span class='faint'>What to do: {_text(each['remedy'])}</span>" if each["remedy"] else ""
        yield f"<p><b>{_text(each['name'])}</b>: {_text(each['why'])}{remedy}</p>"


def _notes(report: Report) -> Iterator[str]:
    yield (
        f"The script ran unchanged on each backend, in a separate process, recorded in {report['rounds']} "
        f"round{'' if report['rounds'] == 1 else 's'} and then timed {report['runs']} times without recording. Every "
        f"call to LibVMI's API was compared with that of <b>{_text(report['reference'])}</b>, argument by argument, "
        "byte by byte."
    )
    if report["stopped"]:
        yield (
            "The RAM file was read while the guest's CPUs were stopped, so no difference there is excused. An agent "
            "needs a running guest: the agents ran between two reads of the file."
        )
    yield (
        "A difference is explained only if another backend got two answers to the same question in its runs: then "
        "the memory changed."
    )
    yield (
        "<b>reads</b> are the script's calls; <b>pages</b> are the distinct 4 KiB pages they read; "
        "<b>requests</b> and <b>bytes</b> are counted on the connection to the agent. <b>"
        f"{TIMES_NATIVE}</b> is the time divided by native's. A dash means that there is no such figure."
    )
