"""The loud words about data and results: when they come, and what they say."""

import numpy as np
import pytest
import tiny
import vocabularies

from ejax.data.sources import Example
from ejax.data.tokenizer import Tokenizer, load_tokenizer
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
    sentence = still_rising(history, rows)
    assert bool(sentence) == rising
    if (len(history), rows) == (2, 100) and rising:
        assert sentence == (
            "dev-A accuracy was still rising at the last evaluation, from 0.700 to 0.800, and the "
            "standard error is 0.040: train longer (--epochs)."
        )


def test_exits_at_chance_are_named():
    labels = np.array([0, 1, 1, 2])
    assert no_better_than_chance((1, 3), (0.75, 1.0), labels) == ""
    sentence = no_better_than_chance((0, 2, 3), (0.5, 0.75, 0.25), labels)
    assert "commonest label (0.500). Got layer 0: 0.500; layer 3: 0.250: train longer" in sentence


def test_nothing_is_said_where_all_is_well(recwarn):
    warn("")
    assert not recwarn
    with pytest.warns(UserWarning, match="look here"):
        warn("look here")
