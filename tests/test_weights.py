"""Checkpoints in and out: names, types, shapes, and what the errors say."""

import functools
import json
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_trees_all_equal as same
from safetensors.numpy import load_file, save_file

from ejax.config import BertConfig, ExitConfig
from ejax.models.bert import Batch, BertModel
from ejax.models.early_exit import EarlyExitBert
from ejax.models.weights import from_hf, load_bert, read_config, to_hf, with_pretrained

TINY = Path(__file__).parent / "goldens" / "bert_tiny"  # D 20, H 5, L 3, F 37, V 101, P 11
E5 = Path(__file__).parents[2] / "shared" / "models" / "e5-small-12l"
BATCH = Batch(np.zeros((2, 3), np.int32))


@pytest.fixture(scope="module")
def tensors():
    return load_file(TINY / "model.safetensors")


@pytest.fixture(scope="module")
def cfg():
    return read_config(TINY)


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(TINY, tmp_path / "bert"))


def edit_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


# from_hf and to_hf


def test_round_trip_is_bit_for_bit(tensors, cfg):
    back = to_hf(from_hf(tensors, cfg), cfg)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == np.float32
        assert back[name].flags.c_contiguous
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def test_the_tree_is_the_one_the_model_makes(tensors, cfg):
    made = jax.eval_shape(BertModel(cfg).init, jax.random.key(0), BATCH)["params"]
    params = from_hf(tensors, cfg)
    pooler = params.pop("pooler")
    assert pooler["kernel"].shape == (20, 20)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, dict(made))


def test_kernels_are_laid_out_input_first_heads_split(tensors, cfg):
    params = from_hf(tensors, cfg)
    x = np.random.default_rng(0).standard_normal(20).astype(np.float32)
    name = "bert.encoder.layer.1.attention"
    query = tensors[f"{name}.self.query.weight"] @ x
    np.testing.assert_allclose(
        np.einsum("d,dhk->hk", x, params["layers"]["query"]["kernel"][1]).reshape(-1),
        query,
        atol=1e-5,
    )
    output = tensors[f"{name}.output.dense.weight"] @ x
    np.testing.assert_allclose(
        np.einsum("hk,hkd->d", x.reshape(5, 4), params["layers"]["attention_output"]["kernel"][1]),
        output,
        atol=1e-5,
    )


def test_names_without_prefix_old_norm_names_and_other_heads(tensors, cfg):
    other = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("bert.")
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        other[name.replace("LayerNorm.bias", "LayerNorm.beta")] = tensor
    other["cls.predictions.bias"] = np.zeros(101, np.float32)
    other["classifier.weight"] = np.zeros((2, 20), np.float32)
    other["embeddings.position_ids"] = np.arange(11)[None]
    other["bert.embeddings.token_type_ids"] = np.zeros((1, 11), np.int64)
    same(from_hf(other, cfg), from_hf(tensors, cfg))


def test_a_checkpoint_without_pooler(tensors, cfg):
    bare = {name: x for name, x in tensors.items() if "pooler" not in name}
    params = from_hf(bare, cfg)
    assert set(params) == {"embeddings", "layers"}
    assert to_hf(params, cfg).keys() == bare.keys()


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float64])
def test_other_float_types_become_float32_exactly(folder, tensors, cfg, dtype):
    stored = {name: x.astype(dtype) for name, x in tensors.items()}
    save_file(stored, folder / "model.safetensors")
    _, params = load_bert(folder)
    same(params, from_hf({name: x.astype(np.float32) for name, x in stored.items()}, cfg))
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}


LAYER = "bert.encoder.layer.1"
EXTRA = {"bert." + 9999 * "x": np.zeros(1), "bert.y": np.zeros(1)}


@pytest.mark.parametrize(
    ("name", "tensor", "line"),
    [
        (f"{LAYER}.output.dense.bias", None, "missing: "),
        (f"{LAYER}.attention.self.extra.weight", np.zeros(3, np.float32), "unexpected: "),
        ("bert.pooler.dense.bias", np.zeros(19, np.float32), "must be (20,). Got (19,)"),
        (f"{LAYER}.intermediate.dense.bias", np.zeros(37, np.int8), "must be one of float32, "),
        ("encoder.layer.1.output.dense.bias", np.zeros(20, np.float32), "twice: "),
        (f"{LAYER}.output.dense.bias", np.full(20, np.inf, np.float32), "not finite: "),
        (f"{LAYER}.output.dense.bias", np.full(20, 1e300), "not finite: "),  # as float32
    ],
)
def test_a_tensor_that_does_not_fit_is_named(folder, tensors, name, tensor, line):
    wrong = {k: x for k, x in tensors.items() if k != name}
    save_file(wrong if tensor is None else wrong | {name: tensor}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="1 of the encoder's tensors do not fit") as error:
        load_bert(folder)
    text = str(error.value)
    assert text.startswith(str(folder / "model.safetensors"))
    assert line in text
    assert name.removeprefix("bert.") in text


def test_the_first_misfits_are_in_one_error(tensors, cfg):
    with pytest.raises(ValueError, match="18 of the encoder's tensors do not fit") as error:
        from_hf({k: x for k, x in tensors.items() if "layer.1" not in k} | EXTRA, cfg)
    assert str(error.value).endswith("more")
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "asked", [{"num_hidden_layers": 10**9}, {"vocab_size": 10**12}, {"intermediate_size": 2**62}]
)
def test_a_config_that_asks_for_more_than_the_file_holds_allocates_nothing(tensors, cfg, asked):
    with pytest.raises(ValueError, match="of the encoder's tensors do not fit") as error:
        from_hf(tensors, BertConfig(**{**vars(cfg), **asked}))
    assert len(str(error.value)) < 500


def test_another_number_of_layers_is_said_in_words(tensors, cfg):
    fewer = BertConfig(**{**vars(cfg), "num_hidden_layers": 2})
    with pytest.raises(ValueError, match=r"\(3 layers found, num_hidden_layers is 2\)"):
        from_hf(tensors, fewer)


def test_a_file_of_another_model(cfg):
    with pytest.raises(ValueError, match="holds no tensor of a BERT encoder"):
        from_hf({"roberta.encoder.layer.0.output.dense.bias": np.zeros(20, np.float32)}, cfg)


def test_to_hf_names_the_leaves_that_do_not_fit(tensors, cfg):
    params = from_hf(tensors, cfg)
    params["layers"]["query"]["bias"] = np.zeros((3, 20), np.float32)
    del params["embeddings"]["word"]
    with pytest.raises(ValueError, match="2 of the parameters do not fit the config") as error:
        to_hf(params, cfg)
    assert "missing: embeddings/word/embedding" in str(error.value)
    assert "layers/query/bias must be (3, 5, 4). Got (3, 20)" in str(error.value)


# load_bert: files


def test_load_bert_takes_overrides():
    cfg, _ = load_bert(TINY, dtype="float32", layer_norm_eps=1e-5)
    assert (cfg.dtype, cfg.layer_norm_eps, cfg.num_hidden_layers) == ("float32", 1e-5, 3)
    with pytest.raises(ValueError, match=r"no field 'dtpye'. Did you mean 'dtype'"):
        load_bert(TINY, dtpye="float32")


def test_missing_files(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no model.safetensors") as error:
        load_bert(folder)
    assert "it holds config.json, pytorch_model.bin. Convert pytorch_model.bin" in str(error.value)
    (folder / "model.safetensors").symlink_to("../../blobs/3f")
    with pytest.raises(ValueError, match=r"is a link to ../../blobs/3f, which leads nowhere"):
        load_bert(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_bert(folder)


@pytest.mark.parametrize("size", [0, 5, 900, 56000])
def test_a_damaged_file(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read, it may be damaged"):
        load_bert(folder)


def in_shards(folder, tensors):
    """As transformers writes a checkpoint that is larger than max_shard_size."""
    (folder / "model.safetensors").unlink()
    where = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for shard in set(where.values()):
        held = {name: x for name, x in tensors.items() if where[name] == shard}
        save_file(held, folder / shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return index


def test_a_checkpoint_in_shards(folder, tensors, cfg):
    index = in_shards(folder, tensors)
    same(load_bert(folder)[1], from_hf(tensors, cfg))
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of the 3 files .* model-00002-of-00003\.safe"):
        load_bert(folder)
    for content in ('{"weight_map": {"a": "../model.safetensors"}}', '{"weight_map": []}', "{}"):
        index.write_text(content)
        with pytest.raises(ValueError, match=r"index\.json must hold weight_map"):
            load_bert(folder)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 133466304\n"


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_pointer_of_git_lfs(folder, file):
    (folder / file).write_text(POINTER)
    with pytest.raises(ValueError, match=rf"{file} is a Git LFS pointer, .* `git lfs pull`"):
        load_bert(folder)


@pytest.mark.parametrize("config", [None, '{"__version__": "0.3"}'])
def test_an_old_sentence_transformers_names_the_folder_of_its_bert(folder, tmp_path, config):
    root = tmp_path / "root"
    root.mkdir()
    folder.rename(root / "0_Transformer")
    if config:
        (root / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"old sentence-transformers.*: give .*/0_Transformer\.$"):
        load_bert(root)
    assert load_bert(root / "0_Transformer")


# read_config


def test_keys_that_do_not_change_the_encoder_are_ignored(folder, cfg):
    edit_config(
        folder,
        architectures=["BertForMaskedLM"],
        transformers_version="4.8.2",
        torch_dtype="float16",
        dtype="float16",  # how it is stored, not how to compute
        use_cache=True,
        classifier_dropout=None,
        gradient_checkpointing=False,
        id2label={"0": "no"},
        position_embedding_type="absolute",
        pad_token_id=None,
        is_decoder=False,
        pruned_heads={},
    )
    assert read_config(folder) == cfg


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "roberta", "model_type must be 'bert', the only one supported. Got 'rob"),
        ("model_type", "xlm-roberta", "model_type must be 'bert', .*Got 'xlm-roberta'"),
        ("position_embedding_type", "relative_key", "position_embedding_type must be 'absolute'"),
        ("is_decoder", True, "is_decoder must be False"),
        ("add_cross_attention", True, "add_cross_attention must be False"),
        ("pruned_heads", {"0": [1]}, "pruned_heads must be {}"),
        ("quantization_config", {"bits": 4}, "quantization_config must be {}"),
        ("hidden_act", "silu", "hidden_act must be one of 'gelu', .*Got 'silu'"),
        ("num_attention_heads", 3, r"hidden_size must be a multiple of num_attention_heads \(3\)"),
        ("hidden_size", "20", "hidden_size must be int. Got '20'"),
    ],
)
def test_settings_that_change_the_maths_are_refused(folder, key, value, message):
    edit_config(folder, **{key: value})
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        read_config(folder)


def test_config_that_is_not_json(folder):
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config\.json is damaged: it is not JSON: .* line 1"):
        read_config(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"must hold a JSON object. Got list"):
        read_config(folder)


# with_pretrained


@functools.cache
def fresh(cfg):
    model = EarlyExitBert(cfg, ExitConfig(layers=(1, 2), num_labels=4))
    return model, jax.jit(model.init)(jax.random.key(1), BATCH)


def fresh_shapes(cfg, layers=(1, 2)):
    model = EarlyExitBert(cfg, ExitConfig(layers=layers, num_labels=4))
    return jax.eval_shape(model.init, jax.random.key(1), BATCH)


def test_with_pretrained_cuts_the_encoder_and_leaves_its_arguments_alone():
    cfg, bert = load_bert(TINY, dtype="float32")
    model, variables = fresh(cfg)
    before = jax.tree.map(np.array, variables)
    start = with_pretrained(variables, bert)
    same(variables, before)
    assert jax.tree.structure(start) == jax.tree.structure(variables)
    same(start["params"]["heads"], before["params"]["heads"])
    same(start["params"]["bert"]["layers"], jax.tree.map(lambda x: x[:2], bert["layers"]))
    same(start["params"]["bert"]["embeddings"], bert["embeddings"])
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(start["params"]["bert"]))
    logits = model.apply(start, Batch(np.asarray([[1, 7, 9, 2]], np.int32)))
    assert logits.shape == (2, 1, 4)


def test_with_pretrained_does_not_share_memory_with_the_checkpoint():
    cfg, bert = load_bert(TINY)
    start = with_pretrained(fresh_shapes(cfg, (3,)), bert)
    before = np.array(start["params"]["bert"]["embeddings"]["word"]["embedding"])
    bert["embeddings"]["word"]["embedding"][:] = 5
    np.testing.assert_array_equal(
        start["params"]["bert"]["embeddings"]["word"]["embedding"], before
    )


def test_the_pooler_starts_every_exit():
    cfg, bert = load_bert(TINY, dtype="float32")
    _, variables = fresh(cfg)
    start = with_pretrained(variables, bert, pooler=True)
    dense = start["params"]["heads"]["exits"]["dense"]
    for exit in range(2):
        np.testing.assert_array_equal(dense["kernel"][exit], bert["pooler"]["kernel"])
        np.testing.assert_array_equal(dense["bias"][exit], bert["pooler"]["bias"])
    same(start["params"]["heads"]["mix"], variables["params"]["heads"]["mix"])
    same(
        start["params"]["heads"]["exits"]["classifier"],
        variables["params"]["heads"]["exits"]["classifier"],
    )
    del bert["pooler"]
    start = with_pretrained(variables, bert, pooler=True)
    same(start["params"]["heads"], variables["params"]["heads"])


def test_with_pretrained_errors(tensors):
    cfg, bert = load_bert(TINY)
    deeper = BertConfig(**{**vars(cfg), "num_hidden_layers": 5})
    with pytest.raises(ValueError, match="needs 5 layers and the checkpoint has 3: choose exits"):
        with_pretrained(fresh_shapes(deeper, (2, 5)), bert)
    wider = BertConfig(**{**vars(cfg), "vocab_size": 99, "intermediate_size": 30})
    with pytest.raises(ValueError, match="4 of the parameters do not fit the model") as error:
        with_pretrained(fresh_shapes(wider), bert)
    assert "embeddings/word/embedding must be (99, 20). Got (101, 20)" in str(error.value)
    assert "layers/output/kernel must be (2, 30, 20). Got (2, 37, 20)" in str(error.value)
    with pytest.raises(ValueError, match="the second value that load_bert returns"):
        with_pretrained(fresh_shapes(cfg), (cfg, bert))
    with pytest.raises(ValueError, match=r"as EarlyExitBert.init gives"):
        with_pretrained(bert, bert)


@pytest.mark.skipif(not E5.is_dir(), reason="needs a 12-layer float16 BERT beside the repository")
def test_a_real_float16_checkpoint_of_twelve_layers():
    cfg, bert = load_bert(E5)
    assert cfg.num_hidden_layers == 12
    assert "pooler" not in bert
    assert bert["layers"]["query"]["kernel"].shape == (12, 384, 12, 32)
    back = to_hf(bert, cfg)
    for name, tensor in load_file(E5 / "model.safetensors").items():
        if not name.endswith("position_ids"):
            np.testing.assert_array_equal(back[f"bert.{name}"], tensor.astype(np.float32))
