"""Makes the bundles of older formats that tests read, each with the ejax that wrote it.

Run in a checkout of the last commit of a format, with this file's path and the folder to write:

    PYTHONPATH=.:tests JAX_PLATFORMS=cpu python make_bundle.py bundle_format_3

It trains the bundle of tests/tiny.py. `answers.json` in its folder holds texts of train, dev and
test, and the bundle's answers in float32. bundle_format_1 was written at ed2e1b8, bundle_format_2
at 69af976, both with exits after layers 1 and 3, and bundle_format_3, with exit 0 too, at 46fffd1.
"""

import json
import shutil
import sys
from pathlib import Path

import tiny

from ejax.bundle_files import FORMAT_VERSION
from ejax.classifier import EarlyExitClassifier

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    args = [*tiny.train_args(tiny.HOME / "golden"), "epochs=6"]
    if FORMAT_VERSION >= 3:
        args[args.index("--layers") + 1] = "0,1,3"
    done = tiny.ejax(*args)
    assert done.code == 0, done.err
    shutil.copytree(tiny.HOME / "golden", folder)
    texts = {
        name: [line.split("\t")[1] for line in tiny.file(name).read_text().splitlines()[1:6]]
        for name in ("train", "dev", "test")
    }
    clf = EarlyExitClassifier.from_pretrained(folder, dtype="float32")
    asked = [text for part in texts.values() for text in part]
    said = [{**answer, "score": float(answer["score"])} for answer in clf(asked)]
    (folder / "answers.json").write_text(
        json.dumps({"texts": texts, "answers": said}, indent=1) + "\n"
    )
