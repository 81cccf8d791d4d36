"""The loud words about data and results: when they come, and what they say."""

import itertools

import numpy as np
import pytest
import tiny
import vocabularies

from ejax.data.sources import Example
from ejax.data.tokenizer import Tokenizer, load_tokenizer
from ejax.tasks import Regression, SeveralLabels, Task
from ejax.training.checks import (
    no_better_than_chance,
    still_rising,
    unknown_share,
    unknown_words,
    warn,
)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "film", "##s", "##ed", "good", ".")
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return load_tokenizer(folder)


def examples(*texts: str | tuple[str, str]) -> list[Example]:
    return [Example(*((text, None) if isinstance(text, str) else text), 0) for text in texts]


def test_the_share_is_of_words_not_of_pieces_nor_of_rows(pieces):
    """Films, filmed, good, the dot and бar: one of five; 7 pieces, and [CLS] and [SEP]."""
    encoded = pieces.encode(["films filmed", "good .", "бar"], 16)
    assert unknown_share(pieces, encoded) == 1 / 5
    assert unknown_share(pieces, pieces.encode([], 16)) == 0
    assert unknown_share(pieces, pieces.encode(["", ""], 16)) == 0


@pytest.mark.parametrize(("known", "warned"), [(33, False), (32, False), (31, True)])
def test_unknown_words_are_warned_of_above_three_percent(pieces, known, warned):
    rows = examples(*["good"] * known, "좋아 film")  # 1 of known + 2 words: 2.9, 2.9, 3.03 %
    sentence = unknown_words(pieces, pieces.encode([row.inputs for row in rows], 16), rows)
    assert bool(sentence) == warned
    if warned:
        assert sentence == (
            "3 % of the words of train, such as '좋아', become [UNK]: the encoder's vocabulary "
            "does not fit the language of the data; choose another model."
        )


def test_the_example_may_stand_in_the_second_text(pieces):
    rows = examples(("good film", "films"), ("film", "good 영화"))
    sentence = unknown_words(pieces, pieces.encode([row.inputs for row in rows], 16), rows)
    assert "17 % of the words of train, such as '영화'" in sentence
    rows = examples("영" * 90)  # as where a language sets no spaces
    sentence = unknown_words(pieces, pieces.encode([rows[0].text], 16), rows)
    assert f"such as '{'영' * 30}…', become" in sentence


@pytest.mark.parametrize("byte_fallback", [False, True])
def test_unknown_to_other_tokenizers(byte_fallback):
    """Good and film are known, 만세 is one <unk>, or six bytes of two characters."""
    tokenizer = Tokenizer(vocabularies.unigram(byte_fallback=byte_fallback))
    rows = examples("good film", "film 만세")
    encoded = tokenizer.encode([row.inputs for row in rows], 32)
    share = 2 / 5 if byte_fallback else 1 / 4
    assert unknown_share(tokenizer, encoded) == share
    token = "<0xEB>" if byte_fallback else "<unk>"
    assert f"such as '만세', become {token}:" in unknown_words(tokenizer, encoded, rows)
    spelt = Tokenizer(vocabularies.byte_bpe())
    assert unknown_share(spelt, spelt.encode(["만세"], 32)) == 0


@pytest.mark.filterwarnings("always:.*words of train", "ignore:exit .*:UserWarning")
def test_train_warns_of_another_language(tmp_path):
    labelled = [(label, f"{text} 영화") for label, text in tiny.rows(40, seed=3)]
    train = tiny.write_tsv(tmp_path / "train.tsv", labelled)
    ask = ("train", "--model", tiny.model(), "--train", train, "--output", tmp_path / "bundle")
    done = tiny.ejax(*ask, "--layers", "1,3", *tiny.FIELDS, "epochs=1")
    assert "of the words of train, such as '영화', become [UNK]" in done.err


@pytest.mark.parametrize(
    ("history", "rows", "rising"),
    [
        ([0.7, 0.8], 100, True),  # 0.1 is more than sqrt(0.8 * 0.2 / 100) = 0.04
        ([0.77, 0.8], 100, False),
        ([0.77, 0.8], 1000, True),  # with 1,000 rows 0.03 is more than 0.0126
        ([0.8, 0.9, 0.8], 1000, False),
        ([0.95, 0.7, 0.9], 1000, False),  # it rises, and is not the best
        ([0.8], 1000, False),
        ([], 1000, False),
        ([0.9, 1.0], 10, True),
    ],
)
def test_still_rising(history, rows, rising):
    sentence = still_rising(history, rows, Task(2))
    assert bool(sentence) == rising
    if (len(history), rows) == (2, 100) and rising:
        assert sentence == (
            "dev-A accuracy was still rising at the last evaluation, from 0.700 to 0.800, and the "
            "standard error is 0.040: train longer (--epochs)."
        )


@pytest.mark.parametrize(
    ("task", "value", "rows", "error"),
    [
        (SeveralLabels(3), 0.8, 100, 0.04),  # as of accuracy
        (Regression(1), 0.8, 103, 0.36 * 1.32**0.5 / 10),  # (1 - r^2) sqrt((1 + r^2 / 2) / (N - 3))
    ],
)
def test_still_rising_is_said_in_the_tasks_metric(task, value, rows, error):
    assert still_rising([value - 0.99 * error, value], rows, task) == ""
    sentence = still_rising([value - 1.01 * error, value], rows, task)
    assert sentence.startswith(f"dev-A {task.metric_name} was still rising at the last")
    assert f"the standard error is {error:.3f}: train longer" in sentence


# The same answer for each row: the commonest label; both of the two commonest labels, which has 5
# of 5 + 1 + 2 right (2 * 5 / (6 + 8)); any number, which orders nothing.
SETS = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 1]], float)


@pytest.mark.parametrize(
    ("task", "labels", "chance"),
    [
        (Task(3), np.array([0, 1, 1, 2]), 0.5),
        (SeveralLabels(3), SETS, 10 / 14),
        (SeveralLabels(3), np.zeros((4, 3)), 1.0),
        (Regression(1), np.array([0.5, 2.0, 3.0, 7.0]), 0.0),
    ],
)
def test_exits_at_chance_are_named(task, labels, chance):
    if chance < 1:
        assert no_better_than_chance((1, 3), (chance + 1e-6, 1.0), labels, task) == ""
    sentence = no_better_than_chance((0, 2, 3), (chance, 1.1, chance - 0.2), labels, task)
    assert sentence.startswith(f"{task.metric_name} of every exit must be above that of one answer")
    assert (
        f"({chance:.3f}). Got layer 0: {chance:.3f}; layer 3: {chance - 0.2:.3f}: train longer"
        in sentence
    )
    # No answer that is the same for all rows does better.
    if task.answer_ndim == 2:
        every = [np.tile(answer, (4, 1)) for answer in itertools.product([False, True], repeat=3)]
        assert chance == max(task.measure(answer, labels) for answer in every)


def test_nothing_is_said_where_all_is_well(recwarn):
    warn("")
    assert not recwarn
    with pytest.warns(UserWarning, match="look here"):
        warn("look here")
