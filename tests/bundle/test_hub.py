"""Bundles on the hub, with a local server that has the hub's endpoints: download, errors, push."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch", reason="the bundle is exported here")
pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")
pytest.importorskip("huggingface_hub", reason="the package of the extra hub")

from huggingface_hub import constants

from blip2edge import Bundle, BundleError, BundleIntegrityError, Captioner, OutputError, UsageError
from blip2edge.bundle.hub.download import find_bundle
from blip2edge.bundle.hub.names import HubName
from blip2edge.bundle.manifest import MANIFEST
from blip2edge.bundle.trust.integrity import STAMPS
from blip2edge.bundle.trust.signing import sign_bundle
from blip2edge.cli import main
from blip2edge.errors import MissingPackageError
from blip2edge.optimization.pipeline import optimize
from blip2edge.runtime.backends.optimized_copy import read_copy
from tests.bundle.conftest import HUB, NAME
from tests.bundle.test_signing import Key, make_keys
from tests.drawing import Drawn, draw_pictures
from tests.hub_server import TOKEN, HubServer

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # the hub's client uploads so

PICTURE = draw_pictures(1, 3)[0]
LARGE = "decoder.onnx.data"


def large(bundle: Path) -> str:
    """The largest file of a bundle."""
    files = Bundle.open(bundle).manifest.files
    return max(files, key=lambda name: files[name].size)


def text_of(bundle: str | Path) -> str:
    with Captioner.load(bundle, threads=1) as captioner:
        return captioner.caption(PICTURE, max_new_tokens=5).text


@pytest.mark.parametrize(
    ("text", "repository", "revision"),
    [
        ("hub:a/b", "a/b", "main"),
        ("a/b@v1.0", "a/b", "v1.0"),
        ("hub:a-b/c.d_e@refs/pr/1", "a-b/c.d_e", "refs/pr/1"),
    ],
)
def test_names(text: str, repository: str, revision: str) -> None:
    name = HubName.parse(text)
    assert (name.repository, name.revision) == (repository, revision)
    assert HubName.parse(str(name)) == name


@pytest.mark.parametrize("text", ["hub:", "hub:a", "hub:a/b/c", "hub:a/b@", "hub:../x", "hub:a b/c", "hub:/tmp/b"])
def test_a_name_of_another_form(text: str) -> None:
    with pytest.raises(UsageError, match=r"expected the name of a repository on the hub as hub:ORG/NAME"):
        find_bundle(text)


def test_download_is_cached_and_holds_only_the_files_of_the_bundle(published: HubServer, tiny_bundle: Path) -> None:
    with Captioner.from_pretrained(NAME, threads=1) as captioner:
        path = captioner.bundle.path
        assert captioner.caption(PICTURE, max_new_tokens=5).text == text_of(tiny_bundle)
    names = {MANIFEST, *Bundle.open(tiny_bundle).manifest.files}
    assert {file.name for file in path.iterdir()} == {*names, STAMPS}
    assert path.name == "tiny"
    (snapshot,) = Path(constants.HF_HUB_CACHE).glob("models--org--tiny/snapshots/*")
    assert {file.name for file in snapshot.iterdir()} == names
    large = names - {MANIFEST}
    assert all((snapshot / name).samefile(path / name) for name in large)  # one copy on the disk
    assert all((path / name).stat().st_nlink == 1 and not (path / name).is_symlink() for name in names)
    published.requests.clear()
    assert Bundle.open(HUB).path == path
    assert published.requests == [f"HEAD /{NAME}/resolve/main/{MANIFEST}"]  # which revision it is


def test_a_revision_is_downloaded(published: HubServer, tiny_bundle: Path) -> None:
    repository = published.repositories[NAME]
    first = repository.refs["main"]
    repository.commit({"README.md": b"nothing else"})
    repository.refs["v1"] = first
    for revision in ("v1", first):
        assert Bundle.open(f"{HUB}@{revision}").path.parent.name == first
    with pytest.raises(BundleError, match=rf"{HUB} is not a bundle: it has no bundle\.json"):
        Bundle.open(HUB)
    with pytest.raises(BundleError, match=r"org/tiny has no revision v2; give a branch, a tag or a commit"):
        Captioner.from_pretrained(NAME, revision="v2")


def test_a_cut_download_continues(published: HubServer, tiny_bundle: Path) -> None:
    size = Bundle.open(tiny_bundle).manifest.files[large(tiny_bundle)].size
    published.cut_after = 1000
    with pytest.raises(BundleError, match=r"cannot be reached .*; run the command again: it continues"):
        Bundle.open(HUB)
    kept = [path.stat().st_size for path in Path(constants.HF_HUB_CACHE).rglob("*.incomplete")]
    assert kept
    assert all(0 < one < size for one in kept)
    assert f"bytes={kept[0]}-" in published.ranges  # it tried to continue at once
    published.cut_after, published.ranges = None, []
    assert Bundle.open(HUB)
    assert f"bytes={kept[0]}-" in published.ranges
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))


def test_a_wrong_file_is_not_kept(published: HubServer, tiny_bundle: Path) -> None:
    name, files = large(tiny_bundle), dict(published.repositories[NAME].files())
    good = files[name]
    for content in (good[:-1] + bytes([good[-1] ^ 1]), good[:-5], good + b"more"):
        published.repositories[NAME].commit(files | {name: content})
        with pytest.raises(BundleIntegrityError, match=rf"{name} of hub:org/tiny does not match its bundle\.json: exp"):
            Bundle.open(HUB)
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))
    published.repositories[NAME].commit(files)
    assert Bundle.open(HUB)


def test_files_that_another_tool_downloaded_are_used(published: HubServer, tiny_bundle: Path) -> None:
    from huggingface_hub import snapshot_download

    snapshot = Path(snapshot_download(NAME))
    published.requests.clear()
    path = Bundle.open(HUB).path
    assert not [line for line in published.requests if line.startswith("GET")]
    assert (snapshot / large(tiny_bundle)).samefile(path / large(tiny_bundle))
    assert Path(snapshot_download(NAME)) == snapshot
    assert not [line for line in published.requests if "/cdn/" in line]


def test_two_revisions_with_equal_files(published: HubServer) -> None:
    repository = published.repositories[NAME]
    first = repository.refs["main"]
    second = repository.commit({**repository.files(), "README.md": b"another card"})
    paths = [Bundle.open(f"{HUB}@{commit}").path for commit in (first, second)]
    assert len(set(paths)) == 2
    downloads = [line for line in published.requests if line.startswith("GET /cdn/")]
    assert len(downloads) == len(set(downloads))  # each file once
    for path in paths:
        Bundle.open(path).verify()


def test_a_damaged_file_of_the_cache_is_found(published: HubServer, tiny_bundle: Path) -> None:
    path = Bundle.open(HUB).path
    file = path / large(tiny_bundle)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleIntegrityError, match=rf"{file} does not match .*; remove this file, and run"):
        Bundle.open(HUB)
    file.unlink()
    published.ranges.clear()
    assert Bundle.open(HUB)
    assert len(published.ranges) == 1  # the others are in the hub's cache


def test_offline_uses_the_cache(published: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Bundle.open(HUB).path
    published.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert Bundle.open(HUB).path == path
    assert not published.requests
    with pytest.raises(BundleError, match=r"org/other is not in the hub's cache, and HF_HUB_OFFLINE is set; unset it"):
        Bundle.open("hub:org/other")


def test_no_network(published: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Bundle.open(HUB).path
    url = "http://127.0.0.1:9"  # nothing listens there
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    assert Bundle.open(HUB).path == path
    with pytest.raises(BundleError, match=r"hub:org/other could not be downloaded: the hub cannot be reached"):
        Bundle.open("hub:org/other")


def test_who_may_download(published: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    published.repositories[NAME].gated = True
    for token in (TOKEN, ""):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(BundleError, match=r"org/tiny is gated, and this account has no access; ask for access"):
            Bundle.open(HUB)
    published.repositories[NAME].gated, published.repositories[NAME].private = False, True
    with pytest.raises(BundleError, match=r"no repository org/tiny on the hub, or it is private; .*hf auth login"):
        Bundle.open(HUB)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert Bundle.open(HUB)


def test_a_missing_repository_and_a_checkpoint(hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    hub.add("org/model", {"config.json": b"{}", "model.safetensors": b"x"})
    assert main(["inspect", "hub:org/model"]) == 1
    assert capsys.readouterr().err == (
        "error: hub:org/model is a checkpoint, not a bundle: it has config.json and no bundle.json; "
        "export it: blip2edge export org/model -o BUNDLE\n"
    )
    assert main(["inspect", "hub:org/none"]) == 1
    assert "there is no repository org/none on the hub, or it is private" in capsys.readouterr().err
    hub.status = 500
    with pytest.raises(BundleError, match=r"answered with status 500 \(Internal Server Error\)"):
        Bundle.open("hub:org/model")


def test_without_a_network_nothing_is_repeated(
    published: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub.utils import _http

    assert main(["inspect", HUB]) == 0
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    waits: list[float] = []
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=waits.append, time=time.time))
    assert main(["inspect", HUB]) == 0  # from the cache
    capsys.readouterr()
    for words in (
        ["inspect", "hub:org/other"],
        ["plan", "hub:org/other"],
        ["plan", "org/other"],
        ["caption", "cat.png", "-b", "hub:org/other"],
        ["caption", "cat.png", "-b", HUB, "--require-signature", str(tmp_path / "key")],
    ):
        assert main(words) == 1
        assert "the hub cannot be reached" in capsys.readouterr().err
    assert not waits


def test_a_full_disk(published: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import file_download

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", full)
    with pytest.raises(OutputError, match=r"the disk is full: .*hub could not be written"):
        Bundle.open(HUB)


def test_in_a_process_of_its_own(published: HubServer, tmp_path: Path) -> None:
    """As a user sets it: by variables, which the hub's client reads when it is imported."""
    variables = {"HF_ENDPOINT": published.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    switches = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    words = [sys.executable, "-m", "blip2edge", "inspect", HUB]
    done = subprocess.run(
        words, env={**os.environ, **variables, **switches}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"next: blip2edge caption IMAGE -b {HUB}"


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blip2edge.packages.importlib.import_module", _absent)
    with pytest.raises(
        MissingPackageError, match=r"hub:org/tiny needs huggingface_hub, which is not installed.*\[hub\]"
    ):
        Bundle.open(HUB)


def _absent(name: str) -> Any:
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_derived_files_go_to_the_users_cache(published: HubServer, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = optimize(HUB).directory
    assert directory.is_relative_to(tmp_path / "cache" / "blip2edge" / "optimized")
    assert Bundle.open(HUB).derived("optimized") == [directory.parent]
    assert not list(Path(constants.HF_HUB_CACHE).rglob("optimized*"))


def test_a_signed_bundle(published: HubServer, tiny_bundle: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "keys").mkdir()
    _, public = keys = make_keys(tmp_path / "keys", "own", _curve())
    with pytest.raises(BundleIntegrityError, match="has no signature"):
        Bundle.open(HUB, require_signature=public)
    signed = _signed(tiny_bundle, tmp_path / "signed", keys)
    published.add("org/signed", signed)
    assert not (Bundle.open("hub:org/signed").path / "optimized").exists()
    bundle = Bundle.open("hub:org/signed", require_signature=public)
    assert (bundle.path / "optimized" / "cpu" / "optimized.json").is_file()  # it is signed
    assert bundle.unsigned == []
    assert text_of("hub:org/signed") == text_of(tiny_bundle)
    own = optimize("hub:org/signed").directory
    assert _copy_of("hub:org/signed") == own
    assert _copy_of("hub:org/signed", public) == bundle.path / "optimized" / "cpu"
    (own / "optimized.json").write_text("{}")  # of another version
    assert _copy_of("hub:org/signed") == bundle.path / "optimized" / "cpu"
    assert main(["verify", "hub:org/signed", "--key", str(public)]) == 0
    other = make_keys(tmp_path / "keys", "other", _curve())[1]
    with pytest.raises(BundleError, match="is not a signature of the key"):
        Bundle.open("hub:org/signed", require_signature=other)


def _copy_of(bundle: str, public_key: Path | None = None) -> Path:
    """The optimized copy for the CPU that a run of a bundle uses."""
    found = read_copy(Bundle.open(bundle, require_signature=public_key), "cpu")
    assert found is not None
    return found[0]


def _curve() -> Any:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.SECP256R1()


def _signed(bundle: Path, target: Path, keys: Key) -> Path:
    """A copy of a bundle with an optimized copy and a signature of both."""
    shutil.copytree(bundle, target, ignore=shutil.ignore_patterns("optimized", "engines", STAMPS))
    optimize(target)
    sign_bundle(target, keys[0])
    (target / STAMPS).unlink(missing_ok=True)
    for stamps in target.rglob(STAMPS):
        stamps.unlink()
    return target


def test_push_and_load_again(hub: HubServer, tiny_bundle: Path, tmp_path: Path, capsys: Any) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    (bundle / "notes.txt").write_text("not of the bundle")
    optimize(bundle)
    assert main(["push", str(bundle), NAME, "--private", "--license", "mit", "--message", "the first"]) == 0
    out = capsys.readouterr().out.splitlines()
    repository = hub.repositories[NAME]
    names = {MANIFEST, *Bundle.open(bundle).manifest.files}
    assert repository.files().keys() == {*names, "README.md", ".gitattributes"}
    assert (repository.private, repository.messages[-1]) == (True, "the first")
    assert out[0].startswith(f"{HUB}: {len(names)} files, ")
    assert out[-1] == f"next: blip2edge caption IMAGE -b {HUB}"
    assert text_of(HUB) == text_of(bundle)
    uploads = [line for line in hub.requests if line.startswith("PUT")]
    assert main(["push", str(bundle), NAME, "--license", "mit"]) == 0  # nothing changed
    assert [line for line in hub.requests if line.startswith("PUT")] == uploads
    assert len(repository.commits) == 2


def test_push_of_another_bundle_removes_old_files(hub: HubServer, tiny_bundle: Path, tmp_path: Path) -> None:
    from blip2edge.bundle.hub.upload import push_bundle

    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    values = json.loads((bundle / MANIFEST).read_text())
    values["files"]["old.bin"] = {"sha256": "0" * 64, "size": 1}
    files = {MANIFEST: json.dumps(values).encode(), "old.bin": b"x", "LICENSE": b"text", "README.md": b"edited"}
    hub.add(NAME, files)
    report = push_bundle(bundle, NAME, revision="next")
    assert (report.removed, report.card_kept) == (("old.bin",), True)
    kept = hub.repositories[NAME].files("next")
    assert "old.bin" not in kept
    assert (kept["LICENSE"], kept["README.md"]) == (b"text", b"edited")
    assert hub.repositories[NAME].files("main") == files
    assert Bundle.open(f"{HUB}@next").sha256 == Bundle.open(bundle).sha256


def test_push_keeps_an_edited_card_and_writes_its_own_again(hub: HubServer, tiny_bundle: Path) -> None:
    from blip2edge.bundle.hub.upload import push_bundle

    assert not push_bundle(tiny_bundle, NAME).card_kept
    card = hub.repositories[NAME].files()["README.md"]
    assert b'license: "mit"' not in card
    assert not push_bundle(tiny_bundle, NAME, license_id="mit").card_kept
    again = hub.repositories[NAME].files()["README.md"]
    assert b'license: "mit"' in again
    edited = again.replace(b"## Run it", b"Of my dogs.\n\n## Run it")
    hub.add(NAME, {**hub.repositories[NAME].files(), "README.md": edited})
    assert push_bundle(tiny_bundle, NAME).card_kept
    assert hub.repositories[NAME].files()["README.md"] == edited


def test_push_uploads_derived_files_when_asked(hub: HubServer, tiny_bundle: Path, tmp_path: Path, capsys: Any) -> None:
    keys = make_keys(tmp_path, "own", _curve())
    signed = _signed(tiny_bundle, tmp_path / "signed", keys)
    assert main(["push", str(signed), NAME]) == 1
    error = capsys.readouterr().err
    assert "which is not uploaded, so `blip2edge verify` would fail; upload the derived files too (--derived)" in error
    assert NAME not in hub.repositories
    assert main(["push", str(signed), NAME, "--derived"]) == 0
    assert main(["verify", HUB, "--key", str(keys[1])]) == 0


def test_push_is_refused(hub: HubServer, tiny_bundle: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    words = ["push", str(tiny_bundle), NAME]
    broken = Path(shutil.copytree(tiny_bundle, tmp_path / "broken"))
    (broken / large(broken)).write_bytes(b"x")
    assert main(["push", str(broken), NAME]) == 1
    assert "does not match bundle.json" in capsys.readouterr().err
    hub.add("org/model", {"config.json": b"{}"})
    assert main(["push", str(tiny_bundle), "org/model"]) == 1
    assert "contains a checkpoint; a bundle cannot be added" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    assert main(words) == 1
    assert "the hub does not accept this token for org/tiny; log in with `hf auth login`" in capsys.readouterr().err
    hub.add(NAME, {})
    monkeypatch.delenv("HF_TOKEN")
    assert main(words) == 1
    assert "no account is logged in; log in with `hf auth login`, or set HF_TOKEN" in capsys.readouterr().err
    assert main(["push", str(tiny_bundle), "tiny"]) == 2
    assert "expected the name of a repository" in capsys.readouterr().err


def test_every_command_takes_a_name(
    published: HubServer, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    PICTURE.save("dog.png")
    bench = ["--runs", "1", "--warmup", "0", "--tokens", "2", "--batch-sizes", "1", "--threads", "1"]
    for words in (
        ["caption", "dog.png", "-b", HUB, "--threads", "1"],
        ["ask", "dog.png", "what is it?", "-b", HUB, "--threads", "1"],
        ["inspect", HUB, "--verify"],
        ["bench", HUB, *bench],
        ["eval", HUB, "--count", "2", "--threads", "1"],
        ["calibrate", HUB, "-o", "int8", "--images", ".", "--no-optimize", "--threads", "1"],
        ["optimize", HUB],
    ):
        assert main(words) == 0, words
        out = capsys.readouterr().out
        assert "cache" not in "".join(line for line in out.splitlines() if line.startswith("next: ")), words
    assert Bundle.open("int8").manifest.calibration


def test_plan_downloads_the_manifest_only(published: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", HUB, "--device", "thor"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"next: blip2edge bench {HUB}"
    assert {line.rpartition("/")[2] for line in published.requests} == {MANIFEST}


def test_nothing_is_written_to_the_hub_or_its_cache(
    published: HubServer, small: Drawn, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    PICTURE.save("dog.png")
    key, _ = make_keys(tmp_path, "own", _curve())
    for words in (
        ["calibrate", HUB, "-o", "hub:org/int8", "--images", "."],
        ["export", str(small.directory), "-o", "hub:org/new"],
        ["bulk", ".", "-o", "hub:org/captions", "-b", HUB],
        ["triton", HUB, "-o", "hub:org/repository"],
    ):
        assert main(words) == 1, words
        assert "the name of a bundle on the hub; give a directory or a file" in capsys.readouterr().err, words
    assert main(["sign", HUB, "--key", str(key)]) == 2
    assert "is in the hub's cache, where nothing is written; give --output, or sign your own" in capsys.readouterr().err
    assert main(["sign", HUB, "--key", str(key), "-o", "model.sig"]) == 0
    assert not list(Path(constants.HF_HUB_CACHE).rglob("model.sig"))
    assert not list(tmp_path.glob("hub:*"))


def test_a_bundle_and_a_checkpoint_taken_for_the_other(
    published: HubServer, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (NAME, HUB, str(tiny_bundle)):
        assert main(["export", name, "-o", str(tmp_path / "new")]) == 1
        error = capsys.readouterr().err
        assert "bundle.json: a bundle, which is exported already; run it: blip2edge caption" in error
    assert main(["inspect", NAME]) == 1
    assert f"a bundle on the hub is named {HUB}" in capsys.readouterr().err
