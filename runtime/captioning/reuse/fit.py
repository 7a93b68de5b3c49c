"""Chooses the thresholds below which a frame reuses an earlier caption, from a recording of frames.

Every frame of the recording was captioned in full. So the code can compute, for each pair of thresholds, which reused
captions would have been wrong. A *missed change* is a frame that reuses an earlier caption although its own caption
differs. The rate is missed changes / reused frames. The user gives the largest rate (``--miss-rate``). A pair of
thresholds is allowed if the upper confidence bound of its rate is at most this value; of the allowed pairs, one that
saves most time is chosen (Learn then Test, Angelopoulos et al., arXiv 2110.01052, with Bonferroni's correction for the
number of pairs).

The bound is that of Clopper and Pearson (Biometrika 26, 1934), which needs independent frames. Frames are not
independent: after one overlooked change, many frames in a row are wrong. So both counts are divided by the design
effect, as Korn and Graubard do for clustered samples (Survey Methodology 24, 1998). The design effect is
sum(m²) / sum(m) over the numbers m of missed changes in blocks of :data:`BLOCK` frames, but at least
:data:`LEAST_EFFECT`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from blip2edge.runtime.captioning.reuse.frames import Floats, feature_distance, picture_distance

CONFIDENCE = 0.95
"""Probability that all confidence bounds that one run computes are right."""

AUDIT_EVERY = 50
"""Of this many frames that could be reused, one is captioned in full to check the reused caption (an audit)."""

ALARM = 100.0
"""If the likelihood ratio of the audits reaches this value, the thresholds are fitted again; on average, a false alarm
occurs at most once in 100 audits."""

SKIP_STEPS, CAPTION_STEPS = 4, 6
"""How many quantiles of the distances between pictures, and between features, are tried as thresholds."""

BLOCK = 200
"""Number of frames in a block, for the design effect. Missed changes of one block count as dependent."""

LEAST_EFFECT = AUDIT_EVERY / 2
"""Smallest value of the design effect: the average number of frames from an overlooked change to the next audit.

It replaces lower estimates, because a recording of few scenes gives estimates that are too low: 3 to 34 on six films of
2,000 frames (``docs/reuse.md``).
"""

EQUAL = 0.02
"""Pairs of thresholds whose shares of saved time differ by at most this value count as equally fast. Of these pairs,
the one with the lowest upper bound of the rate of missed changes is chosen."""

LARGEST_SHARE = 0.75
"""Thresholds are chosen among quantiles of the recorded distances; this is the largest quantile that is tried."""


class Thresholds(NamedTuple):
    """The distances below which a frame reuses the last caption; with zero, no frame does.

    Attributes:
        skip: Threshold for :func:`picture_distance`. A frame with a smaller distance is not even encoded.
        caption: Threshold for :func:`feature_distance`. A frame with a smaller distance is encoded, but no text is
            generated for it.
    """

    skip: float = 0.0
    caption: float = 0.0


@dataclass(frozen=True)
class FrameTimes:
    """Milliseconds of a frame: ``encode`` (vision encoder and bridge) and ``decode`` (prefill and decoding)."""

    encode: float
    decode: float


@dataclass
class Recording:
    """Recorded frames, each captioned in full, on which thresholds are fitted.

    Attributes:
        cells: Mean pixel values of each frame (from :func:`cells_of`), flattened.
        features: Compressed visual tokens of each frame (from :func:`features_of`).
        texts: The caption of each frame.
        times: The time of each frame.
    """

    cells: list[Floats] = field(default_factory=list)
    features: list[Floats] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    times: list[FrameTimes] = field(default_factory=list)

    def __len__(self) -> int:
        """Returns the number of frames."""
        return len(self.texts)

    def add(self, cells: Floats, features: Floats, text: str, times: FrameTimes) -> None:
        """Adds a frame. If its shapes differ from those of the recorded frames, first removes all recorded frames."""
        if self.cells and (self.cells[-1].shape, self.features[-1].shape) != (cells.shape, features.shape):
            self.keep_last(0)
        self.cells.append(cells)
        self.features.append(features)
        self.texts.append(text)
        self.times.append(times)

    def keep_last(self, frames: int) -> None:
        """Keeps the last ``frames`` frames, and removes all earlier frames."""
        extra = max(0, len(self) - frames)
        del self.cells[:extra], self.features[:extra], self.texts[:extra], self.times[:extra]

    @property
    def changes(self) -> int:
        """Returns the number of frames whose caption differs from the caption of the frame before."""
        return sum(one != other for one, other in zip(self.texts, self.texts[1:], strict=False))

    def median_times(self) -> FrameTimes:
        """Returns the median time of encoding and the median time of decoding."""
        encode, decode = (np.median([getattr(one, key) for one in self.times]) for key in ("encode", "decode"))
        return FrameTimes(float(encode), float(decode))


@dataclass(frozen=True)
class CurvePoint:
    """The measured values of one pair of thresholds on the recording.

    Attributes:
        thresholds: The thresholds.
        skipped: Share of the frames that are not encoded.
        captions: Share of the frames that are encoded, but for which no text is generated.
        reused: Number of frames that reuse a caption, without the audited frames.
        missed: Number of missed changes.
        rate: ``missed / reused``.
        design_effect: The number by which both counts are divided before the bound is computed.
        upper: Upper confidence bound of the rate.
        saved: Share of the time of vision encoder, bridge and language model that is saved.
    """

    thresholds: Thresholds
    skipped: float
    captions: float
    reused: int
    missed: int
    rate: float
    design_effect: float
    upper: float
    saved: float


@dataclass(frozen=True)
class ReuseFit:
    """The result of a fit.

    Attributes:
        thresholds: The chosen thresholds. If no pair is allowed, they are zero, and every frame is encoded.
        chosen: The measured values of the chosen pair; None if no pair is allowed.
        curve: The measured values of every pair of thresholds.
        frames: Number of frames of the recording.
        changes: Number of frames whose caption differs from the caption of the frame before.
        times: The median times of a frame.
    """

    thresholds: Thresholds
    chosen: CurvePoint | None
    curve: tuple[CurvePoint, ...]
    frames: int
    changes: int
    times: FrameTimes


def upper_bound(missed: float, frames: float, level: float) -> float:
    """Computes Clopper and Pearson's upper confidence bound of the rate of missed changes.

    If the rate were equal to the bound, at most ``missed`` missed changes in ``frames`` frames would have the
    probability ``level``. The counts need not be whole numbers.
    """
    if missed >= frames:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if incomplete_beta(frames - missed, missed + 1, 1 - middle) > level:
            low = middle
        else:
            high = middle
    return high


def frames_needed(rate: float) -> int:
    """Returns how many reused frames without a missed change prove in the first fit that ``rate`` is not exceeded."""
    points = 4 * SKIP_STEPS * CAPTION_STEPS - 1  # zero, the quantiles and the means between them
    return math.ceil(LEAST_EFFECT * math.log(_level(1, points)) / math.log1p(-rate))


def _level(attempt: int, points: int) -> float:
    """Returns the probability with which one bound may be wrong; the sum over all bounds is ``1 - CONFIDENCE``.

    Args:
        attempt: Number of the fit in a run, from 1.
        points: Number of bounds in the fit.
    """
    return (1 - CONFIDENCE) / (attempt * (attempt + 1)) / points


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Computes the regularized incomplete beta function by its continued fraction (DLMF 8.17.22, Lentz's method)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    tiny = 1e-300
    value, c, d = tiny, tiny, 0.0
    for step in range(10_000):
        m = step // 2
        if step == 0:
            factor = 1.0
        elif step % 2 == 0:
            factor = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            factor = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / ((1 + factor * d) or tiny)
        c = (1 + factor / c) or tiny
        value *= c * d
        if abs(1 - c * d) < 1e-14:
            break
    return front * value


class AuditClock:
    """Chooses the reused frames that are audited: one random frame of every :data:`AUDIT_EVERY`."""

    def __init__(self, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)
        self._at = self._place = 0

    def is_due(self) -> bool:
        """Returns whether to audit the present frame; call it once for each frame that could be reused."""
        if self._at == 0:
            self._place = int(self._random.integers(AUDIT_EVERY))
        due = self._at == self._place
        self._at = (self._at + 1) % AUDIT_EVERY
        return due


class AuditMonitor:
    """Counts missed changes among audited frames, and detects when their rate is above the allowed rate.

    The test is Page's cumulative sum (Biometrika 41, 1954) of the log likelihood ratio between two rates: five times
    the allowed rate, and the allowed rate.

    Attributes:
        frames: Number of audited frames.
        missed: Number of missed changes among them.
    """

    def __init__(self, rate: float) -> None:
        self.frames = self.missed = 0
        raised = min(5 * rate, (1 + rate) / 2)
        self._steps = (math.log((1 - raised) / (1 - rate)), math.log(raised / rate))
        self._sum = 0.0

    def add(self, missed: bool) -> None:
        """Adds an audited frame."""
        self.frames += 1
        self.missed += missed
        self._sum = max(0.0, self._sum + self._steps[missed])

    @property
    def is_raised(self) -> bool:
        """Returns whether the audits show that the rate of missed changes is above the allowed rate."""
        return self._sum >= math.log(ALARM)

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object: numbers of audited frames and of missed changes, the rate, and its upper bound."""
        upper = upper_bound(self.missed, self.frames, 1 - CONFIDENCE)
        rate = self.missed / self.frames if self.frames else None
        return {"frames": self.frames, "missed": self.missed, "rate": rate, "upper": round(upper, 4)}


def fit_thresholds(recording: Recording, rate: float, attempt: int = 1) -> ReuseFit:
    """Chooses the thresholds that save most time and have a rate of missed changes of at most ``rate``.

    Args:
        recording: The recorded frames.
        rate: Largest allowed rate of missed changes.
        attempt: Number of this fit in a run, from 1; later fits need more frames for the same rate.
    """
    pictures = _band(recording.cells, picture_distance)
    features = _band(recording.features, feature_distance)
    times = recording.median_times()
    numbers = np.unique(recording.texts, return_inverse=True)[1].tolist()
    near = (pictures.tolist(), features.tolist())
    pairs = [
        Thresholds(skip, caption)
        for skip in _grid(pictures, SKIP_STEPS)
        for caption in _grid(features, CAPTION_STEPS)
        if skip or caption
    ]
    level = _level(attempt, max(len(pairs), 1))
    replays = (_Replay(pair).run(near, numbers) for pair in pairs)
    curve = tuple(_point(one, level, times, len(recording)) for one in replays)
    allowed = [point for point in curve if point.upper <= rate]
    most = max((point.saved for point in allowed), default=0.0)
    chosen = min((point for point in allowed if point.saved >= most - EQUAL), key=lambda one: one.upper, default=None)
    thresholds = Thresholds() if chosen is None else chosen.thresholds
    return ReuseFit(thresholds, chosen, curve, len(recording), recording.changes, times)


def _band(values: Sequence[Floats], distance: Callable[[Floats, Floats], Floats]) -> Floats:
    """Computes each frame's distances to the ``2 * AUDIT_EVERY`` frames after it; infinite beyond the last frame.

    A caption is reused for fewer than ``2 * AUDIT_EVERY`` frames, because audits come in between.
    """
    count, span = len(values), 2 * AUDIT_EVERY
    found = np.full((count, span), np.inf, np.float32)
    stacked = np.stack(values)
    for step in range(1, min(span, count - 1) + 1):
        found[: count - step, step - 1] = distance(stacked[:-step], stacked[step:])
    return found


def _grid(band: Floats, steps: int) -> list[float]:
    """Returns the thresholds to try: zero, quantiles of the distances, and the geometric means between neighbours.

    Each quantile is increased by the smallest possible amount, so that a frame with exactly this distance is reused.
    The means lie between the small distances of noise and the large distances of changes.
    """
    known = band[np.isfinite(band)]
    if not known.size:
        return [0.0]
    quantiles = np.quantile(known, np.arange(1, steps + 1) / steps * LARGEST_SHARE).astype(np.float32)
    above = np.nextafter(quantiles, np.float32(np.inf)).astype(np.float64)
    between = np.sqrt(above[:-1] * above[1:])
    return sorted({0.0, *map(float, above), *map(float, between)})


class _Replay:
    """Counts the frames that one pair of thresholds would reuse in a recording, and the changes that it would miss."""

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds
        self.skipped = self.captions = self.audits = 0
        self.missed: list[int] = []  # of each block of frames

    def run(self, near: tuple[list[list[float]], list[list[float]]], texts: Sequence[int]) -> _Replay:
        """Counts the reused frames, the audits and the missed changes in the recording; returns this object itself.

        Args:
            near: Two tables of distances between frames, from :func:`_band`: between pictures, and between features.
            texts: A number for the caption of each frame; equal captions have equal numbers.
        """
        skip, caption = self.thresholds
        pictures, features = near
        audit, shown, seen = AuditClock(), 0, 0
        self.missed = [0] * (len(texts) // BLOCK + 1)
        for at in range(1, len(texts)):
            skipped = pictures[seen][at - seen - 1] < skip
            reused = skipped or features[shown][at - shown - 1] < caption
            if reused and not audit.is_due():
                self.skipped += skipped
                self.captions += not skipped
                self.missed[at // BLOCK] += texts[at] != texts[shown]
                if not skipped:
                    seen = at
                continue
            self.audits += reused
            shown = seen = at
        return self

    @property
    def design_effect(self) -> float:
        """Returns sum(m²) / sum(m) over the numbers m of missed changes in each block; 0 if no change was missed."""
        total = sum(self.missed)
        return sum(one * one for one in self.missed) / total if total else 0.0


def _point(one: _Replay, level: float, times: FrameTimes, frames: int) -> CurvePoint:
    """Computes the measured values of one pair of thresholds from its counts (``one``).

    ``level``: probability with which the bound may be wrong. ``times``: median times of a frame.
    """
    effect = max(one.design_effect, LEAST_EFFECT)
    reused, missed = one.skipped + one.captions, sum(one.missed)
    skipped, captions = one.skipped / frames, one.captions / frames
    saved = skipped + captions * times.decode / ((times.encode + times.decode) or 1.0)
    return CurvePoint(
        thresholds=one.thresholds,
        skipped=skipped,
        captions=captions,
        reused=reused,
        missed=missed,
        rate=missed / reused if reused else 0.0,
        design_effect=effect,
        upper=upper_bound(missed / effect, reused / effect, level),
        saved=saved,
    )
