"""Captions live frames and reuses results of earlier frames where possible: ``watch --reuse-below auto``.

    picture near the last one? --yes--> same prompt? --yes--> skip      the last caption again; nothing is computed
        |                                   '---------no---> features  the last visual tokens; a text is generated
        no: vision encoder, bridge
        |
    features near? ------------yes--> caption   the last caption again; no text is generated
        '----------------------no---> full      a text is generated

"Near" means that the distance is below a threshold; :func:`fit_thresholds` chooses the thresholds. Until there are
enough frames for this, each frame is captioned in full and recorded (``fit``). Of :data:`AUDIT_EVERY` frames that could
be reused, one is captioned in full as a check (``audit``). So the rate of missed changes (reused captions that differ
from the frame's own caption) is measured during the whole run. If it is above the allowed rate, the thresholds are
fitted again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.fields import finite_number, list_of, nullable, record, whole
from blip2edge.bundle.outputs.files import check_file, write_output
from blip2edge.errors import DataError, UsageError, option
from blip2edge.reading import checking, read_json
from blip2edge.runtime.backends.probe import processor
from blip2edge.runtime.captioning.encoder import Encoder, PreparedBatch, StageClock
from blip2edge.runtime.captioning.pipeline import TextGenerator
from blip2edge.runtime.captioning.request import CaptionResult
from blip2edge.runtime.captioning.reuse.fit import (
    CONFIDENCE,
    AuditClock,
    AuditMonitor,
    CurvePoint,
    FrameTimes,
    Recording,
    ReuseFit,
    Thresholds,
    fit_thresholds,
    frames_needed,
)
from blip2edge.runtime.captioning.reuse.frames import (
    EncodedFrame,
    Floats,
    cells_of,
    encode_again,
    encode_frame,
    feature_distance,
    features_of,
    picture_distance,
)
from blip2edge.runtime.decoding.generated import Generated
from blip2edge.runtime.decoding.options import GenerationOptions, check_integer, check_number
from blip2edge.runtime.images.video import ItemSource

Step = Literal["full", "fit", "skip", "features", "caption", "audit"]
"""How a frame was captioned.

- ``full``: Nothing was reused; ``fit``: the same, and the frame was recorded for the choice of the thresholds.
- ``skip``: The last caption was reused, and the frame was not encoded.
- ``features``: The last visual tokens were reused, because only the prompt differs; a text was generated.
- ``caption``: The frame was encoded, and the last caption was reused.
- ``audit``: A frame whose caption could be reused was captioned in full, as a check of the reused caption.
"""

REUSED: frozenset[Step] = frozenset(("skip", "features", "caption"))
"""Steps that reuse the caption or the visual tokens of an earlier frame."""

LONGEST = 3  # times the frames of a fit: older ones are removed from the recording
FORMAT = 1  # of the kept file


@dataclass(frozen=True)
class ReusePlan:
    """How to fit the thresholds.

    Attributes:
        rate: Largest allowed rate of missed changes: missed changes / reused frames.
        frames: Number of frames that are recorded for a fit.
        path: JSON file in which the fit is stored for the next start; None to fit at every start.
        on_fit: Called with each fit as a JSON object (from :func:`fit_document`).
        report: Called with a sentence for the user.
        advice: What the user can do if a fit found no thresholds; the last words of the sentence about this fit.

    Raises:
        OutputError: ``path`` cannot be written.
        UsageError: ``rate`` is not between 0 and 1, or ``frames`` is below 2.
    """

    rate: float = 0.05
    frames: int = 5000
    path: Path | None = None
    on_fit: Callable[[dict[str, Any]], None] = lambda document: None
    report: Callable[[str], None] = lambda sentence: None
    advice: str = "the next fit has more frames"

    def __post_init__(self) -> None:
        """Checks ``rate``, ``frames`` and ``path``."""
        check_number("miss_rate", self.rate, 0.0, 0.5, above=True)
        check_integer("fit_frames", self.frames, 2)
        if self.path is not None:
            check_file(self.path, "reuse_fit")


@dataclass(frozen=True)
class _Shown:
    """The last generated caption, and the frame for which it was generated.

    Attributes:
        frame: The frame for which the caption was generated.
        features: The features of ``frame``.
        seen: Mean pixel values (from :func:`cells_of`) of the last picture that passed the vision encoder; the next
            picture is compared with these values. The last picture may be newer than ``frame``, if its caption was
            reused.
        prompt: The prompt as the user gave it.
        prompt_tokens: Length of the prompt in tokens.
        generated: The tokens of the caption.
        text: The caption.
    """

    frame: EncodedFrame
    features: Floats
    seen: Floats
    prompt: str | None
    prompt_tokens: int
    generated: Generated
    text: str


class ReuseLadder:
    """Captions frames one by one, and reuses the last caption if it is probably still right. Use it in one thread only.

    Args:
        encoder: Encodes pictures and prompts.
        generator: Generates the texts.
        options: How to generate.
        plan: How to fit the thresholds.
        key: Bundle, prompt, options and rate (from :func:`fit_key`); a stored fit is used only if its key is equal.

    Attributes:
        audits: The audited frames since the last fit.
        fit: The last fit; None before the first fit, and when a new fit is needed.
        recording: The frames that are recorded for the next fit.

    Raises:
        DataError: The file with the stored fit cannot be read.
        UsageError: The options draw random texts, which differ without a change of the picture; or the stored fit is
            for another bundle, prompt, option or rate.
    """

    def __init__(
        self,
        encoder: Encoder,
        generator: TextGenerator,
        options: GenerationOptions,
        plan: ReusePlan,
        key: Mapping[str, Any],
    ) -> None:
        if options.sampling and options.seed is None:
            raise UsageError(
                f"{option('reuse_below')} auto needs the same text for the same picture, but sampling draws a new "
                "text each time",
                f"leave {option('temperature')}, {option('top_p')} and {option('top_k')} out, or give {option('seed')}",
            )
        self._encoder, self._generator, self._options = encoder, generator, options
        self._plan, self._key = plan, key
        self._context = generator.language.context
        self._spans = encoder.images.preprocessing.spans
        self.recording = Recording()
        self._attempts = self._since = 0
        self._last: _Shown | None = None
        self._clock = AuditClock()
        self.audits = AuditMonitor(plan.rate)
        self.fit = None if plan.path is None else read_fit(plan.path, key)

    @property
    def is_fitting(self) -> bool:
        """Returns whether frames are now recorded for a fit; such frames are encoded in full."""
        return self.fit is None or self.fit.chosen is None

    def __call__(self, image: ItemSource, prompt: str | None = None) -> tuple[CaptionResult, Step]:
        """Captions a frame as ``Captioner.caption``; also returns what was computed or reused (:data:`Step`)."""
        clock = StageClock()
        prepared = self._encoder.prepare([image], [prompt], clock, self._options.queries)
        with clock("preprocess"):
            cells = cells_of(prepared.pixels, self._spans)
        last = self._last
        step, frame = self._choose(prepared, cells, prompt, clock)
        reusing = None
        if last is not None and step in REUSED:
            reusing = last
            if step == "caption":
                reusing = replace(last, seen=cells.ravel())
            elif step == "features" and frame is not None:
                reusing = self._decoded(prepared, frame, last.seen, prompt, clock)
                frame = None  # an audit encodes this picture
            if not self._clock.is_due():
                self._last = reusing
                return self._result(image, reusing, clock), step
            step = "audit"
        if frame is None:
            frame = encode_frame(self._encoder, self._context, prepared, cells, clock)
        shown = self._decoded(prepared, frame, cells.ravel(), prompt, clock)
        self._last = shown
        if reusing is not None:
            self._audited(reusing.text != shown.text)
        elif step == "fit":
            self._record(shown, clock)
        return self._result(image, shown, clock), step

    def _choose(
        self, prepared: PreparedBatch, cells: Floats, prompt: str | None, clock: StageClock
    ) -> tuple[Step, EncodedFrame | None]:
        """Decides how to caption a frame; returns the step, and the encoded frame if it had to be encoded to decide."""
        last, thresholds = self._last, self.fit.thresholds if self.fit else Thresholds()
        if self.is_fitting:
            return "fit", None
        if last is None or not last.frame.is_like(prepared, cells):
            return "full", None
        is_near = picture_distance(last.seen, cells.ravel()) < thresholds.skip
        if prompt != last.prompt:
            if not is_near:
                return "full", None
            return "features", encode_again(self._encoder, self._context, prepared, last.frame, clock)
        if is_near:
            return "skip", None
        frame = encode_frame(self._encoder, self._context, prepared, cells, clock)
        with clock("bridge"):
            is_near = feature_distance(last.features, _features(frame)) < thresholds.caption
        return "caption" if is_near else "full", frame

    def _decoded(
        self, prepared: PreparedBatch, frame: EncodedFrame, seen: Floats, prompt: str | None, clock: StageClock
    ) -> _Shown:
        batch = prepared.encoded({})
        batch = replace(batch, pictures=frame.pictures)
        generated = self._generator.complete(batch, self._options, [0], clock)[0]
        text = self._generator.text(generated, self._options)
        return _Shown(frame, _features(frame), seen, prompt, batch.prompts[0].length, generated, text)

    def _result(self, image: ItemSource, shown: _Shown, clock: StageClock) -> CaptionResult:
        return self._generator.result(
            image, shown.prompt, shown.prompt_tokens, shown.generated, self._options, clock.share(1)
        )

    def _record(self, shown: _Shown, clock: StageClock) -> None:
        """Records a frame, and fits the thresholds when there are enough frames."""
        times = FrameTimes(clock.ms["vision"] + clock.ms["bridge"], clock.ms["prefill"] + clock.ms["decode"])
        self.recording.add(shown.frame.cells.ravel(), shown.features, shown.text, times)
        self.recording.keep_last(LONGEST * self._plan.frames)
        self._since += 1
        if self._since >= self._plan.frames:
            self._fit()

    def finish(self) -> None:
        """Fits the thresholds on the frames recorded so far if there is no fit yet; call it at the end of a source."""
        if self.is_fitting and self._since and len(self.recording) > 1:
            self._fit()

    def _fit(self) -> None:
        self._attempts += 1
        self._since = 0
        fit = self.fit = fit_thresholds(self.recording, self._plan.rate, self._attempts)
        if not self.is_fitting:
            self.recording = Recording()
            self.audits, self._clock = AuditMonitor(self._plan.rate), AuditClock(self._attempts)
        document = fit_document(fit, self._key)
        if self._plan.path is not None:
            write_output(self._plan.path, json.dumps(document, indent=2) + "\n", "reuse_fit")
        self._plan.report(_sentence(fit, self._plan.rate, self._plan.advice))
        self._plan.on_fit(document)

    def _audited(self, missed: bool) -> None:
        audits = self.audits
        audits.add(missed)
        if audits.is_raised:
            self.fit = None
            self._plan.report(
                f"{audits.missed} of {audits.frames} audited frames had another caption, more than the allowed rate of "
                f"{self._plan.rate:.1%}: every frame is encoded, and the thresholds are fitted again"
            )


def _features(frame: EncodedFrame) -> Floats:
    return features_of(frame.pictures.get("visual_tokens", frame.pictures["image_embeds"]))


def fit_key(bundle: Bundle, prompt: str | None, options: GenerationOptions, plan: ReusePlan) -> dict[str, Any]:
    """Returns the values for which a fit is valid: bundle, prompt, options and rate.

    The draft model is left out, because captions do not depend on it.
    """
    values = {key: value for key, value in asdict(options).items() if key != "draft"}
    return {
        "bundle": bundle.sha256,
        "prompt": prompt,
        "options": json.loads(json.dumps(values)),
        "miss_rate": plan.rate,
    }


def fit_document(fit: ReuseFit, key: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a fit as a JSON object, together with the bundle, prompt, options and rate (``key``) of the fit."""
    values = asdict(fit)
    for point in (values, *values["curve"], *filter(None, [values["chosen"]])):
        point["thresholds"] = dict(zip(Thresholds._fields, point["thresholds"], strict=True))
    return {"format": FORMAT, **key, "confidence": CONFIDENCE, "processor": processor(), **values}


def read_fit(path: Path, key: Mapping[str, Any]) -> ReuseFit | None:
    """Reads a stored fit; returns None if the file does not exist.

    Raises:
        DataError: The file cannot be read as a fit.
        UsageError: The fit is for another bundle, prompt, option or rate.
    """
    if not path.exists():
        return None
    document = read_json(path, DataError, strict=True)
    with checking(path, "a fit of reuse thresholds", DataError):
        _FIT(document, "")
    for name, wanted in key.items():
        if document.get(name) != wanted:
            raise UsageError(
                f"{path} was fitted for another {_KEY_NAMES[name]}: expected {_short(wanted)}, got "
                f"{_short(document.get(name))}",
                f"give another {option('reuse_fit')}, or delete the file to fit again",
                field="reuse_fit",
            )
    curve = tuple(map(_point, document["curve"]))
    chosen = None if document["chosen"] is None else _point(document["chosen"])
    times = FrameTimes(**{name: document["times"][name] for name in ("encode", "decode")})
    thresholds = Thresholds() if chosen is None else chosen.thresholds
    return ReuseFit(thresholds, chosen, curve, document["frames"], document["changes"], times)


_KEY_NAMES = {
    "bundle": "bundle",
    "prompt": "prompt",
    "options": "set of generation options",
    "miss_rate": "rate of missed changes",
}

_distance = finite_number(0)
_share = finite_number(0, 1)
_POINT = record(
    {
        "thresholds": record({"skip": _distance, "caption": _distance}),
        "skipped": _share,
        "captions": _share,
        "reused": whole(0, 1 << 40),
        "missed": whole(0, 1 << 40),
        "rate": _share,
        "design_effect": _distance,
        "upper": _share,
        "saved": _share,
    }
)
_FIT = record(
    {
        "format": whole(FORMAT, FORMAT),
        "chosen": nullable(_POINT),
        "curve": list_of(_POINT),
        "frames": whole(0, 1 << 40),
        "changes": whole(0, 1 << 40),
        "times": record({"encode": _distance, "decode": _distance}),
    }
)


def _point(values: Mapping[str, Any]) -> CurvePoint:
    """Reads the measured values of a pair of thresholds from their JSON object."""
    known = {one.name: values[one.name] for one in fields(CurvePoint)}
    skip, caption = (values["thresholds"][name] for name in Thresholds._fields)
    return CurvePoint(**{**known, "thresholds": Thresholds(skip, caption)})


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _sentence(fit: ReuseFit, rate: float, advice: str) -> str:
    """Returns a sentence for the user about the result of a fit; ``advice`` ends the sentence if nothing is reused."""
    film = f"{fit.frames} frames, in which the caption changed {fit.changes} times"
    if fit.chosen is None:
        return (
            f"nothing is reused: on {film}, no thresholds keep missed changes below {rate:.1%} of the reused frames "
            f"with {CONFIDENCE:.0%} confidence (at least {frames_needed(rate)} reused frames are needed); {advice}"
        )
    point = fit.chosen
    return (
        f"thresholds fitted on {film}: {point.skipped:.0%} are skipped, {point.captions:.0%} keep their caption; "
        f"for {point.rate:.1%} of these frames the caption had changed, at most {point.upper:.1%} with "
        f"{CONFIDENCE:.0%} confidence"
    )
