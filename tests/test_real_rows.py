"""A trained bundle on real text: set EJAX_QUICKSTART to a workdir of `ejax quickstart`."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from ejax.classifier import EarlyExitClassifier
from ejax.data.batches import eval_plan
from ejax.inference.policy import select_exit
from ejax.training.parallel import make_all_logits

WORKDIR = os.environ.get("EJAX_QUICKSTART", "")


@pytest.mark.skipif(not WORKDIR, reason="EJAX_QUICKSTART names no workdir of `ejax quickstart`")
def test_the_engine_takes_the_exits_of_the_reference():
    """At most 0.1 % of exits differ (promise 1), in the bundle's own bfloat16."""
    clf = EarlyExitClassifier.from_pretrained(Path(WORKDIR) / "bundle")
    lines = (Path(WORKDIR) / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    encoded = clf.encode([json.loads(line)["text"] for line in lines])
    plan = eval_plan(
        encoded.lengths,
        buckets=clf.bundle.buckets,
        max_length=clf.bundle.max_length,
        batch_size=32,
    )
    logits = make_all_logits(clf.model)(clf.bundle.variables, encoded, plan)
    differing, total = 0, 0
    for threshold in np.arange(0.22, 1.0, 0.02):
        found = clf.decide_encoded(encoded, threshold=threshold)
        wanted = select_exit(logits, threshold, clf.bundle.temperatures)
        differing += int((found.exit != np.asarray(wanted.exit)).sum())
        total += len(lines)
    assert total > 10_000
    assert differing <= total / 1000
