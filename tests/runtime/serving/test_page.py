"""The page of ``serve`` in a real Chromium: what it sends, what it shows, keyboard, screen reader, narrow screens."""

from __future__ import annotations

import io
import json
import math
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image, features

pytest.importorskip("torch", reason="the bundle is exported here")
pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")
pytest.importorskip("uvicorn", reason="the server needs the extra serve")

from blip2edge.cli import main
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.captioning.matcher import Matcher
from blip2edge.runtime.serving.access import Access
from blip2edge.runtime.serving.models.served import ModelSource, ServedCaptioner
from tests.browser import Page
from tests.drawing import draw_pictures
from tests.live_server import live
from tests.runtime.serving.conftest import BOARD

KEY = "s3cret"
CONTRAST = 4.5  # WCAG 2.2, level AA
TOUCH = 44  # pixels, as WCAG 2.2 advises for buttons

Sent = list[tuple[bytes, ...]]


class Service(NamedTuple):
    """A server without and one with an API key, and the pictures that they got."""

    port: int
    guarded: int
    sent: Sent


@pytest.fixture(scope="module")
def service(tiny_bundle: Path) -> Iterator[Service]:
    sent: Sent = []
    submit = ServedCaptioner.submit

    def recording(model: ServedCaptioner, client: Any, pictures: tuple[bytes, ...], *rest: Any) -> None:
        sent.append(pictures)
        submit(model, client, pictures, *rest)

    captioner = Captioner.load(tiny_bundle, threads=1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ServedCaptioner, "submit", recording)
        with live(captioner) as (_, port), live(captioner, access=Access(api_key=KEY)) as (_, guarded):
            yield Service(port, guarded, sent)


@pytest.fixture
def opened(page: Page, service: Service) -> Page:
    """The page of the server without a key."""
    watched = "document.addEventListener('securitypolicyviolation', event => violations.push(event.blockedURI));"
    page.call("Page.addScriptToEvaluateOnNewDocument", source=f"window.violations = []; {watched}")
    page.open(f"http://127.0.0.1:{service.port}/", "document.getElementById('model').textContent")
    return page


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A JPEG that lies on its side, a PNG with alpha, a GIF, a WebP, and a large JPEG."""
    folder = tmp_path_factory.mktemp("files")
    first, second, third, fourth, fifth = draw_pictures(5, 6)
    exif = Image.Exif()
    exif[0x0112] = 6
    first.resize((96, 64)).save(folder / "turned.jpg", exif=exif)
    second = second.convert("RGBA")
    second.putalpha(Image.linear_gradient("L").resize(second.size))
    second.save(folder / "alpha.png")
    third.save(folder / "palette.gif")
    if features.check("webp"):
        fourth.save(folder / "web.webp")
    fifth.resize((1800, 1200)).save(folder / "large.jpg", quality=80)
    return sorted(folder.iterdir())


def cli_texts(files: list[Path], bundle: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The captions of ``blip2edge caption``."""
    assert main(["caption", *map(str, files), "-b", str(bundle), "--threads", "1", "--json"]) == 0
    return [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]


def listed(page: Page) -> list[str]:
    """The captions in the list, when all have come."""
    page.until("pictures.length && pictures.every(one => one.state === 'done')")
    return page.value("pictures.map(one => one.text.textContent)")


def test_captions_equal_those_of_the_command_because_the_files_bytes_are_sent(
    opened: Page, service: Service, files: list[Path], tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service.sent.clear()
    opened.choose("#file", files)
    assert listed(opened) == cli_texts(files, tiny_bundle, capsys)
    assert service.sent == [(file.read_bytes(),) for file in files]
    for name in ("first word", "preprocess", "vision", "bridge", "prefill", "decode", "total"):
        assert name in opened.value("document.getElementById('times').textContent")
    assert opened.value("violations") == []
    loaded = opened.value("performance.getEntriesByType('resource').map(one => one.name)")
    own = (f"http://127.0.0.1:{service.port}/", "blob:")
    assert [address for address in loaded if not address.startswith(own)] == []


def test_words_are_shown_as_they_come(opened: Page, files: list[Path]) -> None:
    opened.value("""window.texts = [];
        new MutationObserver(all => all.forEach(one => one.addedNodes.forEach(node => {
            if (node.nodeType === Node.TEXT_NODE && node.data.trim()) texts.push(node.data);
        })))
        .observe($('caption'), {childList: true})""")
    opened.choose("#file", files[:1])
    (text,) = listed(opened)
    pieces = [one for one in opened.value("texts") if one not in ("waiting", "…")]
    assert len(set(pieces)) > 2
    assert all(text.startswith(piece.strip()) for piece in pieces)
    assert opened.value("document.getElementById('status').textContent") == f"{files[0].name}: {text}"


def test_prompt_and_again(opened: Page, service: Service, files: list[Path], tiny_bundle: Path) -> None:
    opened.choose("#file", files[:2])
    listed(opened)
    opened.value("$('prompt').value = 'two'; $('prompt').focus()")
    opened.press("Enter")
    opened.until("pictures.every(one => one.state === 'done') && !busy")
    captioner = Captioner.load(tiny_bundle, threads=1)
    assert listed(opened) == [captioner.caption(file, prompt="two").text for file in files[:2]]


def test_drop_and_paste(opened: Page, service: Service, files: list[Path]) -> None:
    service.sent.clear()
    data = {"items": [], "files": [str(files[0]), str(files[1])], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        opened.call("Input.dispatchDragEvent", type=kind, x=100, y=200, data=data)
    opened.until("pictures.length === 2")
    listed(opened)
    paste = """((kind, name) => {
        const transfer = new DataTransfer();
        if (name) transfer.items.add(new File([pictures[0].file], name, {type: kind}));
        else transfer.setData("text/plain", "words");
        return document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: transfer, cancelable: true}));
    })"""
    assert not opened.value(f"{paste}('image/png', 'pasted.png')")
    listed(opened)
    assert service.sent == [(files[0].read_bytes(),), (files[1].read_bytes(),), (files[0].read_bytes(),)]
    assert opened.value(f"{paste}()")  # a text goes into the field that has the focus
    assert not opened.value(f"{paste}('text/plain', 'notes.txt')")
    assert opened.value("$('caption').textContent") == "notes.txt is not a picture."
    assert opened.value("pictures.length") == 3


def test_a_broken_picture_is_an_error_in_its_row(opened: Page, files: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(files[0].read_bytes()[:100])
    opened.choose("#file", [broken, files[0]])
    first, second = listed(opened)
    assert "picture" in first
    assert second
    assert opened.value("pictures.map(one => one.text.className)") == ["error", ""]


def test_pictures_can_be_shown_and_removed(opened: Page, files: list[Path]) -> None:
    opened.choose("#file", files[:3])
    texts = listed(opened)
    opened.value("pictures[1].thumb.click()")
    assert opened.value("[$('caption').textContent, $('still').alt]") == [texts[1], files[1].name]
    opened.value("pictures[1].row.querySelector('.remove').click()")
    assert opened.value("[$('caption').textContent, $('still').alt]") == [texts[2], files[2].name]
    assert opened.value("document.activeElement.getAttribute('aria-label')") == f"Remove {files[2].name}"
    opened.value("[...document.querySelectorAll('.remove')].forEach(one => one.click())")
    assert opened.value("[$('listed').hidden, $('still').hidden, $('empty').hidden, document.activeElement.id]") == [
        *(True, True, False),
        "file",
    ]


def test_the_camera_stops_when_a_file_is_chosen(opened: Page, service: Service, files: list[Path]) -> None:
    service.sent.clear()
    opened.value("$('camera').click()")
    opened.until("!$('video').hidden && $('times').textContent")
    assert opened.value("$('camera').textContent") == "Stop camera"
    opened.value("window.track = session.stream.getTracks()[0]; true")
    frame = Image.open(io.BytesIO(service.sent[0][0]))
    assert (frame.format, frame.size) == ("JPEG", (320, 240))
    assert all(abs(got - drawn) < 12 for got, drawn in zip(frame.getpixel((160, 120)), (200, 60, 40), strict=True))  # type: ignore[arg-type]

    opened.choose("#file", files[:1])
    (text,) = listed(opened)
    assert opened.value("[track.readyState, $('video').hidden, $('camera').textContent, $('still').hidden]") == [
        *("ended", True),
        *("Start camera", False),
    ]
    count = len(service.sent)
    opened.value("new Promise(resolve => setTimeout(resolve, 200))")
    assert len(service.sent) == count
    assert opened.value("$('caption').textContent") == text

    opened.value("$('camera').click()")  # and again, which a click on a picture stops
    opened.until("!$('video').hidden")
    opened.value("pictures[0].thumb.click()")
    assert opened.value("[session, $('caption').textContent]") == [None, text]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("NotAllowedError", "does not allow"),
        ("NotFoundError", "finds no camera"),
        ("NotReadableError", "Another program"),
    ],
)
def test_a_camera_that_cannot_be_used(opened: Page, name: str, sentence: str) -> None:
    failing = f"async () => {{ throw new DOMException('x', '{name}'); }}"
    opened.value(f"navigator.mediaDevices.getUserMedia = {failing}; $('camera').click()")
    opened.until("$('caption').textContent")
    assert sentence in opened.value("$('caption').textContent")
    assert opened.value("[session, $('camera').textContent]") == [None, "Start camera"]


def test_without_https_a_sentence_says_why_there_is_no_camera(page: Page, service: Service, files: list[Path]) -> None:
    page.open(f"http://{BOARD}:{service.port}/", "document.getElementById('model').textContent")
    assert not page.value("isSecureContext")
    sentence = page.value("$('no-camera').innerText")
    assert "HTTPS" in sentence
    assert "--self-signed" in sentence
    assert page.value("[$('camera').disabled, $('no-camera').hidden]") == [True, False]
    page.choose("#file", files[:1])
    assert listed(page) != [""]


def test_with_a_key(page: Page, service: Service, files: list[Path]) -> None:
    page.open(f"http://127.0.0.1:{service.guarded}/", "!document.getElementById('login').hidden")
    assert page.value("document.activeElement.id") == "key"
    page.choose("#file", files[:1])  # waits for the key
    page.value("$('key').value = 'wrong'; document.querySelector('#login button').click()")
    page.until("!$('login').hidden && $('refused').textContent")
    page.value(f"$('key').value = '{KEY}'; document.querySelector('#login button').click()")
    (text,) = listed(page)
    assert text
    assert page.value("[$('login').hidden, location.hash]") == [True, ""]


def test_a_server_that_has_ended(page: Page, tiny_bundle: Path, files: list[Path]) -> None:
    with live(Captioner.load(tiny_bundle, threads=1)) as (_, port):
        page.open(f"http://127.0.0.1:{port}/", "document.getElementById('model').textContent")
    page.choose("#file", files[:1])
    assert listed(page) == ["The server does not answer. Check that it is running."]


def test_the_last_captions_of_watch(opened: Page, service: Service) -> None:
    events = [
        {"time": "2026-11-28T19:00:00Z", "source": "rtsp://cam", "frame": "1.00 s", "text": "one"},
        {"text": "two"},
    ]
    assert opened.value("$('address').textContent") == f"http://127.0.0.1:{service.port}/captions"
    for event in events:
        body = json.dumps({**event, "tokens": [1, 2], "age_ms": 3.5}).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{service.port}/captions", body, 60) as answer:
            assert json.load(answer) == event
    opened.value("document.querySelector('#recent summary').click()")
    opened.until("document.querySelectorAll('#events li').length === 2")
    first, second = opened.value("[...document.querySelectorAll('#events li')].map(row => row.innerText)")
    assert first.strip() == "two"
    assert "one" in second
    assert "rtsp://cam · 1.00 s" in second


def test_the_list_is_polled_once_at_a_time_and_also_after_a_failure(opened: Page) -> None:
    """Timers are recorded here and end when the test calls them."""
    opened.value("""
        window.timers = new Map(); window.asked = 0; window.failing = false;
        window.setTimeout = (call, ms, ...rest) => {
            timers.set(timers.size + 1, () => call(...rest));
            return timers.size;
        };
        window.clearTimeout = id => { if (timers.has(id)) timers.set(id, null); };
        const real = window.fetch;
        window.fetch = async (...all) => {
            asked += 1;
            if (failing) throw new TypeError("Failed to fetch");
            return real(...all);
        };
        window.pending = () => [...timers.values()].filter(Boolean).length;
        window.toggle = open => new Promise(done => {
            $("recent").addEventListener("toggle", done, {once: true}); $("recent").open = open;
        });
        window.elapse = () => { for (const [id, call] of [...timers]) { timers.set(id, null); call?.(); } };
        true""")
    for opens in (True, False, True, False, True):  # the last answers come when the list is open again
        opened.value(f"toggle({json.dumps(opens)}).then(() => true)")
    opened.until("pending() === 1")
    opened.value("failing = true; asked = 0; elapse(); true")
    opened.until("asked === 1 && pending() === 1")  # a failed request does not end it
    opened.value("failing = false; elapse(); true")
    opened.until("asked === 2 && pending() === 1")
    opened.value("toggle(false).then(() => true)")
    assert opened.value("[pending(), asked]") == [0, 2]


def test_the_model_that_captions_is_shown(opened: Page, files: list[Path]) -> None:
    name = opened.value("$('model').textContent")
    opened.value("showModel('a matcher')")
    opened.choose("#file", files[:1])
    listed(opened)
    assert opened.value("$('model').textContent") == name


def test_the_first_model_that_captions_is_shown_before_a_caption(page: Page, tiny_bundle: Path, blip_itm: Path) -> None:
    matcher, captioner = Matcher.load(blip_itm, threads=1), Captioner.load(tiny_bundle, threads=1)
    with matcher, captioner, live([ModelSource(matcher), ModelSource(captioner, name="tiny")]) as (_, port):
        page.open(f"http://127.0.0.1:{port}/", "document.getElementById('model').textContent")
        assert page.value("$('model').textContent") == "· tiny"


def test_a_narrow_screen(opened: Page, files: list[Path]) -> None:
    opened.call("Emulation.setDeviceMetricsOverride", width=320, height=640, deviceScaleFactor=1, mobile=True)
    opened.choose("#file", files)
    listed(opened)
    assert opened.value("[innerWidth, document.documentElement.scrollWidth]") == [320, 320]
    sizes = opened.value(
        "[...document.querySelectorAll('button, .button, input:not(.spoken)')].filter(one => one.checkVisibility())"
        ".map(one => one.getBoundingClientRect()).map(box => [box.left, box.right, box.height])"
    )
    assert len(sizes) > 4
    assert all(left >= 0 and right <= 320 and height >= TOUCH for left, right, height in sizes)


def test_the_keyboard_reaches_everything_in_the_order_of_the_page(opened: Page, files: list[Path]) -> None:
    opened.choose("#file", files[:1])
    listed(opened)
    opened.call("Page.bringToFront")
    reached = []
    for _ in range(7):
        opened.press("Tab")
        reached.append(
            opened.value("(one => (one.closest('#recent') || one).id || one.className)(document.activeElement)")
        )
        marked = "document.querySelector('#file:focus + .button') || document.activeElement"
        assert opened.value(f"getComputedStyle({marked}).outlineStyle") == "solid"
    assert reached == ["camera", "file", "prompt", "again", "thumb", "remove", "recent"]
    opened.value("document.querySelector('.remove').focus()")
    opened.press("Enter")
    assert opened.value("pictures.length") == 0


def test_a_screen_reader_gets_a_name_for_everything(opened: Page, files: list[Path]) -> None:
    opened.choose("#file", files[:2])
    texts = listed(opened)
    nodes = opened.call("Accessibility.getFullAXTree")["nodes"]
    named = [(one["role"]["value"], one["name"]["value"]) for one in nodes if not one["ignored"] and "name" in one]
    used = {role: [name for one, name in named if one == role] for role, _ in named}
    assert used["textbox"] == ["Prompt"]
    assert used["button"] == [
        *("Start camera", "Choose pictures", "Caption again"),
        *(f"{what} {file.name}" for file in files[:2] for what in ("Show", "Remove")),
    ]
    assert [role for role in ("image", "list", "region", "heading") if not all(used[role])] == []
    assert "Pictures" in used["heading"]
    live_regions = [one for one in nodes if not one["ignored"] and one["role"]["value"] == "status"]
    assert len(live_regions) == 1
    assert opened.value("$('status').textContent") == f"{files[1].name}: {texts[1]}"
    assert opened.value("document.documentElement.lang") == "en"


LUMINANCE = """(() => {
    const channel = value => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    const numbers = color => color.match(/[\\d.]+/g).map(Number);
    const luminance = color => {
        const [red, green, blue] = numbers(color).map(value => channel(value / 255));
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
    };
    const behind = one => {
        for (; one; one = one.parentElement) {
            const color = getComputedStyle(one).backgroundColor;
            if (numbers(color)[3] !== 0) return color;
        }
    };
    const written = one => [...one.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    return [...document.querySelectorAll("body *")].filter(one => written(one) && one.checkVisibility()).map(one => {
        const pair = [luminance(getComputedStyle(one).color), luminance(behind(one))].sort((a, b) => b - a);
        return [one.outerHTML.slice(0, 60), (pair[0] + 0.05) / (pair[1] + 0.05)];
    });
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(page: Page, service: Service, files: list[Path], tmp_path: Path, scheme: str) -> None:
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    page.open(f"http://{BOARD}:{service.port}/", "document.getElementById('model').textContent")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page.choose("#file", [files[0], tmp_path / "broken.png"])
    listed(page)
    page.value("$('login').hidden = false; $('refused').textContent = 'The server refused this key.'")
    ratios = page.value(LUMINANCE)
    assert len(ratios) > 12
    assert [one for one in ratios if one[1] < CONTRAST] == []


def test_unsure_words_are_underlined_at_the_end(opened: Page, files: list[Path], tiny_bundle: Path) -> None:
    opened.choose("#file", files[:1])
    (text,) = listed(opened)
    words = opened.value("[...document.querySelectorAll('#caption span')].map(one => [one.textContent, one.className])")
    assert " ".join(word for word, _ in words) == " ".join(text.split())
    with Captioner.load(tiny_bundle, threads=1) as captioner:
        sure = [word.logprob >= math.log(0.5) for word in captioner.words(captioner.caption(files[0]))]
    assert [kind for _, kind in words] == ["" if one else "unsure" for one in sure]
    assert not all(sure)
