"""The linear rivals: what they read, what they are fitted to, what is said of them."""

from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from ejax import rivals
from ejax.bundle import load_bundle
from ejax.config import DataConfig
from ejax.data.sources import load, row_hash
from ejax.data.tokenizer import load_tokenizer
from ejax.evaluation.labelled import labelled_rows
from ejax.models.bert import Batch, BertModel
from ejax.models.weights import load_bert
from ejax.rivals import (
    FROZEN,
    TFIDF,
    below_rival,
    enough,
    fit_rivals,
    fit_tfidf,
    mean_vectors,
    regression,
    terms,
    vectors_of_texts,
)  # fmt: skip
from ejax.tasks import Regression, SeveralLabels, Task

TREC = Path(__file__).parents[2] / "shared" / "data" / "trec6"


@pytest.fixture(scope="module")
def bundle():
    return load_bundle(tiny.trained()[0])


@pytest.fixture(scope="module")
def train(bundle):
    return list(labelled_rows(bundle, str(tiny.file("train")), "train"))


@pytest.fixture(scope="module")
def test(bundle):
    return list(labelled_rows(bundle, str(tiny.file("test"))))


# What TF-IDF reads


def test_the_same_word_in_either_text_of_a_pair_is_two_features():
    ours = terms(("Good film", "good"))
    assert ours == ["", "good", "film", "good film", "\tgood"]


def test_words_of_any_script_are_words_whatever_their_case_and_width():
    assert terms("Ｇreat  ÉTÉ, 좋은 \ud800 영화") == [
        "", "great", "été", "좋은", "영화", "great été", "été 좋은", "좋은 영화",
    ]  # fmt: skip


def test_a_pair_whose_order_decides_is_learned():
    """Only marked features can tell the two labels apart."""
    texts = [("good", "bad"), ("bad", "good")] * 6
    rival = fit_tfidf(texts, np.array([0, 1] * 6), Task(2))
    assert rival.scores(texts).argmax(axis=1).tolist() == [0, 1] * 6


def test_texts_without_words_are_fitted_too():
    rival = fit_tfidf(["", "?!"] * 3, np.array([0, 0, 1, 0, 0, 0]), Task(2))
    assert rival.scores(["new", ""]).argmax(axis=1).tolist() == [0, 0]


def test_a_label_without_rows_is_never_answered():
    rival = fit_tfidf(["a b", "c d"] * 4, np.array([0, 2] * 4), Task(4))
    scores = rival.scores(["a b", "c d"])
    assert scores.argmax(axis=1).tolist() == [0, 2]
    assert np.isneginf(scores[:, [1, 3]]).all()


# What the other one reads


def test_frozen_vectors_are_the_mean_of_the_last_layer():
    """Of each row's real tokens, however many others there are: alone, eight, and all."""
    cfg, bert = load_bert(tiny.model(), dtype="float32")
    texts = [text for _, text in tiny.rows(21, seed=9)]
    encoded = load_tokenizer(tiny.model()).encode(texts, 16)
    vectors = mean_vectors(cfg, bert, 16, (4, 8))
    forward = jax.jit(BertModel(cfg).apply)
    expected = []
    for i in range(21):
        ids = encoded.ids[encoded.offsets[i] : encoded.offsets[i + 1]]
        hidden = forward({"params": bert}, Batch([ids.tolist()]))
        expected.append(np.asarray(hidden)[0].mean(axis=0))
    np.testing.assert_allclose(vectors(encoded), expected, atol=1e-5)
    for rows in ([3], list(range(7))):
        few = vectors(encoded.subset(np.array(rows)))
        np.testing.assert_allclose(few, np.array(expected)[rows], atol=1e-5)


def test_of_pairs_both_texts_are_read_apart():
    """Whether two texts are the same, no vector of each text alone can tell."""
    texts = [text for _, text in tiny.rows(24, seed=9)]
    pairs = [(text, text) for text in texts] + list(zip(texts, texts[1:] + texts[:1], strict=True))
    same = np.arange(48) < 24
    tokenizer = load_tokenizer(tiny.model())
    mean = mean_vectors(*load_bert(tiny.model(), dtype="float32"), 32, (32,))
    vectors = vectors_of_texts(mean, tokenizer, pairs=True)(tokenizer.encode(pairs, 32))
    d = tiny.CFG.hidden_size
    assert vectors.shape == (48, 4 * d)
    u, v, apart, both = np.split(vectors, 4, axis=1)
    np.testing.assert_allclose(u, mean(tokenizer.encode([a for a, _ in pairs], 32)), atol=1e-6)
    np.testing.assert_allclose(apart, abs(u - v))
    np.testing.assert_allclose(both, u * v)
    # The sum of differences is 0 of equal texts alone.
    assert (apart.sum(axis=1) < 1e-5).tolist() == [a == b for a, b in pairs]
    model, _ = regression(vectors, same, (1.0,))
    assert model.score(vectors, same) > 0.9


def test_c_is_what_is_right_most_often_on_dev_rows():
    rng = np.random.default_rng(0)
    labels = np.tile([0, 1], 100)
    x = labels[:, None] + rng.normal(size=(200, 3))
    assert regression(x, labels, (1e-9, 1.0), dev=(x, labels))[1] == 1.0
    # To false labels nothing is as good an answer as the commonest label, whatever the row.
    more, common = np.concatenate([x, x[1:6:2]]), np.append(labels, [1, 1, 1])
    assert regression(more, common, (1e-9, 1.0), dev=(x, 1 - labels))[1] == 1e-9


# The two together


def test_both_are_right_on_rows_that_one_word_decides(bundle, train, test):
    reported = {row_hash(row) for row in test}
    fitted, notes = fit_rivals(bundle, train, reported, encoder=str(tiny.model()))
    assert [one.name for one in fitted] == [TFIDF, FROZEN]
    assert notes == []
    labels = np.array([row.label for row in test])
    clean = np.arange(30) % 7 != 6  # every seventh label of test is wrong
    for one in fitted:
        answers = one.scores([row.inputs for row in test]).argmax(axis=1)
        least = {TFIDF: 0.95, FROZEN: 0.7}[one.name]  # this encoder is a random one
        assert (answers == labels)[clean].mean() > least, one.name
        assert one.fitted_rows == 96
        assert one.fit_seconds > 0
    assert fitted[1].facts()["layers"] == 3


def test_at_most_so_many_rows_are_fitted_and_it_is_said(bundle, train, monkeypatch):
    monkeypatch.setattr(rivals, "MOST_ROWS", 40)
    fitted, notes = fit_rivals(bundle, train, set(), encoder=str(tiny.model()))
    assert [one.fitted_rows for one in fitted] == [40, 40]
    assert "The rivals are fitted to 40 of 96 rows, drawn." in notes


def test_rows_that_are_reported_on_are_not_fitted(bundle, train):
    reported = {row_hash(row) for row in train[:10]}
    fitted, notes = fit_rivals(bundle, train, reported, encoder=str(tiny.model()))
    assert fitted[0].fitted_rows == sum(row_hash(row) not in reported for row in train) < 96
    assert "training rows are also reported on" in notes[0]
    with pytest.raises(ValueError, match=r"that are not reported on. Got 0 rows"):
        fit_rivals(bundle, train, {row_hash(row) for row in train})
    one_label = [row for row in train if row.label == 0]
    with pytest.raises(ValueError, match="two labels or more"):
        fit_rivals(bundle, one_label, set())


def test_an_encoder_that_cannot_be_loaded_is_left_out_unless_it_was_named(bundle, train):
    """The bundle keeps no more of a folder's path than its last two names."""
    fitted, notes = fit_rivals(bundle, train, set())
    assert [one.name for one in fitted] == [TFIDF]
    assert notes[0].startswith(f"Left out: {FROZEN} (")
    assert "--encoder names one" in notes[0]
    with pytest.raises(ValueError, match="'no-such-encoder' is neither a folder"):
        fit_rivals(bundle, train, set(), encoder="no-such-encoder")


# What is said


def right(count, of=200):
    return np.arange(of) < count


def test_a_linear_model_is_enough_where_it_is_no_worse():
    said = enough(right(180), {TFIDF: right(186), FROZEN: right(190)})
    assert said == (
        "TF-IDF with logistic regression is right on 0.930 of these rows, full depth on 0.900: a "
        "linear model is enough here."
    )
    assert "may be enough" in enough(right(180), {TFIDF: right(179)})
    said = enough(right(180), {TFIDF: right(120), FROZEN: right(180)})
    assert said.startswith("The frozen encoder with logistic regression is right on 0.900")
    assert enough(right(180), {TFIDF: right(120), FROZEN: right(150)}) == ""


def test_training_below_the_frozen_encoder_is_told(train, test):
    cfg, bert = load_bert(tiny.model(), dtype="float32")
    tokenizer = load_tokenizer(tiny.model())

    def tokens(rows):
        return tokenizer.encode([row.inputs for row in rows], 16)

    labels, truth = (np.array([row.label for row in rows]) for rows in (train, test))

    two = Task(2)

    def said(answers, labels=labels, truth=truth, task=two):
        return below_rival(
            tokens(train), labels, tokens(test), truth, answers, task,
            cfg=cfg, bert=bert, tokenizer=tokenizer, pairs=False, max_length=16,
        )  # fmt: skip

    warning = said(np.where(np.arange(30) < 8, truth, 1 - truth))
    assert warning.startswith("accuracy of full depth is 0.267 on 30 held-out rows, and of logist")
    assert said(truth) == ""
    assert said(1 - truth, labels=np.zeros_like(labels)) == ""  # one label

    sets = np.eye(2)[labels], np.eye(2)[truth]
    warning = said(sets[1][:, ::-1] > 0, *sets, SeveralLabels(2))
    assert warning.startswith("micro-F1 of full depth is 0.000 on 30 held-out rows, and of logist")
    assert said(sets[1] > 0, *sets, SeveralLabels(2)) == ""

    numbers = labels.astype(np.float32), truth.astype(np.float32)
    warning = said(-numbers[1], *numbers, Regression(1))
    assert warning.startswith("Spearman's correlation of full depth is -1.000 on 30 held-out rows,")
    assert "and of ridge regression on the frozen encoder" in warning
    assert said(numbers[1], *numbers, Regression(1)) == ""


@pytest.mark.skipif(not TREC.exists(), reason=f"no {TREC}")
def test_tf_idf_on_real_questions():
    """0.876 of dev at this C, on all training rows."""

    splits = load(DataConfig(path=str(TREC)), splits=("train", "dev"))
    train, dev = (list(splits[name]) for name in ("train", "dev"))
    rival = fit_tfidf([row.text for row in train], np.array([row.label for row in train]), Task(6))
    answers = rival.scores([row.text for row in dev]).argmax(axis=1)
    assert (answers == [row.label for row in dev]).mean() > 0.86
