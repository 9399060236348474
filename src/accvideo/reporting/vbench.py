"""VBench's section of the report's page: our scores beside those that others have published."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from accvideo.reporting.wording import color
from accvideo.vbench.scores import DIMENSIONS, SUMMARIES

COLORS = {"teacher": color(0), "student": color(3)}
"""As in the rest of the page."""


def vbench_section(report: Mapping[str, Any]) -> str:
    """Tables of all dimensions, and the commands for what is not measured yet; empty where VBench was not asked for."""
    if (vbench := report.get("vbench")) is None:
        return ""
    measured = [name for name in COLORS if vbench["models"].get(name, {}).get("dimensions")]
    rule = (
        "Of prompts that are not its own, VBench measures these dimensions, and sums nothing up."
        if vbench["mode"] == "custom_input"
        else "Quality and semantics are VBench's weighted means of the dimensions, each brought to its range; the "
        "total is four parts quality and one part semantics."
    )
    tables = _tables(vbench, measured) if measured else ""
    sources = ""
    if measured and vbench["published"]:
        names = "; ".join(f"<sup>{i}</sup> {escape(name)}" for i, name in enumerate(published_sources(vbench), 1))
        sources = f'<p class="note after">Published: {names}.</p>'
    return (
        '<section><h2>VBench</h2><p class="note">In %, higher is better: Huang et al., arXiv:2311.17982. '
        f"{rule} Made from {vbench['num_prompts']} prompts: {_counts(vbench)}.</p>"
        f"{tables}{sources}{_commands(vbench)}</section>"
    )


def published_sources(vbench: Mapping[str, Any]) -> list[str]:
    """Where the published rows are from, each once; a row's number is its source's place."""
    return list(dict.fromkeys(row["source"] for row in vbench["published"]))


def _counts(vbench: Mapping[str, Any]) -> str:
    counts = (
        f"{model['num_videos']:,} of the {name}'s {model['num_videos'] + model['num_missing']:,} videos"
        for name, model in vbench["models"].items()
    )
    return " and ".join(counts)


def _tables(vbench: Mapping[str, Any], measured: Sequence[str]) -> str:
    """One table of the summaries and the quality, and one of the semantics, as in the paper."""
    quality = [*SUMMARIES, *(name for name, dimension in DIMENSIONS.items() if dimension.is_quality)]
    semantic = [name for name, dimension in DIMENSIONS.items() if not dimension.is_quality]
    if vbench["mode"] == "custom_input":
        return _table(
            vbench, measured, [name for name in quality if name in vbench["models"][measured[0]]["dimensions"]]
        )
    return _table(vbench, measured, quality) + _table(vbench, measured, semantic)


def percents(model: Mapping[str, Any]) -> dict[str, float]:
    """What is known of a model, in percent, by name of the dimension or summary."""
    known = {name: model[name] for name in SUMMARIES if model[name] is not None}
    return {
        name: 100 * value
        for name, value in (known | {name: each["score"] for name, each in model["dimensions"].items()}).items()
    }


def _table(vbench: Mapping[str, Any], measured: Sequence[str], columns: Sequence[str]) -> str:
    titles = SUMMARIES | {name: dimension.title for name, dimension in DIMENSIONS.items()}
    sources = published_sources(vbench)
    head = "".join(f'<th scope="col">{titles[name].replace(" ", "<br>")}</th>' for name in columns)
    ours = {name: percents(vbench["models"][name]) for name in measured}
    lines = []
    for name in ("student", "teacher"):
        if name not in ours:
            continue
        rival = ours.get("teacher", {}) if name == "student" else {}
        cell = '<td class="student">' if name == "student" else "<td>"
        cells = "".join(f"{cell}{_cell(ours[name].get(each), rival.get(each))}</td>" for each in columns)
        dot = f'<i class="dot" style="background:{COLORS[name]}"></i>'
        model = vbench["models"][name]
        detail = f"<small>{model['size'] or 'own size'}, {model['num_steps']} steps</small>"
        lines.append(f'<tr class="main"><th scope="row">{dot}{name.capitalize()}{detail}</th>{cells}</tr>')
    if vbench["published"]:
        lines.append(f'<tr class="section"><th scope="rowgroup" colspan="{len(columns) + 1}">Published</th></tr>')
    for row in vbench["published"]:
        cells = "".join(f"<td>{row['percent'][each]:.2f}</td>" for each in columns)
        detail = f"<small>{escape(row['size'])}<sup>{sources.index(row['source']) + 1}</sup></small>"
        lines.append(f'<tr><th scope="row">{escape(row["name"])}{detail}</th>{cells}</tr>')
    return (
        '<div class="scroll card" tabindex="0" role="region" aria-label="VBench scores"><table class="vbench">'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(value: float | None, rival: float | None) -> str:
    """A score, and below it how far it lies above the teacher's."""
    if value is None:
        return "–"
    return f"{value:.2f}" + (f"<small>{value - rival:+.2f}</small>".replace("-", "−") if rival is not None else "")


def _commands(vbench: Mapping[str, Any]) -> str:
    if not vbench["commands"]:
        return ""
    return (
        '<p class="note after">What is not measured yet, VBench measures by these commands, in an environment of its '
        "own; the evaluation's own command, run again, then reads the results.</p>"
        f'<pre class="card"><code>{escape(chr(10).join(vbench["commands"]))}</code></pre>'
    )


def vbench_sentence(report: Mapping[str, Any]) -> str:
    """The total scores, for the top of the page; empty where there is none."""
    models = report.get("vbench", {"models": {}})["models"]
    totals = {name: models[name]["total"] for name in COLORS if name in models and models[name]["total"] is not None}
    if "student" not in totals:
        return ""
    rival = f", the teacher's <b>{100 * totals['teacher']:.2f} %</b>" if "teacher" in totals else ""
    return f" The student's VBench total is <b>{100 * totals['student']:.2f} %</b>{rival}."
