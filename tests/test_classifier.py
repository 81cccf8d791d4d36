"""Texts in, labels out, whatever their order and company."""

import copy
import dataclasses
import multiprocessing
import os
import pickle
import signal
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

import ejax
from ejax.classifier import EarlyExitClassifier, Shapes
from ejax.data.batches import pad
from ejax.evaluation import targets
from ejax.evaluation.labelled import labelled_rows
from ejax.evaluation.targets import Target
from ejax.inference.cost import Profile, Seconds, profile_path, save_profile
from ejax.inference.pool import run_pool

SMALL = Shapes(tile_tokens=256, pool_tokens=512)
ONE = jax.devices()[:1]
TEXTS = [text for _, text in tiny.rows(23, seed=9)]


@pytest.fixture(scope="module")
def clf() -> EarlyExitClassifier:
    return EarlyExitClassifier.from_pretrained(tiny.trained()[0])


def test_what_it_learned(clf: EarlyExitClassifier) -> None:
    answers = clf(["the film was great", "the plot was awful"])
    assert [row["label"] for row in answers] == ["good", "bad"]
    assert set(answers[0]) == {"label", "score", "exit_layer"}
    assert answers[0]["score"] > 0.5
    assert answers[0]["exit_layer"] in (1, 3)


def test_one_text_gives_a_list_of_one(clf: EarlyExitClassifier) -> None:
    assert clf("the film was great") == clf(["the film was great"])
    assert clf([]) == []


def test_top_k(clf: EarlyExitClassifier) -> None:
    best = clf(TEXTS)
    both = clf(TEXTS, top_k=None)
    for likeliest, rows in zip(best, both, strict=True):
        assert rows[0] == likeliest
        assert [row["label"] for row in rows[1:]] == [
            {"good": "bad", "bad": "good"}[likeliest["label"]]
        ]
        assert sum(row["score"] for row in rows) == pytest.approx(1)
    probs = clf.predict_proba(TEXTS)
    assert probs.shape == (23, 2)
    np.testing.assert_allclose(probs.max(axis=1), [row["score"] for row in best], rtol=1e-6)
    with pytest.raises(ValueError, match="top_k must be a positive number or None"):
        clf("x", top_k=0)


def test_thresholds_at_their_ends(clf: EarlyExitClassifier) -> None:
    assert {row["exit_layer"] for row in clf(TEXTS, threshold=0)} == {1}
    assert {row["exit_layer"] for row in clf(TEXTS, threshold=1.01)} == {3}
    full = clf.full_logits(clf.encode(TEXTS))
    np.testing.assert_allclose(clf.decide(TEXTS, threshold=2).logits, full, atol=1e-5)


def test_an_easy_text_leaves_early_and_a_twisted_one_goes_deeper(clf: EarlyExitClassifier) -> None:
    """One word that says it, against two that say the opposite of each other."""
    easy = clf(["the film was great", "a poor film tonight"], threshold=0.7)
    twisted = clf(["the film was great and the plot awful", "great awful"], threshold=0.7)
    assert {answer["exit_layer"] for answer in easy} == {1}
    assert {answer["exit_layer"] for answer in twisted} == {3}
    assert min(a["score"] for a in easy) > max(a["score"] for a in twisted)


def test_each_text_can_have_its_own_threshold(clf: EarlyExitClassifier) -> None:
    thresholds = np.full((23, 2), 2.0)
    thresholds[::3] = 0
    layers = [row["exit_layer"] for row in clf(TEXTS, threshold=thresholds)]
    assert layers == [1 if i % 3 == 0 else 3 for i in range(23)]
    with pytest.raises(ValueError, match=r"shape \(\), \(2,\) or \(23, 2\)\. Got \(2, 23\)"):
        clf(TEXTS, threshold=thresholds.T)
    with pytest.raises(ValueError, match="thresholds must be numbers"):
        clf(TEXTS, threshold="high")


def test_company_and_order_do_not_matter(clf: EarlyExitClassifier) -> None:
    """Promise 1: at the same length at most 1e-6, and 1e-5 where a text runs alone."""
    texts = [*TEXTS, " ".join(TEXTS[:3])]
    together = clf.decide(texts)
    order = np.random.default_rng(1).permutation(len(texts))
    shuffled = clf.decide([texts[i] for i in order])
    np.testing.assert_allclose(shuffled.score, together.score[order], atol=1e-6)
    np.testing.assert_array_equal(shuffled.exit, together.exit[order])
    for i in (0, 7, 23):
        alone = clf.decide([texts[i]])
        np.testing.assert_allclose(alone.score, together.score[i : i + 1], atol=1e-5)


def test_many_rows_run_in_several_pools() -> None:
    """23 rows in two pools of 10 and 3 alone: the same answers as in one pool."""
    bundle = ejax.load_bundle(tiny.trained()[0])
    small = EarlyExitClassifier(bundle, shapes=Shapes(tile_tokens=64, pool_tokens=160))
    assert len(list(small.pools(small.encode(TEXTS).lengths))) == 5
    one_pool, five_pools = EarlyExitClassifier(bundle).decide(TEXTS), small.decide(TEXTS)
    np.testing.assert_allclose(five_pools.score, one_pool.score, atol=1e-5)
    np.testing.assert_array_equal(five_pools.exit, one_pool.exit)


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_devices_share_the_rows(devices: int) -> None:
    """The same answers as on one (promise 1), thresholds per text included."""
    bundle = ejax.load_bundle(tiny.trained()[0])
    alone = EarlyExitClassifier(bundle, devices=ONE)
    shared = EarlyExitClassifier(bundle, devices=jax.devices()[:devices])
    each = np.random.default_rng(0).uniform(0.4, 1.1, (23, 2))
    for count, threshold in ((23, 0.7), (1, 0.7), (2, 0.7), (23, each)):
        wanted = alone.decide(TEXTS[:count], threshold=threshold)
        decision = shared.decide(TEXTS[:count], threshold=threshold)
        np.testing.assert_allclose(decision.score, wanted.score, atol=1e-5)
        np.testing.assert_array_equal(decision.exit, wanted.exit)
    texts = alone.encode(TEXTS)
    np.testing.assert_allclose(shared.exit_logits(texts), alone.exit_logits(texts), atol=1e-5)


def test_the_number_of_programs_is_bounded() -> None:
    """Per length at most four shapes, whatever the number of texts and the threshold."""
    bundle = ejax.load_bundle(tiny.trained()[0])
    clf = EarlyExitClassifier(bundle, shapes=SMALL, devices=ONE)
    run_pool.clear_cache()
    for count in range(1, 60, 3):
        clf(TEXTS[:1] * count, threshold=count / 60)
    assert run_pool._cache_size() == 2  # 1 and 32 rows


def test_a_stream_answers_like_a_call(clf: EarlyExitClassifier, monkeypatch) -> None:
    """However the texts fall into chunks, and without reading far ahead."""
    texts = [*TEXTS, "", TEXTS[0] * 40, *reversed(TEXTS)]
    whole = clf(texts, threshold=0.7)
    for size in (1, 2, 7, 100):
        monkeypatch.setattr("ejax.streaming.CHUNK_ROWS", size)
        answers = list(clf.stream(iter(texts), threshold=0.7))
        assert [row["label"] for row in answers] == [row["label"] for row in whole]
        np.testing.assert_allclose(
            [row["score"] for row in answers], [row["score"] for row in whole], atol=1e-5
        )
    assert list(clf.stream([])) == []
    assert len(next(clf.stream(texts, top_k=None))) == 2
    monkeypatch.setattr("ejax.streaming.CHUNK_ROWS", 4)
    read: list[str] = []
    endless = (read.append(TEXTS[i % 23]) or TEXTS[i % 23] for i in range(10**9))
    for count, _ in zip(range(40), clf.stream(endless), strict=False):
        assert len(read) <= count + 4 * 4


def test_a_stream_refuses_what_it_cannot_take(clf: EarlyExitClassifier, monkeypatch) -> None:
    for texts, options, message in (
        ("one text", {}, "texts must be many texts"),
        (["fine", None], {}, r"texts\[1\] must be a string"),
        (TEXTS, {"threshold": np.zeros((23, 2))}, "a stream has no number of texts"),
        (TEXTS, {"top_k": 0}, "top_k must be a positive number"),
    ):
        with pytest.raises(ValueError, match=message):
            next(clf.stream(texts, **options))
    monkeypatch.setattr("ejax.streaming.CHUNK_ROWS", 4)
    with pytest.raises(ValueError, match=r"texts\[9\] must be a string"):
        list(clf.stream([*TEXTS[:9], None]))


def test_after_a_warmup_nothing_compiles() -> None:
    """However the texts of a call share out among the lengths."""
    bundle = dataclasses.replace(ejax.load_bundle(tiny.trained()[0]), buckets=(8,), max_length=16)
    clf = EarlyExitClassifier(bundle, shapes=Shapes(tile_tokens=128), devices=ONE)
    run_pool.clear_cache()
    clf.warmup(rows=20)
    compiled = run_pool._cache_size()
    short, long = "great film", "the film was great and the music was poor and awful"
    assert sorted({shape.length for _, shape in clf.pools(clf.encode([short, long]).lengths)}) == [
        8, 16,
    ]  # fmt: skip
    for count in range(21):
        clf([short] * count + [long] * (20 - count), threshold=0.3)
    assert run_pool._cache_size() == compiled == 5  # of 8 tokens 1 and 32 rows


def test_a_warmup_for_many_devices_covers_one_text_too() -> None:
    """Which runs on one, in the same shape as one text on each."""
    bundle = dataclasses.replace(ejax.load_bundle(tiny.trained()[0]), buckets=(8,), max_length=8)
    clf = EarlyExitClassifier(bundle)
    assert len(clf.devices) == 8
    run_pool.clear_cache()
    clf.warmup(rows=8)
    compiled = run_pool._cache_size()
    clf("great film")
    assert run_pool._cache_size() == compiled > 0


def test_few_texts_of_a_length_run_one_by_one() -> None:
    """Rather than in a small tile filled up with padding; with a profile, as it measured."""
    bundle = ejax.load_bundle(tiny.trained()[0])
    clf = EarlyExitClassifier(bundle, devices=ONE)
    lengths = clf.encode(TEXTS).lengths
    assert [len(rows) for rows, _ in clf.pools(lengths[:4])] == [1] * 4
    assert [len(rows) for rows, _ in clf.pools(lengths[:5])] == [5]
    seconds = {(1, 16): Seconds(2.0, 1.0, 1.0), (8, 16): Seconds(5.0, 1.0, 1.0)}
    profile = Profile("here", "today", "float32", "float32", {16: 24}, seconds)
    measured = EarlyExitClassifier(bundle, shapes=Shapes(profile=profile), devices=ONE)
    assert [len(rows) for rows, _ in measured.pools(lengths[:3])] == [3]
    assert [shape.tile for _, shape in measured.pools(lengths)] == [24]
    np.testing.assert_allclose(clf.decide(TEXTS[:4]).score, clf.decide(TEXTS).score[:4], atol=1e-5)


def test_a_single_text_can_have_a_type_of_its_own(monkeypatch, tmp_path: Path) -> None:
    """What `ejax profile` found fastest is what is loaded, unless a dtype is asked for."""
    monkeypatch.setenv("EJAX_CACHE", str(tmp_path))
    folder = tiny.trained()[0]
    bundle = ejax.load_bundle(folder)
    seconds = {(1, 16): Seconds(1.0, 0.0, 0.0), (8, 16): Seconds(3.0, 0.0, 0.0)}
    profile = Profile("here", "today", "bfloat16", "float32", {16: 8}, seconds)
    save_profile(profile, profile_path(bundle.cfg))
    clf = EarlyExitClassifier.from_pretrained(folder)
    assert clf.bundle.cfg.dtype == "bfloat16"
    assert clf.shapes.profile == profile
    exact = EarlyExitClassifier.from_pretrained(folder, dtype="float32")
    assert exact.shapes.profile is None
    full = clf.full_logits(clf.encode(TEXTS[:1]))  # of the same type: what it is compared with
    np.testing.assert_allclose(full, exact.full_logits(exact.encode(TEXTS[:1])), atol=1e-5)
    alone, together = clf.decide(TEXTS[:1]), clf.decide(TEXTS)
    wanted = exact.decide(TEXTS)
    np.testing.assert_allclose(alone.score, wanted.score[:1], atol=1e-5)
    assert np.abs(together.logits - wanted.logits).max() > 1e-5
    np.testing.assert_allclose(together.score, wanted.score, atol=5e-3)
    other = dataclasses.replace(profile, dtype="float32", single_dtype="bfloat16")
    save_profile(other, profile_path(bundle.cfg))
    asked = EarlyExitClassifier.from_pretrained(folder, dtype="float32")
    assert asked.shapes.profile.tile == {16: 8}
    np.testing.assert_array_equal(asked.decide(TEXTS[:1]).logits, exact.decide(TEXTS[:1]).logits)


def test_a_promise_names_the_compute_type_it_is_for(monkeypatch, tmp_path: Path) -> None:
    folder = tiny.copy_of_bundle(tmp_path)
    bundle = ejax.load_bundle(folder)
    target = {"target": {"risk": 0.01, "delta": 0.05}, "dtype": "bfloat16"}
    ejax.save_bundle(
        dataclasses.replace(bundle, provenance=bundle.provenance | {"target": target}), folder
    )
    said = 'shown in bfloat16, and here it computes in float32: load it with dtype="bfloat16"'
    with pytest.warns(UserWarning, match=said):
        EarlyExitClassifier.from_pretrained(folder, dtype="float32")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EarlyExitClassifier.from_pretrained(folder, dtype="bfloat16")
        # A text alone keeps to it, where another type would be faster for that.
        cache = tmp_path / "cache"
        monkeypatch.setenv("EJAX_CACHE", str(cache))
        measured = Profile(
            "a machine", "2026-11-28", "bfloat16", "float32", tile={16: 8}, seconds={}
        )
        save_profile(measured, profile_path(bundle.cfg))
        clf = EarlyExitClassifier.from_pretrained(folder)
        assert clf.shapes.profile.tile == {16: 8}
        wanted = EarlyExitClassifier(clf.bundle, devices=ONE)  # without a profile: one type
        for classifier in (clf, clf.on_one_device()):
            alone = classifier.decide(TEXTS[:1]).logits
            np.testing.assert_array_equal(alone, wanted.decide(TEXTS[:1]).logits)
    # Another target ends the promise: what runs then is what is timed.
    timed, of_exits = [], targets.table_of
    monkeypatch.setattr(
        targets, "table_of", lambda clf, task: timed.append(clf) or of_exits(clf, task)
    )
    rows = labelled_rows(clf.bundle, str(tiny.file("test")))
    for asked in (Target(budget=0.9), Target(risk=0.5)):
        targets.choose(clf, rows, asked)
    alike = [
        (classifier.decide(TEXTS[:1]).logits == wanted.decide(TEXTS[:1]).logits).all()
        for classifier in timed
    ]
    assert alike == [False, True]


def test_logits_that_are_not_finite_are_named(monkeypatch) -> None:
    bundle = ejax.load_bundle(tiny.trained()[0])
    word = tiny.WORDS.index("music")
    bundle.variables["params"]["bert"]["embeddings"]["word"]["embedding"][word] = np.nan
    clf = EarlyExitClassifier(bundle, devices=ONE)
    texts = ["the film was great"] * 9
    assert len(clf(texts)) == 9
    texts[7] = "the music was great"
    with pytest.raises(ValueError, match="text 7 "):
        clf.exit_logits(clf.encode(texts))
    with pytest.raises(
        ValueError, match=r"text 7 \(counted from 0\) has logits that are not finite"
    ):
        clf(texts)
    monkeypatch.setattr("ejax.streaming.CHUNK_ROWS", 4)
    with pytest.raises(ValueError, match="text 7 "):
        list(clf.stream(texts))


TWISTED = ["the film was great and the plot awful", "great awful"]


def test_a_doubtful_text_gets_no_answer(clf: EarlyExitClassifier) -> None:
    texts = ["the film was great", TWISTED[1], "the plot was awful"]
    plain = clf(texts)
    abstaining = EarlyExitClassifier(dataclasses.replace(clf.bundle, abstain=0.75))
    answers = abstaining(texts)
    assert [row["label"] for row in answers] == ["good", None, "bad"]
    assert [row | {"label": None} for row in answers] == [row | {"label": None} for row in plain]
    assert abstaining(texts, abstain=0) == abstaining(texts, abstain=0.0) == plain
    assert {row["label"] for row in clf(texts, abstain=1.0)} == {None}
    assert list(abstaining.stream(texts)) == answers
    assert list(abstaining.stream(texts, abstain=0.0)) == plain
    # The likeliest stay to be seen.
    first, *both = abstaining(TWISTED[1:], top_k=None)[0]
    assert first == answers[1]
    assert both == abstaining(TWISTED[1:], top_k=None, abstain=0)[0]
    np.testing.assert_array_equal(abstaining.predict_proba(texts), clf.predict_proba(texts))
    for wrong in (lambda: clf(texts, abstain=2), lambda: next(clf.stream(texts, abstain=-1))):
        with pytest.raises(ValueError, match="abstain must be a number from 0"):
            wrong()


def test_texts_that_go_deeper_are_noticed(tmp_path: Path, monkeypatch) -> None:
    clf = EarlyExitClassifier.from_pretrained(tiny.careful(tmp_path))
    like = clf.drift(clf.decide(TEXTS))
    assert (like.depth, like.depth_then, like.sentence) == (1, 1, "")
    deep = clf.decide(TWISTED * 6)
    drift = clf.drift(deep)
    assert (drift.depth, drift.depth_then) == (3, 1)
    assert drift.sentence.startswith("These texts leave later than those the thresholds are for")
    assert drift.p_value < 1e-6
    assert clf.drift(np.repeat(deep.exit, 2)).p_value < drift.p_value
    monkeypatch.setattr("ejax.streaming.CHUNK_ROWS", 5)  # no chunk alone is enough
    with pytest.warns(UserWarning, match="These texts leave later than") as warned:
        list(clf.stream(TWISTED * 6))
    assert [warning.filename for warning in warned] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clf(TWISTED * 6)  # a single call says nothing
        list(clf.stream(TEXTS))
        list(clf.stream(TWISTED))  # too few to tell
        list(clf.stream(TWISTED * 6, threshold=0.8))  # not the bundle's own
        other = EarlyExitClassifier(dataclasses.replace(clf.bundle, thresholds=(0.8, 0.0)))
        list(other.stream(TWISTED * 6))
    with pytest.raises(ValueError, match="does not know how deep the texts went"):
        other.drift(deep)
    with pytest.raises(ValueError, match="at least one text"):
        clf.drift(clf.decide([]))


def test_empty_and_huge_texts(clf: EarlyExitClassifier) -> None:
    answers = clf(["", "the film was great " * 60_000])
    assert [row["label"] in ("good", "bad") for row in answers] == [True, True]


def test_what_is_not_a_text_is_named(clf: EarlyExitClassifier) -> None:
    with pytest.raises(ValueError, match=r"texts\[1\] must be a string"):
        clf(["fine", None])
    with pytest.raises(
        ValueError, match=r"a pair \(text, pair\), or a list of either. Got one dict"
    ):
        clf({"text": "fine", "text_pair": "poor"})
    with pytest.raises(ValueError, match="Got one NoneType"):
        clf(None)
    with pytest.raises(ValueError, match=r"a tuple is one pair. Got one tuple"):
        next(clf.stream(("fine", "poor")))


def test_texts_are_of_the_kind_trained_on(clf: EarlyExitClassifier) -> None:
    """Two texts in a tuple are no pair to a bundle of single texts."""
    pair = ("the film was great", "the plot is fine")
    for call in (clf, clf.predict_proba):
        with pytest.raises(ValueError, match=r"trained on one text a row \(text\).* tuple of 2 at"):
            call(pair)
        with pytest.raises(ValueError, match=r"Got a tuple of 2 at texts\[1\]"):
            call(["fine", pair])
    with pytest.raises(ValueError, match=r"Got a tuple of 2 at texts\[1\]"):
        list(clf.stream(["fine", pair]))

    def of(columns: list[str]) -> EarlyExitClassifier:
        provenance = clf.bundle.provenance | {"text_columns": columns, "config": {}}
        return EarlyExitClassifier(dataclasses.replace(clf.bundle, provenance=provenance))

    pairs = of(["premise", "hypothesis"])
    assert len(pairs(pair)) == 1
    with pytest.raises(ValueError, match=r"two texts a row .* Got a string at texts\[0\]"):
        pairs(["fine", "poor"])
    unknown = of([])
    assert (len(unknown(pair)), len(unknown(["fine", pair]))) == (1, 2)


def test_a_classifier_is_pickled_and_copied(clf: EarlyExitClassifier) -> None:
    other = EarlyExitClassifier(clf.bundle, shapes=SMALL, devices=ONE)
    for made in (pickle.loads(pickle.dumps(other)), copy.deepcopy(other)):
        assert made(TEXTS) == other(TEXTS)
        assert (made.shapes, made.devices) == (SMALL, other.devices)


@pytest.mark.slow
def test_a_spawned_worker_answers(clf: EarlyExitClassifier) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as workers:
        (answer,) = workers.submit(clf, "the film was great").result(timeout=300)
    assert answer["label"] == "good"


def test_a_forked_process_refuses_instead_of_hanging(clf: EarlyExitClassifier) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jax warns of the fork itself
        child = os.fork()
    if not child:
        code = 1
        try:
            clf.decide(TEXTS[:1])
        except ValueError as error:
            code = 0 if 'get_context("spawn")' in str(error) else 2
        finally:
            os._exit(code)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0


def test_float64_elsewhere_changes_no_answer(clf: EarlyExitClassifier) -> None:
    expected = clf(TEXTS), clf.full_logits(clf.encode(TEXTS))
    with jax.enable_x64(True):
        wide = EarlyExitClassifier.from_pretrained(tiny.trained()[0])
        assert wide(TEXTS) == expected[0]
        np.testing.assert_array_equal(wide.full_logits(wide.encode(TEXTS)), expected[1])


def test_thresholds_and_temperatures_are_traced(clf: EarlyExitClassifier) -> None:
    """Inside a caller's jit, where a new one is no new program."""
    batch = pad(clf.encode(TEXTS), np.arange(len(TEXTS)), 16)
    traces = []

    @jax.jit
    def run(variables, threshold, temperatures):
        traces.append(1)
        return ejax.early_exit(
            clf.model, variables, batch, threshold, temperatures=temperatures, tile=8
        )

    variables, temperatures = clf.bundle.variables, np.float32(clf.bundle.temperatures)
    for threshold in (0.0, 0.7, 2.0):
        expected = ejax.early_exit(
            clf.model, variables, batch, threshold, temperatures=temperatures, tile=8
        )
        traced = run(variables, threshold, temperatures)
        np.testing.assert_array_equal(traced.exit, expected.exit)
    assert len(traces) == 1
    with pytest.raises(ValueError, match=r"thresholds must have shape .* Got \(3,\)"):
        run(variables, np.zeros(3, np.float32), temperatures)
    with pytest.raises(ValueError, match=r"batch must be an ejax.Batch\(ids, mask\). Got ndarray"):
        ejax.early_exit(clf.model, variables, batch.ids, 0.5)


def test_a_profile_is_read_where_it_is_asked_for(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("EJAX_CACHE", str(tmp_path))
    folder = tiny.trained()[0]
    seconds = {(8, 16): Seconds(1.0, 0.1, 0.1)}
    # Dates of its own: what was said in this process is not said again.
    kept = Profile("here", "that day", "float32", "float32", {16: 8}, seconds)
    other = dataclasses.replace(kept, date="the day before", tile={16: 24})
    save_profile(kept, profile_path(tiny.load_bundle(folder).cfg))
    save_profile(other, tmp_path / "other.json")
    load = EarlyExitClassifier.from_pretrained
    with caplog.at_level("INFO", "ejax"):
        assert load(folder, profile=None).shapes.profile is None
        assert caplog.messages == []
        assert load(folder).shapes.profile == kept
        assert load(folder, profile=tmp_path / "other.json").shapes.profile == other
        load(folder)  # which is said already
    assert [said.partition(" tiles")[0] for said in caplog.messages] == [
        "by the profile of that day",
        "by the profile of the day before",
    ]
    with pytest.raises(ValueError, match=r"No such profile: .*none\.json"):
        load(folder, profile=tmp_path / "none.json")


def test_save_pretrained(clf: EarlyExitClassifier, tmp_path: Path) -> None:
    again = EarlyExitClassifier.from_pretrained(clf.save_pretrained(tmp_path / "copy"))
    assert again(TEXTS) == clf(TEXTS)
