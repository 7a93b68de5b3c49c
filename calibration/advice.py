"""Makes the warnings of a calibration: too few pictures, and large differences from the original bundle."""

from __future__ import annotations

from collections.abc import Mapping

from blip2edge.calibration.agreement import CaptionAgreement
from blip2edge.calibration.pictures import ADVISED, PictureSet
from blip2edge.calibration.report.files import REPORT_PAGE
from blip2edge.calibration.results import CalibratedGraph
from blip2edge.errors import plural

LEAST_AGREEMENT = 0.9
"""Least share of captions that are the same as with the original bundle. Below it, ``calibrate`` warns."""

LEAST_COSINE = 0.99
"""Least mean cosine to the original outputs. Below it, ``calibrate`` warns, if the model generates no captions."""


def picture_warnings(pictures: PictureSet) -> list[str]:
    """Returns warnings if a calibration has too few pictures, or if some of them cannot be read."""
    warnings = []
    if len(pictures) < ADVISED:
        warnings.append(
            f"at least {ADVISED} calibration pictures are advised, got {len(pictures)}: "
            "larger values on other pictures will saturate"
        )
    warnings += [f"{each}; its pictures are left out" for each in pictures.unreadable]
    if pictures.skipped:
        warnings.append(
            f"{plural(len(pictures.skipped), 'picture')} cannot be read; the first is {pictures.skipped[0]}"
        )
    return warnings


def difference_warnings(
    graphs: Mapping[str, CalibratedGraph], agreement: CaptionAgreement | None, *, limited: bool
) -> list[str]:
    """Returns warnings if the new bundle's outputs or captions differ much from those of the original bundle.

    Args:
        graphs: The results of the graphs, by name.
        agreement: The agreement of the captions; None if the model generates no captions.
        limited: Whether a drop limit was set.
    """
    warnings = []
    if agreement is not None and agreement.same < LEAST_AGREEMENT:
        advice = "calibrate on more pictures like those of the application"
        if not limited:
            advice += ", or set a drop limit (--drop-limit), which keeps the most sensitive layers in floating point"
        warnings.append(
            f"only {agreement.same:.1%} of {agreement.pictures} captions are the same as the original bundle's; "
            f"{REPORT_PAGE} shows the others; {advice}"
        )
    if agreement is None:
        low = {
            f"{name}: {output}": value.mean
            for name, graph in graphs.items()
            for output, value in graph.cosine.items()
            if value.mean < LEAST_COSINE
        }
        if low:
            listed = ", ".join(f"{name} {value:.4f}" for name, value in low.items())
            warnings.append(f"the cosine to the original bundle's outputs is below {LEAST_COSINE}: {listed}")
    return warnings
