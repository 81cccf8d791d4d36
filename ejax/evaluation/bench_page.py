"""What `bench` measured, as people read it: a table, and a picture."""

from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from ejax.evaluation.evaluate import plain, save_png, write_json
from ejax.evaluation.scenarios import REQUESTS


def bench_table(result: dict[str, Any]) -> Table:
    """The result as people read it."""
    made = Table(
        title=f"{result['rows']} texts, {result['layers'][-1]} layers, {machine(result)}, "
        f"{result['date']}",
        caption="accuracy per exit: "
        + ", ".join(
            f"{k}: {v:.4f}" for k, v in zip(result["layers"], result["exit_accuracy"], strict=True)
        )
        + f"; mean depth {result['early_exit']['mean_depth']:.2f}, ideal speed-up "
        f"{result['early_exit']['ideal_speedup']:.2f}",
    )
    made.add_column("", no_wrap=True)
    for heading in (
        "accuracy", "points lost (95 %)", "offline texts/s", "spread", "from text",
        "mean ms", "p50", "p99", *(f"by {size}" for size in REQUESTS), "peak MB",
    ):  # fmt: skip
        made.add_column(heading, justify="right")
    for one in result["contenders"]:
        offline, stream = one["offline"], one["single_stream"]
        low, high = offline["seconds"]["min"], offline["seconds"]["max"]
        made.add_row(
            one["name"], f"{one['accuracy']:.4f}",
            f"{one['drop']:.2f} ({one['drop_low']:.2f} to {one['drop_high']:.2f})",
            "" if "rival" in one else f"{offline['texts_per_second']:.0f}",
            f"{result['rows'] / high:.0f} to {result['rows'] / low:.0f}",
            f"{one['end_to_end']['texts_per_second']:.0f}",
            *(f"{1000 * stream[key]:.1f}" for key in ("mean", "p50", "p99")),
            *(f"{one['requests'][str(size)]:.0f}" for size in REQUESTS),
            f"{one['peak_bytes'] / 1e6:.0f}" if one["peak_bytes"] is not None else "",
        )  # fmt: skip
    return made


def machine(result: dict[str, Any]) -> str:
    """What it ran on, and how many of its cores took part."""
    return f"{result['hardware']}, on {result['cores']} core{'s' * (result['cores'] > 1)}"


def save_bench(result: dict[str, Any], path: Path) -> None:
    """The JSON at `path`, and next to it a PNG of accuracy against offline throughput."""
    write_json(result, path)
    save_png(partial(draw, result), path.with_suffix(".png"))


def draw(result: dict[str, Any], axes: Any) -> None:
    points = sorted(result["curve"], key=lambda p: p["texts_per_second"])
    axes.plot(
        [p["texts_per_second"] for p in points], [100 * p["accuracy"] for p in points],
        ".-", color="tab:blue", label="ejax, other thresholds",
    )  # fmt: skip
    for one in result["contenders"]:
        x, y = one["offline"]["texts_per_second"], 100 * one["accuracy"]
        ours = one["name"].startswith("ejax")
        label = plain(one["name"]) + ", from text" * ("rival" in one)
        axes.plot([x], [y], "s" if ours else "o", label=label, alpha=0.8)
    axes.set(xlabel="texts per second, offline", ylabel="accuracy, %")
    if any("rival" in one for one in result["contenders"]):
        axes.set_xscale("log")
    else:
        axes.set_xlim(0, None)
    axes.set_title(f"{result['rows']} texts, {result['date']}\n{machine(result)}", fontsize=9)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
