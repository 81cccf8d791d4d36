"""The TPU configs from their shapes alone, and the TPU's own compiler where it is installed."""

import dataclasses
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from ejax.config import DataConfig
from ejax.data.named import TFDS
from train.__main__ import load_config
from train.aot_tables import overview, table
from train.roofline import hbm_bytes

ROOT = Path(__file__).parents[1]
SIZES = ("base", "large")
SETS = ("ag_news", "imdb", "mnli", "snli", "sst2")
CONFIGS = [Path(f"{ROOT}/configs/bert_{size}.py:{data}") for size in SIZES for data in SETS]
# One per program: of configs that differ in their data alone the one with the most classes.
PROGRAMS = {
    dataclasses.replace(config, data=DataConfig()): path
    for config, path in sorted(
        ((load_config(path), path) for path in CONFIGS),
        key=lambda found: TFDS[found[0].data.name].classes,
    )
}.values()
COMPILER = importlib.util.find_spec("libtpu") or "TPU_LIBRARY_PATH" in os.environ
# Published sizes of the encoders, without pooler and head.
ENCODERS = {"bert_base": 108_891_648, "bert_large": 334_092_288}


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Of its own, as train.aot settles jax's platforms; with XLA's flags as they are for users.

    What is compiled is looked at, so nothing comes from the cache.
    """
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false"},
        capture_output=True,
        text=True,
    )


def python(code: str, *arguments: str) -> str:
    done = process("-c", code, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def aot(*arguments: str, code: int = 0) -> str:
    done = process("-m", "train.aot", *arguments)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_tables_name_a_model_as_it_is_written() -> None:
    part = {"rows": 8, "why": "[hbm] is full"}
    found = {
        "topology": "v4:1x1x1", "chips": 1, "tokens_per_row": 128, "chip": {"memory": 2**35},
        "training": part, "early_exit": part,
    }  # fmt: skip
    shown = io.StringIO()
    Console(file=shown, width=200).print(overview("a/[b]", [found]), table("a/[b]", found))
    assert shown.getvalue().count("a/[b]") == 2
    assert "[hbm] is full" in shown.getvalue()


def test_every_config_of_the_paper_is_there() -> None:
    assert {load_config(path).data.name for path in CONFIGS} == set(TFDS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_config_and_its_pod_variant_build(path: Path) -> None:
    one, pod = load_config(path), load_config(Path(f"{path}_pod"))
    large = "large" in path.name
    assert one.model == f"google-bert/bert-{'large' if large else 'base'}-uncased"
    assert one.layers == ((1, 5, 13, 24) if large else (1, 4, 6, 12))
    assert one.batch_size == (36 if large else 72)
    assert one.remat == large
    assert one.data.max_length == (512 if one.data.name == "imdb_reviews" else 128)
    assert pod.batch_size == 32 * one.batch_size
    assert (pod.layers, pod.data, pod.model) == (one.layers, one.data, one.model)


def test_a_config_file_without_that_name_lists_those_it_has() -> None:
    path = ROOT / "configs" / "bert_base.py"
    with pytest.raises(ValueError, match=r"must define `config = .*:NAME it has ag_news, .*mnli"):
        load_config(path)


def test_the_shapes_are_those_of_bert() -> None:
    found = python(
        "import sys, json, jax; from pathlib import Path; import train.aot\n"
        "from train.__main__ import load_config\n"
        "from train.aot_programs import models_of, shapes_of\n"
        "def count(path):\n"
        "    model, _ = models_of(load_config(Path(path)), 0)\n"
        "    shapes = shapes_of(model)\n"
        "    return sum(leaf.size for leaf in jax.tree.leaves(shapes['bert'])), "
        "shapes['heads']['exits']['classifier']['bias'].shape\n"
        "print(json.dumps([count(path) for path in sys.argv[1:]]))",
        *map(str, CONFIGS),
    )
    for path, (size, (exits, classes)) in zip(CONFIGS, json.loads(found), strict=True):
        assert size == ENCODERS[path.name.partition(".py")[0]]
        assert exits == 4
        assert classes == TFDS[load_config(path).data.name].classes


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--topology", "v9:2x2"], "--topology must be one of v4, v5e, v5p, v6e"),
        (["--topology", "v5e:2"], "Got 'v5e:2'"),
        (["--topology", "v5e:2x2", "layers=1,13"], "at most 12"),
    ],
)
def test_wrong_input(arguments: list[str], text: str) -> None:
    if "v5e:2x2" in arguments and not COMPILER:
        pytest.skip("libtpu is not installed: pip install '.[tpu]'")
    said = aot("--config", str(ROOT / "configs/bert_base.py:sst2"), *arguments, code=2)
    assert text in said
    assert "Traceback" not in said


def test_bytes_of_hbm() -> None:
    """One product: a weight is fetched to the chip, its result stays there, a norm is written."""
    program = """
%fused (p: f32[8,128]) -> f32[8,128] {
  ROOT %big = f32[1024,1024]{1,0} add(%p, %p)
}

ENTRY %main (w: bf16[128,128], x: f32[8,128]) -> f32[8,128] {
  %w = bf16[128,128]{1,0:T(8,128)(2,1)} parameter(0)
  %x = f32[8,128]{1,0:T(8,128)} parameter(1)
  %copy-start = (bf16[128,128]{1,0:S(1)}, bf16[128,128]{1,0}, u32[]{:S(2)}) copy-start(%w)
  %copy-done = bf16[128,128]{1,0:S(1)} copy-done(%copy-start)
  %slice-start = ((f32[8,128]{1,0}), f32[2,128]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x)
  %slice-done = f32[2,128]{1,0:S(1)} slice-done(%slice-start)
  %dot = (f32[8,128]{1,0:S(1)}, pred[8]{0:S(1)}) fusion(%x, %copy-done), kind=kOutput
  %part = f32[8,128]{1,0:S(1)} get-tuple-element(%dot), index=0
  ROOT %norm = f32[8,128]{1,0:T(8,128)} fusion(%part, %slice-done), calls=%fused
}
"""
    weight, x, part = 2 * 128 * 128, 4 * 8 * 128, 4 * 2 * 128
    # x is read by the product, the norm is written
    assert hbm_bytes(program) == weight + part + x + x
    assert hbm_bytes(program.replace("fusion(%part, %slice-done)", "while(%part)")) == float("inf")


def test_a_file_of_other_things_is_not_gone_on_with(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from train.aot import known_slices\n"
        "for path in sys.argv[1:]:\n"
        "    try: print(sorted(known_slices(Path(path), {'rows': [1]})))\n"
        "    except ValueError as error: print(error)"
    )
    wanted = {
        '{"asked": {"rows": [1]}, "slices": [{"topology": "v5e:1x1"}]}': "['v5e:1x1']",
        '{"asked": {"rows": [2]}, "slices": []}': "is of another config",
        "[1]": "is no file of train.aot",
        '{"asked"': "is no file of train.aot",
    }
    paths = [tmp_path / f"{i}.json" for i in range(len(wanted))]
    for path, text in zip(paths, wanted, strict=True):
        path.write_text(text)
    found = python(code, *map(str, paths)).splitlines()
    for line, said in zip(found, wanted.values(), strict=True):
        assert said in line


@pytest.mark.skipif(not COMPILER, reason="libtpu is not installed: pip install '.[tpu]'")
def test_the_tpu_compiler_takes_both_programs(tmp_path: Path) -> None:
    out = tmp_path / "aot.json"
    arguments = [
        "--config", str(ROOT / "configs/bert_base.py:sst2"), "--topology", "v5e:2x2",
        "--rows", "256", "--output", str(out),
    ]  # fmt: skip
    aot(*arguments)
    (found,) = json.loads(out.read_text())["slices"]
    step, early = found["training"], found["early_exit"]
    assert step["fits"]
    assert early["fits"]
    # XLA counts what the shapes ask for, and softmax, norms and the optimizer beside them.
    assert 0.98 < step["step"]["flops"] / step["analytic_flops"] < 1.15
    assert 0.98 < early["full_depth"]["flops"] / early["analytic_flops"] < 1.15
    # The gradients of all weights are summed over the chips, in float32.
    assert step["collectives"]["bytes"] >= step["memory"]["parameters"]
    assert np.isclose(step["memory"]["optimizer"], 2 * step["memory"]["parameters"], rtol=0.01)
    assert step["memory"]["total"] < found["chip"]["memory"]
    for layer in (step["layer"], step["layer_forward"], early["layer_forward"]):
        assert layer["least_bytes"] < layer["bytes"] < layer["xla_bytes"]
    # What a file holds is not compiled again, and it stays of one config.
    written = out.stat().st_mtime_ns
    assert "v5e:2x2" in aot(*arguments)
    assert out.stat().st_mtime_ns == written
    assert "is of another config" in aot(*arguments, "dropout=0.2", code=2)


@pytest.mark.skipif(not COMPILER, reason="libtpu is not installed: pip install '.[tpu]'")
@pytest.mark.slow
@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_a_config_fits_a_chip(path: Path) -> None:
    """A v5e alone, at the paper's batch and 128 tokens."""
    found = python(
        "import json, sys; from pathlib import Path; from train.aot import slice_of\n"
        "from ejax.hardware import compiling_for\n"
        "from train.__main__ import load_config\n"
        "from train.aot_programs import models_of, step_program\n"
        "from train.roofline import memory\n"
        "config, (chip,) = load_config(Path(sys.argv[1])), slice_of('v5e:1x1')\n"
        "with compiling_for('tpu'):\n"
        "    model, _ = models_of(config, 0)\n"
        "    made = step_program(config, model, [chip], config.batch_size, 128)[0]\n"
        "print(json.dumps(memory(made)))",
        str(path),
    )
    # The weights and Adam's two moments of each, in float32.
    assert 3 * 4 * ENCODERS[path.name.partition(".py")[0]] < json.loads(found)["total"] < 16 * 2**30
