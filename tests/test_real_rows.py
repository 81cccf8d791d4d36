"""The real encoder on real text.

Set EJAX_QUICKSTART to a workdir of `ejax quickstart`, EJAX_NSMC to a bundle that was trained on
nsmc (Korean film reviews) from an encoder with the XLM-R tokenizer.
"""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from test_processes import ROOT, finish, start, start_two, weights

from ejax.classifier import EarlyExitClassifier
from ejax.data.batches import eval_plan
from ejax.inference.policy import select_exit
from ejax.training.parallel import make_all_logits

WORKDIR = os.environ.get("EJAX_QUICKSTART", "")
NSMC = os.environ.get("EJAX_NSMC", "")


@pytest.mark.skipif(not WORKDIR, reason="EJAX_QUICKSTART names no workdir of `ejax quickstart`")
def test_the_engine_takes_the_exits_of_the_reference():
    """At most 0.1 % of exits differ (promise 1), in the bundle's own bfloat16."""
    whole = EarlyExitClassifier.from_pretrained(Path(WORKDIR) / "bundle")
    clf = EarlyExitClassifier(whole.bundle.without_zero)  # what runs in compiled programs
    lines = (Path(WORKDIR) / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    encoded = clf.encode([json.loads(line)["text"] for line in lines])
    plan = eval_plan(
        encoded.lengths,
        buckets=clf.bundle.buckets,
        max_length=clf.bundle.max_length,
        batch_size=32,
    )
    # On one device: 32 rows over the tests' eight would be 4 a program, where bfloat16 sums differ.
    logits = make_all_logits(clf.model, jax.devices()[:1])(clf.bundle.variables, encoded, plan)
    differing, total = 0, 0
    for threshold in np.arange(0.22, 1.0, 0.02):
        found = clf.decide_encoded(encoded, threshold=threshold)
        wanted = select_exit(logits, threshold, clf.bundle.temperatures)
        differing += int((found.exit != np.asarray(wanted.exit)).sum())
        total += len(lines)
    assert total > 10_000
    assert differing <= total / 1000


@pytest.mark.skipif(not WORKDIR, reason="EJAX_QUICKSTART names no workdir of `ejax quickstart`")
def test_two_processes_four_devices_and_one_train_the_same_model(tmp_path: Path):
    """The real encoder on real text, with dropout, in float32."""
    config = ROOT / "configs" / "sst2_minilm.py"
    fields = (
        "--smoke", f"data.path={Path(WORKDIR).absolute()}/data", "dtype=float32",
    )  # fmt: skip
    finish(start(config, tmp_path / "one", *fields))
    finish(start(config, tmp_path / "four", *fields, devices=4))
    for process in start_two(config, tmp_path / "two", *fields):
        finish(process)
    one = weights(tmp_path / "one")
    for name in ("four", "two"):
        for key, value in weights(tmp_path / name).items():
            # Sums in another order; one step of Adam moves a weight by up to 1.5e-4, and one whose
            # gradient is nothing but rounding (a key's bias) moves too: 2e-6 in 16 steps. The
            # linear parts of the heads are fitted afterwards by L-BFGS, which stops where the loss
            # changes by less than 1e-7 of itself: near a minimum that is 3e-4 of a weight.
            limit = 5e-4 if "classifier" in key else 2e-5
            np.testing.assert_allclose(
                value, one[key], rtol=0, atol=limit, err_msg=f"{name}, {key}"
            )


@pytest.mark.skipif(not NSMC, reason="EJAX_NSMC names no bundle trained on nsmc")
def test_a_plain_sentence_in_korean_leaves_before_a_subtle_one():
    """At 0.98; at the default thresholds exit 0 is sure enough of both."""
    clf = EarlyExitClassifier.from_pretrained(NSMC)
    texts = [
        "이 영화 재밌네요",
        "각본을 12살 짜리 꼬마가 쓴건지, 아카데미 수상자가 쓴건지 모르겠네요",
    ]
    assert not clf.bundle.tokenizer.unknown()[clf.encode(texts).ids].any()
    plain, subtle = clf(texts, threshold=0.98)
    assert plain["exit_layer"] < subtle["exit_layer"]
    assert (plain["label"], subtle["label"]) == ("1", "0")
