"""The prompt template of a bundle as data; only the standard library is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MARKERS = ("{image}", "<image>")
"""Markers of a picture's place in a prompt with several pictures; templates use the first one."""
VIDEO_MARKER = "<video>"  # of a video's place

SEGMENTS, PLACEHOLDER, INTERLEAVED = PROMPT_KINDS = ("segments", "placeholder", "interleaved")
"""How a prompt is tokenized.

``segments``: the texts before and after a picture are tokenized one by one. ``placeholder``: the whole text is
tokenized, with placeholder tokens at the place of each picture. ``interleaved``: the whole text is tokenized, with a
marker token for each picture; the decoder attends to pictures by cross-attention, so they take no positions of the
prompt.
"""


TURNS = ("head", "system", "picture", "user", "assistant", "start")
"""Kinds of messages in a conversation, and two texts around them.

``head`` begins a conversation without a system message. ``picture`` is a user's message with a picture, ``user`` a
message without a picture. ``start`` begins the answer. A bundle may have no template for ``system``.
"""


@dataclass(frozen=True)
class PromptSpec:
    """How a picture and a text become the language model's input.

    Attributes:
        template: Text with one ``{image}`` per picture and one ``{prompt}``.
        question: The text that ``ask`` puts in place of ``{prompt}``, with one ``{question}``; empty if the model
            answers no questions.
        visual_tokens: Slots of a picture, or of a video's frames together; 0 for interleaved prompts.
        bos_token_id: Token that begins a text; an empty prompt is this token alone.
        image_token_id: Token id that stands for a visual token in transformers' ``input_ids``; the repetition penalty
            applies to this id.
        framed: Kind ``segments``: whether the tokenizer adds its special tokens to the first segment that is not empty
            (for BLIP-2, the text after the picture). Otherwise only BOS is put before this segment. Kind
            ``placeholder``: whether the tokenizer adds them to the whole text; if not, the template contains them.
        required: Whether the model needs a prompt to caption.
        default: The text that ``caption`` puts in place of ``{prompt}`` if no prompt is given; None for no text.
        frames: Pictures of an item: 1, or the frames of a video.
        instruction_positions: The longest instruction that enters the bridge, in tokens of
            ``qformer_tokenizer.json``; 0 if the bridge takes no instruction.
        picture_token: Kind ``interleaved``: the marker token of a picture.
        around_picture: Kind ``interleaved``: the token before and after the marker; adjacent pictures share one.
        end_token_id: Kind ``interleaved``: the token that ends a document; later tokens attend to no earlier picture.
        image_token: Kind ``placeholder``: the tokenizer's token for a picture.
        kind: How the prompt is built, one of :data:`PROMPT_KINDS`.
        turns: Templates of a conversation's messages by :data:`TURNS`, each with one ``{prompt}``; the template of
            ``picture`` has one ``{image}`` as well. Joined in the order of the messages, the filled templates are the
            whole text. Empty if a prompt can have only one text.

    Raises:
        ValueError: ``kind`` is unknown, or a token is set that only another kind uses.
    """

    template: str
    question: str
    visual_tokens: int
    bos_token_id: int | None
    image_token_id: int | None = None
    framed: bool = True
    required: bool = False
    default: str | None = None
    frames: int = 1
    instruction_positions: int = 0
    picture_token: str = ""
    around_picture: str = ""
    end_token_id: int | None = None
    image_token: str = ""
    kind: str = SEGMENTS
    turns: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in PROMPT_KINDS:
            raise ValueError(f"prompt kind {self.kind} is not one of {', '.join(PROMPT_KINDS)}")
        for kind, token in ((PLACEHOLDER, self.image_token), (INTERLEAVED, self.picture_token)):
            if bool(token) != (self.kind == kind):
                raise ValueError(
                    f"a prompt of kind {self.kind} {'must not have' if token else 'needs'} the token for a picture of "
                    f"kind {kind}"
                )

    @property
    def gives_ids(self) -> bool:
        """Whether transformers' ``generate`` gets the token ids of this prompt; False if it gets embeddings only.

        With embeddings only, the options that penalise tokens of the prompt have no effect.
        """
        return self.kind != SEGMENTS or MARKERS[0] not in self.template

    def to_json(self) -> dict[str, Any]:
        """Returns the spec as a JSON object for ``bundle.json``."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> PromptSpec:
        """Reads a spec from the JSON object of :meth:`to_json`.

        Objects of versions before 0.2 have no key ``kind``: then the tokens in the object determine the kind.
        """
        known = {key: values[key] for key in cls.__dataclass_fields__ if key in values}
        tokens = {INTERLEAVED: known.get("picture_token"), PLACEHOLDER: known.get("image_token")}
        implied = next((kind for kind, token in tokens.items() if token), SEGMENTS)
        return cls(**{"kind": implied, **known})
