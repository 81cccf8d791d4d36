"""`ejax export --format jax`: the program without ejax, against the classifier and the engine."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import reference
import tiny
from jax import export
from safetensors.numpy import load_file

from ejax.bundle import load_bundle
from ejax.classifier import EarlyExitClassifier
from ejax.config import ExitConfig
from ejax.export.jax import export_jax
from ejax.inference.engine import early_exit
from ejax.models.bert import Batch
from ejax.tasks import task_of

GUIDE = Path(__file__).parents[1] / "docs" / "export.md"
COUNTS = (1, 5, 40)  # one row, a rest in a small tile, a whole tile and a rest


def between(scores: np.ndarray) -> float:
    """A threshold in the widest gap of the middle half of the scores, [N]."""
    middle = np.sort(scores)[len(scores) // 4 : -len(scores) // 4]
    i = np.argmax(np.diff(middle))
    return float(middle[i : i + 2].mean())


def snippet() -> str:
    """The program of the guide."""
    text = GUIDE.read_text()
    part = text[text.index("## One program for JAX") :]
    return part[part.index("```python\n") + 10 : part.index("\n```\n")]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [text for _, text in tiny.rows(max(COUNTS), seed=5)]


def test_the_program_of_the_guide_answers_like_the_classifier(tmp_path: Path, texts) -> None:
    """In a process that never imports ejax, for several numbers of rows, each compiled anew."""
    clf = EarlyExitClassifier.from_pretrained(tiny.trained()[0], dtype="float32", profile=None)
    scores = clf.decide(texts, threshold=0).score
    threshold = between(scores)
    done = tiny.ejax(
        "export", tiny.trained()[0], "--format", "jax", "--output", tmp_path / "sentiment-jax"
    )
    assert done.code == 0, done.err
    # The guide's own rows and thresholds are followed by ours.
    more = f"""
import sys
found = []
for count in {COUNTS}:
    rows = tokenizer.encode_batch({texts}[:count])
    tokens = [(row.ids, row.type_ids, row.attention_mask) for row in rows]
    ids, types, mask = np.array(tokens, np.int32).swapaxes(0, 1)
    out = program(weights, ids, types, mask, np.full((count, 2), {threshold}, np.float32))
    found.append([np.asarray(part).tolist() for part in out])
print(json.dumps([found, [name for name in sys.modules if name.split(".")[0] == "ejax"]]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-c", snippet() + more],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    shown, found = run.stdout.strip().splitlines()
    assert shown.startswith("['good', 'bad']")
    answers, ours = json.loads(found)
    assert ours == []
    for count, (logits, exit, score) in zip(COUNTS, answers, strict=True):
        wanted = clf.decide(texts[:count], threshold=threshold)
        np.testing.assert_array_equal(exit, wanted.exit)
        # Padded to other lengths, in other tiles: the classifier's own promise for float32.
        np.testing.assert_allclose(score, wanted.score, atol=1e-5)
        np.testing.assert_allclose(logits, wanted.logits, atol=1e-5)
    assert 0 < np.mean(answers[-1][1]) < 1  # some left at the first exit, some at the last


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_exit_0_and_bfloat16_are_in_the_program(tmp_path: Path, problem: str) -> None:
    bundle = load_bundle(tiny.trained()[0])
    exits = ExitConfig((0, 1, 3), 2, problem_type=problem, buckets=1 << 10)
    cfg = dataclasses.replace(bundle.cfg, dtype="bfloat16")
    calibration = [task_of(exits).uncalibrated.tolist()] * 3
    bundle = dataclasses.replace(
        bundle, cfg=cfg, exits=exits, variables=reference.random_variables(cfg, exits, 3),
        temperatures=tuple(calibration),
        thresholds=(0.9, 0.9, 0.0),
    )  # fmt: skip
    folder = export_jax(bundle, tmp_path / "jax")
    program = export.deserialize((folder / "program.jax").read_bytes())
    assert program.platforms == ("cpu", "cuda", "tpu")
    ids, mask, types = reference.random_batch(cfg, 37, 11, seed=1)
    thresholds = np.random.default_rng(0).choice([0.0, 0.6, 2.0], (37, 3)).astype(np.float32)
    weights = load_file(folder / "model.safetensors")
    found = jax.jit(program.call)(weights, ids, types, mask, thresholds)
    wanted = early_exit(
        bundle.model, bundle.variables, Batch(ids, mask, types), thresholds,
        temperatures=bundle.temperatures,
    )  # fmt: skip
    assert set(np.asarray(wanted.exit)) == {0, 1, 2}
    for ours, theirs in zip(found, wanted, strict=True):
        # One program traced twice: XLA may add up in another order, 1e-6 of numbers about 1.
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_what_the_program_refuses(tmp_path: Path) -> None:
    folder = tmp_path / "jax"
    made = tiny.ejax("export", tiny.trained()[0], "--format", "jax", "--output", folder)
    assert "written" in made.err
    program = export.deserialize((folder / "program.jax").read_bytes())
    weights = load_file(folder / "model.safetensors")
    ids = np.zeros((2, tiny.CFG.max_position_embeddings + 1), np.int32)
    with pytest.raises(ValueError, match="Error refining shapes") as refusal:
        program.call(weights, ids, ids, ids, np.zeros((2, 2), np.float32))
    assert "tokens <= 32" in str(refusal.value.__cause__)
    said = tiny.refused("export", tiny.trained()[0], "--format", "tflite", "--output", folder)
    assert said == "--format must be hf, onnx or jax. Got 'tflite'."
    args = ("export", tiny.trained()[0], "--format", "jax", "--output", tiny.trained()[0])
    assert "is a bundle" in tiny.refused(*args)
