"""Signed bundles: only files that the signature lists are loaded, and other tools can read the signature."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the bundle is exported here")
pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")
pytest.importorskip("model_signing", reason="pip install 'blip2edge[sign]'", exc_type=ImportError)

import model_signing
import onnx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from blip2edge import Bundle, BundleError, BundleIntegrityError, BundleSignatureError, Captioner, UsageError
from blip2edge.bundle.manifest import MANIFEST
from blip2edge.bundle.trust import integrity
from blip2edge.bundle.trust.integrity import STAMPS, FileRecord
from blip2edge.bundle.trust.signature import SIGNATURE
from blip2edge.bundle.trust.signing import sign_bundle, verify_bundle
from blip2edge.cli import main
from blip2edge.cli.sign import PASSWORD
from blip2edge.errors import MissingPackageError, OutputError
from blip2edge.optimization.pipeline import optimize
from blip2edge.runtime.backends import onnxruntime_cpu
from blip2edge.runtime.backends.optimized_copy import RECORD
from tests.drawing import draw_pictures

COPY = Path("optimized", "cpu")
Key = tuple[Path, Path]


def make_keys(folder: Path, name: str, curve: ec.EllipticCurve, password: bytes = b"") -> Key:
    """A private key and its public key, as PEM files."""
    key = ec.generate_private_key(curve)
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    pem = serialization.Encoding.PEM
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, encryption))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Key:
    return make_keys(tmp_path_factory.mktemp("keys"), "own", ec.SECP256R1())


@pytest.fixture(scope="module")
def other_keys(tmp_path_factory: pytest.TempPathFactory) -> Key:
    return make_keys(tmp_path_factory.mktemp("keys"), "other", ec.SECP384R1())


@pytest.fixture(scope="module")
def optimized(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an optimized copy; not to be changed."""
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("optimized") / "bundle"))
    optimize(bundle)
    return bundle


@pytest.fixture(scope="module")
def signed_once(optimized: Path, keys: Key, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = Path(shutil.copytree(optimized, tmp_path_factory.mktemp("signed") / "bundle"))
    sign_bundle(bundle, keys[0])
    return bundle


@pytest.fixture
def signed(signed_once: Path, tmp_path: Path) -> Path:
    """A signed bundle with an optimized copy."""
    return Path(shutil.copytree(signed_once, tmp_path / "bundle"))


def caption(bundle: Path, public: Path | None = None) -> tuple[Any, set[str]]:
    """The tokens of a caption, and the names of the graphs that ran from the optimized copy."""
    with Captioner.load(bundle, backend="cpu", threads=1, require_signature=public) as captioner:
        return captioner.caption(draw_pictures(1)[0], max_new_tokens=4).tokens, captioner.graphs.copied


def flip(path: Path) -> None:
    """Changes one bit, and keeps size and time."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


# The format


def test_tools_of_others_read_the_signature(signed: Path, keys: Key) -> None:
    verifier = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=keys[1])
    verifier.verify(signed, signed / SIGNATURE)
    caption(signed)  # stamps are written, and are no part of the signature
    assert (signed / STAMPS).is_file()
    assert (signed / COPY / STAMPS).is_file()
    verifier.verify(signed, signed / SIGNATURE)
    flip(signed / "bridge.onnx.data")
    with pytest.raises(ValueError, match=r"Hash mismatch for 'bridge\.onnx\.data'"):
        verifier.verify(signed, signed / SIGNATURE)


def test_the_command_of_others_reads_the_signature(signed: Path, keys: Key) -> None:
    from click.testing import CliRunner
    from model_signing._cli import main as others

    words = ["verify", "key", str(signed), "--signature", str(signed / SIGNATURE), "--public_key", str(keys[1])]
    done = CliRunner().invoke(others, words)
    assert (done.exit_code, "Verification succeeded" in done.output) == (0, True)
    (signed / "added.txt").write_text("new")
    assert CliRunner().invoke(others, words).exit_code == 1


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_signatures_of_others_are_read(curve: ec.EllipticCurve, optimized: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(optimized, tmp_path / "bundle"))
    private, public = make_keys(tmp_path, "peer", curve)
    signer = model_signing.signing.Config().use_elliptic_key_signer(private_key=private)
    signer.sign(bundle, tmp_path / "bundle.sig")  # beside the bundle
    assert caption(bundle, public) == caption(bundle)
    assert verify_bundle(bundle, public).files[MANIFEST] == Bundle.open(bundle).sha256


def test_a_signature_of_a_certificate(optimized: Path, tmp_path: Path) -> None:
    """Signed by a tool of others with a certificate; verified with that of the authority."""
    day = datetime(2026, 1, 1, tzinfo=timezone.utc)

    def certificate(name: str, issuer: str, key: ec.EllipticCurvePrivateKey, by: ec.EllipticCurvePrivateKey) -> bytes:
        subject, of = (x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, one)]) for one in (name, issuer))
        one = x509.CertificateBuilder().subject_name(subject).issuer_name(of).public_key(key.public_key())
        one = (
            one.serial_number(x509.random_serial_number()).not_valid_before(day).not_valid_after(day.replace(year=2036))
        )
        authority = name == issuer
        one = one.add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        usage = x509.KeyUsage(not authority, False, False, False, False, authority, False, False, False)
        return one.add_extension(usage, critical=True).sign(by, hashes.SHA256()).public_bytes(pem)

    pem = serialization.Encoding.PEM
    authority, signer, stranger = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
    for name, content in (
        ("authority.pem", certificate("authority", "authority", authority, authority)),
        ("signer.pem", certificate("signer", "authority", signer, authority)),
        ("stranger.pem", certificate("authority", "authority", stranger, stranger)),
        ("key.pem", signer.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())),
    ):
        (tmp_path / name).write_bytes(content)
    files = {"private_key": tmp_path / "key.pem", "signing_certificate": tmp_path / "signer.pem"}
    config = model_signing.signing.Config().use_certificate_signer(
        **files, certificate_chain=[tmp_path / "authority.pem"]
    )
    config.sign(optimized, tmp_path / "x.sig")
    assert verify_bundle(optimized, tmp_path / "authority.pem", signature=tmp_path / "x.sig").files
    with pytest.raises(BundleSignatureError, match=r"not a signature of the key .*stranger\.pem"):
        verify_bundle(optimized, tmp_path / "stranger.pem", signature=tmp_path / "x.sig")


def test_hashes_of_another_kind_are_refused(optimized: Path, keys: Key, tmp_path: Path) -> None:
    hashing = model_signing.hashing.Config().use_file_serialization(hashing_algorithm="blake2")
    signer = model_signing.signing.Config().set_hashing_config(hashing)
    signer.use_elliptic_key_signer(private_key=keys[0]).sign(optimized, tmp_path / "b.sig")
    with pytest.raises(BundleSignatureError, match="expected the SHA-256 of whole files, got blake2"):
        verify_bundle(optimized, keys[1], signature=tmp_path / "b.sig")


def test_a_renamed_and_copied_bundle_stays_signed(signed: Path, keys: Key, tmp_path: Path) -> None:
    renamed = signed.rename(tmp_path / "other name")
    (tmp_path / "link").symlink_to(renamed)
    assert caption(renamed, keys[1]) == caption(tmp_path / "link", keys[1])
    assert len(caption(renamed, keys[1])[1]) > 0
    verify_bundle(renamed, keys[1])


def test_a_signature_elsewhere(optimized: Path, keys: Key, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(optimized, tmp_path / "bundle"))
    for place in (tmp_path / "far.sig", bundle / "signatures" / "near.sig"):
        place.parent.mkdir(exist_ok=True)
        assert sign_bundle(bundle, keys[0], output=place).signature == place
        assert verify_bundle(bundle, keys[1], signature=place).signature == place
        with pytest.raises(BundleSignatureError, match=r"has no signature.*blip2edge sign"):
            Bundle.open(bundle, require_signature=keys[1])
        place.unlink()
    with pytest.raises(OutputError, match=r"x.sig could not be written \(No such file or directory\); give another"):
        sign_bundle(bundle, keys[0], output=tmp_path / "absent" / "x.sig")
    assert not (tmp_path / "absent").exists()


# What was changed

ROOT_FILES = [
    MANIFEST, "vision_encoder.onnx", "bridge.onnx.data", "decoder.onnx.data", "embed_tokens.safetensors",
    "tokenizer.json",
]  # fmt: skip


@pytest.mark.parametrize("name", [*ROOT_FILES, SIGNATURE])
def test_a_flipped_bit_is_refused(name: str, signed: Path, keys: Key) -> None:
    flip(signed / name)
    for use in (verify_bundle, caption):
        with pytest.raises(BundleError) as caught:
            use(signed, keys[1])
        assert name in str(caught.value)


@pytest.mark.parametrize("name", ["bridge.onnx", "vision_encoder.own.data", RECORD])
def test_a_flipped_bit_of_a_copy(name: str, signed: Path, keys: Key) -> None:
    flip(signed / COPY / name)
    with pytest.raises(BundleIntegrityError, match=name):
        verify_bundle(signed, keys[1])
    if name == RECORD:
        assert caption(signed, keys[1]) == (caption(signed, keys[1])[0], set())
    else:
        with pytest.raises(BundleIntegrityError, match=name):
            caption(signed, keys[1])


@pytest.mark.parametrize("name", [*ROOT_FILES[1:], str(COPY / "bridge.onnx")])
def test_a_removed_file_is_refused(name: str, signed: Path, keys: Key) -> None:
    (signed / name).unlink()
    for use in (verify_bundle, caption):
        with pytest.raises(BundleIntegrityError, match=rf"{Path(name).name} is missing"):
            use(signed, keys[1])


def test_an_added_file_is_not_signed(signed: Path, keys: Key) -> None:
    (signed / "added.onnx").write_bytes(b"")
    with pytest.raises(BundleSignatureError, match=r"model\.sig does not list added\.onnx"):
        verify_bundle(signed, keys[1])
    bundle = Bundle.open(signed, require_signature=keys[1])
    assert bundle.unsigned == ["added.onnx"]
    assert caption(signed, keys[1])[0] == caption(signed)[0]


def forge_copy(bundle: Path) -> None:
    """Replaces a graph of the optimized copy, and writes a record that fits it."""
    graph, record = bundle / COPY / "decoder.onnx", bundle / COPY / RECORD
    model = onnx.load(graph, load_external_data=False)
    for node in model.graph.node:
        if "logits" in node.output:
            node.output[0] = "inverted"
            model.graph.node.append(onnx.helper.make_node("Neg", ["inverted"], ["logits"]))
            break
    onnx.save(model, graph)
    values = json.loads(record.read_text())
    values["files"]["decoder.onnx"] = dict(vars(FileRecord.of(graph)))
    record.write_text(json.dumps(values))


def test_a_forged_copy_is_found_by_the_signature(signed: Path, keys: Key, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = caption(signed, keys[1])[0]
    forge_copy(signed)
    assert caption(signed)[0] != wanted  # hashes alone do not show who wrote a record
    assert main(["inspect", str(signed), "--verify"]) == 0
    assert "they do not show who wrote the files and the records" in capsys.readouterr().out
    assert caption(signed, keys[1]) == (wanted, set())
    with pytest.raises(BundleSignatureError, match="optimized/cpu"):
        verify_bundle(signed, keys[1])
    words = ["caption", "examples/pictures/scene-1.png", "-b", str(signed), "--backend", "cpu"]
    assert main([*words, "--require-signature", str(keys[1])]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "signature" in line]
    note = (
        "note: not used, because the signature does not list it: optimized/cpu; remove the files that are not "
        "yours, or sign the bundle again: blip2edge sign"
    )
    assert lines == [f"{note} {signed} --key KEY"]


def test_copies_made_after_signing_are_used_after_signing_again(tiny_bundle: Path, keys: Key, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    sign_bundle(bundle, keys[0])
    optimize(bundle)
    tokens, copied = caption(bundle, keys[1])
    assert copied == set()
    with pytest.raises(BundleSignatureError, match=r"does not list optimized/cpu of"):
        verify_bundle(bundle, keys[1])
    sign_bundle(bundle, keys[0])
    assert caption(bundle, keys[1]) == (tokens, caption(bundle)[1])
    assert len(caption(bundle)[1]) > 0


def test_copies_in_the_cache_are_not_signed(
    signed: Path, keys: Key, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cached = tmp_path / "cache" / "blip2edge" / "optimized" / Bundle.open(signed).sha256[:16]
    cached.parent.mkdir(parents=True)
    (signed / "optimized").rename(cached)
    with pytest.raises(BundleIntegrityError, match=r"external data 'bridge\.onnx\.data', which is not listed"):
        caption(signed)  # a copy in the cache must contain its weights, and this one was moved there
    with Captioner.load(signed, backend="cpu", threads=1, require_signature=keys[1]) as captioner:
        assert (captioner.bundle.unsigned, captioner.graphs.copied) == ([str(cached / "cpu")], set())


def test_engines_made_after_signing(tiny_bundle: Path, keys: Key, tmp_path: Path, monkeypatch: Any) -> None:
    from tests.engine.fake_engines import plug_in, write_engines

    plug_in(monkeypatch)
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    sign_bundle(bundle, keys[0])
    write_engines(bundle, bundle / "engines")
    with pytest.raises(BundleError.__mro__[1], match=r"engines in .* are not signed; sign it: blip2edge sign"):
        Captioner.load(bundle, backend="tensorrt", threads=1, require_signature=keys[1])
    sign_bundle(bundle, keys[0])
    with Captioner.load(bundle, backend="tensorrt", threads=1, require_signature=keys[1]) as captioner:
        assert captioner.caption(draw_pictures(1)[0], max_new_tokens=3).tokens == caption(bundle)[0][:3]
    flip(bundle / "engines" / "x" / "bridge.engine")
    with pytest.raises(BundleIntegrityError, match=r"bridge\.engine does not match engine\.json"):
        Captioner.load(bundle, backend="tensorrt", threads=1, require_signature=keys[1])


def test_a_damaged_bundle_is_not_signed(optimized: Path, keys: Key, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(optimized, tmp_path / "bundle"))
    flip(bundle / COPY / "bridge.onnx")
    with pytest.raises(BundleIntegrityError, match=r"cpu/bridge\.onnx does not have its recorded SHA-256"):
        sign_bundle(bundle, keys[0])
    flip(bundle / "bridge.onnx.data")
    with pytest.raises(BundleIntegrityError, match=r"bridge\.onnx\.data does not match"):
        sign_bundle(bundle, keys[0])
    assert not (bundle / SIGNATURE).exists()


# Whose signature


def test_a_signature_of_another_key(signed: Path, other_keys: Key) -> None:
    for use in (verify_bundle, caption):
        with pytest.raises(BundleSignatureError, match=r"model\.sig is not a signature of the key .*other\.pub"):
            use(signed, other_keys[1])


def test_a_signature_of_another_bundle(signed: Path, keys: Key, tmp_path: Path) -> None:
    other = Path(shutil.copytree(signed, tmp_path / "other"))
    manifest = json.loads((other / MANIFEST).read_text())
    manifest["versions"]["note"] = "another bundle"
    (other / MANIFEST).write_text(json.dumps(manifest))
    for use in (verify_bundle, caption):
        with pytest.raises(BundleSignatureError, match=r"bundle\.json is not the file that was signed"):
            use(other, keys[1])


def test_a_bundle_without_signature(optimized: Path, keys: Key, tmp_path: Path) -> None:
    with pytest.raises(BundleSignatureError, match=r"has no signature: neither .*model\.sig nor .*bundle\.sig"):
        caption(optimized, keys[1])
    with pytest.raises(BundleError, match="is not a directory"):
        caption(tmp_path / "nowhere", keys[1])


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"verificationMaterial": {}}', "[" * 100000, "\0"])
def test_what_is_no_signature(content: str, signed: Path, keys: Key) -> None:
    (signed / SIGNATURE).write_text(content)
    expected = r"model\.sig is damaged, or is not a signature: it|expected a JSON object in .*model\.sig"
    with pytest.raises(BundleSignatureError, match=expected) as caught:
        caption(signed, keys[1])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0.3, 0.99])
def test_a_signature_that_is_cut_off(kept: float, signed: Path, keys: Key) -> None:
    content = (signed / SIGNATURE).read_bytes()
    (signed / SIGNATURE).write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(BundleSignatureError, match=r"model\.sig is damaged, or is not a signature: it is not JSON"):
        verify_bundle(signed, keys[1])


@pytest.mark.parametrize("part", ["verificationMaterial", "dsseEnvelope", "payload", "signatures", "mediaType"])
def test_a_signature_that_lacks_a_part(part: str, signed: Path, keys: Key) -> None:
    values = json.loads((signed / SIGNATURE).read_text())
    del (values if part in values else values["dsseEnvelope"])[part]
    (signed / SIGNATURE).write_text(json.dumps(values))
    with pytest.raises(BundleSignatureError, match=r"model\.sig is damaged, or is not a signature: .*") as caught:
        verify_bundle(signed, keys[1])
    assert "object" not in str(caught.value)


@pytest.mark.parametrize("kind", ["private", "text", "rsa", "missing", "curve"])
def test_what_is_no_public_key(kind: str, signed: Path, keys: Key, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = tmp_path / "key"
    pem, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    if kind == "private":
        key = keys[0]
    elif kind == "text":
        key.write_text("no key")
    elif kind == "rsa":
        key.write_bytes(rsa.generate_private_key(65537, 2048).public_key().public_bytes(pem, form))
    elif kind == "curve":
        key.write_bytes(ec.generate_private_key(ec.SECP256K1()).public_key().public_bytes(pem, form))
    fix = "contains a private key; give the public key of the pair" if kind == "private" else "openssl"
    reason = {"rsa": "it is a key of another kind, RSA", "missing": "No such file or directory"}.get(kind, "")
    with pytest.raises(UsageError, match=rf"expected a public key in PEM format .*\({reason}.*\); .*{fix}") as caught:
        caption(signed, key)
    assert "object" not in str(caught.value)


# Links, changes while loading, hashing


@pytest.mark.parametrize("name", [MANIFEST, "bridge.onnx.data", "tokenizer.json"])
def test_links_are_refused(name: str, signed: Path, keys: Key, tmp_path: Path) -> None:
    (signed / name).rename(tmp_path / "target")
    (signed / name).symlink_to(tmp_path / "target")
    assert Bundle.open(signed)
    for use in (verify_bundle, caption):
        with pytest.raises(BundleIntegrityError, match="regular file, got a symbolic link"):
            use(signed, keys[1])
    with pytest.raises(BundleIntegrityError, match="symlink"):
        sign_bundle(signed, keys[0])


def test_a_linked_folder_is_not_used(signed: Path, keys: Key, tmp_path: Path) -> None:
    (signed / "optimized").rename(tmp_path / "optimized")
    (signed / "optimized").symlink_to(tmp_path / "optimized")
    assert Bundle.open(signed, require_signature=keys[1]).unsigned == ["optimized"]
    assert caption(signed, keys[1])[1] == set()
    with pytest.raises(BundleSignatureError, match="does not list optimized of"):
        verify_bundle(signed, keys[1])


@pytest.fixture
def at_opening(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path], None]], None]:
    """Does something just before ONNX Runtime opens the bridge; graphs are opened in threads, at the same time."""

    def install(change: Callable[[Path], None]) -> None:
        inner = onnxruntime_cpu.open_graph

        def opened(path: Path, *rest: Any, **more: Any) -> Any:
            if path.stem == "bridge":
                change(path)
            return inner(path, *rest, **more)

        monkeypatch.setattr(onnxruntime_cpu, "open_graph", opened)

    return install


def swapped_and_back(path: Path) -> None:
    """A file is replaced for a moment, and then has its name and content again."""
    aside = path.with_suffix(".aside")
    path.rename(aside)
    aside.rename(path)


def written_again(path: Path) -> None:
    status, content = path.stat(), path.read_bytes()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [swapped_and_back, written_again, flip])
def test_a_change_between_hash_and_use_is_refused(
    change: Callable[[Path], None], signed: Path, keys: Key, at_opening: Callable[[Any], None]
) -> None:
    shutil.rmtree(signed / "optimized")
    at_opening(lambda path: change(signed / "tokenizer.json"))
    with pytest.raises(BundleIntegrityError, match=r"tokenizer\.json was changed while the bundle was loaded"):
        caption(signed, keys[1])


def test_a_folder_that_is_swapped_and_back(signed: Path, keys: Key, at_opening: Callable[[Any], None]) -> None:
    at_opening(lambda path: swapped_and_back(signed))
    with pytest.raises(BundleIntegrityError, match="changed while the bundle was loaded"):
        caption(signed, keys[1])


def test_without_signature_a_new_file_of_the_same_content_is_no_change(
    signed: Path, at_opening: Callable[[Any], None]
) -> None:
    at_opening(lambda path: written_again(signed / "tokenizer.json"))
    assert caption(signed)[0]
    at_opening(lambda path: flip(signed / "tokenizer.json"))
    with pytest.raises(BundleIntegrityError, match=r"tokenizer\.json was changed while the bundle was loaded"):
        caption(signed)


def test_every_file_is_hashed_once(signed: Path, keys: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    inner = integrity.sha256_of

    def note(path: Path) -> str:
        hashed.append(path.relative_to(signed.resolve()).as_posix())
        return inner(path)

    monkeypatch.setattr(integrity, "sha256_of", note)
    everything = model_files(signed)
    for stamps in signed.rglob(STAMPS):
        stamps.unlink()
    for _ in range(2):  # stamps do not count: whoever can write to the bundle can write them
        hashed.clear()
        caption(signed, keys[1])
        assert sorted(hashed) == everything
    hashed.clear()
    words = ["caption", "examples/pictures/scene-1.png", "-b", str(signed), "--backend", "cpu"]
    assert main([*words, "--max-new-tokens", "2", "--require-signature", str(keys[1])]) == 0
    assert sorted(hashed) == everything
    hashed.clear()
    verify_bundle(signed, keys[1])
    assert sorted(hashed) == everything
    assert not (signed / STAMPS).exists()


def model_files(bundle: Path) -> list[str]:
    files = sorted(path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file())
    return [name for name in files if name != SIGNATURE and not name.endswith(STAMPS)]


def test_forged_stamps_do_not_count(signed: Path, keys: Key) -> None:
    flip(signed / "bridge.onnx.data")
    values = json.loads((signed / MANIFEST).read_text())["files"]["bridge.onnx.data"]
    now = (signed / "bridge.onnx.data").stat()
    stamp = [now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_dev, now.st_ino, values["sha256"]]
    (signed / STAMPS).write_text(json.dumps({"bridge.onnx.data": [*stamp, integrity.STAMP_VERSION]}))
    assert caption(signed)[0]  # without a signature, the stamp is believed
    with pytest.raises(BundleIntegrityError, match=r"bridge\.onnx\.data does not match"):
        caption(signed, keys[1])


# The commands


def test_commands(signed: Path, keys: Key, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = str(signed)
    assert main(["sign", bundle, "--key", str(keys[0]), "-o", str(tmp_path / "a.sig")]) == 0
    assert capsys.readouterr().out == (
        f"{tmp_path / 'a.sig'}: a signature of {len(model_files(signed))} files\n"
        f"next: blip2edge verify {bundle} --key PUBLIC_KEY --signature {tmp_path / 'a.sig'}\n"
    )
    for words in ([], ["--signature", str(tmp_path / "a.sig")]):
        assert main(["verify", bundle, "--key", str(keys[1]), *words]) == 0
        assert "verified: " in capsys.readouterr().out
    for words in (["verify", bundle], ["sign", bundle], ["caption", "a.png", "-b", bundle]):
        flag = "--require-signature" if words[0] == "caption" else "--key"
        assert main([*words, flag, str(tmp_path / "none")]) == 1, "as every missing input"
        assert "none cannot be read as one (No such file or directory)" in capsys.readouterr().err
    flip(signed / "tokenizer.json")
    assert main(["verify", bundle, "--key", str(keys[1])]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "tokenizer.json does not match" in error


def test_a_key_with_a_password(
    optimized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(optimized, tmp_path / "bundle"))
    private, public = make_keys(tmp_path, "locked", ec.SECP256R1(), b"g\xc3\xbcnstig")
    words = ["sign", str(bundle), "--key", str(private)]
    monkeypatch.delenv(PASSWORD, raising=False)
    assert main(words) == 2
    assert f"is protected by a password; set the environment variable {PASSWORD}" in capsys.readouterr().err
    monkeypatch.setenv(PASSWORD, "wrong")
    assert main(words) == 1
    assert "expected a private key in PEM format" in capsys.readouterr().err
    with pytest.raises(UsageError, match="expected a private key"):
        sign_bundle(bundle, private)
    monkeypatch.setenv(PASSWORD, "günstig")
    assert main(words) == 0
    verify_bundle(bundle, public)


def test_a_missing_package_is_named(signed: Path, keys: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(MissingPackageError, match=r"a signature needs model_signing.*pip install 'blip2edge\[sign\]'"):
        caption(signed, keys[1])


def test_inspect_names_the_signature(signed: Path, optimized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(signed), "--verify"]) == 0
    assert "model.sig was not checked: blip2edge verify" in capsys.readouterr().out
    (signed / COPY / "extra.onnx").write_bytes(b"")
    assert main(["inspect", str(signed), "--verify"]) == 1
    assert "extra.onnx is not listed in optimized.json" in capsys.readouterr().err
    assert main(["inspect", str(optimized), "--verify"]) == 0
    assert "the bundle has no model.sig: blip2edge sign" in capsys.readouterr().out


def test_a_record_must_list_the_graphs_it_names(optimized: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(optimized, tmp_path / "bundle"))
    record = bundle / COPY / RECORD
    values = json.loads(record.read_text())
    values["graphs"]["decoder"]["file"] = "unlisted.onnx"
    record.write_text(json.dumps(values))
    shutil.copy(bundle / COPY / "decoder.onnx", bundle / COPY / "unlisted.onnx")
    with pytest.raises(BundleIntegrityError, match=r"unlisted\.onnx is not listed in optimized\.json"):
        caption(bundle)
    values["graphs"]["decoder"]["file"] = "../../decoder.onnx"
    record.write_text(json.dumps(values))
    assert caption(bundle)[1] == set()  # the record is broken, and the copy is not used
