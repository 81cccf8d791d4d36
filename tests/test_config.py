"""Configurations: what is refused, and with which words; to JSON and back; overrides."""

import ast
import dataclasses
import json
import re
from pathlib import Path

import pytest

from ejax.config import (
    BertConfig,
    DataConfig,
    ExitConfig,
    TrainConfig,
    check_layers,
    field_sentences,
    from_json,
    override,
    smoke,
    to_json,
)
from train.__main__ import load_config


def test_the_defaults_are_bert_base():
    cfg = BertConfig()
    assert (cfg.num_hidden_layers, cfg.hidden_size, cfg.head_size) == (12, 768, 64)
    assert cfg.residual_dtype == "float32"


@pytest.mark.parametrize(
    ("cls", "fields", "text"),
    [
        (BertConfig, {"hidden_size": 0}, r"BertConfig.hidden_size must be at least 1. Got 0"),
        (BertConfig, {"num_hidden_layers": -1}, r"num_hidden_layers must be at least 1. Got -1"),
        (BertConfig, {"hidden_size": 20, "num_attention_heads": 3}, r"multiple of .*\(3\). Got 20"),
        (BertConfig, {"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob must be in \[0, 1\)"),
        (BertConfig, {"attention_probs_dropout_prob": -0.1}, r"attention_probs_dropout_prob must"),
        (BertConfig, {"hidden_act": "swish"}, r"hidden_act must be one of 'gelu'.*Got 'swish'"),
        (BertConfig, {"dtype": "float16"}, r"dtype must be one of 'float32', 'bfloat16'"),
        (BertConfig, {"hidden_size": "768"}, r"hidden_size must be int. Got '768'"),
        (BertConfig, {"num_attention_heads": True}, r"num_attention_heads must be int. Got True"),
        (BertConfig, {"hidden_size": 768.0}, r"hidden_size must be int. Got 768.0"),
        (ExitConfig, {"layers": (), "num_labels": 2}, r"exit layers must be ascending"),
        (ExitConfig, {"layers": (0,), "num_labels": 2}, r"the last one at least 1.*Got \(0,\)"),
        (ExitConfig, {"layers": (-1, 2), "num_labels": 2}, r"0 or above.*Got \(-1, 2\)"),
        (
            ExitConfig,
            {"layers": (0, 1), "num_labels": 2, "buckets": 12},
            r"a power of two, at most 2\^24. Got 12",
        ),
        (ExitConfig, {"layers": (2, 1), "num_labels": 2}, r"ascending.*Got \(2, 1\)"),
        (ExitConfig, {"layers": (1, 1), "num_labels": 2}, r"ascending.*Got \(1, 1\)"),
        (ExitConfig, {"layers": (1.0, 2.0), "num_labels": 2}, r"layers must be a tuple of int"),
        (ExitConfig, {"layers": (1,), "num_labels": 1}, r"at least 2: a classifier.*Got 1"),
        (ExitConfig, {"layers": (1,), "num_labels": 2, "pooling": "max"}, r"'cls', 'mean'"),
        (ExitConfig, {"layers": (1,), "num_labels": 2, "mix": "sum"}, r"'softmax', 'last'"),
        (DataConfig, {"max_length": 3}, r"data.max_length must be at least 4 tokens. Got 3"),
        (DataConfig, {"dev_fraction": 1.0}, r"data.dev_fraction must be between 0 and 1"),
        (DataConfig, {"limit": -1}, r"data.limit must be 0 \(all\) or above. Got -1"),
        (DataConfig, {"buckets": (32, 16)}, r"data.buckets must be ascending.*\(32, 16\)"),
        (DataConfig, {"buckets": ()}, r"data.buckets must be ascending"),
        (TrainConfig, {"epochs": -1}, r"epochs must be 0 or above. Got -1"),
        (TrainConfig, {"batch_size": 0}, r"batch_size must be at least 1"),
        (TrainConfig, {"gradient_stop": 1.5}, r"gradient_stop must be between 0 .* Got 1.5"),
        (TrainConfig, {"gradient_stop": True}, r"gradient_stop must be a finite float. Got True"),
        (TrainConfig, {"clip_norm": float("inf")}, r"clip_norm must be a finite float. Got inf"),
        (TrainConfig, {"learning_rate": 0.0}, r"learning_rate must be above 0"),
        (TrainConfig, {"warmup_fraction": 1.0}, r"warmup_fraction must be in \[0, 1\)"),
        (TrainConfig, {"max_drop": -0.5}, r"max_drop must be 0 or above. Got -0.5"),
        (TrainConfig, {"layers": (3, 2)}, r"exit layers must be ascending"),
        (TrainConfig, {"class_weights": (0.0, 0.0)}, r"class_weights must be .* not all 0"),
        (
            TrainConfig,
            {"class_weights": "even"},
            r"a finite float or 'balanced'. Got 'e",
        ),
        (TrainConfig, {"exit_weights": "balanced"}, r"exit_weights must be a tuple of a finite"),
        (TrainConfig, {"exit_weights": (1.0, -1.0)}, r"exit_weights must be 0 or above"),
    ],
)
def test_wrong_values_are_refused(cls, fields, text):
    with pytest.raises(ValueError, match=text):
        cls(**fields)


def test_a_whole_number_is_a_float_and_a_list_of_layers_a_tuple():
    assert TrainConfig(weight_decay=0).weight_decay == 0
    assert ExitConfig([1, 4], 2) == ExitConfig((1, 4), 2)


def test_configs_are_frozen_and_hashable():
    config = TrainConfig(layers=(1, 2))
    assert hash(config) == hash(dataclasses.replace(config))
    assert {ExitConfig((1, 4), 2): 1}[ExitConfig([1, 4], 2)] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


def test_layers_kept_and_layers_of_the_encoder():
    assert ExitConfig((1, 4, 6), 2).num_layers == 6
    check_layers((1, 12), 12)
    with pytest.raises(ValueError, match=r"at most 12, the layers of this encoder. Got \(1, 13\)"):
        check_layers((1, 13), 12)


@pytest.mark.parametrize("cls", [TrainConfig, DataConfig])
def test_every_field_has_a_sentence_for_its_help(cls):
    names = {field.name for field in dataclasses.fields(cls)} - {"data"}
    sentences = field_sentences(cls)
    assert sentences.keys() == names
    assert all(len(sentence) > 8 for sentence in sentences.values())
    assert field_sentences(DataConfig)["limit"] == "at most so many rows of each split; 0 = all"


# JSON


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(hidden_size=60, num_attention_heads=5, dtype="float32"),
        ExitConfig((1, 3), 4, pooling="cls", mix="last"),
        TrainConfig(
            model="m", layers=(1, 2), exit_weights=(1.0, 0.5),
            data=DataConfig(path="p", text_columns=("a", "b"), buckets=(8, 64)),
        ),
    ],
)  # fmt: skip
def test_json_and_back(config):
    text = json.dumps(to_json(config))
    back = from_json(type(config), json.loads(text))
    assert back == config
    assert hash(back) == hash(config)


@pytest.mark.parametrize(
    ("cls", "values", "text"),
    [
        (BertConfig, {"hiden_size": 1}, r"BertConfig has no field 'hiden_size'.*'hidden_size'"),
        (ExitConfig, {"zzz": 1}, r"no field 'zzz'. Known: layers, num_labels"),
        (TrainConfig, {"data": {"pth": ""}}, r"DataConfig has no field 'pth'. Did you mean 'path'"),
        (TrainConfig, {"data": 3}, r"TrainConfig.data must be DataConfig. Got 3"),
        (ExitConfig, {"layers": ["1"], "num_labels": 2}, r"layers must be a tuple of int"),
    ],
)
def test_wrong_json(cls, values, text):
    with pytest.raises(ValueError, match=text):
        from_json(cls, values)


# Overrides


def test_overrides():
    config = override(
        TrainConfig(),
        ["layers=1,4,6", "learning_rate=3e-5", "data.path=my folder/a=b", "data.buckets=(8,16)",
         "epochs=3", "dtype=float32", "exit_weights=1,0.5,0", "data.text_columns=a,b",
         "data.name="],
    )  # fmt: skip
    assert config.layers == (1, 4, 6)
    assert config.learning_rate == 3e-5
    assert config.data.path == "my folder/a=b"
    assert config.data.buckets == (8, 16)
    assert config.data.text_columns == ("a", "b")
    assert config.data.name == ""
    assert (config.epochs, config.dtype) == (3, "float32")
    assert config.exit_weights == (1, 0.5, 0)
    assert override(config, ["layers="]).layers == ()
    assert override(config, ["model=123"]).model == "123"
    for text in ("body (en),'x y'", '(body (en),"x y")', "[body (en), x y]"):
        columns = override(config, [f"data.text_columns={text}"]).data.text_columns
        assert columns == ("body (en)", "x y")
    assert override(config, []) == config


@pytest.mark.parametrize(
    ("assignment", "text"),
    [
        ("epochs", r"must look like field=value. Got 'epochs'"),
        ("epoch=3", r"no field 'epoch'. Did you mean 'epochs'"),
        ("data.pth=x", r"DataConfig has no field 'pth'. Did you mean 'path'"),
        ("data=x", r"data is a group of fields: set one of them, such as data.name=value"),
        ("epochs.x=3", r"epochs is a value and has no field 'x'"),
        ("epochs=three", r"epochs must be int. Got 'three'"),
        ("epochs=2.5", r"epochs must be int. Got '2.5'"),
        ("layers=1,b", r"layers must be int. Got 'b'"),
        ("dtype=half", r"dtype must be one of .*Got 'half'"),
        ("data.limit=-3", r"data.limit must be 0 \(all\) or above. Got -3"),
        ("learning_rate=nan", r"learning_rate must be"),
    ],
)
def test_wrong_overrides(assignment, text):
    with pytest.raises(ValueError, match=text):
        override(TrainConfig(), [assignment])


CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_says_how_to_run_it(path: Path) -> None:
    commands = re.findall(
        r"--config configs/(\S+)", ast.get_docstring(ast.parse(path.read_text())) or ""
    )
    assert commands
    for name in commands:
        assert name.partition(":")[0] == path.name
        config = load_config(path.with_name(name))
        assert smoke(config).epochs == 1
        assert smoke(config).data.limit == 256


def test_class_weights_are_numbers_or_a_word():
    for text, value in (("balanced", "balanced"), ("1,2.5", (1.0, 2.5)), ("1.0", (1.0,)), ("", ())):
        config = override(TrainConfig(), [f"class_weights={text}"])
        assert config.class_weights == value
        assert from_json(TrainConfig, json.loads(json.dumps(to_json(config)))) == config
    with pytest.raises(ValueError, match=r"must be one of 'balanced'. Got 'balnced'"):
        override(TrainConfig(), ["class_weights=balnced"])
