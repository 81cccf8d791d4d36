"""Which exits to keep: against every choice tried one by one, and in a real bundle."""

from itertools import combinations

import numpy as np
import pytest
import tiny
from test_thresholds import rows

from ejax.bundle import load_bundle
from ejax.calibration.placement import Placement, cheapest, place, point_of
from ejax.calibration.thresholds import make_table, policies
from ejax.classifier import EarlyExitClassifier
from ejax.data.sources import row_hash
from ejax.evaluation.labelled import labelled_rows
from ejax.evaluation.place import keep
from ejax.provenance import UNKNOWN

LAYERS = (1, 2, 4, 6)


def four_exits(n=300):
    logits, labels, temperatures, tokens = rows(5, exits=4, n=n)
    return make_table(logits, labels, temperatures, LAYERS, tokens)


@pytest.mark.parametrize("max_drop", [0.0, 3.0, 12.0])
def test_no_other_choice_is_cheaper(max_drop):
    table = four_exits()
    layer, passing = np.linspace(1, 2, 300), np.full(300, 0.3)
    found = place(table, 4, layer, passing, max_drop=max_drop)
    assert [len(one.exits) for one in found] == [1, 2, 3, 4]
    every = np.arange(300)
    ordered = policies(table, "per exit")
    for size, best in enumerate(found, 1):
        costs = []
        for kept in combinations(range(4), size):
            for policy in ordered:
                one = Placement(kept, tuple(policy[list(kept)]), 0.0)
                taken = table.leave(one.of_all(4))
                lost = table.correct[-1].mean() - table.correct[taken, every].mean()
                if 100 * max(lost, table.expected_lost[taken, every].mean()) <= max_drop + 1e-9:
                    passed = np.searchsorted(kept, taken, side="right")
                    cost = layer * np.array(LAYERS)[taken] + passing * passed
                    costs.append(cost.mean())
        assert best.cost == pytest.approx(min(costs), rel=1e-9)
        point = point_of(table, best)
        assert max(point["drop"], point["expected_drop"]) <= max_drop + 1e-6
        assert point["layers"] == [LAYERS[e] for e in best.exits]


def test_layers_that_change_nothing_are_dropped():
    """The exit after layer 4 answers as the last does: nothing above it is needed."""
    logits, labels, temperatures, tokens = rows(5, exits=4, n=300)
    logits[3] = logits[2]
    temperatures[3] = temperatures[2]
    table = make_table(logits, labels, temperatures, LAYERS, tokens)
    (one,) = place(table, 1, np.ones(300), np.zeros(300), max_drop=0)
    assert one.exits == (2,)
    assert one.cost == 4


def test_exit_0_is_never_the_last_and_costs_what_it_does():
    logits, labels, temperatures, tokens = rows(5, exits=3, n=300)
    logits[:] = logits[0]  # exit 0 says all that full depth does
    free, dear = (
        make_table(logits, labels, temperatures[[0, 0, 0]], (0, 2, 6), tokens, exit0_cost=cost)
        for cost in (0.1, 2.5)
    )
    (_, two), (one, _) = (place(table, 2, np.ones(300), np.zeros(300)) for table in (free, dear))
    assert (two.exits, two.cost) == ((0, 1), pytest.approx(0.1))
    assert (one.exits, one.cost) == ((1,), 2)
    best = cheapest(place(dear, 3, np.ones(300), np.zeros(300)))
    assert best.exits == (1,)


@pytest.mark.parametrize("seed", [2, 4, 8])
def test_exits_that_no_row_uses_are_left_out(seed):
    """They change the cost by rounding alone, with these seeds to something less."""
    logits, labels, temperatures, tokens = rows(seed, exits=4, n=300)
    logits[1:], temperatures[1:] = logits[0], temperatures[0]
    table = make_table(logits, labels, temperatures, LAYERS, tokens)
    layer, passing = np.random.default_rng(seed).random((2, 300))
    found = place(table, 4, layer, passing, max_drop=5)
    assert [one.exits for one in found] == [(0,), (0, 1), (0, 1, 2), (0, 1, 2, 3)]
    assert cheapest(found).exits == (0,)


def test_dear_exits_are_left_out():
    table = four_exits()
    free, dear = (
        min(place(table, 4, np.ones(300), np.full(300, cost), max_drop=8), key=lambda p: p.cost)
        for cost in (0.0, 5.0)
    )
    assert len(dear.exits) < len(free.exits)


def test_a_wrong_number_of_exits():
    for count in (0, 5):
        with pytest.raises(ValueError, match=f"exits must be between 1 and 4.*Got {count}"):
            place(four_exits(), count, np.ones(300), np.ones(300))


def test_kept_exits_answer_as_before():
    bundle = load_bundle(tiny.trained()[0], dtype="float32")
    texts = [text for _, text in tiny.rows(40, 3)]
    clf = EarlyExitClassifier(bundle)
    before = clf.exit_logits(clf.encode(texts))
    for exits in ((0,), (1,), (0, 1)):
        small = keep(bundle, exits, (0.9,) * len(exits))
        after = EarlyExitClassifier(small).exit_logits(clf.encode(texts))
        np.testing.assert_allclose(after, before[list(exits)], atol=1e-6)
        assert small.cfg.num_hidden_layers == (1, 3)[exits[-1]]


@pytest.mark.usefixtures("quick_profile")
def test_place_makes_a_bundle_that_runs_as_simulated(tmp_path, monkeypatch):
    monkeypatch.setenv("EJAX_CACHE", str(tmp_path / "cache"))
    folder, output = tmp_path / "few", tmp_path / "few"
    ask = ("place", tiny.trained()[0], "--data", tiny.data(), "--exits", 1, "--output", output)
    assert "run `ejax profile`" in tiny.refused(*ask)
    assert tiny.ejax("profile", tiny.trained()[0]).code == 0
    assert "exits must be between 1 and 2" in tiny.refused(*ask[:-3], 3, *ask[-2:])
    assert not output.exists()
    mine = tiny.copy_of_bundle(tmp_path)
    here = ("place", mine, *ask[2:-1], tmp_path / "." / "bundle")
    assert "the layers it loses could not be had back" in tiny.refused(*here)
    done = tiny.ejax(*ask, "--max-drop", 100)  # so that the first exit alone will do
    assert done.code == 0, done.err
    assert "21 rows left out" in done.err
    assert "left at another exit" not in done.err
    before, after = load_bundle(tiny.trained()[0]), load_bundle(folder)
    assert after.exits.layers == (1,)
    assert after.cfg.num_hidden_layers == 1
    assert after.temperatures == before.temperatures[:1]
    assert set(before.provenance["metrics"]) - set(after.provenance["metrics"]) == {"dev_b"}
    assert after.cfg.dtype == before.cfg.dtype
    report = after.provenance["placed"]
    assert report["rows"] == 20
    assert report["differ"] == 0
    depth = {"rows": 20, "exit_share": [1.0], "thresholds": list(after.thresholds)}
    assert after.provenance["depth"] == depth
    names = [row_hash(row) for row in labelled_rows(before, str(tiny.file("dev")))]
    assert len(after.ledger.among(names, ["placed"])) == 20
    ask = (*ask[:-1], tmp_path / "test", "--split", "test", "--max-drop", 100)
    assert tiny.ejax(*ask).code == 0
    kept = load_bundle(tmp_path / "test").provenance["metrics"]
    assert set(before.provenance["metrics"]) - set(kept) == {"test"}
    shown = tiny.ejax("info", folder)
    assert shown.code == 0
    assert "Exits at layers 1 of 1, 3" in " ".join(shown.out.split())
    # Rows that chose the exits are spent: no guarantee can be had from them.
    page = tmp_path / "page.html"
    again = ("report", folder, "--data", tiny.file("dev"), "--output", page)
    assert "a report needs other rows" in tiny.refused(*again)
    one = ("thresholds", folder, "--data", tiny.file("test"), "--risk", 0.5)
    assert "has one exit: there are no thresholds to choose" in tiny.refused(*one)
    # Nor figures of a held-out half.
    assert tiny.ejax("calibrate", folder, "--data", tiny.data()).code == 0
    assert set(load_bundle(folder).provenance["metrics"]) == {"calibration"}
    # The temperatures with which exits were chosen are of rows that stay spent.
    spent = tiny.rows_of(load_bundle(folder))["calibration"]
    assert tiny.ejax("calibrate", folder, "--data", tiny.file("test")).code == 0
    assert spent < tiny.rows_of(load_bundle(folder))["calibration"]


@pytest.mark.usefixtures("quick_profile")
def test_place_keeps_no_figure_of_rows_that_are_not_known(tmp_path, monkeypatch):
    """They may be the very rows that choose."""
    monkeypatch.setenv("EJAX_CACHE", str(tmp_path / "cache"))
    folder, output = tiny.copy_of_bundle(tmp_path), tmp_path / "few"
    (folder / "rows.json").unlink()
    assert tiny.ejax("profile", folder).code == 0
    ask = ("--data", tiny.data(), "--exits", 1, "--max-drop", 100, "--output", output)
    done = tiny.ejax("place", folder, *ask)
    assert done.code == 0, done.err
    assert UNKNOWN in " ".join(done.err.split())
    assert load_bundle(folder).provenance["metrics"]
    assert load_bundle(output).provenance["metrics"] == {}


def test_too_many_choices_are_refused():
    exits = 24
    logits, labels, temperatures, tokens = rows(5, exits=exits, n=20)
    table = make_table(logits, labels, temperatures, tuple(range(1, exits + 1)), tokens)
    with pytest.raises(ValueError, match="5 of 24 exits can be kept in 55,454 ways"):
        place(table, 5, np.ones(20), np.ones(20))
