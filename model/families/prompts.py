"""Makes the prompt format of a family. Training uses this format, and export writes it into the bundle's manifest."""

from __future__ import annotations

from blip2edge.bundle.prompt_spec import INTERLEAVED, PLACEHOLDER, SEGMENTS, PromptSpec
from blip2edge.model.config import CaptionerConfig
from blip2edge.model.families.registry import FAMILIES


def prompt_spec(config: CaptionerConfig) -> PromptSpec:
    """Makes the prompt template of a captioner, from its family's row in the registry."""
    family = FAMILIES[config.family]
    interleaved = bool(family.around_image)
    kind = INTERLEAVED if interleaved else PLACEHOLDER if family.image_token else SEGMENTS
    return PromptSpec(
        template=family.template,
        question=family.question,
        visual_tokens=0 if interleaved else config.frames * config.bridge.num_visual_tokens,
        bos_token_id=config.bos_token_id,
        image_token_id=config.image_token_id,
        framed=family.framed,
        required=family.prompt_required,
        default=family.default_prompt,
        frames=config.frames,
        instruction_positions=config.instruction_positions,
        picture_token=family.image_token if interleaved else "",
        around_picture=family.around_image,
        end_token_id=next(iter(config.eos_token_ids), None),
        image_token="" if interleaved else family.image_token,
        kind=kind,
    )
