"""A bundle, or a model to start from, as tables that people read."""

from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ejax.bundle import Bundle
from ejax.card import describe_thresholds, exits_in_words
from ejax.config import BertConfig

PARTS = {"test": "test", "dev_b": "dev-B", "calibration": "calibration rows", "dev_a": "dev-A"}


def show(*things: Any) -> None:
    """Prints on standard output; tables keep their width where it is a file or a pipe."""
    console = Console()
    console = console if console.is_terminal else Console(width=140)
    for thing in things:
        console.print(thing, markup=False, highlight=False)


def facts(bundle: Bundle) -> Table:
    """What the bundle is and how its thresholds came about."""
    p = bundle.provenance
    thresholds = describe_thresholds(bundle.thresholds)
    versions = p.get("versions", {})
    return grid(
        {
            "encoder": shape(bundle.cfg),
            "parameters": "" if bundle.graph else f"{count(bundle.variables):,}",
            "exits": exits_in_words(bundle.exits),
            "labels": f"{len(bundle.labels)}: {', '.join(bundle.labels)}",
            "exit 0 adds": weights_of_zero(bundle),
            "problem type": bundle.exits.problem_type,
            "temperatures": ", ".join(f"{t:.3f}" for t in bundle.temperatures if np.ndim(t) == 0),
            "thresholds": f"{thresholds}. {p.get('thresholds_from', '')}".strip(),
            "no answer": p.get("abstain", {}).get("sentence", ""),
            "tokens": f"at most {bundle.max_length}",
            "pooling, mix": f"{bundle.exits.pooling}, {bundle.exits.mix}",
            "numerics": numerics(bundle),
            "started from": p.get("model", ""),
            "taught by": p.get("teacher", ""),
            "trained on": p.get("data", ""),
            "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        }
    )


def numerics(bundle: Bundle) -> str:
    """What runs it, and in which types."""
    if bundle.graph:
        operators = {"onnxruntime": "its own operators too", "standard": "standard operators"}
        return f"ONNX Runtime, {bundle.graph.precision}, {operators[bundle.graph.operators]}"
    return f"{bundle.cfg.dtype}, residual {bundle.cfg.residual_dtype}"


def model_facts(cfg: BertConfig, params: Any) -> Table:
    """What a pretrained encoder is."""
    return grid(
        {
            "encoder": shape(cfg),
            "heads": str(cfg.num_attention_heads),
            "parameters": f"{count(params):,}",
            "vocabulary": f"{cfg.vocab_size:,}",
            "tokens": f"at most {cfg.max_position_embeddings}",
            "exits": "none yet: `ejax train` adds them",
        }
    )


def weights_of_zero(bundle: Bundle) -> str:
    """What exit 0's logits weigh in each later exit; "" where they add nothing."""
    if not bundle.adds_evidence:
        return ""
    weights = bundle.variables["params"]["ngrams"]["evidence"]
    return f"its logits, times {', '.join(f'{weight:.2f}' for weight in weights)}, to later exits"


def exit_tables(bundle: Bundle) -> list[Table]:
    """Quality per exit, for every set of rows that the provenance reports on."""
    metrics = bundle.provenance.get("metrics", {})
    made, metric = [], bundle.task.metric
    for name, title in PARTS.items():
        if name not in metrics:
            continue
        if "measured_before_export" in bundle.provenance:
            title += ", before the export"
        point = bundle.provenance.get("operating_points", {}).get(name)
        columns = bundle.task.measures
        title = f"{title}, {point['rows']} rows" if point else title
        table = numbers(title, "layer", *columns.values(), "leave here")
        shares = (
            [f"{100 * share:.1f} %" for share in point["exit_share"]]
            if point
            else [""] * len(bundle.exits.layers)
        )
        for layer, row, share in zip(bundle.exits.layers, metrics[name], shares, strict=True):
            values = (row["after"][key] for key in columns)
            table.add_row(str(layer), *(f"{value:.4f}" for value in values), share)
        if point:
            table.caption = (
                f"at the default thresholds: {bundle.task.metric_name} {point[metric]:.4f}, full "
                f"depth {point[f'full_{metric}']:.4f}, mean depth {point['mean_depth']:.2f} of "
                f"{bundle.exits.num_layers} layers"
            )
        made.append(table)
    return made


def shape(cfg: BertConfig) -> str:
    return f"{cfg.num_hidden_layers} layers of width {cfg.hidden_size}"


def count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def numbers(title: Any, *headings: str) -> Table:
    """An empty table of numbers, which stand to the right."""
    made = Table(title=title)
    for heading in headings:
        made.add_column(heading, justify="right")
    return made


def grid(rows: dict[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        if value:
            table.add_row(name, Text(value))  # a label may hold [brackets]
    return table
