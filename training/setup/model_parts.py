"""The model that a run trains: a captioner with its tokenizer, preprocessing and the other files of its checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
import torch
from torch import Tensor

from blip2edge.model.captioner import CaptionerModel
from blip2edge.model.checkpoint.directory import save_checkpoint
from blip2edge.runtime.images.preprocess import Preprocessing
from blip2edge.runtime.text.tokenizer import Tokenizer
from blip2edge.training.loading.qformer_texts import QFormerTexts
from blip2edge.training.loop.sharding import whole_tensor
from blip2edge.training.phases.stage1 import Stage1Model
from blip2edge.training.setup.lora import without_lora

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class ModelParts:
    """A captioner and all files of its checkpoint that are not weights.

    Attributes:
        model: The captioner; the phases change it in place.
        preprocessing: Preprocessing of the pictures.
        tokenizer: Tokenizer of the language model.
        qformer_texts: Tokenizes texts for the Q-Former's own text modules; None if the bridge has none.
        files: Content of the other files of the checkpoint, by name: configurations and tokenizers.
        new_projection: Whether the bridge's last layer has new weights. If so, stage 2 scales its weights so that its
            output is as large as the token embeddings.
        stage1: Reads the model that stage 1 starts from; None to start from a new Q-Former.
    """

    model: CaptionerModel
    preprocessing: Preprocessing
    tokenizer: tokenizers.Tokenizer
    qformer_texts: QFormerTexts | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    new_projection: bool = True
    stage1: Callable[[], Stage1Model] | None = None

    @property
    def runtime_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer as the runtime's class ``Tokenizer``."""
        return Tokenizer(self.tokenizer)

    def write(self, directory: Path, dtype: str) -> None:
        """Writes the captioner as a checkpoint: config, weights and the other files.

        Args:
            directory: An empty directory.
            dtype: dtype of the stored tensors: "float16", "bfloat16" or "float32".
        """
        save_checkpoint(self.model, directory, dtype=DTYPES[dtype])
        for name, content in self.files.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(content)
        if self.qformer_texts is not None and self.model.draft is not None:
            self.qformer_texts.save(directory)

    def tensors(self, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
        """Copies the model's tensors whose names begin with one of the prefixes, such as "vision.", to the CPU.

        If tensors are sharded, every process must call this method.
        """
        return {
            name: whole_tensor(tensor.detach()).cpu().clone()
            for name, tensor in without_lora(self.model.state_dict()).items()
            if prefixes and name.startswith(prefixes)
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies tensors back into the model, by name."""
        state = self.model.state_dict()
        with torch.no_grad():
            for name, tensor in tensors.items():
                state[name].copy_(tensor)
