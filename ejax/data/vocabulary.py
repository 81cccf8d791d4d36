"""What a Hugging Face folder says about its tokenizer, as one object of the `tokenizers` library.

Most of it stands in tokenizer.json, or in vocab.txt for BERT's. tokenizer_config.json, config.json,
added_tokens.json and special_tokens_map.json may change it, as transformers (4.57.6) reads them.
All of it is put into the object, so that the tokenizer.json it saves says everything. What cannot
be followed is refused by its name.
"""

import itertools
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from ejax import assets
from ejax.errors import UserError, clipped, shown

PADDING = ("[PAD]", "<pad>")
SPECIAL_TOKENS = {
    "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}  # fmt: skip
LONGEST = 1000  # bytes of an added token: the library takes minutes for one of 100,000
LONG = re.compile(rb'"content"\s*:\s*"[^"]{%d}' % LONGEST)
NAMED_TOKENS = ("bos_token", "eos_token", *SPECIAL_TOKENS)
MORE_TOKENS = ("additional_special_tokens", "extra_special_tokens")
SAVE = "save a fast tokenizer: AutoTokenizer.from_pretrained(name).save_pretrained(folder)"


class Kind(NamedTuple):
    """What a tokenizer class of transformers does besides what the files say."""

    types: bool  # it tells the texts of a pair apart by token types
    bert: bool = False  # it sets BERT's normalisation, and vocab.txt alone describes it
    mask: str = ""  # its mask token, which takes the space before it


CLASSES = {
    "BertTokenizer": Kind(types=True, bert=True),
    "DistilBertTokenizer": Kind(types=False, bert=True),
    "ElectraTokenizer": Kind(types=True, bert=True),
    "AlbertTokenizer": Kind(types=True, mask="[MASK]"),
    "RobertaTokenizer": Kind(types=False, mask="<mask>"),
    "XLMRobertaTokenizer": Kind(types=False, mask="<mask>"),
    "CamembertTokenizer": Kind(types=False, mask="<mask>"),
    "PreTrainedTokenizerFast": Kind(types=True),
    "TokenizersBackend": Kind(types=True),
}
# Settings of tokenizer_config.json that would change the tokens, and what they may be.
ONLY: dict[str, tuple[Any, ...]] = {
    "word_tokenizer_type": (None, "basic"),  # of BertJapaneseTokenizer: mecab, sudachi, …
    "subword_tokenizer_type": (None, "wordpiece"),
    "do_basic_tokenize": (None, True),
    "split_special_tokens": (None, False),
    "truncation_side": (None, "right"),
}
# Fields of the library's objects, their names in tokenizer_config.json, and what transformers
# takes where that file does not name them.
NORMAL = {
    "lowercase": ("do_lower_case", True),
    "strip_accents": ("strip_accents", None),
    "handle_chinese_chars": ("tokenize_chinese_chars", True),
}
SPLIT = {"add_prefix_space": ("add_prefix_space", False)}


class Frame(NamedTuple):
    """The tokens around texts: before + text + after, before + first + middle + second + end."""

    before: list[int]
    after: list[int]
    middle: list[int]
    end: list[int]
    middle_types: list[int]
    second_type: int
    end_types: list[int]

    @property
    def ids(self) -> list[int]:
        return sorted({*self.before, *self.after, *self.middle, *self.end})

    @property
    def pair_size(self) -> int:
        return len(self.before) + len(self.middle) + len(self.end)


def frame_of(backend: tokenizers.Tokenizer, source: str | Path) -> Frame:
    """The frame that a tokenizer's post-processor gives.

    Raises:
      ValueError: when texts do not stand between tokens, such as [CLS] and [SEP].
    """
    text = "a"
    if not _ids(backend, text):  # the frame shows around a text of some tokens
        text = next((token for token in backend.get_vocab() if _ids(backend, token)), text)
    single, pair = backend.encode(text), backend.encode(text, text)
    one, two = _groups(single), _groups(pair)
    kinds = [[kind for kind, _ in runs] for runs in (one, two)]
    good = kinds == [[None, 0, None], [None, 0, None, 1, None]]
    if good:
        parts = [[pair.ids[i] for i in rows] for _, rows in two]
        types = [[pair.type_ids[i] for i in rows] for _, rows in two]
        before, after = ([single.ids[i] for i in one[at][1]] for at in (0, 2))
        flat = {*single.type_ids, *types[0], *types[1]}
        good = parts[0] == before and flat == {0} and len({*types[3]}) == 1
        good = good and {*pair.type_ids} <= {0, 1}
    if not good:
        raise UserError(
            f"{source} must frame a text as [CLS] text [SEP] and a pair as [CLS] first [SEP] "
            f"second [SEP], under any names, as BERT does. Got {shown(single.tokens)} and "
            f"{shown(pair.tokens)} with token types {shown(pair.type_ids)}."
        )
    return Frame(before, after, parts[2], parts[4], types[2], types[3][0], types[4])


def _ids(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids


def _groups(encoding: tokenizers.Encoding) -> list[tuple[int | None, list[int]]]:
    """Runs of tokens of one text, 0 or 1, or of the frame, None."""
    of = encoding.sequence_ids
    return [(key, list(rows)) for key, rows in itertools.groupby(range(len(of)), of.__getitem__)]


def unknowns_of(backend: tokenizers.Tokenizer, size: int) -> np.ndarray:
    """Which ids stand for what the vocabulary cannot spell, bool [size]."""
    model = backend.model
    if isinstance(model, models.Unigram):  # the library does not show its unk_id otherwise
        found = re.search(rb'"unk_id":(\d+)', model.__getstate__())
        ids: list[int | None] = [int(found[1])] if found else []
    else:
        ids = [backend.token_to_id(getattr(model, "unk_token", None) or "[UNK]")]
    ids += [backend.token_to_id(f"<0x{byte:02X}>") for byte in range(0xC2, 0xF5)]
    unknown = np.zeros(size, bool)
    unknown[[i for i in ids if i is not None]] = True
    return unknown


def begins_of(backend: tokenizers.Tokenizer, size: int) -> np.ndarray:
    """Which ids count as words, bool [size]: not those that go on with one, nor a space alone."""
    mark = getattr(backend.model, "continuing_subword_prefix", None)
    within = {"▁", "Ġ", *(f"<0x{byte:02X}>" for byte in range(0x80, 0xC0))}
    begins = np.ones(size, bool)
    for token, i in backend.get_vocab().items():
        if token in within or (mark and token.startswith(mark)):
            begins[i] = False
    return begins


def load_backend(folder: Path) -> tuple[tokenizers.Tokenizer, Path]:
    """The tokenizer of a Hugging Face folder or a bundle, and the file it came from.

    Read from tokenizer.json; its settings for truncation and padding are dropped. Where there is
    none, built from vocab.txt with BERT's own normalisation: `do_lower_case` (by default true),
    `strip_accents` and `tokenize_chinese_chars` as tokenizer_config.json says, if it is there.

    Raises:
      ValueError: naming the file, when there is none, or one cannot be used or followed.
    """
    if not folder.is_dir():
        raise UserError(
            f"a tokenizer needs a folder with tokenizer.json or vocab.txt: {folder} is not a "
            f"folder."
        )
    config = assets.read_object(folder / "config.json")
    said = folder / "tokenizer_config.json"
    settings = assets.read_object(said)
    legacy = assets.read_object(folder / "special_tokens_map.json")
    _check_types(settings, said)
    _check_types(legacy, folder / "special_tokens_map.json")
    kind = _kind(folder, settings, config)
    for key, allowed in ONLY.items():
        if settings.get(key) not in allowed:
            raise UserError(
                f"{said}: {key} must be {allowed[1]!r}, the only one supported. "
                f"Got {shown(settings[key])}."
            )
    names = settings if "added_tokens_decoder" in settings else settings | legacy
    path, vocab = folder / "tokenizer.json", folder / "vocab.txt"
    if assets.held(path):
        backend = from_json(path, path)
        if settings:
            _follow(backend.pre_tokenizer, SPLIT, said, settings, path)
            _follow(backend.normalizer, NORMAL if kind.bert else {}, said, settings, path)
    elif assets.held(vocab):
        path = vocab
        backend = _from_vocab(path, names)
        _follow(backend.normalizer, NORMAL, said, settings, path)
    else:
        raise UserError(_nothing_to_read(folder))
    _add_tokens(backend, folder, settings, names, kind.mask)
    given = settings.get("model_input_names")
    types = kind.types if given is None else "token_type_ids" in given
    if not types or config.get("type_vocab_size") == 1:
        _without_types(backend, frame_of(backend, path))
    return backend, path


def _check_types(settings: dict[str, Any], path: Path) -> None:
    """Raises ValueError where a setting that is read here has a type of its own."""
    inputs = settings.get("model_input_names") or []
    _check(isinstance(inputs, list), path, "model_input_names", inputs)
    for key in (*NAMED_TOKENS, *MORE_TOKENS):
        tokens = settings.get(key) or []
        if key in NAMED_TOKENS:
            tokens = [tokens] if tokens else []
        elif isinstance(tokens, dict):
            tokens = [*tokens.values()]
        good = isinstance(tokens, list) and all(
            isinstance(token.get("content") if isinstance(token, dict) else token, str)
            for token in tokens
        )
        _check(good, path, key, settings.get(key))


def _kind(folder: Path, settings: dict[str, Any], config: dict[str, Any]) -> Kind:
    """The tokenizer class that the folder names; BERT's where it names none."""
    file = "tokenizer_config.json" if settings.get("tokenizer_class") else "config.json"
    name = settings.get("tokenizer_class") or config.get("tokenizer_class") or "BertTokenizer"
    kind = CLASSES.get(str(name)) or CLASSES.get(str(name).removesuffix("Fast"))
    if kind is None or (not kind.bert and not assets.held(folder / "tokenizer.json")):
        classes = [one for one in CLASSES if kind is None or CLASSES[one].bert]
        where = "" if kind is None else "without a tokenizer.json, "
        raise UserError(
            f"{folder / file}: {where}tokenizer_class must be one of {', '.join(classes)}. Got "
            f"{shown(name)}: "
            + ("choose a model with one of these tokenizers." if kind is None else f"{SAVE}.")
        )
    return kind


def _nothing_to_read(folder: Path) -> str:
    other = [*folder.glob("*.model"), *folder.glob("vocab.json"), *folder.glob("merges.txt")]
    if other:
        return (
            f"{folder} has {other[0].name} and no tokenizer.json, which alone is read for such a "
            f"tokenizer. With transformers, {SAVE}."
        )
    return f"a tokenizer needs a folder with tokenizer.json or vocab.txt: {folder} has neither."


def from_json(path: Path, name: Path) -> tokenizers.Tokenizer:
    """That of a tokenizer.json, which errors call `name`.

    Raises:
      ValueError: when it cannot be read.
    """
    try:
        if LONG.search(path.read_bytes()):
            raise ValueError(f"an added token has more than {LONGEST} bytes")
        backend = tokenizers.Tokenizer.from_file(str(path))
        backend.model.tokenize("\ue000")  # of no use, and in no vocabulary: needs [UNK]
        return backend
    except Exception as error:  # the library raises no narrower type
        raise UserError(
            f"{name} is not a tokenizer that the tokenizers library "
            f"{tokenizers.__version__} can read ({clipped(error)}): fetch it again."
        ) from error


def _from_vocab(path: Path, names: dict[str, Any]) -> tokenizers.Tokenizer:
    """A BERT tokenizer with transformers' defaults for its normalisation."""
    try:
        lines = path.read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} must be UTF-8 text ({error}): fetch it again.") from error
    if lines[-1] == "":
        lines.pop()
    vocab = {token: i for i, token in enumerate(lines)}
    special = {key: _content(names.get(key) or token) for key, token in SPECIAL_TOKENS.items()}
    cls, sep, unknown = (special[key] for key in ("cls_token", "sep_token", "unk_token"))
    missing = [token for token in (unknown, cls, sep) if token not in vocab]
    if missing:
        raise UserError(
            f"{path} must hold one token per line, the unknown, class and separator token, such "
            f"as [UNK], [CLS] and [SEP], among them. "
            f"Got {len(lines)} lines without {clipped(', '.join(missing), 60)}."
        )
    marked = [token for token in vocab if len(token) > 1 and token[0] == "▁"]
    if len(marked) > sum(token.startswith("##") for token in vocab):
        raise UserError(
            f"{path} must hold WordPiece's tokens. Got those of a SentencePiece tokenizer, such as "
            f"{shown(marked[0], 40)}, which needs a tokenizer.json. With transformers, {SAVE}."
        )
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=unknown))
    backend.add_special_tokens([token for token in special.values() if token in vocab])
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing((sep, vocab[sep]), (cls, vocab[cls]))
    backend.decoder = decoders.WordPiece()
    return backend


def _follow(
    part: Any, fields: dict[str, tuple[str, Any]], said: Path, settings: dict[str, Any], path: Path
) -> None:
    """Sets what tokenizer_config.json names; nothing is guessed where it does not."""
    for field, (key, default) in fields.items():
        if not hasattr(part, field):
            continue
        old = getattr(part, field)
        if key not in settings and old != default:
            raise UserError(
                f"{said} must say {key}: {path.name} has {old}, and readers that go by {said.name} "
                f"take {default}. Put the right one in as {key!r}."
            )
        try:
            setattr(part, field, settings.get(key, default))
        except TypeError:
            raise UserError(
                f"{said}: {key} must be true or false. Got {shown(settings[key])}."
            ) from None


def said_of(part: Any, fields: dict[str, tuple[str, Any]]) -> dict[str, Any]:
    """What tokenizer_config.json must say of a normaliser or a pre-tokenizer."""
    return {key: getattr(part, at) for at, (key, _) in fields.items() if hasattr(part, at)}


def _add_tokens(
    backend: tokenizers.Tokenizer, folder: Path, settings: dict[str, Any], names: dict[str, Any],
    mask: str,
) -> None:  # fmt: skip
    """Adds the tokens of added_tokens_decoder and added_tokens.json, and marks the special ones.

    Raises:
      ValueError: when a token would get another id than the files say.
    """
    said, old = folder / "tokenizer_config.json", folder / "added_tokens.json"
    special = _special(names, mask)
    named = {_content(token) for token in special}
    listed = assets.read_object(old)
    _check(max(map(len, [*named, *listed, ""])) <= LONGEST, said, "a token", "one too long")
    decoder = settings.get("added_tokens_decoder")
    if decoder is not None:
        _check(isinstance(decoder, dict), said, "added_tokens_decoder", decoder)
        tokens = {_number(i, said): _added(token, said) for i, token in decoder.items()}
        described = {token.content for token in tokens.values()}
    else:
        tokens = {
            _number(i, old): AddedToken(name, normalized=name not in named, special=name in named)
            for name, i in listed.items()
        }
        described = {*listed, *_added_to(backend)}
    if not names.get("mask_token"):
        described -= {mask}  # by the class alone
    for i in sorted(tokens):
        token = tokens[i]
        token.special = token.special or token.content in named
        backend.add_tokens([token])
        _check_id(backend, token.content, i, said if decoder is not None else old)
    for name, i in listed.items():
        _check_id(backend, name, _number(i, old), old)
    extra = {_content(token) for token in _extra(names)}
    present = _added_to(backend)
    for one in special:
        content = _content(one)
        if backend.token_to_id(content) is None and content not in extra:
            continue  # such as a bos_token that no text of this model has
        if isinstance(one, dict) and content not in described:
            backend.add_special_tokens([_added(one | {"special": True}, said)])
        elif content not in present:
            backend.add_special_tokens([content])


def _added_to(backend: tokenizers.Tokenizer) -> set[str]:
    return {token.content for token in backend.get_added_tokens_decoder().values()}


def _special(names: dict[str, Any], mask: str) -> list[str | dict[str, Any]]:
    """The tokens with a part of their own, as the settings give them or the class does."""
    given = [names[key] for key in NAMED_TOKENS if names.get(key)]
    given += _extra(names)
    if mask and not isinstance(names.get("mask_token"), dict):
        name = names.get("mask_token") or mask
        given.append({"content": name, "lstrip": True, "normalized": False})
    return given


def _extra(names: dict[str, Any]) -> list[str | dict[str, Any]]:
    """Special tokens of this model alone; transformers 5 has the second key for both."""
    more = names.get("extra_special_tokens") or []
    more = more.values() if isinstance(more, dict) else more
    return [*(names.get("additional_special_tokens") or []), *more]


def _content(token: Any) -> str:
    return str(token.get("content")) if isinstance(token, dict) else str(token)


def _added(token: Any, path: Path) -> AddedToken:
    text = token.get("content") if isinstance(token, dict) else None
    _check(isinstance(text, str) and len(text) <= LONGEST, path, "a token", token)
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    return AddedToken(token["content"], **{key: bool(token[key]) for key in flags if key in token})


def _number(value: Any, path: Path) -> int:
    _check(str(value).isdecimal(), path, "the id of an added token", value)
    return int(value)


def _check(good: bool, path: Path, what: str, value: Any) -> None:
    if not good:
        raise UserError(f"{path}: {what} is not as transformers writes it. Got {shown(value, 60)}.")


def _check_id(backend: tokenizers.Tokenizer, token: str, number: int, path: Path) -> None:
    got = backend.token_to_id(token)
    if got != number:
        other = "the other files do not have it" if got is None else f"by the other files {got}"
        raise UserError(
            f"{path}: the added token {shown(token, 40)} must have the id {clipped(number, 20)}; "
            f"{other}. Fetch all "
            f"files of one version of the model."
        )


def _without_types(backend: tokenizers.Tokenizer, frame: Frame) -> None:
    """Makes all token types 0."""
    if not any((*frame.middle_types, frame.second_type, *frame.end_types)):
        return
    parts = {"before": frame.before, "after": frame.after, "middle": frame.middle, "end": frame.end}
    backend.post_processor = processors.TemplateProcessing(
        single=["before:0", "$A:0", "after:0"],
        pair=["before:0", "$A:0", "middle:0", "$B:0", "end:0"],
        special_tokens=[
            {"id": name, "ids": ids, "tokens": [backend.id_to_token(i) for i in ids]}
            for name, ids in parts.items()
        ],
    )
