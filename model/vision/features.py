"""Config of a ViT that returns one embedding for each patch.

Two keys of the config choose the embeddings: the block that they come from, and whether the class token and the
registers are among them (``blip2edge/shapes/features.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from blip2edge.model.config import TransformerConfig
from blip2edge.model.config_json import Fields, check_patch_size, key
from blip2edge.shapes.features import FULL, LAYER, PATCHES, STRATEGY, feature_blocks, is_full


@dataclass(frozen=True)
class PatchEncoderConfig(TransformerConfig):
    """Config of a ViT that returns its class token and registers (if it has these), then one embedding for each patch.

    Attributes:
        image_size: Side of the picture in pixels.
        patch_size: Side of a patch in pixels.
        post_norm: Whether the final norm is applied to the output. It is left out if ``vision_feature_layer`` is set;
            ``num_layers`` is then the number of blocks up to that layer.
        keep_prefix: Whether the embeddings before the patches (class token, registers) stay in the output.
    """

    image_size: int = key("image_size", 224)
    patch_size: int = key("patch_size", 16)
    norm_eps: float = key("layer_norm_eps", 1e-6)
    post_norm: bool = True
    keep_prefix: bool = True

    section = "vision_config"
    merge_tokens = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_patch_size(self.section, self.patch_size, self.image_size)

    @property
    def kind(self) -> str:
        """The encoder's ``model_type``, a key in ``vision/registry.py``."""
        return self.model_type

    @property
    def prefix(self) -> int:
        """Number of embeddings before the patches: class token and registers."""
        return 0

    @property
    def num_patches(self) -> int:
        """Number of patches."""
        return int((self.image_size // self.patch_size) ** 2)

    @property
    def num_embeds(self) -> int:
        """Number of output embeddings."""
        return self.num_patches + (self.prefix if self.keep_prefix else 0)

    def select(self, x: Tensor) -> Tensor:
        """Returns all embeddings ``x [B, prefix + patches, D]``, or only the patches, as the config says."""
        return x if self.keep_prefix or not self.prefix else x[:, self.prefix :]

    @classmethod
    def read_features(cls, values: Any, depth: int) -> dict[str, Any]:
        """Reads ``vision_feature_layer`` and ``vision_feature_select_strategy``.

        Returns the fields of the config that these keys set, by name.

        Args:
            values: Content of the section.
            depth: Number of blocks of the encoder.

        Raises:
            CheckpointError: A key has a wrong value, or names several layers.
        """
        found = Fields(cls.section, values).values
        fields: dict[str, Any] = {"keep_prefix": is_full(found.get(STRATEGY, FULL), cls.section)}
        if found.get(LAYER) is not None:
            fields |= {"num_layers": feature_blocks(found[LAYER], depth), "post_norm": False}
        return fields

    def to_hf(self) -> dict[str, Any]:
        """Returns the section of ``config.json`` that ``from_hf`` reads."""
        layer = {} if self.post_norm else {LAYER: -1}
        return super().to_hf() | layer | ({} if self.keep_prefix else {STRATEGY: PATCHES})
