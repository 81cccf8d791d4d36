"""Downloads, against local stand-ins: a folder as pip's index, a small server as the hub."""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import venv
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from huggingface_hub import RepoUrl

from ejax import assets
from ejax.assets import Package, cache_dir, resolve
from ejax.bundle import load_bundle
from ejax.classifier import EarlyExitClassifier
from ejax.data.files import check_file

REPOSITORY = Path(__file__).parents[1]


def make_wheel(index: Path, *, extra: dict[str, str] | None = None) -> Package:
    """A wheel tiny==1.0 with a folder of two files, and a module that must never run."""
    index.mkdir(exist_ok=True)
    path = index / "tiny-1.0-py3-none-any.whl"
    info = "tiny-1.0.dist-info"
    files = {
        "tiny/__init__.py": "raise SystemExit('imported')",
        "tiny/data/config.json": "{}",
        "tiny/data/sub/a.txt": "á",
        "tiny/database/other.txt": "not asked for",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
        **(extra or {}),
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return Package("tiny==1.0", sha256, "tiny/data", "a test")


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.fixture
def index(tmp_path, monkeypatch):
    """pip sees this folder and nothing else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("EJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "index"


# where things are


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.delenv("EJAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == Path.home() / ".cache" / "ejax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "ejax"
    monkeypatch.setenv("EJAX_CACHE", "~/mine")
    assert cache_dir() == Path.home() / "mine"
    assert cache_dir("other") == Path("other")


def test_a_folder_is_itself_and_wins_over_a_pinned_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bbc-news").mkdir()
    assert resolve("bbc-news") == Path("bbc-news")
    assert resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["", "no-such-name", "/no/such/folder", "./a/b", "a/b/c"])
def test_an_unknown_name(name):
    with pytest.raises(ValueError, match=r"neither a folder here, nor a hub id .* bbc-news"):
        resolve(name)


def test_a_name_of_the_paper_says_where_it_may_be():
    with pytest.raises(ValueError, match=r"it may be 'google-bert/bert-base-uncased'"):
        resolve("bert-base-uncased")


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match="is a file: give the folder"):
        resolve(str(tmp_path / "config.json"))


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match=r"loop is a link to loop, which leads nowhere \(Too many"):
        resolve(str(tmp_path / "loop"))
    (tmp_path / "train.tsv").symlink_to("gone.tsv")
    with pytest.raises(ValueError, match=r"train\.tsv is a link to gone\.tsv, which leads nowhere"):
        check_file(tmp_path / "train.tsv")


def test_a_name_that_no_file_can_have():
    with pytest.raises(ValueError, match=r"neither a folder here"):
        resolve("a\0b")
    with pytest.raises(ValueError, match=r"cannot be read: File name too long"):
        resolve("a" * 5000)


def test_data_that_git_lfs_has_not_fetched(tmp_path):
    (tmp_path / "train.csv").write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
    with pytest.raises(ValueError, match=r"train\.csv is a Git LFS pointer, .* `git lfs pull`"):
        check_file(tmp_path / "train.csv")


def test_a_bundle_that_git_lfs_has_not_fetched(tmp_path):
    golden = REPOSITORY / "tests" / "goldens" / "bundle_format_3"
    folder = shutil.copytree(golden, tmp_path / "bundle")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"model\.safetensors is a Git LFS pointer"):
        load_bundle(folder)


# package files


def test_a_package_folder_is_fetched_checked_and_unpacked_once(index, monkeypatch, tmp_path):
    monkeypatch.setitem(assets.PACKAGES, "tiny", make_wheel(index))
    folder = resolve("tiny")
    assert listing(folder) == ["config.json", "sub/a.txt"]
    assert (folder / "sub/a.txt").read_text(encoding="utf-8") == "á"
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]  # no scratch left
    (index / "tiny-1.0-py3-none-any.whl").unlink()
    assert resolve("tiny") == folder  # from the cache
    monkeypatch.setenv("EJAX_CACHE", str(tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match="could not fetch"):
        resolve("tiny")


def test_a_wrong_sha256_keeps_nothing(index, monkeypatch, tmp_path):
    package = make_wheel(index)._replace(sha256="0" * 64)
    monkeypatch.setitem(assets.PACKAGES, "tiny", package)
    with pytest.raises(ValueError, match=r"tiny==1.0 has changed: its wheel must have sha256 0000"):
        resolve("tiny")
    assert listing(tmp_path / "cache") == []
    assert list((tmp_path / "cache" / "packages").iterdir()) == []


def test_what_pip_says_is_shown(index, monkeypatch):
    index.mkdir()
    monkeypatch.setitem(assets.PACKAGES, "tiny", Package("tiny==1.0", "0" * 64, "tiny/data", ""))
    with pytest.raises(ValueError, match=r"pip could not fetch tiny==1.0 for 'tiny'") as error:
        resolve("tiny")
    assert "No matching distribution found for tiny==1.0" in str(error.value)
    assert "pip download --no-deps tiny==1.0" in str(error.value)


@pytest.mark.parametrize("name", ["tiny/data/../../../evil.txt", "tiny/data/..\\evil.txt"])
def test_a_path_out_of_the_folder_is_refused(index, monkeypatch, tmp_path, name):
    package = make_wheel(index, extra={name: "evil"})
    monkeypatch.setitem(assets.PACKAGES, "tiny", package)
    with pytest.raises(ValueError, match="holds a file outside its folder"):
        resolve("tiny")
    assert listing(tmp_path / "cache") == []


def test_a_folder_that_the_wheel_does_not_hold(index, monkeypatch, tmp_path):
    package = make_wheel(index)._replace(folder="tiny/model")
    monkeypatch.setitem(assets.PACKAGES, "tiny", package)
    with pytest.raises(ValueError, match="holds no files under tiny/model"):
        resolve("tiny")
    assert listing(tmp_path / "cache") == []


RESOLVE_TINY = """
import sys
from ejax import assets
assets.PACKAGES["tiny"] = assets.Package("tiny==1.0", sys.argv[1], "tiny/data", "")
print(assets.resolve("tiny"))
"""


def test_processes_that_fetch_at_once_agree(index, tmp_path):
    package = make_wheel(index)
    command = [sys.executable, "-c", RESOLVE_TINY, package.sha256]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
        for _ in range(2)
    ]
    folders = {process.communicate()[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    (folder,) = folders
    assert listing(Path(folder)) == ["config.json", "sub/a.txt"]
    assert len(list(Path(folder).parent.iterdir())) == 1


def test_the_loser_of_the_race_takes_the_winners_folder(index, monkeypatch, tmp_path):
    monkeypatch.setitem(assets.PACKAGES, "tiny", make_wheel(index))
    unpack = assets._extract

    def slow(wheel, folder, target):
        unpack(wheel, folder, target)
        monkeypatch.setattr(assets, "_extract", unpack)
        resolve("tiny")  # another process finishes first

    monkeypatch.setattr(assets, "_extract", slow)
    folder = resolve("tiny")
    assert listing(folder.parent) == [f"{folder.name}/config.json", f"{folder.name}/sub/a.txt"]


def test_without_pip_the_error_says_what_to_do(tmp_path):
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    code = f"import runpy; runpy.run_path({assets.__file__!r})['resolve']('bbc-news')"
    env = {**os.environ, "EJAX_CACHE": str(tmp_path / "cache")}
    env.pop("PYTHONPATH", None)
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ejax.errors.UserError: fetching 'bbc-news' needs pip, which")
    assert "uv pip install pip" in last


def test_a_cache_that_cannot_be_made(index, monkeypatch, tmp_path):
    monkeypatch.setitem(assets.PACKAGES, "tiny", make_wheel(index))
    (tmp_path / "file").touch()
    monkeypatch.setenv("EJAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"cannot write to the cache folder .* Set EJAX_CACHE"):
        resolve("tiny")


# the hub

SHA = "1234567890" * 4
HELD = {
    "config.json": b'{"model_type": "bert"}',
    "model.safetensors": b"weights" * 1000,
    "model-00001-of-00002.safetensors": b"a shard",
    "vocab.txt": b"[PAD]\n",
    "pytorch_model.bin": b"never fetched",
    "onnx/model.safetensors": b"never fetched",
}


class Hub(http.server.BaseHTTPRequestHandler):
    """The three endpoints of the hub that a snapshot needs, for the model org/bert."""

    asked: list[str]
    held: dict[str, bytes]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.asked.append(path)
        model = "/api/models/org/bert"
        if path in (model, f"{model}/revision/main"):
            siblings = [{"rfilename": name} for name in self.held]
            self.answer(json.dumps({"id": "org/bert", "sha": SHA, "siblings": siblings}).encode())
        elif path in (f"{model}/tree/{SHA}", f"{model}/tree/main"):
            files = [
                {"type": "file", "path": name, "size": len(x), "oid": hashlib.sha1(x).hexdigest()}
                for name, x in self.held.items()
            ]
            self.answer(json.dumps(files).encode())
        elif path.startswith(f"/org/bert/resolve/{SHA}/"):
            content = self.held[path.rpartition("/")[2]]
            etag = hashlib.sha1(content).hexdigest()
            self.answer(content, **{"ETag": f'"{etag}"', "X-Repo-Commit": SHA})
        else:
            known = path.startswith((model, "/org/bert/"))
            code = "RevisionNotFound" if known else "RepoNotFound"
            self.answer(b"{}", 404, **{"X-Error-Code": code})

    def answer(self, content, status=200, **headers):
        self.send_response(status)
        headers = {"Content-Length": str(len(content)), **headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    Hub.asked, Hub.held = [], HELD
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


RESOLVE = "import sys; from ejax import assets; print(assets.resolve(sys.argv[1]))"
BUNDLE_AT = "import sys; from ejax import hub; print(hub.bundle_at(*sys.argv[1:]))"
COMMANDS = "from ejax import cli; cli.sys.argv[1:] = cli.sys.argv[2:]; cli.main()"


def resolve_elsewhere(name, endpoint, tmp_path, *more, code=RESOLVE):
    """In a process of its own: the hub's client reads its settings on import."""
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": "1"}
    env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": "", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", code, name, *more]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=REPOSITORY)


def test_a_hub_id_fetches_the_files_that_are_read(hub, tmp_path):
    done = resolve_elsewhere("org/bert", hub, tmp_path)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert folder.is_relative_to(tmp_path / "hub")
    shard = "model-00001-of-00002.safetensors"
    assert listing(folder) == ["config.json", shard, "model.safetensors", "vocab.txt"]
    assert (folder / "model.safetensors").read_bytes() == HELD["model.safetensors"]
    assert not any("pytorch_model.bin" in path for path in Hub.asked)
    # Once fetched it is there without a network.
    again = resolve_elsewhere("org/bert", "http://127.0.0.1:9", tmp_path)
    assert again.stdout == done.stdout, again.stderr


def test_an_unknown_hub_id(hub, tmp_path):
    done = resolve_elsewhere("org/brt", hub, tmp_path)
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        "ejax.errors.UserError: 'org/brt' is neither a folder here nor a public model on the "
        "hub: check the name; for a private or gated model log in with `hf auth login`."
    )


def test_a_hub_that_cannot_be_reached(tmp_path):
    done = resolve_elsewhere("org/bert", "http://127.0.0.1:9", tmp_path)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "ejax.errors.UserError: 'org/bert' is no folder here, and fetching it from the hub"
    )
    assert "check the network" in last


# bundles there


class Api:
    """As `huggingface_hub.HfApi`: it keeps its one repository in a folder."""

    root: Path
    public: bool

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, repo_id, *, private, exist_ok):
        if self.token != "mine":
            raise OSError("401 Client Error. Unauthorized")
        assert exist_ok
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def model_info(self, repo_id):
        return SimpleNamespace(private=not self.public)

    def upload_folder(self, *, repo_id, folder_path, commit_message, delete_patterns):
        assert commit_message
        for name in delete_patterns:
            (self.root / repo_id / name).unlink(missing_ok=True)
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)


@pytest.fixture
def pushed(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    Api.root, Api.public = tmp_path / "there", False
    return Api.root / "org" / "bert"


def test_a_bundle_goes_to_the_hub_and_comes_back(pushed, hub, tmp_path):
    clf = EarlyExitClassifier.from_pretrained(tiny.trained()[0])
    url = clf.push_to_hub("org/bert", rows=True, token="mine")
    assert url == "https://huggingface.co/org/bert"
    assert (pushed / "rows.json").exists()
    clf.push_to_hub("org/bert", private=True, token="mine")
    assert not (pushed / "rows.json").exists()  # by which a text can be known as trained on
    assert 'from_pretrained("org/bert")' in (pushed / "README.md").read_text()
    Hub.held = {path.name: path.read_bytes() for path in pushed.iterdir()}
    done = resolve_elsewhere("org/bert", hub, tmp_path, code=BUNDLE_AT)
    assert done.returncode == 0, done.stderr
    back = EarlyExitClassifier.from_pretrained(done.stdout.strip())
    texts = [text for _, text in tiny.rows(8, 5)]
    assert back(texts) == clf(texts)
    done = resolve_elsewhere("", hub, tmp_path, "info", "org/bert", code=COMMANDS)
    assert f"{clf.bundle.labels[0]}" in done.stdout, done.stderr
    read = ("--input", str(tiny.write_tsv(tmp_path / "texts.tsv", tiny.rows(3, 5))))
    done = resolve_elsewhere("", hub, tmp_path, "predict", "org/bert", *read, code=COMMANDS)
    assert "\n3 rows labelled" in done.stderr, done.stderr
    done = resolve_elsewhere("org/bert", hub, tmp_path, "v9", code=BUNDLE_AT)
    assert done.stderr.strip().endswith(
        "'org/bert' on the hub has no revision 'v9': give a branch, a tag or a commit of it."
    )


def test_a_bundle_that_the_hub_does_not_take(pushed):
    clf = EarlyExitClassifier.from_pretrained(tiny.trained()[0])
    with pytest.raises(ValueError, match=r"did not take 'org/bert': .*`hf auth login`.*401"):
        clf.push_to_hub("org/bert")
    Api.public = True
    with pytest.raises(ValueError, match=r"org/bert is there and is public, and private=True"):
        clf.push_to_hub("org/bert", private=True, token="mine")
    assert not list(pushed.iterdir())


def test_a_folder_here_wins_over_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny.trained()[0], "org/bert")
    assert EarlyExitClassifier.from_pretrained("org/bert")("a great film")
    with pytest.raises(ValueError, match=r"revision is for a bundle on the hub.* 'v9' for 'org/b"):
        EarlyExitClassifier.from_pretrained("org/bert", revision="v9")
    with pytest.raises(ValueError, match=r"runs/x does not exist"):
        EarlyExitClassifier.from_pretrained(Path("runs/x"))  # a path is never a hub id


# the pinned files themselves


def fetched(name):
    try:
        return resolve(name)
    except ValueError as error:
        pytest.skip(f"{name} cannot be fetched here: {error}")


def test_bbc_news_is_what_it_says():
    folder = fetched("bbc-news")
    counts = {p.name: len(list(p.glob("*.txt"))) for p in folder.iterdir()}
    assert counts == {
        "business": 510,
        "entertainment": 386,
        "politics": 417,
        "sports": 511,
        "tech": 401,
    }


def test_minilm_is_what_it_says():
    held = listing(fetched("all-MiniLM-L6-v2"))
    assert {"config.json", "model.safetensors", "tokenizer.json", "vocab.txt"} <= set(held)
