"""The report: its numbers from the rows themselves, its page in a real browser."""

import dataclasses
import json
import re
import shutil
import subprocess
from html import escape, unescape

import numpy as np
import pytest
import tiny
from matplotlib.figure import Figure

from ejax.bundle import load_bundle
from ejax.calibration.thresholds import operating_point, oracle
from ejax.classifier import EarlyExitClassifier
from ejax.data.rows import encode
from ejax.data.sources import row_hash
from ejax.evaluation import report as report_module
from ejax.evaluation.labelled import labelled_rows
from ejax.evaluation.page import draw_time
from ejax.evaluation.report import shown, slices
from ejax.evaluation.targets import table_of
from ejax.inference.cost import exit_flops, full_flops
from ejax.provenance import CHOSEN
from ejax.saving import save_bundle

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
BROWSER = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
HOSTILE = f'{"great " * 14}<script>document.title = "taken"</script>'


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The report on dev, of which half chose the bundle, and one row that is no friend of HTML."""
    folder = tmp_path_factory.mktemp("report")
    source = folder / "<i>rows.tsv"
    source.write_text(tiny.file("dev").read_text() + f"good\t{HOSTILE}\nbad\t{HOSTILE}\n")
    long = "great " * 200  # characters: 1,200
    source.write_text(f"{source.read_text()}bad\t{long}\n")
    beside = ("--beside", tiny.trained()[0])
    linear = ("--train", tiny.file("train"), "--encoder", tiny.model())
    output = folder / "report.html"
    done = tiny.ejax(
        "report", tiny.trained()[0], "--data", source, *beside, *linear, "--output", output
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "s of inference, compiling and timing; " in done.err
    return source, output, json.loads(output.with_suffix(".json").read_text())


def table(source):
    """Of the rows that chose nothing."""
    clf = EarlyExitClassifier.from_pretrained(tiny.trained()[0])
    task = encode(labelled_rows(clf.bundle, str(source)), clf.bundle.encode)
    seen = clf.bundle.ledger.among(task.hashes, CHOSEN)
    return table_of(clf, task.take(np.flatnonzero([name not in seen for name in task.hashes])))


def test_a_bundle_beside_may_have_any_name(made, tmp_path):
    _, _, report = made
    beside = dict.fromkeys(("b$x_{$", "_hidden"), next(iter(report["beside"].values())))
    axes = Figure().subplots(1, 2)
    draw_time(report | {"beside": beside}, axes)
    axes[0].figure.savefig(tmp_path / "time.png")
    names = [text.get_text() for text in axes[0].get_legend().get_texts()]
    assert names[-4:-2] == [r"beside: b\$x_{\$, 3 layers", "beside: _hidden, 3 layers"]
    assert names[-2:] == ["TF-IDF, linear, from text", "frozen encoder, linear, from text"]


def test_linear_rivals_are_rows_of_the_comparison(made):
    _, output, report = made
    linear, page = report["measured"]["rivals"], output.read_text(encoding="utf-8")
    full = report["measured"]["full"]
    for one in linear:
        assert f"<td>{one['name']}</td><td>{one['accuracy']:.4f}</td>" in page
        assert one["drop"] == pytest.approx(100 * (full["accuracy"] - one["accuracy"]))
        assert one["from_text"] > 0
        assert f"{one['name']}: fitted to 96 rows in " in page
    assert full["from_text"] < full["texts_per_second"]
    said = report["measured"]["enough"]
    assert said.startswith("TF-IDF with logistic regression is right on")
    assert said in page


def test_rows_left_at_random_stand_at_what_they_spend(made):
    """As many at each exit, whatever their length."""
    source, _, report = made
    of_rows, bundle = table(source), load_bundle(tiny.trained()[0])
    flops = exit_flops(bundle.cfg, bundle.exits, of_rows.tokens)
    whole = full_flops(bundle.cfg, bundle.exits, of_rows.tokens).sum()
    points = report["curves"]["per exit"]
    point = points[len(points) // 2]
    taken = of_rows.leave(point["threshold"])
    assert 0 < taken.mean() < 1
    rng, rows = np.random.default_rng(0), np.arange(taken.size)
    drawn = [flops[rng.permutation(taken), rows].sum() / whole for _ in range(2000)]
    error = np.std(drawn) / np.sqrt(2000)
    assert point["random_flops"] == pytest.approx(np.mean(drawn), abs=5 * error)


def test_rows_that_chose_are_left_out(made):
    source, _, report = made
    assert (report["rows"], report["rows_left_out"]) == (23, 21)
    bundle = load_bundle(tiny.trained()[0])
    names = [row_hash(row) for row in labelled_rows(bundle, str(source))]
    assert len(bundle.ledger.among(names, ["dev_a"])) == 21


def test_its_numbers_are_those_of_the_rows(made):
    source, _, report = made
    rows = table(source)
    point = operating_point(rows, tuple(report["thresholds"]))
    own = next(p for p in report["measured"]["thresholds"] if isinstance(p["threshold"], list))
    assert own["accuracy"] == pytest.approx(point["accuracy"])
    assert [e["leave"] for e in report["exits"]] == [
        round(23 * share) for share in point["exit_share"]
    ]
    assert report["oracle"]["accuracy"] == rows.correct.any(axis=0).mean()
    assert report["oracle"]["flops"] < 1
    assert report["oracle"]["mean_depth"] == rows.depth(oracle(rows))
    for family in ("per exit", "one number"):
        full, *_, first = report["curves"][family]
        assert full["accuracy"] == point["full_accuracy"] == full["random"]
        assert full["flops"] == pytest.approx(1, abs=0.02)  # and one head more
        assert first["accuracy"] == rows.correct[0].mean()
        for p in report["curves"][family]:
            assert p["accuracy_low"] <= p["accuracy"] <= p["accuracy_high"]
            assert p["macro_f1_low"] <= p["macro_f1"] <= p["macro_f1_high"]
            again = operating_point(rows, tuple(p["threshold"]))
            assert p["accuracy"] == pytest.approx(again["accuracy"])
    beside = report["beside"]["bundle"]  # the same bundle, at full depth
    assert beside["accuracy"] == point["full_accuracy"]
    right_early = rows.correct[0] & ~rows.correct[1]
    assert report["overthinking"]["rows"] == right_early.sum()
    texts = [one["text"] for part in report["examples"].values() for one in part]
    assert max(map(len, texts)) == 501  # the long one, cut, and an ellipsis
    by_label = [part for part in report["slices"] if part["slice"].startswith("label")]
    assert sum(part["rows"] for part in by_label) == 23
    by_length = [part for part in report["slices"] if part["slice"].endswith("tokens")]
    assert sum(part["rows"] for part in by_length) == 23
    for e, leave in enumerate(report["exits"]):
        assert sum(leave["labels_of_leavers"]) == leave["leave"]
        assert leave["after"]["accuracy"] == rows.correct[e].mean()


def test_rare_labels_are_a_slice_of_their_own(made, monkeypatch):
    monkeypatch.setattr(report_module, "MOST_LABELS", 1)
    rows = table(made[0])
    found = {part["slice"]: part["rows"] for part in slices(rows, ("bad", "good"), [0.9])}
    assert found["all other labels"] == np.bincount(rows.labels).min()
    assert sum(n for name, n in found.items() if "label" in name) == 23


def test_the_page_needs_nothing_else(made):
    _, output, _ = made
    page = output.read_text(encoding="utf-8")
    assert all(at.startswith("data:") for at in re.findall(r"(?:src|href)=\"?([^\s>]*)", page))
    assert HOSTILE not in page
    assert "<i>" not in page
    assert "&lt;i&gt;rows.tsv" in page
    assert escape(HOSTILE) in page  # among the examples
    assert "Medians of 3 passes, in turns. Bundles beside are timed after these." in page
    alts = re.findall(r'alt="([^"]*)"', page)
    assert len(alts) == 4
    assert all(len(alt.split()) > 8 for alt in alts)
    assert "at the best temperature" in page
    assert page.count("data:image/png;base64,") == 4
    names = {path.name for path in output.parent.glob("report*")}
    pictures = {f"report_{name}.png" for name in ("tradeoff", "time", "exits", "reliability")}
    assert names == {"report.html", "report.json", *pictures}


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on PATH")
@pytest.mark.parametrize("width", [1200, 500])
def test_the_page_in_a_browser(made, tmp_path, width):
    """Every picture is shown, nothing hangs over the side, no text has become a script.

    On a desktop no table has to be scrolled.
    """
    _, output, report = made
    probe = """<script>addEventListener("load", () => {
        const shown = [...document.images].filter(i => i.naturalWidth > 0 && i.offsetWidth > 0);
        document.body.dataset.seen = JSON.stringify({
            title: document.title, pictures: shown.length, width: innerWidth,
            over: document.documentElement.scrollWidth - innerWidth,
            tables: document.querySelectorAll("table").length,
            cut: [...document.querySelectorAll(".wide")].filter(
                w => w.scrollWidth > w.clientWidth).length})})</script>"""
    page = tmp_path / "page.html"
    page.write_text(output.read_text(encoding="utf-8").replace("</body>", probe + "</body>"))
    done = subprocess.run(
        [CHROMIUM, *BROWSER, f"--user-data-dir={tmp_path / 'profile'}",
         f"--window-size={width},800", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    seen = json.loads(unescape(found[1]))
    assert seen["title"] == f"Early exit: bundle on {report['data']}"
    assert seen["over"] <= 0
    assert seen["width"] == width
    assert (seen["pictures"], seen["tables"]) == (4, 7)
    assert seen["cut"] == 0 or width == 500


def test_of_a_pair_both_texts_are_shown():
    assert shown(("great " * 200, "no")) == f"{('great ' * 200)[:500]}… | no"


def test_the_json_of_something_else_stays(tmp_path):
    kept = tmp_path / "r.json"
    kept.write_text("[1, 2]")
    args = ("report", tiny.trained()[0], "--data", tiny.file("test"))
    assert "exists and is not of a report" in tiny.refused(*args, "--output", tmp_path / "r.html")
    assert kept.read_text() == "[1, 2]"


def test_nothing_to_report_on(tmp_path):
    folder = tiny.copy_of_bundle(tmp_path)
    assert tiny.ejax("calibrate", folder, "--data", tiny.file("test")).code == 0
    args = ("report", folder, "--data", tiny.file("test"))
    assert "a report needs other rows" in tiny.refused(*args, "--output", tmp_path / "r.html")
    assert "--output must end in .html" in tiny.refused(*args, "--output", tmp_path / "r.json")
    trained = ("--output", tmp_path / "r.html", "--split", "train")
    assert "confidences on trained rows" in tiny.refused(*args, *trained)
    assert not list(tmp_path.glob("r.*"))


def test_bundles_beside_that_are_called_alike_or_have_other_labels(tmp_path):
    same = tiny.copy_of_bundle(tmp_path)
    args = ("report", tiny.trained()[0], "--data", tiny.file("test"), "--output")
    twice = (*args, tmp_path / "r.html", "--beside", same, "--beside", same)
    assert "bundle is given twice" in tiny.refused(*twice)
    both = (*args, tmp_path / "r.html", "--beside", same, "--beside", tiny.trained()[0])
    assert tiny.ejax(*both, "--repeats", 1).code == 0
    names = set(json.loads((tmp_path / "r.json").read_text())["beside"])
    assert names == {f"{path.parent.name}/bundle" for path in (same, tiny.trained()[0])}
    save_bundle(dataclasses.replace(load_bundle(same), labels=("good", "bad")), same)
    other = (*args, tmp_path / "r.html", "--beside", same)
    assert "must have the labels bad, good, in this order. Got good, bad" in tiny.refused(*other)
