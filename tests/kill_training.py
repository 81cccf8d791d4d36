"""Kills training 25 times at moments of chance; what it ends with is what an undisturbed run has.

    python tests/kill_training.py [--seed 0] [--short] [--output kills.json]

One process, then two with each as the victim. SIGKILL while a checkpoint is being written in the
background, before the first one or during an evaluation; SIGKILL or SIGTERM anywhere. After each
the same command goes on, and the first run that ends otherwise ends this script. About ten
minutes on 2 idle cores. --short kills one process twice.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from rich.console import Console
from test_processes import assert_same_run, child_of, finish, start, start_two, write_config

from ejax.hardware import environment

# (processes, victim, what the kills hit)
PLAN = [
    (1, 0, ["before"] + ["saving"] * 5 + ["evaluating"] * 2 + ["anywhere"] * 5),
    (2, 0, ["before"] + ["saving"] * 2 + ["anywhere"] * 3),
    (2, 1, ["saving"] * 2 + ["evaluating"] + ["anywhere"] * 3),
]
SHORT = [(1, 0, ["saving", "evaluating"])]
EPOCHS, PATIENCE = 12, 180.0


def saving(workdir: Path, since: float) -> bool:
    """A checkpoint begun after that time is half-written: Orbax has not renamed its folder."""
    for path in (workdir / "checkpoints").glob("*tmp*"):
        try:
            if path.stat().st_mtime > since:
                return True
        except FileNotFoundError:  # renamed meanwhile
            pass
    return False


def saved(workdir: Path) -> bool:
    return any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))


def evaluating(workdir: Path) -> bool:
    """The last step of an epoch is logged, and its accuracy on dev-A is not."""
    log = workdir / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    try:
        last = json.loads(lines[-1]) if lines else {}
    except ValueError:  # half a line
        return False
    return last.get("kind") == "train" and last["step"] % steps_per_epoch(workdir) == 0


def steps_per_epoch(workdir: Path) -> int:
    return int((workdir.parent / "steps_per_epoch").read_text())


def moment(kind: str, processes: int, workdir: Path, chance: random.Random) -> Callable[[], bool]:
    """A function that says when to kill, asked again and again.

    Several processes are let meet first: who waits for one that is not up yet waits for five
    minutes.
    """
    begun, delay = time.time(), chance.uniform(0.5, 9.0)
    log = workdir / "metrics.jsonl"
    met: list[float] = [begun] if processes == 1 else []

    def anywhere() -> bool:
        if not met and log.exists() and log.stat().st_mtime > begun:
            met.append(time.time())
        return bool(met) and time.time() - met[0] > delay

    return {
        "before": lambda: (workdir / "config.json").exists(),
        "saving": lambda: saved(workdir) and saving(workdir, begun),
        "evaluating": lambda: evaluating(workdir) and log.stat().st_mtime > begun,
        "anywhere": anywhere,
    }[kind]


def run_once(processes: int, config: Path, workdir: Path) -> list[subprocess.Popen]:
    return [start(config, workdir)] if processes == 1 else start_two(config, workdir)


def alive(running: list[subprocess.Popen]) -> bool:
    return all(process.poll() is None for process in running)


def has_child(running: list[subprocess.Popen]) -> bool:
    """Of several, each is the supervisor of one."""
    return len(running) == 1 or all(
        Path(f"/proc/{p.pid}/task/{p.pid}/children").read_text().split() for p in running
    )


def kills(
    processes: int, victim: int, kinds: list[str], config: Path, folder: Path,
    chance: random.Random, console: Console,
) -> Iterator[dict]:  # fmt: skip
    """Kills and restarts in one workdir until all kinds had their turn, then lets it finish."""
    workdir = folder / "run"
    whole = folder.parent / f"whole{processes}"
    left, turn = list(kinds), 0
    while left:
        running = run_once(processes, config, workdir)
        kind, when = left[0], moment(left[0], processes, workdir, chance)
        begun = time.time()
        deadline = begun + PATIENCE
        while not (due := when() and has_child(running)) and alive(running):
            assert time.time() < deadline, f"no moment for {kind!r} in time"
            time.sleep(0.001)
        if not due or not alive(running):
            for process in running:  # it came to its end first
                finish(process)
            assert_same_run(workdir, whole)
            folder = folder.parent / f"{folder.name}+"
            folder.mkdir()
            (folder / "steps_per_epoch").write_text(str(steps_per_epoch(workdir)))
            workdir = folder / "run"
            continue
        number = signal.SIGKILL if turn % 2 == 0 or kind != "anywhere" else signal.SIGTERM
        if number == signal.SIGKILL and processes > 1:
            os.kill(child_of(running[victim].pid), number)
        else:
            running[victim].send_signal(number)
        killed = time.time()
        codes = []
        for process in running:
            process.communicate(timeout=90)
            codes.append(process.returncode)
        hit = {
            "saving": saving(workdir, begun),
            "before": not saved(workdir),
            "evaluating": evaluating(workdir),
            "anywhere": True,
        }[kind]
        turn += 1
        left.pop(0)
        if not hit:  # too late: its turn comes again
            left.append(kind)
        found = {
            "processes": processes,
            "victim": victim,
            "moment": kind if hit else "anywhere",
            "inside_a_save": saving(workdir, begun),
            "signal": number.name,
            "codes": codes,
            "seconds_until_all_ended": round(time.time() - killed, 1),
        }
        console.print(found)
        yield found
    for process in run_once(processes, config, workdir):
        finish(process)
    assert_same_run(workdir, whole)
    assert not (workdir / "damaged").exists(), "a checkpoint was unreadable"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="two kills of one process")
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    plan = SHORT if chosen.short else PLAN
    chance, console, found = random.Random(chosen.seed), Console(), []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        config = write_config(root, epochs=EPOCHS)
        for processes in sorted({processes for processes, _, _ in plan}):
            for process in run_once(processes, config, root / f"whole{processes}"):
                finish(process)
        lines = [json.loads(x) for x in (root / "whole1/metrics.jsonl").read_text().splitlines()]
        per_epoch = max(line["step"] for line in lines) // EPOCHS
        for processes, victim, kinds in plan:
            folder = root / f"killed{processes}{victim}"
            folder.mkdir()
            (folder / "steps_per_epoch").write_text(str(per_epoch))
            found += kills(processes, victim, kinds, config, folder, chance, console)
    result = {
        "kills": len(found),
        "moments": dict(Counter(one["moment"] for one in found)),
        "inside_a_save": sum(one["inside_a_save"] for one in found),
        "signals": dict(Counter(one["signal"] for one in found)),
        "seed": chosen.seed,
        "command": " ".join(["python tests/kill_training.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        **environment(),
        "each": found,
    }
    console.print({key: value for key, value in result.items() if key != "each"})
    if chosen.output:
        chosen.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
