"""Hugging Face weights in, Hugging Face hidden states out.

The bound is 1e-5 in float32 on every layer and every position, padding included
(measured: 3e-6). The goldens and the script that made them are in tests/goldens.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import vocabularies

from ejax import assets
from ejax.data.tokenizer import load_tokenizer
from ejax.models.bert import Batch, BertModel
from ejax.models.weights import load_bert

GOLDENS = Path(__file__).parent / "goldens"
SETTINGS = ("gelu", "gelu_new", "relu")


def hidden_states(name, batch, **overrides):
    """float32 [L + 1, B, T, D]."""
    cfg, params = load_bert(name, dtype="float32", **overrides)
    _, hidden = BertModel(cfg).apply({"params": params}, batch, output_hidden_states=True)
    return np.asarray(hidden)


@pytest.fixture(scope="module")
def tiny():
    return dict(np.load(GOLDENS / "bert_tiny.npz"))


@pytest.fixture(scope="module")
def minilm():
    try:
        return assets.resolve("all-MiniLM-L6-v2")
    except ValueError as error:
        pytest.skip(f"all-MiniLM-L6-v2 cannot be fetched here: {error}")


@pytest.mark.parametrize("act", SETTINGS)
def test_tiny_bert_gives_the_hidden_states_of_hugging_face(tiny, act):
    eps = float(tiny["eps"][SETTINGS.index(act)])
    batch = Batch(tiny["ids"], tiny["mask"], tiny["types"])
    hidden = hidden_states(GOLDENS / "bert_tiny", batch, hidden_act=act, layer_norm_eps=eps)
    assert hidden.shape == (4, 2, 7, 20)
    for layer, (ours, theirs) in enumerate(zip(hidden, tiny[act], strict=True)):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5, err_msg=f"layer {layer}")


def test_the_goldens_tell_the_settings_apart(tiny):
    """Else a wrong activation or epsilon would pass above."""
    for other in SETTINGS[1:]:
        assert np.abs(tiny["gelu"][1:] - tiny[other][1:]).max(axis=(1, 2, 3)).min() > 1e-4
    hidden = hidden_states(GOLDENS / "bert_tiny", Batch(tiny["ids"], tiny["mask"]))
    assert np.abs(hidden - tiny["gelu"])[1:].max() > 0.1  # token types
    hidden = hidden_states(GOLDENS / "bert_tiny", Batch(tiny["ids"], None, tiny["types"]))
    assert np.abs(hidden - tiny["gelu"])[1:, 1, :4].max() > 0.1  # the padding mask


def test_minilm_gives_the_hidden_states_of_hugging_face(minilm):
    golden = np.load(GOLDENS / "minilm.npz")
    hidden = hidden_states(minilm, Batch(golden["ids"], golden["mask"], golden["types"]))
    few = hidden[:, :, golden["tokens"], :4]
    assert few.shape == (7, 2, 3, 4)
    np.testing.assert_allclose(few, golden["hidden"], rtol=0, atol=1e-5)


# Live, where transformers with Flax is installed: `pip install -e ".[parity]"`.


@pytest.fixture(scope="module")
def transformers():
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed: it is in the extra `parity`")
    import transformers

    try:
        _ = transformers.FlaxBertModel.from_pretrained
    except (AttributeError, ImportError) as error:
        pytest.skip(f"this transformers has no Flax BERT, the extra `parity` does: {error}")
    return transformers


def live(transformers, folder, batch, **settings):
    import jax

    config = transformers.BertConfig.from_pretrained(folder, **settings)
    model = transformers.FlaxBertModel.from_pretrained(folder, config=config)
    with jax.default_matmul_precision("highest"):
        out = model(batch.ids, batch.mask, batch.types, output_hidden_states=True)
    return np.stack([np.asarray(x) for x in out.hidden_states])


def test_live_the_goldens_are_what_hugging_face_gives(transformers, tiny):
    batch = Batch(tiny["ids"], tiny["mask"], tiny["types"])
    for act, eps in zip(SETTINGS, tiny["eps"], strict=True):
        theirs = live(
            transformers, GOLDENS / "bert_tiny", batch, hidden_act=act, layer_norm_eps=float(eps)
        )
        np.testing.assert_allclose(theirs, tiny[act], rtol=0, atol=1e-5)


def test_live_minilm_all_hidden_states(transformers, minilm):
    rng = np.random.default_rng(3)
    lengths = np.asarray([40, 17, 5])
    mask = (np.arange(40) < lengths[:, None]).astype(np.int32)
    ids = (rng.integers(1000, 30000, (3, 40)) * mask).astype(np.int32)
    types = (np.arange(40) >= lengths[:, None] // 2).astype(np.int32) * mask
    batch = Batch(ids, mask, types)
    theirs = live(transformers, minilm, batch)
    ours = hidden_states(minilm, batch)
    assert ours.shape == theirs.shape == (7, 3, 40, 384)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", vocabularies.FOLDERS)
def test_live_tokens_are_those_of_the_goldens(transformers, tmp_path, name):
    """And of a tokenizer that is saved here and read there, by its tokenizer_config.json."""
    expected = json.loads(vocabularies.GOLDENS.read_text(encoding="utf-8"))[name]
    folder = vocabularies.write(name, tmp_path / "from")
    assert vocabularies.of_transformers(folder) == expected
    tokenizer = load_tokenizer(folder)
    tokenizer.save(tmp_path / "to")
    settings = json.dumps(tokenizer.hf_settings())
    (tmp_path / "to" / "tokenizer_config.json").write_text(settings)
    assert vocabularies.of_transformers(tmp_path / "to") == expected
