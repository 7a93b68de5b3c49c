"""Initialises, loads and saves the model of stage 1, and copies its trained weights into a captioner.

:func:`start_from_bert` initialises the model from a BERT. :func:`open_stage1` and :func:`save_stage1` use directories
of transformers' ``Blip2ForImageTextRetrieval``, with the files of the draft model. :func:`begin_stage2` copies the
trained weights into the bridge and the draft model of a captioner.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from blip2edge.bundle.fields import finite_number, record
from blip2edge.errors import CheckpointError, some
from blip2edge.model.bridges.qformer import QFormerBase
from blip2edge.model.bridges.text_head import DRAFT_CONFIG, DRAFT_FILE, TEXT_HEAD_RULES, write_draft
from blip2edge.model.captioner import CaptionerModel
from blip2edge.model.checkpoint.directory import load_model, read_model_config, save_checkpoint
from blip2edge.model.checkpoint.stored.files import find_checkpoint, read_checkpoint_json
from blip2edge.model.checkpoint.stored.tensors import TensorFiles
from blip2edge.model.config import CaptionerConfig, DraftConfig, QFormerConfig
from blip2edge.model.retrieval import RetrievalConfig, RetrievalModel
from blip2edge.model.weights.rules import Rule, WeightMap, under
from blip2edge.reading import checking, reading
from blip2edge.training.phases.stage1 import Stage1Model
from blip2edge.training.setup.architecture import stage1_config

STAGE1_FAMILY = "blip-2-itm"  # of the checkpoints that stage 1 writes
STAGE1_FILE = "stage1.json"  # holds the temperature, which is in no other file
EMBED_DIM = 256  # of picture and text vectors where they are newly initialised, as in LAVIS
BERT_STD = 0.02  # of BERT's initialisation, and of the queries

_ATTENTION = (
    Rule("query", "attention.self.query"),
    Rule("key", "attention.self.key"),
    Rule("value", "attention.self.value"),
    Rule("dense", "attention.output.dense"),
    Rule("norm", "attention.output.LayerNorm"),
)
_FEED_FORWARD = (
    Rule("up", "intermediate.dense"),
    Rule("down", "output.dense"),
    Rule("norm", "output.LayerNorm"),
)
_QFORMER = "matcher.qformer."
BERT_RULES = (
    Rule(f"{_QFORMER}word_embeddings", "embeddings.word_embeddings"),
    Rule(f"{_QFORMER}position_embeddings", "embeddings.position_embeddings"),
    Rule(f"{_QFORMER}norm", "embeddings.LayerNorm"),
    *under(f"{_QFORMER}layers.*.self_attention.", "encoder.layer.*.", _ATTENTION),
    *under(f"{_QFORMER}layers.*.text_feed_forward.", "encoder.layer.*.", _FEED_FORWARD),
    *under(f"{_QFORMER}layers.*.feed_forward.", "encoder.layer.*.", _FEED_FORWARD),
    *(rule for rule in TEXT_HEAD_RULES if rule.ours.startswith("head")),
)
"""Maps parameter names of :class:`Stage1Model` to tensor names of BERT.

BERT's feed-forward is copied to the feed-forward of the text and to that of the queries. Parameters without a rule are
drawn at random.
"""

_DRAWN = ("query_tokens", "cross_attention", "projection", "match_head", "temperature", "vision.")


def _bert_name(name: str) -> str:
    """Returns a tensor's name as in :data:`BERT_RULES`, given its name in any BERT class of transformers."""
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def draw_weights(model: Stage1Model, generator: torch.Generator | None = None) -> None:
    """Initialises all modules except the picture encoder as BERT does: N(0, 0.02²), biases 0, norms 1.

    Args:
        model: The model; changed in place.
        generator: Random generator; None for torch's global generator.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("vision.") or name == "temperature":
                continue
            if parameter.ndim > 1:
                parameter.normal_(0.0, BERT_STD, generator=generator)
            else:
                parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)


def start_from_bert(model: Stage1Model, source: str | Path, generator: torch.Generator | None = None) -> list[str]:
    """Loads the text side and self-attention from a BERT, and initialises all other tensors at random.

    Initialised at random: vocabulary rows that BERT does not have ([DEC]); the cross-attention to the picture; the word
    head, if the file has no language-modelling head (BertModel).

    Args:
        model: The model; changed in place.
        source: A local directory or a hub name, such as ``google-bert/bert-base-uncased``, with safetensors.
        generator: Random generator; None for torch's global generator.

    Returns:
        Names of the randomly initialised tensors, as in ``model``.

    Raises:
        CheckpointError: The source is not a BERT, or its sizes differ from those of the Q-Former.
    """
    draw_weights(model, generator)
    directory = find_checkpoint(source)
    files, rules = TensorFiles(directory, _bert_name), WeightMap(BERT_RULES)
    drawn = []
    state = dict(model.named_parameters())
    try:
        for name, parameter in state.items():
            if any(part in name for part in _DRAWN):
                drawn.append(name)
                continue
            theirs = rules.sources(name)[0]
            if theirs not in files.shapes:
                if not name.startswith("head."):
                    raise CheckpointError(
                        f"{directory} has no tensor {theirs}, which every BERT has",
                        "give the directory or hub name of a BERT, such as google-bert/bert-base-uncased",
                    )
                drawn.append(name)
                continue
            _take(parameter, files.read([theirs]), theirs, directory)
    finally:
        files.close()
    return drawn


def _take(parameter: Tensor, given: Tensor, name: str, directory: Path) -> None:
    """Copies a tensor into a parameter, which may have more rows than the tensor if :func:`_may_grow` allows it."""
    rows = len(given)
    if given.shape[1:] != parameter.shape[1:] or rows > len(parameter) or not _may_grow(name, given, parameter):
        raise CheckpointError(
            f"{directory}: {name} has shape {list(given.shape)}, but the Q-Former needs {list(parameter.shape)}",
            "set [model.qformer] to the sizes of this BERT",
        )
    with torch.no_grad():
        parameter[:rows] = given.to(parameter.dtype)


def _may_grow(name: str, given: Tensor, parameter: Tensor) -> bool:
    grows = name in ("embeddings.word_embeddings.weight", "cls.predictions.bias")
    return len(given) == len(parameter) or grows


def draft_tensors(model: Stage1Model) -> dict[str, Tensor]:
    """Returns the tensors of the text head, by the names of :class:`TextHead`; they share memory with the model."""
    side = model.text_side()
    parts: dict[str, nn.Module] = {"words": side.words, "positions": side.positions, "head": side.head}
    parts |= {f"feed_forwards.{index}": feed_forward for index, (_, feed_forward) in enumerate(side.layers)}
    return {f"{path}.{name}": tensor for path, part in parts.items() for name, tensor in part.state_dict().items()}


def save_stage1(model: Stage1Model, directory: str | Path) -> None:
    """Writes a directory that ``transformers.Blip2ForImageTextRetrieval`` loads, with the files of the draft model.

    Args:
        model: The model; its temperature is written to ``stage1.json``.
        directory: The directory; created if it does not exist.
    """
    target = Path(directory)
    with torch.device("meta"):
        plain = RetrievalModel(model.config)
    state = model.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()}, assign=True)
    save_checkpoint(plain, target)
    rules = WeightMap(TEXT_HEAD_RULES)
    tensors = {rules.sources(name)[0]: tensor.contiguous().cpu() for name, tensor in draft_tensors(model).items()}
    write_draft(target, tensors, model.draft_config)
    record = {"temperature": float(model.temperature.detach())}
    (target / STAGE1_FILE).write_text(json.dumps(record) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Stage1Source:
    """A checkpoint from which stage 1 can start, or whose Q-Former a captioner can get; its weights are not read yet.

    Attributes:
        directory: The checkpoint.
        config: Config of the stage-1 model.
        draft: Config of its text head.
        has_draft: Whether the checkpoint has a text head; if not, the text head is new.
    """

    directory: Path
    config: RetrievalConfig
    draft: DraftConfig
    has_draft: bool

    def load(self) -> Stage1Model:
        """Reads the model, in eval mode and float32. Tensors that the checkpoint does not have are random."""
        model = Stage1Model(self.config, self.draft)
        draw_weights(model)
        given = load_model(self.directory)
        if isinstance(given, CaptionerModel):
            _copy_captioner(model, given)
            return model.eval()
        model.load_state_dict(given.state_dict(), strict=False)
        if self.has_draft:
            _load_head(model, self.directory)
        if (self.directory / STAGE1_FILE).is_file():
            with torch.no_grad():
                model.temperature.fill_(_temperature(self.directory / STAGE1_FILE))
        return model.eval()


def open_stage1(source: str | Path, draft: DraftConfig | None = None, embed_dim: int = EMBED_DIM) -> Stage1Source:
    """Opens the output of :func:`save_stage1`, or any directory of transformers' ``Blip2ForImageTextRetrieval``.

    From a captioner with a draft model, Q-Former and text head are used; the contrastive projections and the matching
    head are initialised at random.

    Args:
        source: A directory or a hub name.
        draft: Config of the text head, if the directory has no draft model; its word head is then random.
        embed_dim: Dimension of the contrastive projections, where they are initialised at random.

    Raises:
        CheckpointError: The source is not such a model, or has no draft model and ``draft`` is None.
    """
    directory = find_checkpoint(source)
    has_draft = (directory / DRAFT_CONFIG).is_file()
    if has_draft:
        draft = DraftConfig.from_json(read_checkpoint_json(directory / DRAFT_CONFIG))
    given = read_model_config(directory)
    if isinstance(given, CaptionerConfig) and given.draft is not None:
        if type(given.bridge) is not QFormerConfig:
            raise CheckpointError(
                f"expected a plain Q-Former with a draft model in {directory}, found a bridge of kind"
                f" {given.bridge.kind}",
                "give the output of stage 1",
            )
        config = stage1_config(given.vision, given.bridge, given.draft, embed_dim)
        return Stage1Source(directory, config, given.draft, has_draft)
    if not isinstance(given, RetrievalConfig) or given.family != STAGE1_FAMILY or draft is None:
        raise CheckpointError(
            f"expected the output of stage 1 with {DRAFT_CONFIG} in {directory}, found "
            + (f"the family {given.family}" if draft else f"no {DRAFT_CONFIG}"),
            "give the output of stage 1, or a captioner with a draft model",
        )
    if draft.vocab_size != given.vocab_size:
        holder = DRAFT_CONFIG if has_draft else "the tokenizer of the text side"
        raise CheckpointError(
            f"{directory}: {holder} has {draft.vocab_size} tokens, but vocab_size in config.json is "
            f"{given.vocab_size}; expected the same number",
            "copy all files of the directory from the same training run",
        )
    return Stage1Source(directory, given, draft, has_draft)


def _temperature(path: Path) -> float:
    values = read_checkpoint_json(path)
    with checking(path, "the record of stage 1", CheckpointError):
        record({"temperature": finite_number(0, 1e6)})(values, "")
    return float(values["temperature"])


def _copy_captioner(model: Stage1Model, captioner: CaptionerModel) -> None:
    """Copies a captioner's picture encoder, Q-Former and draft model; the reverse of :func:`begin_stage2`."""
    model.vision.load_state_dict(captioner.vision.state_dict())
    qformer: Any = captioner.bridge.get_submodule("qformer")
    model.matcher.get_submodule("qformer").load_state_dict(qformer.state_dict(), strict=False)
    written = {} if captioner.draft is None else captioner.draft.state_dict()
    with torch.no_grad():
        for name, tensor in draft_tensors(model).items():
            tensor.copy_(written[name])


def _load_head(model: Stage1Model, directory: Path) -> None:
    """Loads the word head from the draft model's file; all other weights are in the file of the stage-1 model."""
    rules = WeightMap(TEXT_HEAD_RULES)
    path = directory / DRAFT_FILE
    with reading(
        path, "the weights of the text head", CheckpointError, "copy the file again from the output of stage 1"
    ):
        tensors = load_file(path)
    sources = {name: rules.sources(f"head.{name}")[0] for name in model.head.state_dict()}
    given = {name: tensors[source] for name, source in sources.items() if source in tensors}
    _copy(model.head, given, f"the text head in {path}")


def begin_stage2(stage1: Stage1Model, captioner: CaptionerModel) -> None:
    """Copies the trained weights of stage 1 into a captioner's bridge, and into the captioner's draft model (if any).

    Args:
        stage1: The trained stage-1 model.
        captioner: A captioner whose Q-Former, plain or instructed, has the same sizes. If it has a draft model, its
            config has ``draft=stage1.draft_config``. Changed in place, except for its projection.

    Raises:
        CheckpointError: The captioner's bridge has no Q-Former, or a Q-Former of other sizes.
    """
    qformer = getattr(captioner.bridge, "qformer", None)
    if not isinstance(qformer, QFormerBase):
        raise CheckpointError(
            f"a bridge of kind {captioner.config.bridge.kind} has no Q-Former that could be initialized from stage 1",
            "set bridge to qformer, or set stage1.steps to 0 and leave bridge_from out",
        )
    trained: Any = stage1.matcher.qformer
    _copy(qformer, trained.state_dict(), "the Q-Former")
    if captioner.draft is not None:
        _copy(captioner.draft, draft_tensors(stage1), "the draft model")


def _copy(module: nn.Module, given: Mapping[str, Tensor], title: str) -> None:
    state = module.state_dict()
    wrong = [name for name, tensor in state.items() if name not in given or given[name].shape != tensor.shape]
    if wrong:
        raise CheckpointError(
            f"{title} has other sizes in this model than in stage 1: {some(wrong)}", "use the same sizes in both stages"
        )
    module.load_state_dict({name: given[name] for name in state})
