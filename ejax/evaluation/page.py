"""A report as one HTML file that needs nothing else, with its JSON and PNGs beside it."""

import base64
import json
from collections.abc import Iterable, Sequence
from functools import partial
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from ejax import storage
from ejax.card import describe_thresholds
from ejax.errors import UserError
from ejax.evaluation.evaluate import describe, plain, save_figure, write_json

CURVES = {"per exit": "C0", "one number": "C1"}
Report = dict[str, Any]


def write_page(report: Report, output: Path) -> list[Path]:
    """The page at `output`, and beside it what is in it: NAME.json and NAME_….png."""
    files = [output, output.with_suffix(".json")]
    write_json(report, files[1])
    pictures = {}
    for name, (draw, size, panels, shows) in figures(report).items():
        path = output.with_name(f"{output.stem}_{name}.png")
        save_figure(draw, path, size=size, panels=panels)
        data = base64.b64encode(path.read_bytes()).decode()
        pictures[name] = (
            f'<div class=wide><img id={name} src="data:image/png;base64,{data}" '
            f'alt="{escape(shows)}"></div>'
        )
        files.append(path)
    frame = resources.files("ejax.evaluation").joinpath("page.html").read_text(encoding="utf-8")
    page = Template(frame).substitute(fragments(report) | pictures)
    storage.write_text(output, page)
    return files


def check_report(path: Path) -> None:
    """Raises ValueError where something else than a report would be overwritten."""
    if not path.exists():
        return
    try:
        known = "overthinking" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        known = False
    if not known:
        raise UserError(
            f"{path} exists and is not of a report, whose JSON would take its place: choose "
            f"another --output."
        )


def figures(report: Report) -> dict[str, Any]:
    """Per picture: what draws it, its inches, its panels (rows by columns), what it shows."""
    exits = len(report["layers"])
    across = min(exits, 4)
    down = -(-exits // across)
    points, best = report["curves"]["per exit"], report["oracle"]
    work = "; ".join(f"{p['flops']:.2f}: {100 * p['accuracy']:.1f} %" for p in points[::6])
    shares = (100 * e["leave"] / report["rows"] for e in report["exits"])
    leave = zip(report["layers"], shares, strict=True)
    return {
        "tradeoff": (
            partial(draw_tradeoff, report), (10, 4.2), (1, 2),
            f"Accuracy and macro-F1 by the share of full depth's operations. Accuracy with "
            f"thresholds per exit: {work}. The oracle has {100 * best['accuracy']:.1f} % at "
            f"{best['flops']:.2f}.",
        ),
        "time": (
            partial(draw_time, report), (10, 4.2), (1, 2),
            "Accuracy and macro-F1 by measured milliseconds per text; the table below has the "
            "numbers.",
        ),
        "exits": (
            partial(draw_exits, report), (7, 3.2), (1, 1),
            f"Rows that leave, {', '.join(f'after layer {k}: {p:.0f} %' for k, p in leave)}.",
        ),
        "reliability": (
            partial(draw_reliability, report), (2.6 * across, 2.6 * down), (down, across),
            "Accuracy by confidence for each exit, before and after temperature; the table above "
            "has the calibration errors.",
        ),
    }  # fmt: skip


def draw_tradeoff(report: Report, panels: Sequence[Any]) -> None:
    for axes, key in zip(panels, ("accuracy", "macro_f1"), strict=True):
        for family, colour in CURVES.items():
            points = report["curves"][family]
            x = [p["flops"] for p in points]
            axes.plot(
                x, [100 * p[key] for p in points], color=colour, label=f"early exit, {family}"
            )
            low, high = ([100 * p[f"{key}_{end}"] for p in points] for end in ("low", "high"))
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        if key == "accuracy":
            points = report["curves"]["per exit"]
            axes.plot(
                [p["random_flops"] for p in points], [100 * p["random"] for p in points], ":",
                color="grey", label="the same exits at random",
            )  # fmt: skip
            best = report["oracle"]
            axes.plot([best["flops"]], [100 * best["accuracy"]], "*", color="C2", label="oracle")
        axes.set(xlabel="share of full depth's operations", ylabel=f"{name_of(key)}, %")
        axes.set_xlim(0, 1.03)
        axes.legend(fontsize=8)


def draw_time(report: Report, panels: Sequence[Any]) -> None:
    measured = report["measured"]
    points = sorted(measured["thresholds"], key=lambda p: p["seconds"]["median"])
    for axes, key in zip(panels, ("accuracy", "macro_f1"), strict=True):
        ladder = [p for p in points if not isinstance(p["threshold"], list)]
        own = next(p for p in points if isinstance(p["threshold"], list))
        axes.plot([ms(p) for p in ladder], [100 * p[key] for p in ladder], "o-", label="one number")
        axes.plot([ms(own)], [100 * own[key]], "D", color="C3", label="the bundle's thresholds")
        full = measured["full"]
        axes.plot([ms(full)], [100 * full[key]], "s", color="black", label="full model")
        for name, other in report["beside"].items():
            shown = f"beside: {plain(name)}, {other['layers']} layers"
            axes.plot([ms(other)], [100 * other[key]], "^", label=shown)
        for rival in measured.get("rivals", ()):
            x, y = 1000 / rival["from_text"], 100 * rival[key]
            axes.plot([x], [y], "v", label=f"{rival['name']}, from text")
        axes.set(xlabel="milliseconds per text, measured", ylabel=f"{name_of(key)}, %")
        axes.set_xlim(0, None)
        axes.legend(fontsize=8)


def draw_exits(report: Report, panels: Sequence[Any]) -> None:
    names = [str(layer) for layer in report["layers"]]
    panels[0].bar(names, [100 * e["leave"] / report["rows"] for e in report["exits"]])
    panels[0].set(xlabel="layer", ylabel="rows that leave there, %")


def draw_reliability(report: Report, panels: Sequence[Any]) -> None:
    for axes, exit in zip(panels, report["exits"], strict=False):
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        for when, colour in (("before", "C1"), ("after", "C0")):
            bins = exit[f"reliability_{when}"]
            axes.plot(
                [b["confidence"] for b in bins], [b["accuracy"] for b in bins], ".-", color=colour,
                label=f"{when} temperature",
            )  # fmt: skip
        axes.set_title(f"layer {exit['layer']}", fontsize=9)
        axes.set(xlim=(1 / len(report["labels"]) - 0.05, 1.02), ylim=(0, 1.05))
        axes.tick_params(labelsize=7)
    panels[0].legend(fontsize=7)
    panels[0].set(xlabel="confidence", ylabel="accuracy")
    for axes in panels[len(report["exits"]) :]:
        axes.set_visible(False)


def name_of(key: str) -> str:
    return {"accuracy": "accuracy", "macro_f1": "macro-F1"}[key]


def ms(entry: dict[str, Any]) -> float:
    """Milliseconds per text, measured."""
    return 1000 / float(entry["texts_per_second"])


def fragments(report: Report) -> dict[str, Any]:
    """What the frame of the page names, as HTML."""
    measured, layers, over = report["measured"], report["layers"], report["overthinking"]
    own = next(p for p in measured["thresholds"] if isinstance(p["threshold"], list))
    facts = {
        "accuracy": f"{100 * own['accuracy']:.1f} %",
        "at full depth": f"{100 * measured['full']['accuracy']:.1f} %",
        "speed-up, measured": f"{own['speedup']:.2f} x",
        "mean depth": f"{own['mean_depth']:.2f} of {layers[-1]}",
    }
    left_out = report["rows_left_out"]
    whose = "this bundle or one beside it" if report["beside"] else "this bundle"
    why = f"{left_out} left out: they fitted {whose} or chose its thresholds"
    words = {
        "title": f"Early exit: {report['bundle']} on {report['data']}",
        "rows": str(report["rows"]),
        "left_out": f" ({why})" if left_out else "",
        "hardware": report["hardware"],
        "dtype": measured["dtype"],
        "passes": times_from(report),
        "rivals": about_rivals(report),
        "enough": measured.get("enough", ""),
        "date": report["date"],
        "thresholds": describe_thresholds(report["thresholds"]),
        "thresholds_from": report["thresholds_from"],
        "drop": lost(own),
        "over_rows": str(over["rows"]),
        "over_share": f"{100 * over['rows'] / report['rows']:.1f}",
    }
    counts = zip(layers, over["per_exit"], over["gained_per_exit"], strict=False)
    return {name: escape(text) for name, text in words.items()} | {
        "facts": "".join(f"<div>{name}<b>{value}</b></div>" for name, value in facts.items()),
        "timings": timings(report),
        "leavers": leavers(report),
        "qualities": qualities(report),
        "slices": by_slice(report),
        "over_table": table(
            ["layer", "right here, wrong at the end", "wrong here, right at the end"],
            ([str(value) for value in row] for row in counts),
        ),
        "over_examples": table(
            ["label", *(f"layer {k}" for k in layers), "text"],
            ([x["label"], *x["answers"], x["text"]] for x in over["examples"]),
        ),
        "examples": table(
            ["layer", "score", "answer", "label", "text"],
            (
                [str(x["layer"]), f"{x['score']:.3f}", x["answer"], x["label"], x["text"]]
                for name in ("first", "last")
                for x in report["examples"][name]
            ),
        ),
    }


def times_from(report: Report) -> str:
    passes = report["measured"]["repeats"]
    said = f"Medians of {passes} passes, in turns." if passes > 1 else "One pass each."
    return said + " Bundles beside are timed after these." * bool(report["beside"])


def about_rivals(report: Report) -> str:
    """What is said of the linear models."""
    said = [
        f"{rival['name']}: fitted to {rival['fitted_rows']:,} rows in {rival['fit_seconds']:.1f} s."
        for rival in report["measured"].get("rivals", ())
    ]
    return " ".join([*said, *report["notes"]])


def lost(point: dict[str, Any]) -> str:
    """Points of accuracy with their interval."""
    return f"{point['drop']:.2f} ({point['drop_low']:.2f} to {point['drop_high']:.2f})"


def threshold_of(point: dict[str, Any]) -> str:
    return describe(point["threshold"]).removeprefix("threshold ")


def table(headings: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Cells are escaped; the column "text" may wrap; a cell (text, class) has a class."""
    names = list(headings)
    lines = ["<div class=wide><table><thead><tr>"]
    lines += [f"<th scope=col{style_of(name)}>{escape(name)}</th>" for name in names]
    lines.append("</tr></thead><tbody>")
    for row in rows:
        lines.append("<tr>")
        for name, cell in zip(names, row, strict=True):
            text, kind = cell if isinstance(cell, tuple) else (cell, name)
            lines.append(f"<td{style_of(kind)}>{escape(text)}</td>")
        lines.append("</tr>")
    return "".join([*lines, "</tbody></table></div>"])


def style_of(kind: str) -> str:
    return f' class="{kind}"' if kind in ("text", "bad") else ""


def timings(report: Report) -> str:
    measured, depth = report["measured"], report["layers"][-1]
    full = measured["full"]

    def row(name: str, p: dict[str, Any], depth: float, speedup: float, *more: str) -> list[str]:
        cells = [f"{p['accuracy']:.4f}", f"{p['macro_f1']:.4f}", f"{depth:.2f}"]
        for speed in ("texts_per_second", "from_text"):
            cells.append(f"{p[speed]:.0f}" if speed in p else "")
        return [name, *cells, f"{speedup:.2f}", *(more or [""] * 3)]

    rows = [row("full model", full, depth, 1.0)]
    for p in measured["thresholds"]:
        more = f"{p['ideal_speedup']:.2f}", lost(p), f"{100 * p['agreement']:.1f} %"
        rows.append(row(threshold_of(p), p, p["mean_depth"], p["speedup"], *more))
    for name, p in report["beside"].items():
        speedup = p["texts_per_second"] / full["texts_per_second"]
        rows.append(row(f"{name}, full depth", p, p["layers"], speedup))
    for p in measured.get("rivals", ()):
        more = "", lost(p), f"{100 * p['agreement']:.1f} %"
        rows.append(row(p["name"], p, p["layers"], p["from_text"] / full["from_text"], *more))
    headings = (
        "threshold", "accuracy", "macro-F1", "depth", "texts/s", "from text", "speed-up", "ideal",
    )  # fmt: skip
    return table([*headings, "points lost (95 %)", "agreement"], rows)


def leavers(report: Report) -> str:
    rows = []
    for e in report["exits"]:
        count = e["leave"]
        cells = [str(e["layer"]), str(count), f"{100 * count / report['rows']:.1f} %"]
        if count:
            shares = zip(report["labels"], e["labels_of_leavers"], strict=True)
            often = [f"{name} {100 * n / count:.0f} %" for name, n in shares if 50 * n > count]
            accuracies = (e[f"{name}accuracy_of_leavers"] for name in ("", "full_"))
            cells += [f"{value:.4f}" for value in accuracies]
            cells += [f"{e['tokens_of_leavers']:.1f}", ", ".join(often)]
        rows.append(cells + [""] * (7 - len(cells)))
    headings = ("layer", "rows", "share", "accuracy there", "full depth on them", "mean tokens")
    return table([*headings, "labels"], rows)


def qualities(report: Report) -> str:
    rows = []
    for e in report["exits"]:
        after = e["after"]
        auroc = after["failure_auroc"]
        rows.append(
            [str(e["layer"]), f"{after['accuracy']:.4f}", f"{after['macro_f1']:.4f}",
             f"{e['temperature']:.3f}", f"{after['nll']:.3f}", f"{after['brier']:.3f}",
             f"{e['before']['ece_width']:.3f}", f"{after['ece_width']:.3f}",
             f"{after['ece_width_minus_floor']:.3f} ({e['ece_minus_floor_low']:.3f} to "
             f"{e['ece_minus_floor_high']:.3f})",
             f"{e['ece_minus_floor_at_best']:.3f} at {e['best_temperature']:.2f}",
             f"{after['ece_mass_minus_floor']:.3f}",
             "" if auroc is None else f"{auroc:.3f}"]
        )  # fmt: skip
    return table(
        ["layer", "accuracy", "macro-F1", "temperature", "NLL", "Brier", "ECE before", "ECE",
         "less floor (95 %)", "at the best temperature", "equal mass, less floor", "AUROC"],
        rows,
    )  # fmt: skip


def by_slice(report: Report) -> str:
    rows = []
    for part in report["slices"]:
        points = part["points"]
        cells: list[Any] = [part["slice"], str(part["rows"]), f"{points[0]['full_accuracy']:.3f}"]
        for p in points:
            text, bad = f"{p['accuracy']:.3f} ({p['drop']:.1f})", p["drop_low"] > 0
            cells.append((text + " *" * bad, "bad" if bad else ""))
        rows.append(cells)
    names = (threshold_of(p) for p in report["slices"][0]["points"])
    return table(["slice", "rows", "full depth", *names], rows)
