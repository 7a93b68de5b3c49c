"""Any model of the family, and how it is built of its config."""

from __future__ import annotations

from blip2edge.model.captioner import CaptionerModel
from blip2edge.model.config import CaptionerConfig
from blip2edge.model.retrieval import RetrievalConfig, RetrievalModel

Config = CaptionerConfig | RetrievalConfig
Model = CaptionerModel | RetrievalModel


def build_model(config: Config) -> Model:
    """A captioner, or a model that compares; on the device that torch makes tensors on."""
    return RetrievalModel(config) if isinstance(config, RetrievalConfig) else CaptionerModel(config)
