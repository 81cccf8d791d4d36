"""Exit 0: the hash, its two forms, what is learnt and what is left out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from reference import gram_buckets, model_logits, random_batch, random_variables
from scipy.sparse import csr_array
from sklearn.linear_model import LogisticRegression

from ejax.bundle import load_bundle
from ejax.calibration.placement import check_count, place
from ejax.classifier import EarlyExitClassifier
from ejax.config import BertConfig, ExitConfig
from ejax.data.batches import pad
from ejax.data.rows import encode
from ejax.data.sources import Example
from ejax.data.tokenizer import Encoded
from ejax.errors import UserError
from ejax.evaluation.place import keep
from ejax.evaluation.targets import table_of
from ejax.inference import engine
from ejax.inference.engine import early_exit, full_depth
from ejax.inference.policy import select_exit
from ejax.inference.pool import run_pool
from ejax.models.bert import Batch
from ejax.models.early_exit import EarlyExitBert
from ejax.models.ngrams import hashed, packed_table, ragged_grams, ragged_logits, unpacked_table
from ejax.saving import save_bundle
from ejax.training import ngrams
from ejax.training.ngrams import fit_ngrams

CFG = BertConfig(
    vocab_size=41, hidden_size=12, num_hidden_layers=3, num_attention_heads=3,
    intermediate_size=23, max_position_embeddings=17, dtype="float32",
)  # fmt: skip
# Any implementation must give these: ids, those that follow and types; the buckets of 2^18.
GOLDEN = (
    [0, 101, 7592, 30521, 250036, 2147483647],
    [101, 7592, 102, 5, 250036, 2147483647],
    [0, 0, 0, 1, 1, 1],
    [0, 197333, 59688, 207316, 10975, 20666],
    [239128, 147916, 212341, 97292, 107346, 167348],
)


def flat(rows, types=None):
    """Rows of ids as `Encoded`."""
    types = types or [[0] * len(row) for row in rows]
    return Encoded(
        np.concatenate(rows).astype(np.int32),
        np.concatenate(types).astype(np.int8),
        np.concatenate([[0], np.cumsum([len(row) for row in rows])]),
    )


def logits_of(params, encoded):
    return ragged_logits(params, encoded.ids, encoded.types, encoded.offsets)


@pytest.mark.parametrize("library", [np, jnp])
def test_the_hash_is_the_same_everywhere(library) -> None:
    ids, following, types = (library.asarray(row, dtype=np.int32) for row in GOLDEN[:3])
    one, two = hashed(ids, following, types, 1 << 18)
    assert (np.asarray(one).tolist(), np.asarray(two).tolist()) == (GOLDEN[3], GOLDEN[4])
    for i, follows, kind, token, pair in zip(*GOLDEN, strict=True):
        single = gram_buckets([i], [kind], 1 << 18)
        assert single == [token]
        assert gram_buckets([i, follows], [kind, kind], 1 << 18)[-1] == pair


def test_single_tokens_of_a_large_vocabulary_share_no_bucket() -> None:
    ids = np.arange(250_037, dtype=np.int32)
    one, two = hashed(ids, ids, np.zeros_like(ids), 1 << 18)
    assert len(set(one.tolist())) == len(ids)
    assert len(set(two.tolist())) > len(ids) / 2  # and pairs are spread


@pytest.mark.parametrize(("labels", "buckets"), [(3, 64), (35, 128)])
def test_ragged_rows_are_the_padded_module_is_the_plain_sum(labels, buckets) -> None:
    exits = ExitConfig((0, 2, 3), labels, buckets=buckets)
    variables = random_variables(CFG, exits, 0)
    ids, mask, types = random_batch(CFG, 13, 9, 1)
    found = np.asarray(EarlyExitBert(CFG, exits).apply(variables, Batch(ids, mask, types)))
    wanted = model_logits(variables, CFG, exits, ids, mask, types)
    assert found.shape == (3, 13, labels)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    lengths = mask.sum(axis=1)
    rows = flat(
        [row[:n] for row, n in zip(ids, lengths, strict=True)],
        [row[:n] for row, n in zip(types, lengths, strict=True)],
    )
    ragged = logits_of(variables["params"]["ngrams"], rows)
    # float32 sums of at most 17 rows, in another order
    np.testing.assert_allclose(ragged, found[0], rtol=0, atol=2e-6 * (1 + np.abs(wanted[0]).max()))
    alone = logits_of(variables["params"]["ngrams"], rows.subset(np.array([5])))
    np.testing.assert_allclose(alone[0], ragged[5], rtol=0, atol=1e-6 * (1 + np.abs(ragged).max()))


def test_a_pair_does_not_reach_into_another_text() -> None:
    grams = ragged_grams(*dataclasses.astuple(flat([[7, 8], [9]]))[:3], 64)
    assert grams.sum(axis=1).tolist() == [3, 1]
    of_pair = flat([[7, 8]], [[0, 1]])
    assert ragged_grams(of_pair.ids, of_pair.types, of_pair.offsets, 64).sum() == 2
    second = flat([[8]], [[1]])
    marked = ragged_grams(second.ids, second.types, second.offsets, 64).indices
    assert (
        marked.tolist() != ragged_grams(*dataclasses.astuple(flat([[8]]))[:3], 64).indices.tolist()
    )


def corpus(rows: int, labels: int, seed: int = 0):
    """Rows of 3 to 9 tokens, of which two tell the class nine times in ten."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(labels, size=rows)
    texts = []
    for label in truth:
        told = label if rng.random() < 0.9 else rng.integers(labels)
        noise = rng.integers(1000, 1400, rng.integers(1, 8))
        texts.append([101, 2 * told + 1, *noise.tolist(), 2 * told + 2, 102])
    return flat(texts), truth


def test_it_is_the_logistic_regression_of_its_features() -> None:
    encoded, labels = corpus(400, 3)
    exits = ExitConfig((0, 1), 3, buckets=4096)
    params = fit_ngrams(encoded, np.eye(exits.num_labels)[labels], exits)
    counts: csr_array = ragged_grams(encoded.ids, encoded.types, encoded.offsets, 4096)
    counts.sum_duplicates()
    rows_with = (counts > 0).sum(axis=0)
    weight = np.where(rows_with >= 3, np.log(400 / np.maximum(rows_with, 1)), 0)
    dense = counts.toarray()
    x = dense * weight / np.sqrt(dense @ weight**2)[:, None]
    model = LogisticRegression(C=1 / ngrams.PENALTY, tol=1e-8, max_iter=5000).fit(x, labels)
    mine = logits_of(params, encoded)
    ours, theirs = (z - z.mean(axis=1, keepdims=True) for z in (mine, model.decision_function(x)))
    # Both stop near the one minimum of a convex function: their probabilities within 1 in 100.
    np.testing.assert_allclose(jax.nn.softmax(ours), jax.nn.softmax(theirs), rtol=0, atol=0.01)


def test_many_classes_share_a_low_rank() -> None:
    encoded, labels = corpus(3000, 40)
    exits = ExitConfig((0, 1), 40, buckets=1 << 13)
    params = fit_ngrams(encoded, np.eye(exits.num_labels)[labels], exits)
    assert params["table"].shape == (1 << 13, 33)
    fresh, truth = corpus(500, 40, seed=1)
    assert (logits_of(params, fresh).argmax(axis=1) == truth).mean() > 0.85  # at most 0.9


def test_the_table_does_not_hold_what_few_rows_hold() -> None:
    rows = [[101, 5, 6, 102]] * 2 + [[101, 7, 8, 102]] * 3 + [[101, 9, 102]] * 4
    params = fit_ngrams(flat(rows), np.eye(2)[[0, 1, 0, 1, 0, 1, 0, 1, 1]], ExitConfig((0, 1), 2))
    one, two = hashed(*(np.array(x, np.int32) for x in ([5, 7], [6, 8], [0, 0])), 1 << 18)
    held = params["table"].any(axis=1)
    assert held[one].tolist() == held[two].tolist() == [False, True]
    assert held.sum() == 3 + 3 + 2  # tokens, pairs around 7 and 8, and around 9; not 101 and 102
    unseen = logits_of(params, flat([[5, 6]]))
    np.testing.assert_array_equal(unseen[0], params["bias"])


def test_what_is_saved_is_what_is_not_zero() -> None:
    exits = ExitConfig((0, 1), 3, buckets=64)
    params = random_variables(CFG, exits, 0)["params"]["ngrams"]
    params["table"][5:] = 0
    saved = packed_table(params)
    assert saved["table"].shape == (5, 4)
    jax.tree.map(np.testing.assert_array_equal, unpacked_table(saved, exits), params)
    for name in ("table", "bias", "known"):
        rest = {key: value for key, value in saved.items() if key != name}
        with pytest.raises(ValueError, match=r"ngrams.* is missing, not finite, or of"):
            unpacked_table(rest, exits)


@pytest.fixture(scope="module")
def bundle():
    """The tiny trained one, with an exit 0 on its rows before its exits."""
    trained = load_bundle(tiny.trained()[0])
    rows = tiny.rows(96, 0)
    exits = dataclasses.replace(trained.exits, layers=(0, *trained.exits.layers))
    encoded = trained.tokenizer.encode([text for _, text in rows], 16)
    labels = np.array([trained.labels.index(label) for label, _ in rows])
    grams = fit_ngrams(encoded, np.eye(exits.num_labels)[labels], exits)
    grams["evidence"] = np.array([0.6, 0.3], np.float32)
    params = trained.variables["params"] | {"ngrams": grams}
    return dataclasses.replace(
        trained, exits=exits, variables={"params": params}, thresholds=(0.9, 0.8, 0.0),
        temperatures=(0.7, *trained.temperatures),
        provenance=trained.provenance | {"metrics": {}, "operating_points": {}},
    )  # fmt: skip


TEXTS = [text for _, text in tiny.rows(31, seed=9)] + ["music and music and", ""]


def test_a_classifier_answers_as_all_exits_say(bundle) -> None:
    clf = EarlyExitClassifier(bundle)
    encoded = clf.encode(TEXTS)
    logits = clf.exit_logits(encoded)
    per_row = np.random.default_rng(0).uniform(0.4, 1.1, (len(TEXTS), 3))
    for threshold in (None, 0.0, 0.7, 2.0, per_row):
        found = clf.decide_encoded(encoded, threshold=threshold)
        levels = bundle.thresholds if threshold is None else threshold
        wanted = select_exit(logits, levels, bundle.temperatures)
        assert found.exit.tolist() == np.asarray(wanted.exit).tolist()
        np.testing.assert_allclose(found.logits, wanted.logits, rtol=0, atol=1e-5)
        np.testing.assert_allclose(found.score, wanted.score, rtol=0, atol=1e-5)
    assert set(clf.decide(TEXTS).exit.tolist()) == {0, 1, 2}
    answers = clf(TEXTS)
    assert {answer["exit_layer"] for answer in answers} == {0, 1, 3}
    assert list(clf.stream(TEXTS)) == answers
    assert clf([]) == []
    assert clf(TEXTS[3]) == [answers[3]]


def test_later_exits_add_what_it_says(bundle) -> None:
    clf, heads = EarlyExitClassifier(bundle), EarlyExitClassifier(bundle.without_zero)
    encoded = clf.encode(TEXTS)
    logits, alone = clf.exit_logits(encoded), heads.exit_logits(encoded)
    wanted = alone + np.array([0.6, 0.3])[:, None, None] * logits[:1]
    # float32, and tiles of other sizes
    np.testing.assert_allclose(logits[1:], wanted, rtol=0, atol=1e-5)
    np.testing.assert_allclose(clf.full_logits(encoded), wanted[-1], rtol=0, atol=1e-5)
    batch = pad(encoded, np.arange(len(TEXTS)), 16)
    full = full_depth(bundle.model, bundle.variables, batch, tile=8)
    np.testing.assert_allclose(full, wanted[-1], rtol=0, atol=1e-5)
    one = clf.decide([TEXTS[3]], threshold=2.0)
    np.testing.assert_allclose(one.logits[0], wanted[-1, 3], rtol=0, atol=1e-5)


def test_a_warm_classifier_compiles_nothing_more(bundle) -> None:
    clf = EarlyExitClassifier(bundle)
    run_pool.clear_cache()
    clf.warmup(rows=len(TEXTS))
    compiled = run_pool._cache_size()
    clf(TEXTS, threshold=2.0)
    clf(TEXTS[:1], threshold=2.0)
    assert run_pool._cache_size() == compiled > 0


def test_exit_0_stays_where_later_exits_read_it(bundle) -> None:
    placed = keep(bundle, [0, 2], [0.9, 0.0])
    clf, whole = EarlyExitClassifier(placed), EarlyExitClassifier(bundle)
    logits = whole.exit_logits(whole.encode(TEXTS))
    # float32, and tiles of other sizes
    np.testing.assert_allclose(clf.exit_logits(clf.encode(TEXTS)), logits[[0, 2]], atol=1e-5)
    with pytest.raises(UserError, match=r"between 2 and 3, .*exit 0 stays.* Got 1"):
        check_count(1, 3, bundle.adds_evidence)
    table = table_of(whole, encode([Example(text, None, 0) for text in TEXTS], bundle.encode))
    costs = np.ones(len(TEXTS)), np.zeros(len(TEXTS))
    assert all(0 in one.exits for one in place(table, 3, *costs, with_first=True, max_drop=50))


def test_the_compiled_program_answers_as_the_classifier_on_texts_that_fit(bundle) -> None:
    clf = EarlyExitClassifier(bundle)
    encoded = clf.encode(TEXTS)
    batch = pad(encoded, np.arange(len(TEXTS)), 16)
    found = early_exit(
        bundle.model, bundle.variables, batch, bundle.thresholds,
        temperatures=bundle.temperatures,
    )  # fmt: skip
    wanted = clf.decide_encoded(encoded)
    assert np.asarray(found.exit).tolist() == wanted.exit.tolist()
    np.testing.assert_allclose(found.score, wanted.score, rtol=0, atol=1e-5)


def test_exit_0_reads_what_the_encoder_does_not(bundle) -> None:
    """A word behind the 16 tokens of the encoder; under jit there is no such word."""
    clf = EarlyExitClassifier(bundle)
    texts = ["the plot " * 10 + word for word in ("great fine great", "awful poor awful")]
    encoded = clf.encode(texts)
    assert encoded.lengths.tolist() == [16, 16]
    assert encoded.whole_lengths.tolist() == [25, 25]
    at_zero = [answer["label"] for answer in clf(texts, threshold=0)]
    assert at_zero == ["good", "bad"]
    heads = EarlyExitClassifier(bundle.without_zero)
    assert len({str(answer) for answer in heads(texts)}) == 1
    assert len({str(answer) for answer in clf(texts, threshold=2)}) == 2  # it tells later exits
    cut = pad(encoded, np.arange(2), 16)
    logits = np.asarray(bundle.model.apply(bundle.variables, cut))[0]
    np.testing.assert_array_equal(logits[0], logits[1])


def test_what_leaves_at_exit_0_is_in_no_pool(bundle, monkeypatch) -> None:
    clf = EarlyExitClassifier(bundle)
    seen = []
    run = engine.early_exit
    monkeypatch.setattr(
        engine, "early_exit", lambda *a, **k: (seen.append(k["rows"]), run(*a, **k))[1]
    )
    found = clf.decide(TEXTS)
    assert 0 < sum(seen) == (found.exit > 0).sum() < len(TEXTS)
    seen.clear()
    clf.decide(TEXTS, threshold=0)
    assert seen == []


def test_a_bundle_keeps_it(bundle, tmp_path) -> None:
    again = load_bundle(save_bundle(bundle, tmp_path / "bundle"))
    assert again.exits == bundle.exits
    ours, theirs = (b.variables["params"]["ngrams"] for b in (bundle, again))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert EarlyExitClassifier(again)(TEXTS) == EarlyExitClassifier(bundle)(TEXTS)
    assert (tmp_path / "bundle" / "README.md").read_text().count("before the first layer") == 1


def test_training_keeps_it_where_it_saves_layers(tmp_path) -> None:
    """By default; the words of the tiny set tell the class, so it does."""
    arguments = [
        item for item in tiny.train_args(tmp_path / "b") if item not in ("--layers", "1,3")
    ]
    result = tiny.ejax(*arguments)
    assert result.code == 0, result.err
    assert "exit 0, on n-grams, is kept" in result.err.replace("\n", " ")
    made = load_bundle(tmp_path / "b")
    assert made.exits.layers == (0, 1, 2, 3)
    assert made.provenance["operating_points"]["dev_b"]["exit_share"][0] > 0.3
    again = tiny.ejax(*arguments)  # a finished run, made anew from its workdir
    assert again.code == 0, again.err
    jax.tree.map(
        np.testing.assert_array_equal, load_bundle(tmp_path / "b").variables, made.variables
    )
