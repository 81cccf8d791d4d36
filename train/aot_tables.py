"""What `train.aot` found, as people read it."""

from typing import Any

from rich.table import Table
from rich.text import Text

from ejax.evaluation.describe import numbers


def overview(model: str, slices: list[dict[str, Any]]) -> Table:
    """A row per slice; memory and time of one chip, tokens per second of all."""
    made = numbers(
        Text(f"{model}: compiled, not run", "italic"),
        "slice", "rows per chip", "GiB", "step, ms", "of peak", "tokens/s, training",
        "tokens/s, nobody leaves",
    )  # fmt: skip
    for found in slices:
        step, early = found["training"], found["early_exit"]
        training, inference = ["does not fit", *["–"] * 3], "does not fit"
        if "memory" in step:
            training = [
                f"{step['memory']['total'] / 2**30:.1f} of {found['chip']['memory'] / 2**30:.0f}",
                f"{1e3 * step['step']['seconds']:.1f}",
                f"{step['step']['share_of_peak']:.2f}",
                f"{step['tokens_per_second']:.3g}",
            ]
        if "memory" in early:
            inference = f"{found['chips'] * early['tokens_per_second']:.3g}"
        made.add_row(found["topology"], str(step["rows"]), *training, inference)
    return made


def table(model: str, found: dict[str, Any]) -> Table:
    """The report as people read it, a chip at a time."""
    title = (
        f"{model}, {found['tokens_per_row']} tokens, per chip of {found['topology']} "
        f"({found['chips']} chips, {found['chip']['memory'] / 2**30:.0f} GiB): compiled, not run"
    )
    made = Table(title=Text(title, "italic"), show_header=False)
    for name, key in (("training step", "training"), ("early exit, nobody leaves", "early_exit")):
        part = found[key]
        made.add_row(f"[bold]{name}", f"{part['rows']} rows")
        if "memory" not in part:
            made.add_row("memory", Text(f"does not fit: {part['why']}"))
            made.add_row("", "lower batch_size or raise accumulate, or remat=True")
            continue
        held = part["memory"]
        cells = [
            f"{what} {held[what] / 2**30:.2f}"
            for what in ("parameters", "optimizer", "activations", "total")
            if what in held
        ]
        fits = "" if part["fits"] else ": does not fit, lower batch_size, raise accumulate or remat"
        made.add_row("memory, GiB", ", ".join(cells) + fits)
        whole = part["step" if key == "training" else "full_depth"]
        made.add_row("whole", bound_text(whole))
        made.add_row("a layer, forward", bound_text(part["layer_forward"]))
        if "layer" in part:
            made.add_row("a layer, both ways", bound_text(part["layer"]))
            made.add_row(
                "collectives",
                f"{part['collectives']['count']}, {part['collectives']['bytes'] / 2**20:.0f} MiB",
            )
        made.add_row("at most, on all chips" if key == "training" else "at most",
                     f"{part['tokens_per_second']:.3g} tokens per second")  # fmt: skip
        if "largest_rows" in part:
            made.add_row("largest batch that fits", f"{part['largest_rows']} rows")
    return made


def bound_text(part: dict[str, float]) -> str:
    return (
        f"{1e3 * part['seconds']:.3g} ms: {part['flops'] / 1e12:.3g} TFLOP, "
        f"{part['bytes'] / 1e9:.3g} GB of HBM, {part['share_of_peak']:.2f} of peak"
    )
