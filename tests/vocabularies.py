"""Small tokenizers of each kind, in folders with the files that say how to tokenise.

`goldens/tokens.json` holds what transformers 4.57.6 makes of `TEXTS` with each of `FOLDERS`;
`python tests/vocabularies.py` writes it, where the extra `parity` is installed.
"""

import json
import tempfile
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

GOLDENS = Path(__file__).parent / "goldens" / "tokens.json"
WORDS = """[PAD] [UNK] [CLS] [SEP] [MASK] the The film was good Good cafe café un ##afford ##able
##s ! , . < > url 영화 ##가 좋 ##다 中 国 user [ ] 1 0 ##0 😀 mask s ##é e"""
PIECES = """▁ e a t h o s l m f i g d w u n r c é ▁the ▁film ▁good ▁Good ▁was ▁un afford able s
▁caf ▁영화 가 ▁좋 다 中国 中 ! , . < > url 😀 1 0 ▁1"""
MERGES = "t h|th e|Ġ th|Ġthe e|f i|fi l|fil m|Ġ film|Ġ g|o o|Ġg oo|Ġgoo d|w a|wa s|Ġ was|ì ĺ"

TEXTS: list[str | tuple[str, str]] = [
    "the film was good!",
    "The CAFÉ cafés, Good <url>",
    "unaffordable films <url>and [USER] now",
    "영화가 좋다 좋다영화",
    "영화가",  # in decomposed Hangul below
    "\u110b\u1167\u11bc\u1112\u116a\u1100\u1161 cafe\u0301",
    "中国the 中",
    "good 😀😀 👩‍👩‍👧 🇩🇪!",
    "the\u200bfilm\u200d was\ufeff good\u00ad",
    "tabs\tand\r\n  lines\u2028\u00a0good",
    "[SEP] </s> <s> [sep] <mask> film",
    "",
    "  ",
    ("the film", "was good !"),
    ("", "good"),
    ("good", ""),
    ("the film was good, the film was good", "영화가 좋다 <url>"),
    ("good", "The film was unaffordable, 100 films!"),
]
LENGTHS = (64, 12, 7)


def wordpiece(lower: bool) -> Tokenizer:
    """BERT's."""
    vocab = {token: i for i, token in enumerate(WORDS.split())}
    made = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    made.add_special_tokens(WORDS.split()[:5])
    made.normalizer = normalizers.BertNormalizer(lowercase=lower)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.decoder = decoders.WordPiece()
    return made


def byte_bpe(prefix: bool = False) -> Tokenizer:
    """RoBERTa's."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokens += sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [tuple(pair.split()) for pair in MERGES.split("|") if " " in pair]
    known: list[tuple[str, str]] = []
    for left, right in merges:
        if left in tokens and right in tokens:
            known.append((left, right))
            tokens.append(left + right)
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, known))
    made.add_special_tokens(tokens[:5])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    made.decoder = decoders.ByteLevel()
    return made


def unigram(*, byte_fallback: bool = False) -> Tokenizer:
    """XLM-R's: no token types, and two tokens between the texts of a pair."""
    scored = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    scored += [(piece, -2.0 - 0.1 * i) for i, piece in enumerate(PIECES.split())]
    scored += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)] if byte_fallback else []
    scored.append(("<mask>", 0.0))
    made = Tokenizer(models.Unigram(scored, unk_id=3, byte_fallback=byte_fallback))
    made.add_special_tokens([token for token, score in scored if not score])
    made.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    made.decoder = decoders.Metaspace()
    return made


def added(start: int) -> dict[str, dict]:
    """As an added_tokens_decoder: a plain token that the normaliser sees, and a special one."""
    plain = {"lstrip": False, "rstrip": False, "single_word": False}
    return {
        str(start): {"content": "<url>", "normalized": True, "special": False, **plain},
        str(start + 1): {"content": "[USER]", "normalized": False, "special": True, **plain},
    }


def folders() -> dict[str, tuple[Tokenizer | None, dict[str, object]]]:
    """Of each folder its tokenizer.json, if it has one, and its other files."""
    bert, cased = wordpiece(True), wordpiece(False)
    words, pieces = len(WORDS.split()), len(PIECES.split()) + 5
    vocab = "\n".join(WORDS.split()) + "\n"
    old = {"<url>": words, "[USER]": words + 1}
    users = {"additional_special_tokens": ["[USER]"]}

    def said(kind: str, **settings: object) -> dict[str, object]:
        return {"tokenizer_config.json": {"tokenizer_class": kind, **settings}}

    lower, upper = {"do_lower_case": True}, {"do_lower_case": False}
    more = {"added_tokens_decoder": added(words)}
    typed = {"__type": "AddedToken", "rstrip": False, "single_word": False, "normalized": False}
    mask = {"content": "<mask>", "lstrip": True, **typed}
    sep = {"content": "</s>", "lstrip": False, **typed}
    return {
        "uncased": (bert, said("BertTokenizer", **lower)),
        "cased": (cased, said("BertTokenizerFast", **upper)),
        "cased by its settings": (bert, said("BertTokenizer", **upper, strip_accents=None)),
        "accents kept": (bert, said("ElectraTokenizer", **lower, strip_accents=False)),
        "no token types": (bert, said("DistilBertTokenizer")),
        "inputs without types": (
            bert,
            said("BertTokenizer", model_input_names=["input_ids", "attention_mask"]),
        ),
        "tokens added": (bert, said("BertTokenizer", **more)),
        "tokens added to a cased one": (cased, said("BertTokenizer", **upper, **more)),
        "tokens in a file": (
            bert,
            said("BertTokenizer") | {"added_tokens.json": old, "special_tokens_map.json": users},
        ),
        "a token of its own": (
            cased, said("BertTokenizer", **upper, extra_special_tokens={"user_token": "[USER]"}),
        ),
        "vocabulary": (None, {"vocab.txt": vocab}),
        "cased vocabulary": (None, {"vocab.txt": vocab} | said("BertTokenizer", **upper)),
        "Chinese together": (
            None, {"vocab.txt": vocab} | said("BertTokenizer", tokenize_chinese_chars=False),
        ),
        "vocabulary and tokens": (
            None, {"vocab.txt": vocab, "added_tokens.json": old, "special_tokens_map.json": users},
        ),
        "vocabulary and tokens in the settings": (
            None, {"vocab.txt": vocab} | said("BertTokenizer", **more),
        ),
        "its own frame": (
            None,
            {"vocab.txt": vocab.replace("[CLS]", "<s>").replace("[SEP]", "</s>")}
            | said("BertTokenizer", cls_token="<s>", sep_token=sep),
        ),
        "bytes": (byte_bpe(), said("RobertaTokenizer", add_prefix_space=False)),
        "bytes with a space first": (byte_bpe(), said("RobertaTokenizer", add_prefix_space=True)),
        "bytes as they are": (byte_bpe(), said("PreTrainedTokenizerFast")),
        "Unigram": (unigram(), said("XLMRobertaTokenizer", mask_token=mask)),
        "Unigram as it is": (unigram(), said("PreTrainedTokenizerFast")),
        "Unigram and tokens": (
            unigram(), said("XLMRobertaTokenizerFast", added_tokens_decoder=added(pieces)),
        ),
        "Unigram and bytes": (unigram(byte_fallback=True), said("PreTrainedTokenizerFast")),
    }  # fmt: skip


FOLDERS = tuple(folders())


def write(name: str, folder: Path) -> Path:
    """The folder of this name, with a config.json that transformers needs."""
    folder.mkdir(parents=True, exist_ok=True)
    made, files = folders()[name]
    if made:
        made.save(str(folder / "tokenizer.json"))
    for file, content in {"config.json": {"model_type": "bert"}, **files}.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / file).write_text(text, encoding="utf-8")
    return folder


def of_transformers(folder: Path) -> list[list[list[list[int]]]]:
    """For each of LENGTHS and TEXTS [ids, types]: types 0 where the tokenizer gives none."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for length in LENGTHS:
        rows = []
        for text in TEXTS:
            batch = [[part] for part in ((text,) if isinstance(text, str) else text)]
            out = tokenizer(*batch, truncation="longest_first", max_length=length)
            ids = out["input_ids"][0]
            rows.append([ids, out.get("token_type_ids", [[0] * len(ids)])[0]])
        found.append(rows)
    return found


def goldens() -> dict[str, list]:
    with tempfile.TemporaryDirectory() as scratch:
        return {name: of_transformers(write(name, Path(scratch) / name)) for name in FOLDERS}


if __name__ == "__main__":
    lines = (f"{json.dumps(name)}: {json.dumps(rows)}" for name, rows in goldens().items())
    GOLDENS.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
