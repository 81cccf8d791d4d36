"""The scripts in tpu/, against a gcloud whose cloud is a folder; its worker is this machine."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "tpu"
NAMES = ("create", "setup", "run", "logs", "watch", "fetch", "delete")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
EXAMPLE = dict(
    PROJECT="my-project",
    REPOSITORY="https://example.com/ejax.git",
    COMMIT=COMMIT,
    WORKDIR="/mnt/sst2",
    POLL_SECONDS="0.02",
)
needs_linux = pytest.mark.skipif(
    not (shutil.which("flock") and shutil.which("setsid")), reason="the workers run Linux"
)

# $CLOUD holds `queue` (absent: no such request) and `node`, the two states (of `node`'s lines each
# answers once, the last for good); `grant`, the state of a new request; `broken`, which leaves
# gcloud without answers; `worker`, the home of worker 0.
GCLOUD = r"""#!/usr/bin/env bash
printf '%s %s\n' "$3" "$4" >>"$CLOUD/calls"
[[ ! -e $CLOUD/broken ]] || { echo "ERROR: no network" >&2; exit 1; }
[[ -e $CLOUD/queue || $4 == create ]] || { echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; }
case "$3 $4" in
  "queued-resources create")
    cat "$CLOUD/grant" >"$CLOUD/queue"; echo READY >"$CLOUD/node"; mkdir "$CLOUD/worker" ;;
  "queued-resources delete")
    kill -KILL -- "-$(cat "$CLOUD/worker/ejax-run/pid")" 2>/dev/null
    rm -rf "$CLOUD/queue" "$CLOUD/worker" ;;
  "queued-resources describe") echo "WARNING: old version" >&2; cat "$CLOUD/queue" ;;
  "tpu-vm describe")
    head -n 1 "$CLOUD/node"
    [[ $(wc -l <"$CLOUD/node") == 1 ]] || sed -i 1d "$CLOUD/node" ;;
  "tpu-vm ssh")
    [[ "$*" == *--worker=all* || "$*" == *--worker=0* ]] || exit 255
    for word; do [[ $word != --command=* ]] || command=${word#--command=}; done
    cd "$CLOUD/worker" && HOME=$CLOUD/worker exec bash -c "$command" ;;
esac
"""
# Its python notes each training and then does what the test has put down for it, else finishes.
UV = r"""#!/usr/bin/env bash
mkdir -p .venv/bin
printf '#!/bin/sh\necho "$@" >>"$CLOUD/installed"\n' >.venv/bin/pip
cat >.venv/bin/python <<'END'
#!/usr/bin/env bash
echo "EJAX_DISTRIBUTED=$EJAX_DISTRIBUTED$(printf ' <%s>' "$@")" >>"$CLOUD/trainings"
echo "a line of the log"
number=$(wc -l <"$CLOUD/trainings")
[[ ! -f $CLOUD/train-$number ]] || source "$CLOUD/train-$number"
END
chmod +x .venv/bin/*
"""


class Cloud:
    """A folder that stands for the project, and a way to call the scripts in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = f"{folder}/bin:{os.environ['PATH']}"
        (folder / "bin").mkdir()
        (folder / "grant").write_text("ACTIVE\n")
        for name, text in (("gcloud", GCLOUD), ("uv", UV)):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        self.settings()

    def settings(self, **changes: str) -> None:
        """tpu/env as a user makes it: the example with values filled in."""
        text = (FOLDER / "env.example").read_text()
        for name, value in (EXAMPLE | changes).items():
            text, found = re.subn(rf"^{name}=.*$", f"{name}={value}", text, flags=re.MULTILINE)
            assert found == 1, name
        (self.folder / "env").write_text(text)

    def with_repository(self, **changes: str) -> None:
        """Settings with a real repository and its only commit."""
        source = self.folder / "source"
        source.mkdir()
        git = ["git", "-C", str(source), "-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run([*git, "init", "-q"], check=True)
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "one"], check=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True)
        self.settings(REPOSITORY=f"file://{source}", COMMIT=head.stdout.decode().strip(), **changes)

    def __call__(self, name: str, *args: str, answer: str = "") -> subprocess.CompletedProcess[str]:
        env = os.environ | {
            "CLOUD": str(self.folder),
            "EJAX_TPU_ENV": str(self.folder / "env"),
            "PATH": self.path,
            "NAME": "of-the-shell",  # some systems export one
        }
        return subprocess.run(
            [FOLDER / name, *args],
            env=env,
            input=answer,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def training(self, number: int, code: str) -> None:
        (self.folder / f"train-{number}").write_text(code + "\n")

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def calls(self, what: str) -> int:
        return self.lines("calls").count(what)

    def wait_for(self, what: str) -> None:
        end = time.monotonic() + 20
        while not (self.folder / what).exists():
            assert time.monotonic() < end, f"{what} never came"
            time.sleep(0.01)


@pytest.fixture
def cloud(tmp_path):
    made = Cloud(tmp_path)
    yield made
    pid = tmp_path / "worker" / "ejax-run" / "pid"
    if pid.exists():
        subprocess.run(["kill", "-KILL", "--", f"-{pid.read_text().strip()}"], capture_output=True)


def words(line: str) -> list[str]:
    """A printed command as bash reads it."""
    done = subprocess.run(["bash", "-c", f'printf "%s\\0" {line}'], capture_output=True, text=True)
    return done.stdout.split("\0")[:-1]


def commands(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    assert done.returncode == 0, done.stderr
    return [words(line) for line in done.stdout.splitlines()]


# the scripts as text


@pytest.mark.parametrize("name", [*NAMES, "common.sh"])
def test_every_script_parses_and_shellcheck_has_nothing_to_say(name):
    assert subprocess.run(["bash", "-n", FOLDER / name]).returncode == 0
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=path)
    assert shellcheck, "pip install '.[dev]' brings shellcheck"
    done = subprocess.run([shellcheck, "-x", name], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_help_has_an_example_and_needs_no_settings(name, cloud):
    (cloud.folder / "env").unlink()
    done = cloud(name, "--help")
    assert done.returncode == 0
    assert re.search(rf"^Example: .*tpu/{name}", done.stdout, re.MULTILINE)
    assert "set -euo" not in done.stdout


def test_git_does_not_see_the_users_settings():
    assert "tpu/env" in (FOLDER.parent / ".gitignore").read_text().splitlines()


# settings


def test_a_missing_file_of_settings_says_what_to_copy(cloud):
    (cloud.folder / "env").unlink()
    done = cloud("create")
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"tpu/create: No such file: {cloud.folder}/env. Copy tpu/env.exam"
    )
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", EXAMPLE)
def test_a_setting_without_a_value_is_named(name, cloud):
    cloud.settings(**{name: ""})
    done = cloud("watch")
    assert done.returncode == 2
    assert re.search(rf"^tpu/watch: {name} must be .*\. Got ''\. Set it in ", done.stderr)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ACCELERATOR", "v5e-8", "an accelerator type, such as v4-128, v5litepod-8 (v5e)"),
        ("ZONE", "us-west4", "a zone, such as us-west4-a"),
        ("SPOT", "true", "yes or no"),
        ("COMMIT", "main", "a commit, 7 to 40 hex digits"),
        ("WORKDIR", "s3://bucket/sst2", "a folder that all workers share"),
        ("MAX_RECREATIONS", "many", "a whole number"),
        ("SERVICE_ACCOUNT", "me", "an e-mail address"),
        ("FIELDS", "epochs=3", "an array"),
        ("FIELDS", "(epochs 3)", "field=value"),
    ],
)
def test_a_malformed_setting_says_what_was_expected_and_what_came(name, value, said, cloud):
    cloud.settings(**{name: value})
    done = cloud("run")
    assert done.returncode == 2
    assert f"{name} must" in done.stderr
    assert said in done.stderr
    assert f"Got '{value.strip(chr(39) + '()').split()[0]}" in done.stderr
    assert not cloud.lines("calls")


def test_an_unknown_option_and_a_second_argument_are_refused(cloud):
    for args in (["--dryrun"], ["1", "2"], ["--yes"]):
        done = cloud("logs", *args)
        assert done.returncode == 2
        assert f": {args[-1]}. See tpu/logs --help." in done.stderr


def test_without_gcloud_the_user_hears_what_to_install(cloud):
    (cloud.folder / "tools").mkdir()
    for tool in ("bash", "dirname", "basename", "grep"):
        (cloud.folder / "tools" / tool).symlink_to(shutil.which(tool) or tool)
    cloud.path = str(cloud.folder / "tools")
    done = cloud("setup")
    assert done.returncode == 2
    assert "gcloud must be on PATH: install the Google Cloud CLI" in done.stderr
    assert cloud("setup", "--dry-run").returncode == 0


# dry runs


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_prints_gcloud_commands_of_this_slice_and_runs_none(name, cloud):
    shown = commands(cloud(name, "--dry-run"))
    assert shown
    for command in shown:
        assert command[0] == "gcloud"
        assert "--project=my-project" in command
        assert name == "fetch" or {"ejax", "--zone=us-west4-a", "--quiet"} < set(command)
        for word in command:
            if word.startswith("--command="):
                remote = word.removeprefix("--command=")
                assert subprocess.run(["bash", "-n", "-c", remote]).returncode == 0
    assert not cloud.lines("calls")


@pytest.mark.parametrize(
    ("accelerator", "runtime"),
    [
        ("v4-128", "tpu-ubuntu2204-base"),
        ("v5litepod-8", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-16", "v2-alpha-tpuv6e"),
    ],
)
def test_create_asks_for_the_accelerator_with_its_generations_software(accelerator, runtime, cloud):
    cloud.settings(ACCELERATOR=accelerator)
    command = commands(cloud("create", "--dry-run"))[0]
    assert command[1:6] == ["compute", "tpus", "queued-resources", "create", "ejax"]
    assert {"--node-id=ejax", f"--accelerator-type={accelerator}", "--spot"} < set(command)
    assert f"--runtime-version={runtime}" in command
    assert not any(word.startswith(("--service-account", "--network")) for word in command)


def test_create_passes_on_what_is_optional(cloud):
    cloud.settings(
        SPOT="no", RUNTIME="special", SERVICE_ACCOUNT="me@my-project.iam", NETWORK="inside"
    )
    command = commands(cloud("create", "--dry-run"))[0]
    assert "--spot" not in command
    assert {"--runtime-version=special", "--network=inside"} < set(command)
    assert "--service-account=me@my-project.iam" in command


def test_watch_shows_what_a_loss_would_do_in_order(cloud):
    shown = [" ".join(command[3:5]) for command in commands(cloud("watch", "--dry-run"))]
    assert shown[:3] == ["queued-resources describe", "tpu-vm describe", "tpu-vm ssh"]
    assert shown[3:5] == ["queued-resources delete", "queued-resources create"]
    assert shown[-2:] == ["tpu-vm ssh", "tpu-vm ssh"]


def test_fetch_copies_from_worker_0(cloud):
    for workdir in ("/mnt/sst2", "/mnt/sst2/"):
        cloud.settings(WORKDIR=workdir)
        worker = commands(cloud("fetch", "--dry-run", "here"))[0]
        assert worker[1:5] == ["compute", "tpus", "tpu-vm", "scp"]
        assert {"ejax:/mnt/sst2/bundle", "here/", "--recurse", "--worker=0"} < set(worker)


def test_fetch_copies_from_a_bucket(cloud):
    cloud.settings(WORKDIR="gs://bucket/sst2/")
    (command,) = commands(cloud("fetch", "--dry-run", "here"))
    assert command[1:4] == ["storage", "cp", "--recursive"]
    assert command[4:6] == ["gs://bucket/sst2/bundle", "here/"]


def test_fetch_overwrites_nothing(cloud, tmp_path):
    (tmp_path / "bundle").mkdir()
    done = cloud("fetch", str(tmp_path))
    assert done.returncode == 2
    assert f"{tmp_path}/bundle exists" in done.stderr
    assert not cloud.lines("calls")


# a slice


def test_delete_asks_first(cloud):
    assert cloud("create").returncode == 0
    for answer in ("", "\n", "no\n"):
        done = cloud("delete", answer=answer)
        assert done.returncode == 1
        assert "Delete ejax (v5litepod-8, us-west4-a, my-project)" in done.stderr
        assert "nothing was deleted" in done.stderr
    assert cloud.calls("queued-resources delete") == 0
    assert cloud("delete", answer="y\n").returncode == 0
    assert cloud.calls("queued-resources delete") == 1


def test_delete_with_yes_does_not_ask(cloud):
    cloud("create")
    done = cloud("delete", "--yes")
    assert done.returncode == 0
    assert "Delete ejax" not in done.stderr
    assert cloud.calls("queued-resources delete") == 1


def test_create_leaves_a_ready_slice_as_it_is(cloud):
    for _ in range(2):
        done = cloud("create")
        assert done.returncode == 0, done.stderr
        assert "ejax is READY" in done.stderr
    assert cloud.calls("queued-resources create") == 1


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_create_says_that_a_request_came_to_nothing(state, cloud):
    (cloud.folder / "grant").write_text(state + "\n")
    done = cloud("create")
    assert done.returncode == 1
    assert f"ejax is {state} and will not become ready: see above, run tpu/delete" in done.stderr


def test_create_gives_up_when_gcloud_has_no_answer(cloud):
    (cloud.folder / "broken").touch()
    done = cloud("create")
    assert done.returncode == 1
    assert "ERROR: no network" in done.stderr
    assert "No answer about ejax 10 times in a row" in done.stderr
    assert cloud.calls("queued-resources create") == 0


@needs_linux
def test_setup_installs_once_per_commit_and_run_needs_it(cloud):
    cloud.with_repository()
    cloud("create")
    before = cloud("run")
    assert before.returncode == 1
    assert "is not set up: tpu/setup first" in before.stderr
    for _ in range(2):
        done = cloud("setup")
        assert done.returncode == 0, done.stderr
    assert cloud.lines("installed") == ["install --quiet .[tpu,gcs]"]
    cloud.settings(REPOSITORY=f"file://{cloud.folder}/source", COMMIT=COMMIT)
    assert cloud("setup").returncode != 0  # no such commit there
    assert "tpu/setup first" in cloud("run").stderr


@needs_linux
def test_one_run_at_a_time_with_its_fields_whole_and_restart_replaces_it(cloud):
    cloud.with_repository(
        CONFIG="configs/bert_large.py:mnli_pod", FIELDS='(epochs=3 "data.text_column=it\'s one")'
    )
    cloud.training(1, "sleep 60")
    cloud("create")
    cloud("setup")
    assert cloud("run").returncode == 0
    cloud.wait_for("trainings")
    again = cloud("run")
    assert again.returncode == 1
    assert "a run is going (process " in again.stderr
    assert "tpu/run --restart replaces it" in again.stderr
    assert cloud.lines("trainings") == [
        "EJAX_DISTRIBUTED=1 <-m> <train> <--config> <configs/bert_large.py:mnli_pod> "
        "<--workdir> </mnt/sst2> <epochs=3> <data.text_column=it's one>"
    ]
    assert cloud("run", "--restart").returncode == 0
    cloud.wait_for("worker/ejax-run/exit")
    assert len(cloud.lines("trainings")) == 2
    assert cloud.lines("worker/ejax-run/log").count("a line of the log") == 2


@needs_linux
def test_a_machine_that_shuts_down_leaves_the_runs_own_code(cloud):
    cloud.with_repository()
    cloud.training(1, 'trap "exit 75" TERM; touch "$CLOUD/training"; sleep 60 & wait')
    for name in ("create", "setup", "run"):
        assert cloud(name).returncode == 0
    cloud.wait_for("training")
    os.killpg(int(cloud.lines("worker/ejax-run/pid")[0]), signal.SIGTERM)
    cloud.wait_for("worker/ejax-run/exit")
    assert cloud.lines("worker/ejax-run/exit") == ["75"]


# a run that is watched


@needs_linux
def test_watch_starts_from_nothing_and_survives_a_preemption(cloud):
    cloud.with_repository()
    cloud.training(1, 'echo PREEMPTED >"$CLOUD/node"; sleep 60')
    done = cloud("watch")
    assert done.returncode == 0, done.stderr
    assert "there is no slice: start 1 of at most 20" in done.stderr
    assert "the slice is PREEMPTED: start 2 of at most 20" in done.stderr
    assert "the run has finished" in done.stderr
    assert cloud.calls("queued-resources create") == 2
    assert cloud.calls("queued-resources delete") == 1
    assert len(cloud.lines("installed")) == 2  # the new machine is set up too
    first, second = cloud.lines("trainings")
    assert first == second


@needs_linux
@pytest.mark.parametrize("queue", ["SUSPENDED", "FAILED"])
def test_a_request_that_ends_is_made_again(queue, cloud):
    cloud.with_repository()
    cloud.training(1, f'echo {queue} >"$CLOUD/queue"; sleep 60')
    done = cloud("watch")
    assert done.returncode == 0, done.stderr
    assert f"the slice is {queue}: start 2" in done.stderr


@needs_linux
@pytest.mark.parametrize(
    ("code", "why"), [(75, "was preempted"), (76, "lost one of its processes")]
)
def test_a_run_that_was_told_to_stop_goes_on_on_the_same_slice(code, why, cloud):
    cloud.with_repository()
    cloud.training(1, f"exit {code}")
    done = cloud("watch")
    assert done.returncode == 0, done.stderr
    assert f"the run {why}: start 2" in done.stderr
    assert len(cloud.lines("trainings")) == 2
    assert cloud.calls("queued-resources delete") == 0


@needs_linux
def test_a_run_lost_by_a_reboot_is_started_again(cloud):
    cloud.with_repository()
    cloud.training(1, "kill -KILL 0")
    done = cloud("watch")
    assert done.returncode == 0, done.stderr
    assert "no run is going: start 2" in done.stderr


@needs_linux
def test_a_run_that_failed_ends_the_watch_with_its_code(cloud):
    cloud.with_repository()
    cloud.training(1, "exit 7")
    done = cloud("watch")
    assert done.returncode == 7
    assert "the run failed with code 7: tpu/logs shows why" in done.stderr
    assert len(cloud.lines("trainings")) == 1


@needs_linux
def test_a_failure_on_a_slice_that_is_going_away_is_not_the_runs(cloud):
    cloud.with_repository(POLL_SECONDS="0.2")
    cloud.training(1, r'printf "READY\nPREEMPTED\n" >"$CLOUD/node"; exit 134')
    done = cloud("watch")
    assert done.returncode == 0, done.stderr
    assert "the slice is PREEMPTED: start 2" in done.stderr


@needs_linux
def test_watch_stops_at_its_bound(cloud):
    cloud.with_repository(MAX_RECREATIONS="2")
    for number in (1, 2, 3):
        cloud.training(number, 'echo PREEMPTED >"$CLOUD/node"; sleep 60')
    done = cloud("watch")
    assert done.returncode == 1
    assert "the slice is PREEMPTED, after 2 of at most MAX_RECREATIONS=2 starts" in done.stderr
    assert len(cloud.lines("trainings")) == 2


def test_watch_deletes_nothing_while_gcloud_has_no_answer(cloud):
    cloud("create")
    (cloud.folder / "broken").touch()
    done = cloud("watch")
    assert done.returncode == 1
    assert "No answer 10 times in a row" in done.stderr
    assert cloud.calls("queued-resources delete") == 0


def test_logs_follow_the_worker_that_was_asked_for(cloud):
    assert "--worker=0" in commands(cloud("logs", "--dry-run"))[0]
    other = commands(cloud("logs", "3", "--dry-run"))[0]
    assert "--worker=3" in other
    assert any("tail -n 100 -F ~/ejax-run/log" in word for word in other)
