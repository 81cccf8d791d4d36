"""Exact ids by hand on a small vocabulary, truncation against a plain loop, odd input."""

import json
import time

import numpy as np
import pytest
import tokenizers
import vocabularies
from hypothesis import given, settings
from hypothesis import strategies as st

from ejax import assets
from ejax.data.tokenizer import Tokenizer, bucket_of, load_tokenizer, longest_first

TOKENS = """[PAD] [UNK] [CLS] [SEP] [MASK] the cafe film was un ##afford ##able ##s good , ! ' 中 国
Good café bad 10 ##0 % ~"""
VOCAB = TOKENS.split()
ID = {token: i for i, token in enumerate(VOCAB)}
CLS, SEP, UNK = ID["[CLS]"], ID["[SEP]"], ID["[UNK]"]


def write_vocab(folder, **config):
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_vocab(tmp_path_factory.mktemp("vocab"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def library(tokenizer, tmp_path_factory):
    """Hugging Face's own object, from the saved file."""
    folder = tmp_path_factory.mktemp("saved")
    tokenizer.save(folder)
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def rows(encoded):
    parts = np.split(encoded.ids, encoded.offsets[1:-1])
    return [part.tolist() for part in parts] if len(encoded) else []


def types(encoded):
    return [part.tolist() for part in np.split(encoded.types, encoded.offsets[1:-1])]


def pieces(words):
    return [ID[word] for word in words.split()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the film was good", "the film was good"),
        ("The FILM was Good!", "the film was good !"),
        ("Café, CAFÉ cafe\u0301s", "cafe , cafe cafe ##s"),
        ("unaffordable films", "un ##afford ##able film ##s"),
        ("中国the中", "中 国 the 中"),
        ("the film's", "the film ' [UNK]"),
        ("unzip 100%", "[UNK] 10 ##0 %"),
        ("the\t\n \u00a0\u3000film\u0000\ufffd\u200d", "the film"),
        ("was~!!", "was ~ ! !"),
        ("x" * 101, "[UNK]"),
        ("[SEP] [sep]", "[SEP] [UNK] [UNK] [UNK]"),
        ("", ""),
        (" \n", ""),
    ],
)
def test_ids_by_hand(tokenizer, text, expected):
    encoded = tokenizer.encode([text], 128)
    assert rows(encoded) == [[CLS, *pieces(expected), SEP]]
    assert types(encoded) == [[0] * len(encoded.ids)]


def test_pairs_and_singles_mix(tokenizer):
    encoded = tokenizer.encode(
        [("the film", "was good !"), "café", ("", "good"), ("good", ""), ["", ""]], 128
    )
    assert rows(encoded) == [
        [CLS, *pieces("the film"), SEP, *pieces("was good !"), SEP],
        [CLS, ID["cafe"], SEP],
        [CLS, SEP, ID["good"], SEP],
        [CLS, ID["good"], SEP, SEP],
        [CLS, SEP, SEP],
    ]
    assert types(encoded) == [
        [0, 0, 0, 0, 1, 1, 1, 1],
        [0, 0, 0],
        [0, 0, 1, 1],
        [0, 0, 0, 1],
        [0, 0, 1],
    ]
    assert encoded.lengths.tolist() == [8, 3, 4, 4, 3]
    assert (encoded.ids.dtype, encoded.types.dtype) == (np.int32, np.int8)
    assert encoded.offsets.dtype == np.int64


@pytest.mark.parametrize("frame", ["[SEP]", "</s></s>"])
def test_the_texts_of_pairs_apart_are_those_alone(tokenizer, frame):
    tokenizer = tokenizer if frame == "[SEP]" else Tokenizer(vocabularies.unigram())
    assert tokenizer.separator == (() if frame == "[SEP]" else (2, 2))
    pairs = [("the film", "was bad, the film"), ("a", ""), ("", "good")]
    apart = tokenizer.apart(tokenizer.encode(pairs, 32))
    for found, texts in zip(apart, zip(*pairs, strict=True), strict=True):
        alone = tokenizer.encode(list(texts), 32)
        np.testing.assert_array_equal(found.ids, alone.ids)
        np.testing.assert_array_equal(found.types, alone.types)
        np.testing.assert_array_equal(found.offsets, alone.offsets)


def test_no_texts(tokenizer):
    encoded = tokenizer.encode([], 8)
    assert len(encoded) == 0
    assert encoded.lengths.tolist() == []
    assert (encoded.ids.dtype, encoded.types.dtype) == (np.int32, np.int8)


def test_truncation_by_hand(tokenizer):
    encoded = tokenizer.encode(
        ["the film was good ! !", ("the film was good", "good"), ("the", "good ! ! ! ! ,")], 6
    )
    assert rows(encoded) == [
        [CLS, *pieces("the film was good"), SEP],
        [CLS, *pieces("the film"), SEP, ID["good"], SEP],
        [CLS, ID["the"], SEP, *pieces("good !"), SEP],
    ]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"do_lower_case": False}, "Good [UNK] café 中"),
        ({"do_lower_case": True, "strip_accents": False}, "good café café 中"),
        ({"tokenize_chinese_chars": False}, "good cafe cafe 中"),
        ({"do_lower_case": False, "strip_accents": True}, "Good [UNK] cafe 中"),
        ({"tokenizer_class": "BertTokenizerFast"}, "good cafe cafe 中"),
    ],
)
def test_normalisation_follows_tokenizer_config(tmp_path, config, expected):
    tokenizer = load_tokenizer(write_vocab(tmp_path, **config))
    assert rows(tokenizer.encode(["Good CAFÉ café 中"], 128)) == [[CLS, *pieces(expected), SEP]]


def test_chinese_characters_stay_together_when_told(tmp_path):
    tokenizer = load_tokenizer(write_vocab(tmp_path, tokenize_chinese_chars=False))
    assert rows(tokenizer.encode(["中国"], 128)) == [[CLS, UNK, SEP]]


def test_settings_of_the_file_are_overridden(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    wild = tokenizers.Tokenizer.from_file(str(path))
    wild.enable_truncation(5)
    wild.enable_padding(length=5)
    wild.save(str(path))
    assert json.loads(path.read_text())["truncation"]["max_length"] == 5

    loaded = load_tokenizer(tmp_path)
    texts = ["the film was good ! ! !", "good"]
    assert rows(loaded.encode(texts, 128)) == rows(tokenizer.encode(texts, 128))
    assert loaded.encode(texts, 128).lengths.tolist() == [9, 3]
    loaded.save(tmp_path)
    saved = json.loads(path.read_text())
    assert (saved["truncation"], saved["padding"]) == (None, None)


def test_save_and_load_give_the_same_ids(tmp_path):
    cased = load_tokenizer(write_vocab(tmp_path / "from", do_lower_case=False))
    cased.save(tmp_path / "to" / "bundle")
    texts = ["Good CAFÉ café 中", ("the film's", "unaffordable")]
    loaded = load_tokenizer(tmp_path / "to" / "bundle")
    assert rows(loaded.encode(texts, 64)) == rows(cased.encode(texts, 64))
    assert loaded.vocab_size == cased.vocab_size == len(VOCAB)
    settings = loaded.hf_settings()
    assert (settings["do_lower_case"], settings["cls_token"]) == (False, "[CLS]")


def truncate_one_by_one(a, b, room):
    """Takes tokens off the longer text; of two equal ones, the one that began shorter."""
    first_is_shorter = a <= b
    while a + b > room:
        if a > b or (a == b and first_is_shorter):
            a -= 1
        else:
            b -= 1
    return a, b


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 50))
def test_longest_first_is_the_plain_loop(a, b, room):
    kept = longest_first(np.array([a]), np.array([b]), room)
    assert (int(kept[0][0]), int(kept[1][0])) == truncate_one_by_one(a, b, room)


WORDS = st.lists(st.sampled_from(["the", "film", "good", "unaffordable", "!"]), max_size=12)
TEXTS = st.lists(st.tuples(WORDS, st.none() | WORDS), max_size=6)


@settings(deadline=None)
@given(TEXTS, st.integers(4, 30))
def test_truncation_is_that_of_the_library(tokenizer, library, words, max_length):
    texts = [" ".join(a) if b is None else (" ".join(a), " ".join(b)) for a, b in words]
    library.enable_truncation(max_length, strategy="longest_first")
    expected = [library.encode(t) if isinstance(t, str) else library.encode(*t) for t in texts]
    library.no_truncation()
    encoded = tokenizer.encode(texts, max_length)
    assert rows(encoded) == [e.ids for e in expected]
    assert len(texts) == 0 or types(encoded) == [e.type_ids for e in expected]
    for text, row in zip(texts, rows(encoded), strict=True):
        assert len(row) <= max_length
        assert (row[0], row[-1]) == (CLS, SEP)
        assert row.count(SEP) == (1 if isinstance(text, str) else 2)


LONG = {
    "words": "unaffordable films, " * 3000,
    "spaces": " " * 50_000 + "the film" + " " * 50_000 + "good",
    "one word": "x" * 60_000 + " good",
    "no spaces": "中国" * 30_000,
    "long words": ("x" * 3000 + " the ") * 30,
    "a word across the cut": "the " * 255 + "unaffordable" * 8 + " good",
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
@pytest.mark.parametrize("max_length", [4, 16, 128])
def test_cutting_long_texts_changes_no_token(tokenizer, library, text, max_length):
    whole = library.encode(text).ids[1:-1]
    expected = [CLS, *whole[: max_length - 2], SEP]
    assert rows(tokenizer.encode([text], max_length)) == [expected]


def test_a_megabyte_is_not_tokenised_whole(tokenizer, library):
    text = "unaffordable films, " * 50_000
    start = time.perf_counter()
    encoded = tokenizer.encode([text], 128)
    cut = time.perf_counter() - start
    library.encode_batch_fast([text])
    whole = time.perf_counter() - start - cut
    assert len(encoded.ids) == 128
    assert cut < whole / 10  # in fact about 1 / 200


def test_chunks_keep_the_order(tokenizer):
    texts = [["good", "the film " * 100, ("café " * 50, "was")][i % 3] for i in range(3001)]
    single = {str(t): rows(tokenizer.encode([t], 32))[0] for t in texts[:3]}
    assert rows(tokenizer.encode(texts, 32)) == [single[str(t)] for t in texts]


def test_lone_surrogates_are_dropped(tokenizer):
    texts = ["the \ud83d film", "good", ("\udc00", "caf\ud800é")]
    assert rows(tokenizer.encode(texts, 16)) == [
        [CLS, *pieces("the film"), SEP],
        [CLS, ID["good"], SEP],
        [CLS, SEP, ID["cafe"], SEP],
    ]


@pytest.mark.parametrize(
    ("bad", "shown"),
    [
        (None, "None"),
        (3.5, "3.5"),
        (b"the", "b'the'"),
        (("the", None), r"\('the', None\)"),
        (("a", "b", "c"), r"\('a', 'b', 'c'\)"),
    ],
)
def test_a_row_that_is_no_text_is_named(tokenizer, bad, shown):
    sentence = rf"^texts\[1\] must be a string or a pair of strings\. Got {shown}\.$"
    with pytest.raises(ValueError, match=sentence):
        tokenizer.encode(["the", bad, None], 16)


def test_one_string_is_not_a_list_of_letters(tokenizer):
    with pytest.raises(ValueError, match=r"^texts must be a list of texts\. Got one str\.$"):
        tokenizer.encode("good", 16)


def test_max_length_leaves_room(tokenizer):
    with pytest.raises(ValueError, match=r"^max_length must be at least 4 tokens\. Got 3\.$"):
        tokenizer.encode(["good"], 3)


def test_folder_without_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json or vocab\.txt: .* has neither\.$"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"nowhere is not a folder\.$"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b"", b"{", b'{"version": "1.0"}', b"\xff\xfe", b"[]"])
def test_damaged_tokenizer_json(tmp_path, content):
    write_vocab(tmp_path)  # not a silent way out
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer that .* fetch it"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_of_another_model_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    plain = json.loads(path.read_text())
    plain["post_processor"] = None
    path.write_text(json.dumps(plain))
    with pytest.raises(
        ValueError, match=r"tokenizer\.json must frame .* as BERT does\. Got \['\[UNK"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", r"vocab\.txt must hold one token per line.* Got 0 lines without \[UNK\], \[CLS\], "),
        (b"[UNK]\n[SEP]\nthe\n", r"Got 3 lines without \[CLS\]\.$"),
        (b"[UNK]\n\xff\n", r"vocab\.txt must be UTF-8 text .* fetch it again\.$"),
    ],
)
def test_damaged_vocab(tmp_path, content, sentence):
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        load_tokenizer(tmp_path)


def test_windows_line_ends_and_a_blank_last_line(tmp_path, tokenizer):
    (tmp_path / "vocab.txt").write_bytes("\r\n".join(VOCAB).encode() + b"\r\n")
    texts = ["Café 中国 100%"]
    assert rows(load_tokenizer(tmp_path).encode(texts, 16)) == rows(tokenizer.encode(texts, 16))


def test_tokenizer_config_of_another_tokenizer(tmp_path):
    write_vocab(tmp_path, tokenizer_class="BertJapaneseTokenizer")
    with pytest.raises(ValueError, match=r"tokenizer_class must be .* Got 'BertJapaneseTokenizer'"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is damaged: it is not JSON"):
        load_tokenizer(tmp_path)


# Other tokenizers than BERT's


@pytest.fixture(scope="module")
def goldens():
    """Of transformers 4.57.6; tests/test_parity.py makes them again where it is installed."""
    return json.loads(vocabularies.GOLDENS.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", vocabularies.FOLDERS)
def test_ids_and_types_are_those_of_transformers(goldens, tmp_path, name):
    loaded = load_tokenizer(vocabularies.write(name, tmp_path / "from"))
    loaded.save(tmp_path / "bundle")
    for tokenizer in (loaded, load_tokenizer(tmp_path / "bundle")):
        for length, expected in zip(vocabularies.LENGTHS, goldens[name], strict=True):
            encoded = tokenizer.encode(vocabularies.TEXTS, length)
            assert rows(encoded) == [ids for ids, _ in expected]
            assert types(encoded) == [kinds for _, kinds in expected]


def test_an_encoder_with_one_token_type_gets_no_other(tmp_path):
    folder = vocabularies.write("uncased", tmp_path)
    assert types(load_tokenizer(folder).encode([("good", "film")], 8)) == [[0, 0, 0, 1, 1]]
    (folder / "config.json").write_text('{"type_vocab_size": 1}')
    assert types(load_tokenizer(folder).encode([("good", "film")], 8)) == [[0] * 5]


def test_a_pair_with_two_tokens_between_its_texts_needs_room_for_them():
    tokenizer = Tokenizer(vocabularies.unigram())
    assert tokenizer.encode([("good", "film")], 5).lengths.tolist() == [5]
    with pytest.raises(ValueError, match=r"max_length must be at least 5 tokens\. Got 4\."):
        tokenizer.encode(["good"], 4)


OTHERS = {
    "Unigram": vocabularies.unigram,
    "bytes": vocabularies.byte_bpe,
    "one long word": lambda: tokenizers.Tokenizer(models_without_words()),
}


def models_without_words():
    """Pieces of equal length and score: the end of a word decides how all of it is spelt."""
    scored = [("<s>", 0.0), ("</s>", 0.0), ("a", -3.0), ("aa", -3.5), ("aaa", -4.0), (" ", -1.0)]
    return tokenizers.models.Unigram(scored, unk_id=0)


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize(
    "text",
    [
        "the film was good " * 900,
        "영화가좋다中国" * 2000,
        "a" * 9001 + " good",
        "good" + " " * 9000 + "film was " * 500,
        "the film\n" * 1500,
        "a\u3000" * 5000,
    ],
)
def test_cutting_changes_no_token_of_other_tokenizers(kind, text):
    backend = OTHERS[kind]()
    if kind == "one long word":
        backend.post_processor = tokenizers.processors.BertProcessing(("</s>", 1), ("<s>", 0))
    expected = backend.encode(text, add_special_tokens=False).ids
    for length in (7, 64):
        (ids,) = rows(Tokenizer(backend).encode([text], length))
        assert ids[1:-1] == expected[: length - 2]


def test_decoding_leaves_out_the_frame():
    for made in (vocabularies.unigram(), vocabularies.byte_bpe(), vocabularies.wordpiece(False)):
        tokenizer = Tokenizer(made)
        (ids,) = rows(tokenizer.encode([("the film", "was good")], 32))
        assert tokenizer.decode(ids).split() == ["the", "film", "was", "good"]


@pytest.mark.parametrize("made", [vocabularies.unigram, vocabularies.byte_bpe])
def test_lone_surrogates_are_dropped_by_every_tokenizer(made):
    tokenizer = Tokenizer(made())
    broken, whole = (
        tokenizer.encode(["the\ud83d film", "\udc00"], 16),
        tokenizer.encode(["the film", ""], 16),
    )
    assert rows(broken) == rows(whole)


# What cannot be followed


def with_files(folder, name, **files):
    """A folder of `vocabularies` with other files; __ stands for the dot of their names."""
    folder = vocabularies.write(name, folder)
    for file, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / file.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def settings_file(**values):
    return {"tokenizer_config__json": values}


@pytest.mark.parametrize(
    ("name", "files", "sentence"),
    [
        (
            "uncased",
            settings_file(tokenizer_class="KoBertTokenizer"),
            r"tokenizer_config\.json: tokenizer_class must be .* Got 'KoBertTokenizer': choose",
        ),
        (
            "vocabulary",
            {"config__json": {"tokenizer_class": "BertJapaneseTokenizer"}},
            r"/config\.json: tokenizer_class must be .* Got 'BertJapaneseTokenizer'",
        ),
        (
            "vocabulary",
            settings_file(word_tokenizer_type="mecab"),
            r"word_tokenizer_type must be 'basic', the only one supported\. Got 'mecab'",
        ),
        ("cased", settings_file(do_basic_tokenize=False), "do_basic_tokenize must be True"),
        ("cased", settings_file(truncation_side="left"), "truncation_side must be 'right'"),
        (
            "cased",
            settings_file(model_max_length=512),
            r"tokenizer_config\.json must say do_lower_case: tokenizer\.json has False, .* True",
        ),
        ("cased", settings_file(do_lower_case="no"), "must be true or false. Got 'no'"),
        (
            "vocabulary",
            settings_file(tokenizer_class="XLMRobertaTokenizer"),
            r"without a tokenizer\.json, .* Got 'XLMRobertaTokenizer': save a fast tokenizer",
        ),
        (
            "vocabulary",
            {"vocab__txt": "[UNK]\n[CLS]\n[SEP]\n▁나는\n▁학교\n에\n"},
            r"vocab\.txt must hold WordPiece's .* such as '▁나는', which needs a tokenizer\.json",
        ),
        (
            "vocabulary",
            {"added_tokens__json": {"<url>": 90}},
            r"added_tokens\.json: .* '<url>' must have the id 90; by the other files 4",
        ),
        (
            "tokens added",
            {"added_tokens__json": {"<new>": 41}},
            r"added_tokens\.json: .* '<new>' must have the id 41; the other files do not have it",
        ),
        (
            "cased",
            {"added_tokens__json": {"<url>": -1}},
            r"the id of an added token is not as .* -1",
        ),
        (
            "vocabulary",
            settings_file(added_tokens_decoder={"5": "the"}),
            "a token is not as transformers writes it. Got 'the'",
        ),
        ("uncased", settings_file(tokenizer_class={"a": 1}), "tokenizer_class must be one of"),
        ("uncased", settings_file(model_input_names=0.5), "model_input_names is not as .* 0.5"),
        ("uncased", settings_file(mask_token="\ud800"), "json is damaged: .*surrogates"),
        (  # for which the library would take minutes
            "uncased",
            {"tokenizer__json": json.dumps({"added_tokens": [{"content": "x" * 99_999}]})},
            r"tokenizer\.json is not .* \(an added token has more than 1000 bytes",
        ),
        (
            "uncased",
            {"tokenizer__json": "version https://git-lfs.github.com/spec/v1\noid sha256:4d\n"},
            r"tokenizer\.json is a Git LFS pointer, not the file itself: run .*git lfs pull",
        ),
    ],
)
def test_what_cannot_be_followed_is_named(tmp_path, name, files, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_tokenizer(with_files(tmp_path, name, **files))


@pytest.mark.parametrize("file", ["sentencepiece.bpe.model", "merges.txt"])
def test_a_file_that_only_a_slow_tokenizer_reads(tmp_path, file):
    (tmp_path / file).touch()
    with pytest.raises(ValueError, match=rf"has {file} and no tokenizer\.json.* save a fast token"):
        load_tokenizer(tmp_path)


def test_a_link_to_a_file_that_is_gone(tmp_path):
    (tmp_path / "tokenizer.json").symlink_to("../blobs/123")
    with pytest.raises(ValueError, match=r"is a link to \.\./blobs/123, which leads nowhere"):
        load_tokenizer(tmp_path)


def test_without_settings_tokenizer_json_stands_for_itself(tmp_path):
    """As in a bundle: a cased tokenizer stays cased."""
    Tokenizer(vocabularies.wordpiece(False)).save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    tokenizer = load_tokenizer(tmp_path)
    assert rows(tokenizer.encode(["The"], 8)) == [[2, WORDS_OF.index("The"), 3]]


WORDS_OF = vocabularies.WORDS.split()


def test_bucket_of():
    lengths = np.array([2, 16, 17, 64, 65, 100])
    assert bucket_of(lengths, (16, 32, 64), 100).tolist() == [16, 16, 32, 64, 100, 100]
    assert bucket_of(lengths, (16, 32, 64, 128, 256), 100).tolist() == [16, 16, 32, 64, 100, 100]
    assert bucket_of(lengths, (128,), 100).tolist() == [100] * 6
    assert bucket_of(np.array([], int), (16,), 100).tolist() == []
    assert bucket_of(lengths, (16,), 100).dtype == np.int32
    with pytest.raises(ValueError, match=r"at most max_length, 64: .* Got 100 tokens in row 5\.$"):
        bucket_of(lengths, (16, 64), 64)


TRICKY = [
    "Naïve CAFÉ — the “quoted” film's 100% good…",
    "İstanbul ǅ ﬁ Ω ß ẞ Straße",
    "中文字符 mixed with 日本語 and 한국어",
    "tabs\tand\r\nlines\u2028and\u00a0spaces\u200b\u00adhere",
    "emoji 👩‍👩‍👧 🇩🇪 and [MASK] [SEP]",
    "x" * 99 + " " + "y" * 100 + " " + "z" * 101,
    "e\u0301 o\u0308 \u0300 नमस्ते عربى",
    ("first text", "the second: one!"),
]


def test_both_files_of_a_real_model_give_equal_ids(tmp_path):
    name = "all-MiniLM-L6-v2"
    if not list((assets.cache_dir() / "packages").glob(f"{name}-*")):
        pytest.skip(f"{name} is not in {assets.cache_dir()}: set EJAX_CACHE to a cache with it")
    folder = assets.resolve(name)
    for file in ("vocab.txt", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    from_json, from_vocab = load_tokenizer(folder), load_tokenizer(tmp_path)
    assert rows(from_json.encode(TRICKY, 512)) == rows(from_vocab.encode(TRICKY, 512))
    assert from_json.encode(["good " * 500], 512).lengths.tolist() == [502]
    assert rows(from_json.encode(["Hello world!"], 16)) == [[101, 7592, 2088, 999, 102]]
    assert from_json.vocab_size == from_vocab.vocab_size == 30522
