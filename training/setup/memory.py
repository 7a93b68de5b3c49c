"""Predicts the memory of a training step of stage 2 or instruction tuning, before the training starts.

Weights, gradients and optimizer state are counted from the parameters. A trained parameter takes 4 bytes each for
weight, gradient, AdamW's two moments and (with `ema_decay`) the average. A frozen parameter takes the bytes of its
dtype. To count the tensors that are kept for the backward pass, the forward pass runs on torch's meta device, which
computes only shapes. So the counted code is the code that trains, for every family, and no weights are needed. The
numbers of parameters equal those of ``blip2edge plan`` (tests compare them).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from blip2edge.errors import ConfigError
from blip2edge.model.captioner import CaptionerModel
from blip2edge.model.config import CaptionerConfig
from blip2edge.runtime.bench.devices import GB
from blip2edge.runtime.bench.memory import MachineMemory, MemoryNeed, check_memory
from blip2edge.runtime.bench.plan import PlanOptions
from blip2edge.training.config import TrainingConfig
from blip2edge.training.loading.batches import CaptionBatch, TextBatch
from blip2edge.training.loading.loader import PictureBatch
from blip2edge.training.loop.optim import recompute_activations, transformer_layers
from blip2edge.training.phase_config import Stage2Phase
from blip2edge.training.phases.distributed import alone
from blip2edge.training.phases.stage2 import GenerativeStage
from blip2edge.training.setup.lora import add_lora
from blip2edge.training.setup.model_parts import DTYPES

GIB = 1 << 30
_TRAINED = 4  # bytes of a value in float32
_PROMPT = PlanOptions().prompt_tokens
_SMALLER_BRIDGE = "lower the sizes in [model.qformer], or [model] num_query_tokens"
_SMALLER = "lower the sizes in [model.vision], [model.qformer] and [model.language]"


@dataclass(frozen=True)
class StepMemory:
    """Bytes that one process needs during a step. If parameters are sharded, only the process' share is counted.

    Attributes:
        frozen: Frozen weights, the picture encoder's included.
        trained: Trained weights.
        gradients: Gradients of the trained weights.
        optimizer: AdamW's two moments.
        averages: Averages of the trained weights.
        gathered: With sharding: the largest layer, and the parameters that belong to no layer.
        activations: Tensors that are kept for the backward pass; with activation checkpointing also the activations of
            the largest layer, whose forward pass runs again.
        working: The gradient of the largest kept tensor, usually the gradient of the logits.
        reading: The whole model in float32, when it is read from the checkpoint, before the first step.
    """

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    averages: int
    gathered: int
    activations: int
    working: int
    reading: int

    @property
    def step(self) -> int:
        """Returns the peak of a step in bytes.

        The activations are released while the gradients are computed, so only the larger of these amounts is counted.
        """
        held = self.frozen + self.trained + self.optimizer + self.averages + self.gathered
        return held + max(self.activations + self.working, self.gradients)

    @property
    def peak(self) -> int:
        """Returns the peak of the phase in bytes: of a step, or of reading the checkpoint."""
        return max(self.step, self.reading)


def predict(config: CaptionerConfig, recipe: TrainingConfig, phase: Stage2Phase, processes: int = 1) -> StepMemory:
    """Predicts the memory that one training step needs.

    Args:
        config: The captioner.
        recipe: The recipe; the key `bridge` and the section `[loop]` are used.
        phase: Section `[stage2]` or `[instruct]`. Texts are assumed to have `max_tokens` tokens.
        processes: Number of processes; with `fsdp` the parameters are spread over the processes.
    """
    with alone(), torch.device("meta"):
        stage, vision = _stage(config, recipe, phase)
        batch = _batch(stage, config, recipe, phase)
        kept, largest, working = _kept(stage, batch)
        if recipe.loop.recompute_activations:
            recompute_activations(stage)
            kept = _kept(stage, batch)[0] + largest
    shares = processes if recipe.loop.fsdp else 1
    frozen, trained = _parameter_bytes([stage, vision])
    parameters = {id(each): each.numel() for module in (stage, vision) for each in module.parameters()}
    own = -(-trained // shares)
    return StepMemory(
        frozen=-(-frozen // shares),
        trained=own,
        gradients=own,
        optimizer=2 * own,
        averages=own if recipe.loop.ema_decay else 0,
        gathered=_gathered(stage) if shares > 1 else 0,
        activations=kept,
        working=working,
        reading=_TRAINED * sum(parameters.values()),
    )


def memory_table(predicted: StepMemory, title: str) -> list[str]:
    """Returns the lines of a short table of the predicted memory, in GiB."""
    rows = {each.name: getattr(predicted, each.name) for each in fields(predicted)}
    reading = rows.pop("reading")
    rows |= {"step": predicted.step, "reading": reading, "peak": predicted.peak}
    shown = [(name, size) for name, size in rows.items() if size]
    return [title, *(f"  {name:<12}{size / GIB:9.3f} GiB" for name, size in shown)]


def announce(
    config: CaptionerConfig,
    recipe: TrainingConfig,
    stage: str,
    accelerator: Accelerator,
    log: Callable[[str], None],
    *,
    new_bridge: bool = False,
) -> None:
    """Prints the predicted memory of stage 2 or instruction tuning, and compares it with the memory of the device.

    Needs the config only: call it before the weights are read, or drawn for the miniature.

    Args:
        config: The captioner.
        recipe: The recipe. For the miniature, only warnings are printed, because it is small by default.
        stage: The last stage of the run. For "stage1", only the memory for reading the checkpoints and for pretraining
            the miniature is compared.
        accelerator: Device and processes.
        log: Receives the lines.
        new_bridge: Whether the bridge gets new weights while the other parts of the model come from checkpoints.

    Raises:
        ConfigError: The weights and the optimizer state alone need more than all memory of the device, reading the
            checkpoints needs more than all memory of the machine, or a tensor has more bytes than torch can count.
    """
    with _countable(recipe, stage):
        _announce(config, recipe, stage, accelerator, log, new_bridge=new_bridge)


@contextmanager
def _countable(recipe: TrainingConfig, stage: str) -> Iterator[None]:
    """Turns torch's error about a tensor of more than 2^63 bytes in a ``with`` block into a ConfigError."""
    try:
        yield
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        phase = getattr(recipe, stage)
        raise ConfigError(
            f"a tensor of this recipe would have more than 2^63 bytes: [{stage}] batch_size = {phase.batch_size} and"
            f" max_tokens = {phase.max_tokens}, [model] num_query_tokens = {recipe.model.num_query_tokens}",
            f"lower batch_size and raise accumulate, or {_SMALLER}",
        ) from error


def _announce(
    config: CaptionerConfig,
    recipe: TrainingConfig,
    stage: str,
    accelerator: Accelerator,
    log: Callable[[str], None],
    *,
    new_bridge: bool,
) -> None:
    processes = accelerator.num_processes
    local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))  # processes on this machine
    miniature, on_gpu = recipe.model.is_miniature, accelerator.device.type == "cuda"
    with torch.device("meta"):
        model = CaptionerModel(config)
    reading = _reading_need(model, local, miniature=miniature, new_bridge=new_bridge)
    check_memory(reading, ConfigError, notify=log if on_gpu or stage == "stage1" else None)
    memory = None
    if on_gpu:
        free, total = torch.cuda.mem_get_info(accelerator.device)
        memory = MachineMemory(free, total, 0, 0, None)
    if miniature:
        need = _pretraining_need(model, recipe, stage, local=local, processes=processes, on_gpu=on_gpu)
        check_memory(need, ConfigError, notify=log, memory=memory)
    here = 1 if on_gpu else local  # processes that share the memory
    for name in ("stage1", stage) if recipe.runs_stage1(stage) else (stage,):
        check_memory(_batch_need(config, recipe, name, local), ConfigError)
    if stage == "stage1":
        return
    phase = recipe.instruct if stage == "instruct" else recipe.stage2
    predicted = predict(config, recipe, phase, processes)
    title = f"{stage}: predicted memory of a step of {phase.batch_size} samples with {phase.max_tokens} tokens"
    for line in (
        ()
        if miniature
        else memory_table(predicted, f"{title}, for each of {processes} processes" if processes > 1 else title)
    ):
        log(line)
    need = MemoryNeed(
        "the training",
        here * (predicted.frozen + predicted.trained + predicted.optimizer),
        here * (predicted.step if on_gpu else predicted.peak),
        "set frozen_dtype to bfloat16, recompute_activations to true, or fsdp to true with several processes ([loop]);"
        " or lower batch_size and raise accumulate",
        ignorable=False,
    )
    check_memory(need, ConfigError, notify=log, memory=memory)


def _reading_need(model: CaptionerModel, local: int, *, miniature: bool, new_bridge: bool) -> MemoryNeed:
    """Returns the memory for a model in float32, whose weights are read from checkpoints or drawn.

    `local` is the number of processes on this machine, each of which holds the whole model.
    """
    size, bridge = local * _size(model), local * _size(model.bridge)
    fewer = ", or start fewer processes on it" if local > 1 else ""
    what, mend = "reading the checkpoints, which is done in float32,", "train a smaller model"
    if miniature:
        what, mend = "drawing the weights of the miniature", _SMALLER
    elif new_bridge:
        what = f"reading the checkpoints and drawing a new bridge of {bridge / GB:.1f} GB, both in float32,"
        mend = _SMALLER_BRIDGE if 2 * bridge > size else mend
    return MemoryNeed(what, size, size, f"{mend}, or use a machine with more memory{fewer}", ignorable=False)


def _batch_need(config: CaptionerConfig, recipe: TrainingConfig, name: str, local: int) -> MemoryNeed:
    """Returns the memory for the pictures of one batch in `local` processes: their pixels, or their stored features.

    A step needs several times as much. So only a batch that is much too large is refused, before it is read. The cache
    has features, and a folder may have them in place of pictures.
    """
    vision, rows = config.vision, getattr(recipe, name).batch_size
    pixels, features = 3 * vision.image_size**2, vision.num_embeds * vision.hidden_size
    stored = recipe.loop.cache_features or any(part.kind == "folder" for part in recipe.data.parts)
    size = local * _TRAINED * rows * (min(features, pixels) if stored else pixels)
    what = f"a batch of [{name}] batch_size = {rows} pictures"
    return MemoryNeed(what, size, size, "lower batch_size and raise accumulate", ignorable=False)


def _pretraining_need(
    model: CaptionerModel, recipe: TrainingConfig, stage: str, *, local: int, processes: int, on_gpu: bool
) -> MemoryNeed:
    """Returns the memory for pretraining the larger of the miniature's trained parts, without activations.

    On a GPU, only the trained part is on the device. On a CPU, the `local` processes on this machine share its memory.
    """
    parts = [model.vision] if stage == "stage1" else [model.vision, model.language]
    part = max(map(_size, parts))
    own = -(-part // (processes if recipe.loop.fsdp else 1))
    copies, others = (1, 0) if on_gpu else (local, _size(model) - part)
    least, gradients = copies * (others + 3 * own), copies * own  # AdamW has two moments
    return MemoryNeed("pretraining the miniature", least, least + gradients, _SMALLER, ignorable=False)


def _size(module: nn.Module) -> int:
    """Returns the bytes of a module's parameters in float32."""
    return _TRAINED * sum(each.numel() for each in module.parameters())


def _stage(config: CaptionerConfig, recipe: TrainingConfig, phase: Stage2Phase) -> tuple[GenerativeStage, nn.Module]:
    """Builds the module that the phase trains; returns it and the picture encoder, on the current (meta) device."""
    model = CaptionerModel(config)
    frozen = DTYPES[recipe.loop.frozen_dtype]
    if not phase.unfreeze_language:
        model.language.to(frozen)
    if phase.lora_rank:
        add_lora(model.language, phase.lora_rank, phase.lora_alpha, phase.lora_targets)
    if not phase.unfreeze_vision:
        model.vision.to(frozen).requires_grad_(False)
    stage = GenerativeStage(
        model,
        recipe.bridge,
        phase.itg_weight,
        unfreeze_language=phase.unfreeze_language,
        unfreeze_vision=phase.unfreeze_vision,
    )
    return stage, model.vision


def _batch(stage: GenerativeStage, config: CaptionerConfig, recipe: TrainingConfig, phase: Stage2Phase) -> PictureBatch:
    """Makes a batch in which all texts have the largest length."""
    rows, vision = phase.batch_size, config.vision
    size = vision.image_size
    picture = (3, size, size) if stage.vision is not None else (vision.num_embeds, vision.hidden_size)

    def ids(length: int) -> Tensor:
        return torch.ones(rows, length, dtype=torch.int64)

    separate = config.language.is_encoder_decoder
    length = _PROMPT if separate else _PROMPT + phase.max_tokens
    target = ids(phase.max_tokens)
    captions = CaptionBatch(
        ids(length),
        ids(length),
        target if separate else ids(length),
        torch.ones(0, dtype=torch.int64),
        target if separate else None,
    )
    own = TextBatch(ids(recipe.stage1.max_tokens), ids(recipe.stage1.max_tokens)) if stage.draft is not None else None
    instruction = (ids(_PROMPT), ids(_PROMPT)) if config.instruction_positions else None
    return PictureBatch((), torch.empty(rows, *picture), rows, captions, own, instruction)


def _kept(stage: nn.Module, batch: PictureBatch) -> tuple[int, int, int]:
    """Runs the forward pass and counts the bytes kept for the backward pass, without weights.

    Returns:
        Bytes of all kept tensors, the largest number of bytes that one layer adds, and bytes of the largest tensor.
    """
    sizes: dict[int, int] = {}
    weights = {each.untyped_storage()._cdata for each in stage.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    layers: list[int] = [0]
    with _counting(stage, sizes, layers), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = stage(batch)["loss"]
    found = sum(sizes.values()), max(layers), max(sizes.values(), default=0)
    del loss  # the graph keeps the tensors, and so their addresses, until here
    return found


@contextmanager
def _counting(stage: nn.Module, sizes: dict[int, int], layers: list[int]) -> Iterator[None]:
    """Measures each layer that runs in a ``with`` block: how many bytes its forward pass adds to ``sizes``.

    The results are appended to ``layers``.
    """
    began: list[int] = []
    hooks: list[Any] = []
    for layer in transformer_layers(stage):
        hooks.append(layer.register_forward_pre_hook(lambda *_: began.append(sum(sizes.values()))))
        hooks.append(layer.register_forward_hook(lambda *_: layers.append(sum(sizes.values()) - began.pop())))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _parameter_bytes(modules: list[nn.Module]) -> tuple[int, int]:
    """Returns the bytes of all frozen and of all trained parameters; a shared parameter counts once."""
    distinct = {id(each): each for module in modules for each in module.parameters()}.values()
    frozen = sum(each.numel() * each.element_size() for each in distinct if not each.requires_grad)
    return frozen, sum(each.numel() * _TRAINED for each in distinct if each.requires_grad)


def _gathered(stage: nn.Module) -> int:
    """Returns the bytes that are gathered at one time under FSDP.

    These are the largest layer and the parameters outside of all layers, with the gradients of trained parameters.
    """
    layers = transformer_layers(stage)
    within = {id(each) for layer in layers for each in layer.parameters()}
    outside = nn.ParameterList([each for each in stage.parameters() if id(each) not in within])
    largest = 0
    for layer in layers:
        frozen, trained = _parameter_bytes([layer])
        largest = max(largest, frozen + 2 * trained)
    frozen, trained = _parameter_bytes([outside])
    return largest + frozen + 2 * trained
