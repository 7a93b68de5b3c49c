"""What a run works on: the captioner, what belongs beside its weights, and the model of stage 1 while it lasts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
import torch
from torch import Tensor

from blip2edge.model.captioner import CaptionerModel
from blip2edge.model.checkpoint.directory import save_checkpoint
from blip2edge.runtime.images.preprocess import Preprocessing
from blip2edge.runtime.text.tokenizer import Tokenizer
from blip2edge.training.loading.stage1_texts import QFormerTexts

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class Workshop:
    """The parts of one run.

    Attributes:
        model: Changed in place by the phases.
        preprocessing: Of its pictures.
        tokenizer: Of its language model.
        texts: Of its Q-Former's own text side; None where the bridge has none.
        files: What stands beside the weights, by name: configurations and tokenizers as bytes.
        fresh: Whether the bridge's last layer was drawn, so that its scale is still to be matched.
    """

    model: CaptionerModel
    preprocessing: Preprocessing
    tokenizer: tokenizers.Tokenizer
    texts: QFormerTexts | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    fresh: bool = True

    @property
    def runtime_tokenizer(self) -> Tokenizer:
        """The tokenizer with the interface of the runtime."""
        return Tokenizer(self.tokenizer)

    def write(self, directory: Path, dtype: str) -> None:
        """Writes a checkpoint.

        Args:
            directory: An empty one.
            dtype: How the tensors are stored: a key of `DTYPES`.
        """
        save_checkpoint(self.model, directory, dtype=DTYPES[dtype])
        self.write_files(directory)
        if self.texts is not None and self.model.draft is not None:
            self.texts.save(directory)

    def write_files(self, directory: Path) -> None:
        """Writes what stands beside the weights."""
        for name, content in self.files.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(content)

    def trained(self, parts: tuple[str, ...]) -> dict[str, Tensor]:
        """The tensors of some parts, by name: what a snapshot keeps of the phases before.

        Args:
            parts: Beginnings of parameter names, such as "vision.".
        """
        if not parts:
            return {}
        state = self.model.state_dict()
        return {
            name: tensor.detach().cpu().clone() for name, tensor in state.items() if name.startswith(parts)
        }

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes what `trained` gave."""
        state = self.model.state_dict()
        with torch.no_grad():
            for name, tensor in tensors.items():
                state[name].copy_(tensor)
