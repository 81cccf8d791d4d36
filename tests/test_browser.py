"""The example page, in a real browser."""

import functools
import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny

from ejax.bundle import load_bundle
from ejax.export.onnx import export_onnx
from ejax.models.ngrams import hashed
from ejax.onnx import OnnxClassifier

PAGE = Path(__file__).parents[1] / "examples" / "browser"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not shutil.which("node"), reason="needs Node.js")


def node(*args: object, cwd: Path) -> str:
    done = subprocess.run(
        ["node", *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_n_grams_have_the_same_buckets_in_javascript() -> None:
    draw = np.random.default_rng(0)
    ids = draw.integers(0, 1 << 31, (3, 200)).astype(np.int32)
    ids[2] &= 1
    buckets = f"{json.dumps(ids.T.tolist())}.map((row) => hashed(...row, 1 << 18))"
    script = (
        f"import('{PAGE / 'ejax.mjs'}')"
        f".then(({{ hashed }}) => console.log(JSON.stringify({buckets})))"
    )
    found = json.loads(node("-e", script, cwd=PAGE))
    with np.errstate(over="ignore"):  # wrapping is meant
        wanted = np.stack(hashed(*ids, 1 << 18), axis=1)
    assert found == wanted.tolist()


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[tuple[Path, str]]:
    """The page with its packages, served here; models go next to it."""
    if not CHROMIUM or not shutil.which("npm"):
        pytest.skip("needs Chromium and npm")
    folder = tmp_path_factory.mktemp("site")
    for path in PAGE.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    got = subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund"], cwd=folder, capture_output=True, text=True
    )
    if got.returncode:
        pytest.skip(f"npm has no packages: {got.stderr.strip().splitlines()[-1:]}")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    serve = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.slow
def test_the_page_answers_as_python_does(site, tmp_path: Path) -> None:
    folder, url = site
    fields = [*tiny.train_args(tmp_path / "bundle"), "layers=0,1,3", "evals=4"]
    assert tiny.ejax(*fields).code == 0
    bundle = load_bundle(tmp_path / "bundle")
    assert bundle.exits.has_zero
    export_onnx(bundle, folder / "model", operators="standard")
    clf = OnnxClassifier.from_pretrained(folder / "model")
    texts = [text for _, text in tiny.rows(30, seed=7)]
    texts += ["great " * 300 + "awful", "a café — “great” 日本語"]
    file = tmp_path / "texts.json"
    file.write_text(json.dumps(texts))
    for threshold, value in (("own", None), ("0", 0.0), ("0.8", 0.8), ("1.01", 2.0)):
        found = json.loads(node("check.mjs", url, CHROMIUM, file, threshold, cwd=folder))
        wanted = clf(texts, threshold=value)
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours["label"] == theirs["label"]
            assert ours["exit_layer"] == theirs["exit_layer"]
            # Both are float32 by other products of the same numbers.
            assert ours["score"] == pytest.approx(theirs["score"], abs=1e-5)
    assert {each["exit_layer"] for each in wanted} == {3}


@pytest.mark.slow
def test_a_page_without_a_model_says_what_is_missing(site, tmp_path: Path) -> None:
    folder, url = site
    file = tmp_path / "texts.json"
    file.write_text('["a text"]')
    said = json.loads(node("check.mjs", url + "?model=none", CHROMIUM, file, "own", cwd=folder))
    assert said["error"].startswith("none/exits.json is not there")
