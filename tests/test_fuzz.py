"""Bundles and models whose files were changed: as before, or one short sentence refuses them.

`EJAX_FUZZ=800 python -m pytest tests/test_fuzz.py` tries as many changes of each.
"""

import functools
import json
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import vocabularies
from safetensors.numpy import load_file, save_file

from ejax.bundle import load_bundle
from ejax.bundle_files import FILES
from ejax.classifier import EarlyExitClassifier
from ejax.data.tokenizer import load_tokenizer
from ejax.errors import UserError
from ejax.evaluation.describe import exit_tables, facts, model_facts
from ejax.models.weights import load_bert

COUNT = int(os.environ.get("EJAX_FUZZ", "75"))
LONGEST = 500  # characters of a sentence, with a temporary folder of up to 120
TEXTS = ["the film was great", "an awful plot", "music and a poor cast tonight", ""]
OLD = Path(__file__).parent / "goldens" / "bundle_format_3"  # no sums protect its files
VALUES: list[Any] = [
    None, True, 0, -1, 1, 2, 3, 10**9, 2**63, 10**39, -0.5, 1e-45, 0.5, 1e38, "", "1", "x" * 99_999,
    "\ud800", [], [[]], [0.5], ["a"], [1, 2, 3], {}, {"a": 1}, {"0": "x", "1": "x"}, {"1": "x"},
    [7] * 9999,
]  # fmt: skip
TEXTUAL = (
    "1e999", "-1e999", "NaN", "Infinity", "1" * 400, "9" * 5000, "[" * 1100 + "]" * 1100,
    '{"a": 1, "a": 2}', '{"a":' * 99 + "1" + "}" * 99,
)  # fmt: skip


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to every value in a JSON file."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for name, one in inner:
        yield (*above, name)
        if isinstance(one, dict | list):
            yield from places(one, (*above, name))


def change(path: Path, draw: random.Random) -> str:
    """Changes one file in one place; says how."""
    raw = bytearray(path.read_bytes())
    how = draw.choice(
        ("flip", "cut", "text") if path.suffix != ".json" else ("flip", "cut", *"jjjjjj", "text")
    )
    if path.suffix == ".txt":
        how = draw.choice(("flip", "cut"))
    if how == "flip":
        for _ in range(draw.choice((1, 1, 3))):
            raw[draw.randrange(min(len(raw), draw.choice((200, len(raw)))))] ^= 1 << draw.randrange(
                8
            )
    elif how == "cut":
        raw = raw[: draw.randrange(len(raw))]
    elif path.suffix != ".json":
        tensors = load_file(path)
        name = draw.choice(sorted(tensors))
        one = tensors[name]
        changed = (
            one.astype(np.int32),
            one.astype(np.float64)[..., None],
            one[:0],
            np.full_like(one, 127),
            np.full_like(one, np.nan, np.float32),
        )
        tensors[name] = draw.choice(changed)
        if draw.random() < 0.3:
            del tensors[name]
        save_file(tensors, path)
        return f"{path.name}: {name}"
    else:
        content = json.loads(raw)
        place = draw.choice(list(places(content)))
        inner = functools.reduce(lambda value, name: value[name], place[:-1], content)
        value = draw.choice(VALUES)
        if how == "text":
            inner[place[-1]] = "HERE"
            text = draw.choice(TEXTUAL)
            raw = bytearray(json.dumps(content).replace('"HERE"', text, 1).encode())
            value = text[:20]
        elif draw.random() < 0.1:
            del inner[place[-1]]
            value = "gone"
        else:
            inner[place[-1]] = value
        if how != "text":
            raw = bytearray(json.dumps(content).encode())
        how = f"{place} {str(value)[:20]!a}"
    path.write_bytes(raw)
    return f"{path.name}: {how}"


def outcome(folder: Path) -> tuple[list[Any], list[str]]:
    """(answers, warnings)."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        bundle = load_bundle(folder, dtype="float32")
        facts(bundle), exit_tables(bundle)
        answers = EarlyExitClassifier(bundle)(TEXTS)
    return answers, [str(one.message) for one in said]


def tried(
    source: Path, folder: Path, files: list[str], outcome: Callable[[Path], Any] = outcome
) -> Iterator[tuple[str, Any]]:
    """(how it was changed, its answers and warnings, or None where it was refused)."""
    draw = random.Random(0)
    for i in range(COUNT):
        shutil.copytree(source, folder)
        name = draw.choice(files)
        how = f"change {i}, {change(folder / name, draw)}"
        found, sentence = None, ""
        try:
            found = outcome(folder)
        except UserError as error:
            sentence = str(error)
        except BaseException as error:
            raise AssertionError(how) from error
        assert len(sentence) < LONGEST, (how, sentence[:LONGEST])
        yield how, found
        shutil.rmtree(folder)


def test_a_changed_bundle_answers_as_before_or_says_so(tmp_path: Path) -> None:
    source = tiny.trained()[0]
    before, refused = outcome(source)[0], 0
    for how, found in tried(source, tmp_path / "bundle", [*FILES, "rows.json"]):
        refused += found is None
        if found is not None and found[0] != before:
            assert any("changed after the bundle was saved" in one for one in found[1]), how
    assert COUNT / 3 < refused < COUNT


def test_a_changed_bundle_of_an_older_format_raises_nothing_else(tmp_path: Path) -> None:
    for how, found in tried(OLD, tmp_path / "bundle", [*FILES]):
        for answer in found[0] if found else []:
            assert 0 <= answer["score"] <= 1, how


def model(folder: Path) -> None:
    """One whose tokenizer stands in every file that may say something of it, with one shard."""
    shutil.copytree(tiny.model(), folder)
    made = vocabularies.wordpiece(lower=True)
    made.save(str(folder / "tokenizer.json"))
    shard = "model-00001-of-00001.safetensors"
    weights = (folder / "model.safetensors").rename(folder / shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(weights), shard)}
    user = {"content": "[USER]", "lstrip": False, "rstrip": False, "normalized": False,
            "single_word": False, "special": True}  # fmt: skip
    size = made.get_vocab_size()
    for name, content in {
        "model.safetensors.index.json": index,
        "special_tokens_map.json": {"unk_token": "[UNK]", "additional_special_tokens": [user]},
        "added_tokens.json": {"[USER]": size},
        "tokenizer_config.json": {
            "tokenizer_class": "BertTokenizer", "do_lower_case": True, "strip_accents": None,
            "tokenize_chinese_chars": True, "model_max_length": 512, "cls_token": "[CLS]",
            "mask_token": user | {"content": "[MASK]"}, "model_input_names": ["token_type_ids"],
            "added_tokens_decoder": {str(size): user}, "additional_special_tokens": ["[USER]"],
        },
    }.items():  # fmt: skip
        (folder / name).write_text(json.dumps(content))


def read_model(folder: Path) -> list[Any]:
    """Its tokens of texts, and its shape."""
    cfg, params = load_bert(folder)
    model_facts(cfg, params)
    tokens = load_tokenizer(folder)
    encoded = tokens.encode([*TEXTS, ("the film", "a [USER] plot")], 16)
    assert 0 <= encoded.ids.min() <= encoded.ids.max() < tokens.vocab_size
    assert encoded.lengths.max() <= 16
    return [encoded.ids.tolist(), params["embeddings"]["word"]["embedding"].shape]


def test_a_changed_model_is_read_or_refused(tmp_path: Path) -> None:
    model(tmp_path / "whole")
    read_model(tmp_path / "whole")
    files = [path.name for path in (tmp_path / "whole").iterdir()]
    refused = [
        found is None
        for _, found in tried(tmp_path / "whole", tmp_path / "model", files, read_model)
    ]
    assert COUNT / 5 < sum(refused) < COUNT
