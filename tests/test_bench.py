"""The benchmark's own arithmetic, and the contenders' logits where their libraries are there."""

import collections
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from test_runtime import bundle_of, folder_of, runtime

from ejax.bundle import load_bundle
from ejax.classifier import EarlyExitClassifier, Shapes
from ejax.data.tokenizer import Encoded
from ejax.evaluation import bench as bench_module
from ejax.evaluation import engines, scenarios
from ejax.evaluation.bench import AGAINST, bench, build, settings_of
from ejax.evaluation.bench_page import save_bench
from ejax.evaluation.contenders import Setting, run_batches
from ejax.evaluation.evaluate import best_full_depth
from ejax.export.hf import export_hf
from ejax.inference.cost import Profile

TEXTS = [text for _, text in tiny.rows(30, seed=5)]
LABELS = [i % 2 for i in range(30)]


@pytest.fixture(autouse=True)
def patient(monkeypatch) -> None:
    """Toy models run for microseconds: a busy machine could make any of them "too slow"."""
    monkeypatch.setattr(scenarios, "SLOWEST", float("inf"))


def clf() -> EarlyExitClassifier:
    return EarlyExitClassifier.from_pretrained(tiny.trained()[0], dtype="float32")


def needs(name: str) -> None:
    for library in AGAINST[name][0]:
        pytest.importorskip(library, reason=f"{library} comes with the extra `bench`")


def test_it_measures_what_runs_and_names_what_is_missing(monkeypatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else find(name)
    )
    monkeypatch.setattr(scenarios, "STREAM_ROWS", 5)
    result = bench(clf(), TEXTS, LABELS, threshold=0.7, beside={"again": clf()}, repeats=2)
    assert set(result["left_out"]) == set(AGAINST)
    assert "torch" in result["left_out"]["torch-float32"]
    full, early, again = result["contenders"]
    assert again["name"] == "ejax, again"
    assert again["accuracy"] == full["accuracy"] == result["exit_accuracy"][-1]
    assert full["agreement"] == again["agreement"] == 1
    assert sum(result["early_exit"]["exit_share"]) == pytest.approx(1)
    assert 1 <= result["early_exit"]["mean_depth"] < 3
    assert (full["name"], early["name"]) == ("ejax full depth", "ejax early exit")
    labels = [clf().bundle.labels.index(row["label"]) for row in clf()(TEXTS, threshold=0.7)]
    assert early["accuracy"] == pytest.approx(np.mean(np.array(labels) == LABELS))
    assert early["drop"] == pytest.approx(100 * (full["accuracy"] - early["accuracy"]))
    assert full["logit_difference"] < 1e-4
    for one in (full, early):
        assert one["offline"]["texts_per_second"] > one["end_to_end"]["texts_per_second"] > 0
        stream = one["single_stream"]
        assert 0 < stream["p50"] <= stream["p90"] <= stream["p99"]
        assert set(one["requests"]) == {"8", "32"}
    save_bench(result, tmp_path / "bench.json")
    assert json.loads((tmp_path / "bench.json").read_text())["rows"] == 30
    assert (tmp_path / "bench.png").stat().st_size > 0


def test_early_exit_runs_without_exit_0_too(monkeypatch) -> None:
    """Of the bundle, and of an exported folder; where nobody leaves there, once is enough."""
    monkeypatch.setattr(scenarios, "STREAM_ROWS", 2)
    ours = EarlyExitClassifier(bundle_of("exit 0"))
    result = bench(ours, TEXTS, LABELS, beside={"g": runtime("exit 0")}, against=(), repeats=1)
    assert [one["name"] for one in result["contenders"]] == [
        "ejax full depth", "ejax early exit", "ejax early exit without exit 0",
        "ejax, g", "ejax early exit, g", "ejax early exit without exit 0, g",
    ]  # fmt: skip
    shares = [result[key]["exit_share"] for key in ("early_exit", "without_exit_0")]
    assert shares[0][0] > 0 == shares[1][0]
    wanted = ours.predict(TEXTS, threshold=(2.0, *ours.bundle.thresholds[1:]))
    right = np.mean(np.array([ours.bundle.labels.index(name) for name in wanted]) == LABELS)
    for one in (result["contenders"][2], result["contenders"][5]):
        assert one["accuracy"] == pytest.approx(right)
    assert bench_module.without_zero(ours, (1.5, 0.7, 0.7)) is None
    assert bench_module.without_zero(clf(), (0.7, 0.7)) is None


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are chosen on Linux")
@pytest.mark.slow
def test_one_core_is_one_for_all_contenders(tmp_path: Path) -> None:
    """Every thread of the process is kept there, whichever runtime started it."""
    output = tmp_path / "b.json"
    code = """
import os, sys
import numpy as np
np.ones((500, 500)) @ np.ones((500, 500))  # its threads start before the command
from ejax.cli.app import app
from ejax.cli.run import run
print(run(app, "ejax", sys.argv[1:]))
threads = os.listdir("/proc/self/task")
print({len(os.sched_getaffinity(int(thread))) for thread in threads}, os.sched_getaffinity(0))
"""
    args = (
        "bench", tiny.trained()[0], "--data", tiny.file("test"), "--limit", 8, "--repeats", 1,
        "--beside", folder_of("one label"), "--against", "onnx-int8", "--output", output,
    )  # fmt: skip
    argv = [sys.executable, "-c", code, *map(str, args), "--cores", "1"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=600)
    assert done.stdout.splitlines()[-2:] == ["0", f"{{1}} {{{min(os.sched_getaffinity(0))}}}"], done
    assert "on 1 core," in done.stdout
    result = json.loads(output.read_text())
    assert result["cores"] == 1
    assert {one["setting"]["threads"] for one in result["contenders"] if one["setting"]} <= {1}
    assert "ONNX Runtime, onnx-float32, on 1 thread" in done.stderr
    most = len(os.sched_getaffinity(0))
    assert f"--cores must be from 1 to {most} here. Got 0" in tiny.refused(*args, "--cores", 0)
    assert f"Got {most + 1}" in tiny.refused(*args, "--cores", most + 1)


def test_linear_rivals_stand_among_the_others(monkeypatch, tmp_path: Path) -> None:
    ranged = watched_ranges(monkeypatch)
    train = tmp_path / "train.tsv"  # and some rows of the test, which have no part in anything
    train.write_text(
        tiny.file("train").read_text() + tiny.file("test").read_text().partition("\n")[2]
    )
    monkeypatch.setattr(scenarios, "STREAM_ROWS", 2)
    output = tmp_path / "b.json"
    args = ("bench", tiny.trained()[0], "--data", tiny.file("test"), "--output", output)
    assert "--encoder needs --train" in tiny.refused(*args, "--encoder", tiny.model())
    done = tiny.ejax(
        *args, "--repeats", 1, "--train", train, "--encoder", tiny.model(),
        "--against", "onnx-int8-static",
    )  # fmt: skip
    assert done.code == 0, done.err
    result = json.loads(output.read_text())
    full, _, _, *linear = result["contenders"]
    assert [one["name"] for one in linear] == ["TF-IDF, linear", "frozen encoder, linear"]
    for one in linear:
        assert one["rival"]["fitted_rows"] == 96
        assert one["drop"] == pytest.approx(100 * (full["accuracy"] - one["accuracy"]))
        # From text to label, tokenising counted, is how they were timed.
        assert one["end_to_end"]["texts_per_second"] == one["offline"]["texts_per_second"]
        assert one["single_stream"]["p50"] > 0
        assert one["name"].partition(",")[0] in done.out
    # Every seventh label of test is wrong: whoever knows the words is right on 0.867.
    assert linear[0]["accuracy"] == pytest.approx(26 / 30, abs=0.04)
    assert result["enough"].startswith("TF-IDF with logistic regression is right on 0.8")
    assert result["enough"] in done.err
    tested = {text for _, text in tiny.rows(30, 2)}
    others = [text for _, text in tiny.rows(96, 0) if text not in tested]
    assert len(others) > 80
    np.testing.assert_array_equal(ranged[0].ids, clf().encode(others).ids)


def watched_ranges(monkeypatch) -> list[Encoded]:
    """What contenders get to fix their ranges; they need no library, and answer 0."""
    found: list[Encoded] = []

    def build(name, bundle, thresholds, ranges):
        found.append(ranges)
        return lambda rows, setting: np.zeros((len(rows), 2), np.float32)

    monkeypatch.setattr(bench_module, "build", build)
    find, needed = importlib.util.find_spec, AGAINST["onnx-int8-static"][0]
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: object() if name in needed else find(name)
    )
    return found


def test_rows_trained_on_are_counted(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_module, "AGAINST", {})
    monkeypatch.setattr(scenarios, "STREAM_ROWS", 2)
    output = tmp_path / "b.json"
    for source, fitted in ((tiny.file("train"), 6), (tiny.file("test"), 0)):
        done = tiny.ejax(
            "bench", tiny.trained()[0], "--data", source, "--limit", 6, "--repeats", 1,
            "--output", output,
        )  # fmt: skip
        assert done.code == 0, done.err
        assert json.loads(output.read_text())["rows_fitted_on"] == fitted


def test_who_is_far_too_slow_is_left_out_and_said_so(monkeypatch) -> None:
    """A trial decides, so that the whole ends in time."""

    def slow(name, bundle, threshold, ranges):
        return lambda rows, setting: time.sleep(0.5) or np.zeros((len(rows), 2), np.float32)

    monkeypatch.setattr(bench_module, "build", slow)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(scenarios, "STREAM_ROWS", 2)
    monkeypatch.setattr(scenarios, "SLOWEST", 4.0)
    result = bench(clf(), TEXTS, LABELS, threshold=0.7, against=("torch-bfloat16",), repeats=1)
    assert len(result["contenders"]) == 2
    assert "times slower than full depth here" in result["left_out"]["torch-bfloat16"]


def test_the_sweep_takes_the_fastest_setting(monkeypatch) -> None:
    """Whatever a first run of each costs; and its memory is seen."""
    met, kept = set(), []

    def run(rows, setting):
        first = setting not in met
        if not met:
            kept.append(np.ones(1 << 27, np.uint8))
        met.add(setting)
        fast = setting.batch == 64 and setting.threads == 1
        time.sleep(0.2 if first else 0.005 if fast else 0.02 if setting.batch == 64 else 0.05)
        return np.zeros((len(rows), 2), np.float32)

    encoded = clf().encode(TEXTS)
    found = scenarios.entered("a", lambda: run, encoded, settings_of("onnx-int8"), None)
    assert found.setting == Setting(64, 1)
    assert Setting(32, 1) in met  # requests are tried as well
    # The kernel's counts are rough where many threads run, and freed memory may be used again.
    assert found.peak_bytes is None or found.peak_bytes >= 0.9 * kept[0].nbytes


def test_requests_are_run_in_the_best_batches() -> None:
    """A rival pads all of a batch to its longest row; here one that runs 8 at once is fastest."""

    def run(rows, setting):
        time.sleep({1: 0.02, 8: 0.004}.get(setting.batch, 0.05))
        return np.zeros((len(rows), 2), np.float32)

    encoded = clf().encode(TEXTS * 3)
    rival = scenarios.Contender("a", run, encoded, Setting(16, 1), np.zeros(0), None)
    ours = scenarios.Contender("b", run, encoded, Setting(0, 1), np.zeros(0), None)
    found = scenarios.requests([rival, ours], 3, lambda _: None)
    # 2 requests of 32 take 8 or 100 ms, and what the clock and the rows cost.
    assert 64 / 0.05 < found["a"]["32"] < 64 / 0.008
    assert 64 / 0.2 < found["b"]["32"] < 64 / 0.1


def test_the_sweep_pads_as_the_run_does() -> None:
    lengths = np.random.default_rng(0).integers(3, 120, 2000)
    rows = scenarios.sweep_rows(lengths)
    assert rows.size == 512
    blocks = lengths[rows].reshape(4, 128)
    assert blocks.max(axis=1).tolist() == sorted(blocks.max(axis=1))
    assert np.ptp(blocks, axis=1).max() < 12  # of 117, spread over 15 blocks
    assert blocks[0].min() == 3
    assert sorted(scenarios.sweep_rows(lengths[:100])) == list(range(100))


def test_a_model_beside_is_tried_on_its_own_tokens(monkeypatch) -> None:
    """Which ours, with a shorter max_length, could not run."""
    monkeypatch.setattr(scenarios, "STREAM_ROWS", 2)
    long = ["the film was great and the music was poor and awful tonight"] * 4
    short = EarlyExitClassifier(dataclasses.replace(clf().bundle, max_length=8))
    result = bench(short, long, [1] * 4, beside={"longer": clf()}, against=(), repeats=1)
    assert [one["name"] for one in result["contenders"]][2:] == ["ejax, longer"]


def test_a_contender_that_fails_is_left_out(monkeypatch) -> None:
    def broken(name, bundle, threshold, ranges):
        raise RuntimeError("no such operator\nand more")

    monkeypatch.setattr(bench_module, "build", broken)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(scenarios, "STREAM_ROWS", 2)
    result = bench(clf(), TEXTS, LABELS, against=("onnx-int8",), repeats=1)
    assert result["left_out"] == {"onnx-int8": "failed: RuntimeError: no such operator"}
    assert len(result["contenders"]) == 2


def test_a_model_beside_must_have_the_same_labels() -> None:
    other = dataclasses.replace(clf().bundle, labels=("good", "bad"))
    with pytest.raises(ValueError, match="--beside other must have the labels bad, good"):
        bench(clf(), TEXTS, LABELS, beside={"other": EarlyExitClassifier(other)})


def test_a_model_beside_must_take_as_many_texts() -> None:
    bundle = clf().bundle
    pairs = bundle.provenance | {"text_columns": ["premise", "hypothesis"]}
    other = EarlyExitClassifier(dataclasses.replace(bundle, provenance=pairs))
    with pytest.raises(ValueError, match=r"on 1 text columns.*Got 2 \(premise, hypothesis\)"):
        bench(clf(), TEXTS, LABELS, beside={"other": other})


@pytest.mark.parametrize("fastest", [24, 128])
def test_full_depth_is_run_in_the_fastest_tiles(monkeypatch, fastest: int) -> None:
    """Those of the machine's profile, which divide no round number of tokens, or others."""
    profile = Profile("a machine", "2026-11-28", "float32", "float32", tile={16: 24}, seconds={})
    measured = EarlyExitClassifier(clf().bundle, shapes=Shapes(profile=profile))

    def full_logits(self: EarlyExitClassifier, _: Encoded) -> None:
        time.sleep(0 if self.shapes.tile(16) == fastest else 0.02)

    monkeypatch.setattr(EarlyExitClassifier, "full_logits", full_logits)
    best = best_full_depth(measured, measured.encode(TEXTS))
    assert best.shapes.tile(16) == fastest


def test_one_lucky_trial_does_not_make_tiles_the_fastest(monkeypatch) -> None:
    """The median of the trials decides: by their least, the tiles that are slow in all but one
    would win, and the baseline, and so every speed-up, would be measured in those."""
    calls: collections.Counter[int] = collections.Counter()
    steady, lucky = 128, 64

    def full_logits(self: EarlyExitClassifier, _: Encoded) -> None:
        tile = self.shapes.tile(16)
        calls[tile] += 1
        slow = {steady: 0.01, lucky: 0.0 if calls[tile] == 3 else 0.03}
        time.sleep(slow.get(tile, 0.03))

    monkeypatch.setattr(EarlyExitClassifier, "full_logits", full_logits)
    best = best_full_depth(clf(), clf().encode(TEXTS))
    assert calls[lucky] > 3
    assert best.shapes.tile(16) == steady


def test_an_unknown_contender_is_refused(tmp_path: Path) -> None:
    said = tiny.refused(
        "bench", tiny.trained()[0], "--data", tiny.data(), "--against", "tensorrt",
        "--output", tmp_path / "b.json",
    )  # fmt: skip
    assert "--against must be among torch-float32" in said
    assert "'tensorrt'" in said


@pytest.mark.parametrize("name", ["torch-float32", "torch-compile", "onnx-float32"])
def test_a_contender_runs_the_same_model(name: str) -> None:
    """Logits equal to 1e-4, whatever the batch; else the comparison would be void."""
    needs(name)
    encoded = clf().encode([*TEXTS, ""])
    wanted = clf().full_logits(encoded)
    for batch in (1, 8, 64):
        found = build(name, clf().bundle, (0.7, 0.7), None)(encoded, Setting(batch, 1))
        np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("name", ["onnx-int8", "onnx-int8-static", "openvino-int8"])
def test_a_quantised_contender_answers_as_the_model_does(name: str) -> None:
    """Rounding to 8 bits moves logits, and few answers."""
    needs(name)
    encoded = clf().encode(TEXTS)
    wanted = clf().full_logits(encoded)
    found = build(name, clf().bundle, (0.7, 0.7), encoded)(encoded, Setting(8, 1))
    assert 0 < np.abs(found - wanted).max() < 0.3 * np.abs(wanted).max()
    assert (found.argmax(axis=1) == wanted.argmax(axis=1)).mean() >= 0.9


def test_batches_of_a_contender_are_its_rows() -> None:
    """Each once and in its place, padded to the longest; and what exit 0 adds is added."""
    encoded = clf().encode([*TEXTS, ""])
    sums = np.zeros((len(encoded), 2), np.float32)
    for row, (start, end) in enumerate(itertools.pairwise(encoded.offsets)):
        sums[row] = encoded.ids[start:end].sum(), end - start

    def forward(batch) -> np.ndarray:
        feeds = engines._feeds(batch)
        assert list(feeds) == ["ids", "mask", "types"]
        assert all(array.dtype == np.int64 for array in feeds.values())
        assert feeds["mask"].sum(axis=1).max() == feeds["ids"].shape[1] <= encoded.lengths.max()
        return np.stack([(feeds["ids"] * feeds["mask"]).sum(1), feeds["mask"].sum(1)], axis=1)

    for size in (1, 8, 64):
        np.testing.assert_array_equal(run_batches(forward, encoded, size, clf().bundle), sums)
    bundle = bundle_of("exit 0")
    whole = bundle.encode([*TEXTS, ""])
    added = run_batches(forward, whole, 8, bundle) - sums
    zero = EarlyExitClassifier(bundle).exit_logits(whole)[0]
    evidence = bundle.variables["params"]["ngrams"]["evidence"][-1]
    np.testing.assert_allclose(added, evidence * zero, atol=1e-4)  # sums of up to 300


def test_without_texts_for_their_ranges_some_are_left_out(monkeypatch) -> None:
    monkeypatch.setattr(scenarios, "STREAM_ROWS", 2)
    result = bench(clf(), TEXTS, LABELS, against=("openvino-int8",), repeats=1)
    assert result["left_out"] == {
        "openvino-int8": "needs training rows (--train) for the ranges of its activations"
    }


def test_the_early_exit_of_pytorch_takes_the_same_exits() -> None:
    needs("torch-exit")
    encoded = clf().encode(TEXTS)
    found = build("torch-exit", clf().bundle, (0.7, 0.7), None)(encoded, Setting(1, 1))
    wanted = clf().decide_encoded(encoded, threshold=0.7).logits
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_export_says_why_it_cannot() -> None:
    said = tiny.refused("export", tiny.trained()[0], "--output", tiny.HOME / "never")
    assert "pooling 'mean' and mix 'softmax'" in said
    assert not (tiny.HOME / "never").exists()


@functools.cache
def standard() -> Path:
    """A bundle whose last exit is a plain BERT classifier, not to be changed."""
    output = tiny.HOME / "standard"
    fields = [*tiny.train_args(output), "pooling=cls", "mix=last", "evals=4"]
    assert tiny.ejax(*fields).code == 0
    return output


def test_export_does_not_replace_a_bundle() -> None:
    output = standard()
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    assert f"{output} is a bundle" in tiny.refused("export", output, "--output", output)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_export_is_a_plain_classifier(tmp_path: Path) -> None:
    """Its names and shapes are transformers' own; where torch is at hand, so are its logits."""
    bundle = load_bundle(standard())
    folder = export_hf(bundle, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["num_hidden_layers"] == 3
    assert (folder / "model.safetensors").stat().st_mode & 0o044  # a server is another user
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["do_lower_case"]
    assert settings["model_max_length"] == bundle.max_length
    again = EarlyExitClassifier(bundle)
    encoded = again.encode(TEXTS[:1])
    wanted = again.full_logits(encoded)
    torch = pytest.importorskip("torch", reason="torch comes with the extra `bench`")
    transformers = pytest.importorskip("transformers")
    plain = transformers.BertForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        found = plain(torch.from_numpy(encoded.ids[None].astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-4)
