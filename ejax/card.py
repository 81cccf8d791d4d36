"""The model card, and a bundle in words."""

from collections.abc import Sequence

from ejax.bundle import Bundle
from ejax.bundle_files import ROWS
from ejax.config import ExitConfig

CARD_FOLDER = "path/to/this/folder"  # in its example


def describe_thresholds(thresholds: Sequence[float]) -> str:
    """In words: the last exit, which takes everyone, left out."""
    early = sorted(set(thresholds[:-1]))
    if not early or early[0] > 1:
        return "full depth"
    if len(early) == 1:
        return f"{early[0]:.7g}"
    return ", ".join(map(describe_threshold, thresholds[:-1]))


def describe_threshold(threshold: float) -> str:
    """Of one exit: those near 1 are chosen to more digits."""
    if threshold > 1:
        return "none"
    return f"{threshold:.3f}" if threshold < 0.999 else f"{threshold:.7g}"


def exits_in_words(exits: ExitConfig) -> str:
    """Such as "before the first layer and after layers 2, 4"."""
    before = "before the first layer and " if exits.has_zero else ""
    return f"{before}after layers {', '.join(map(str, exits.encoder.layers))}"


def model_card(bundle: Bundle) -> str:
    """What the bundle is, how its thresholds came about, and how to run it."""
    p, kind = bundle.provenance, bundle.exits.problem_type
    zero_gives_away = (
        "Exit 0's table has numbers for the hash of each token and pair of tokens that at least "
        "three training texts hold: it may still show that such a pair occurred."
    )
    lines = [
        "---",
        "library_name: ejax",
        "pipeline_tag: text-classification",
        "---",
        "",
        "# BERT with early exits",
        "",
        f"{bundle.cfg.num_hidden_layers} layers of width {bundle.cfg.hidden_size}, exits "
        f"{exits_in_words(bundle.exits)}; labels: {', '.join(bundle.labels)}.",
        "",
        *([f"- Problem type: {kind}"] if kind != "single_label_classification" else []),
        f"- Started from: {p.get('model', 'not recorded')}",
        *([f"- Taught by: {p['teacher']}"] if p.get("teacher") else []),
        f"- Trained on: {p.get('data', 'not recorded')}",
        f"- Default thresholds: {describe_thresholds(bundle.thresholds)}. "
        f"{p.get('thresholds_from', '')}".rstrip(),
        *([f"- {p['abstain']['sentence']}"] if "abstain" in p else []),
        *([f"- Runtime: ONNX Runtime, {bundle.graph.precision}"] if bundle.graph else []),
        *(
            [f"- Tables below: measured in {p['measured_before_export']}, before the export"]
            if "measured_before_export" in p
            else []
        ),
        f"- Pooling {bundle.exits.pooling}, mix {bundle.exits.mix}, at most "
        f"{bundle.max_length} tokens.",
        "",
    ]
    for name in ("calibration", "dev_a", "dev_b", "test"):
        rows = p.get("metrics", {}).get(name)
        if rows:
            lines += [f"## {name.replace('_', '-')}, per exit, after temperature", ""]
            columns = bundle.task.measures
            lines.append(f"| layer | {' | '.join(columns.values())} |")
            lines.append("|---" * (1 + len(columns)) + "|")
            for layer, row in zip(bundle.exits.layers, rows, strict=True):
                cells = " | ".join(f"{row['after'][column]:.4f}" for column in columns)
                lines.append(f"| {layer} | {cells} |")
            lines.append("")
    lines += [
        "## What it gives away",
        "",
        f"`{ROWS}`, where it is there, holds salted hashes of the texts that trained, fitted or "
        "tested this bundle, so that they choose no thresholds and are not reported on.",
        "With it, anyone who has a text can test whether it is among them. Where that must stay "
        "secret, leave the file out: `clf.save_pretrained(folder, rows=False)`.",
        "Then `ejax calibrate` and promises ask for `--rows-are-new`.",
        *([zero_gives_away] if bundle.exits.has_zero else []),
        "",
        "## Use",
        "",
        "```python",
        "import ejax",
        "",
        f'clf = ejax.EarlyExitClassifier.from_pretrained("{CARD_FOLDER}")',
        'clf("a text")',
        "```",
        "",
    ]
    return "\n".join(lines)
