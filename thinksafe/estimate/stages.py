"""Estimate of a run before it starts: time, memory and tokens of each stage, from counted FLOPs and bytes.

The estimate reads configurations of models, never weights. The roofline time of a stage is what the GPU's rates allow.
The expected time is the roofline time divided by the share of the roofline that we aim for: no stage has been measured
on a GPU yet. Response lengths come from the paper, or from the responses that a run directory already holds.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from thinksafe.errors import UserError
from thinksafe.estimate.workload import (
    REASONING_TOKENS,
    TextLengths,
    evaluation_set_size,
    mean_response_tokens,
    response_lengths,
    unsteered_response_lengths,
)
from thinksafe.hardware import Hardware
from thinksafe.kernels.packed_attention import supports_grouped_heads
from thinksafe.model.config import ModelConfig
from thinksafe.model.lora import check_targets
from thinksafe.model.public_configs import PUBLIC_CONFIGS
from thinksafe.model.tensor_parallel import TensorShard
from thinksafe.model.weights import load_config
from thinksafe.paths import expand_path
from thinksafe.recipe.schema import Recipe
from thinksafe.run.directory import RunDir
from thinksafe.sampler.config import KV_CACHE_SHARE, EngineConfig, SamplingConfig
from thinksafe.sampler.kv_cache import CacheFormat
from thinksafe.sampler.roofline import ByteCounts, pass_seconds
from thinksafe.training.cost_model import HOST_SECONDS_PER_LAYER, TokenCounts, TrainingCosts
from thinksafe.training.memory_plan import (
    MEMORY_RESERVE,
    DeviceMemory,
    choose_max_cuda_graph_tokens,
    choose_zero_stage,
    describe_checkpointing,
)

SAMPLING_SHARE, SCORING_SHARE, TRAINING_SHARE = 0.70, 0.60, 0.60
"""Shares of the roofline that we aim for: expected seconds = roofline seconds / share. No GPU run has measured them."""

_BF16 = 2
_GUARD_TEMPLATE_TOKENS = 80
"""Tokens of a guard's prompt besides prompt and response. Its policy text is equal in all prompts, so computed once."""


@dataclass(frozen=True)
class StageEstimate:
    """Estimate of one stage.

    Attributes:
        name: name of the stage in the manifest.
        tokens: number of response tokens; in training, of tokens in whole sequences, over all epochs.
        seconds: expected time on all GPUs of the run.
        roofline_seconds: least time at the hardware's rates.
        memory: bytes of each part (weights, key-value cache, ...) on one GPU, by the part's name.
        remark: expected rates, and settings that were chosen automatically, as text.
    """

    name: str
    tokens: int
    seconds: float
    roofline_seconds: float
    memory: dict[str, int]
    remark: str = ""

    @property
    def peak_bytes(self) -> int:
        """Bytes of all parts on one GPU."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Estimate:
    """Estimate of a run: its stages in order, sentences on what is assumed, and one sentence for each stage that needs
    more memory than a GPU has."""

    hardware: Hardware
    num_gpus: int
    stages: tuple[StageEstimate, ...]
    assumptions: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Expected time of all stages, one after another."""
        return sum(stage.seconds for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """Return GPU and stages as a JSON object, with which the report later compares the actual run."""
        stages = {stage.name: asdict(stage) | {"peak_bytes": stage.peak_bytes} for stage in self.stages}
        gpu = {"gpu": self.hardware.name, "num_gpus": self.num_gpus, "measured": self.hardware.measured}
        return gpu | {"stages": stages}


def estimate(recipe: Recipe, hardware: Hardware, num_gpus: int = 1, run: RunDir | None = None) -> Estimate:
    """Return the estimate of every stage of a recipe on `num_gpus` GPUs of one kind. Nothing is downloaded.

    Args:
        run: run directory whose responses give the response lengths; None for the lengths of the paper.

    Raises:
        UserError: the configuration of a model or the number of prompts is unknown, a LoRA target is no projection, or
            the GPUs cannot form tensor-parallel groups.
    """
    assumptions = ["every element has two bytes, although dtype is float32"] if recipe.dtype == "float32" else []
    model = shape_of(recipe.model, "model")
    if recipe.training.method == "lora":
        check_targets(model, recipe.lora)
    by_label = response_lengths(recipe, model, run, assumptions)
    if recipe.generation.ladder:
        assumptions.append("further attempts, on the ladder or after marks, are not counted")
    estimator, stages = Estimator(recipe, model, hardware, num_gpus), []
    if "generate" in recipe.method.stages:
        steered, unsteered = sum(by_label.values(), TextLengths()), TextLengths()
        responder = recipe.method.responder
        answering = replace(estimator, model=shape_of(responder, "method.model")) if responder else estimator
        stages.append(answering.sampling("generate", steered, recipe.generation.sampling))
        if "probe" in recipe.method.stages:
            unsteered = unsteered_response_lengths(recipe, by_label.get("harmful"), run)
        if unsteered.num_responses:
            stages.append(answering.sampling("probe", unsteered, recipe.generation.sampling))
        stages.append(answering.judging("filter", steered + unsteered))
    training = estimator.training(by_label)
    if recipe.evaluation.sets:
        mean_tokens: dict[str, float] = mean_response_tokens(model)
        if "generate" in recipe.method.stages:
            mean_tokens = {label: texts.response_tokens / texts.num_responses for label, texts in by_label.items()}
        before = estimator.evaluation("evaluate_before", mean_tokens, assumptions)
        stages += [before, training, replace(before, name="evaluate_after")]
    else:
        stages.append(training)
    usable = (1 - MEMORY_RESERVE) * hardware.memory_bytes
    problems = [
        f"{stage.name} needs {stage.peak_bytes / 2**30:.1f} GiB, but {usable / 2**30:.1f} GiB are usable"
        for stage in stages
        if stage.peak_bytes > usable
    ]
    return Estimate(hardware, num_gpus, tuple(stages), tuple(dict.fromkeys(assumptions)), tuple(problems))


def shape_of(name: str, key: str) -> ModelConfig:
    """Return the configuration of a model: from the folder `name`, `PUBLIC_CONFIGS`, or the local cache of the hub.

    Args:
        key: recipe key that holds `name`, for the error message.

    Raises:
        UserError: none of them has the model, or its config.json is invalid or not supported.
    """
    from huggingface_hub import try_to_load_from_cache

    folder = expand_path(name)
    if folder.is_dir():
        return load_config(folder)[0]
    if name in PUBLIC_CONFIGS:
        return ModelConfig.from_hugging_face(PUBLIC_CONFIGS[name], name)
    cached = try_to_load_from_cache(name, "config.json") if name.count("/") == 1 else None
    if isinstance(cached, str):
        return load_config(expand_path(cached).parent)[0]
    raise UserError(
        f"{key}: the shape of {name!r} is unknown; download the model, or use a folder that holds its config.json"
    )


class _Engine:
    """The costs of an engine on one GPU, which holds a part of the model if several GPUs share it."""

    def __init__(self, model: ModelConfig, config: EngineConfig, hardware: Hardware):
        self.config, self.hardware = config, hardware
        self.shard = TensorShard(size=config.tensor_parallel_size).shard_config(model)
        token_bytes = CacheFormat.of(model, torch.bfloat16, config.kv_cache_dtype).bytes_per_token(self.shard)
        self.byte_counts = ByteCounts(1 if config.weight_dtype == "fp8" else _BF16, _BF16, token_bytes)
        projections = self.shard.num_layers * self.shard.layer_weights
        self.weight_bytes = _BF16 * self.shard.num_parameters - (_BF16 - self.byte_counts.per_weight) * projections

    def seconds(self, *sizes: float) -> float:
        """Return the roofline time of one pass; `sizes` are the last arguments of `pass_seconds`."""
        return pass_seconds(self.shard, self.byte_counts, self.hardware, *sizes)

    def kv_cache_bytes(self, resident_bytes: int) -> int:
        """Return the bytes of the KV cache: `kv_cache_gib`, or a share of the memory that `resident_bytes` of weights
        leave; at most the bytes of `max_num_seqs` sequences at full context."""
        free_bytes = max(0.0, (1 - MEMORY_RESERVE) * self.hardware.memory_bytes - resident_bytes)
        max_bytes = self.config.max_num_seqs * self.shard.max_seq_len * self.byte_counts.per_cached_token
        gib = self.config.kv_cache_gib
        return int(min(KV_CACHE_SHARE * free_bytes if gib is None else gib * 2**30, max_bytes))


@dataclass(frozen=True)
class Estimator:
    """The estimates of single stages of a recipe, whose student has the shape `model`."""

    recipe: Recipe
    model: ModelConfig
    hardware: Hardware
    num_gpus: int

    def sampling(self, name: str, texts: TextLengths, sampling: SamplingConfig, guard_bytes: int = 0) -> StageEstimate:
        """Return the estimate of sampling: decode passes of mean batch size and context, the prefill, and one last
        response that runs alone up to the largest length.

        Args:
            guard_bytes: bytes of a guard's weights that stay on the GPU meanwhile.
        """
        config, engine = self.recipe.sampler, _Engine(self.model, self.recipe.sampler, self.hardware)
        if self.num_gpus % config.tensor_parallel_size:
            raise UserError(
                f"sampler.tensor_parallel_size: {config.tensor_parallel_size} GPUs share one copy of the model, so "
                f"--gpus must be a multiple of {config.tensor_parallel_size}"
            )
        num_groups = self.num_gpus // config.tensor_parallel_size
        cache_bytes = engine.kv_cache_bytes(engine.weight_bytes + guard_bytes)
        context = texts.response_pairs / texts.response_tokens
        fitting = cache_bytes / (engine.byte_counts.per_cached_token * context)
        batch_size = max(1.0, min(config.max_num_seqs, fitting, texts.num_responses / num_groups))
        pass_time = engine.seconds(batch_size, batch_size, batch_size * context, batch_size * context)
        decode_seconds = texts.response_tokens / batch_size * pass_time
        prefill_seconds = engine.seconds(texts.prompt_tokens, 0, 0, texts.prompt_pairs)
        tail_seconds = min(sampling.max_tokens, self.model.max_seq_len) * engine.seconds(1, 1, 0, 0)
        seconds = (decode_seconds + prefill_seconds) / num_groups + tail_seconds
        remark = f"{texts.response_tokens / seconds * SAMPLING_SHARE:,.0f} tokens/s, batch size {batch_size:,.0f}"
        memory = {"weights": engine.weight_bytes} | ({"guard": guard_bytes} if guard_bytes else {})
        memory["key-value cache"] = cache_bytes
        return StageEstimate(name, round(texts.response_tokens), seconds / SAMPLING_SHARE, seconds, memory, remark)

    def judging(self, name: str, texts: TextLengths) -> StageEstimate:
        """Return the estimate of judging: every guard reads every prompt and response. Its language-model head runs at
        one position of each text, which is not counted. An oracle costs nothing."""
        guards = [guard for guard in self.recipe.guard.single_guards if guard.kind != "oracle"]
        engines = [_Engine(shape_of(guard.model, "guard.model"), guard.sampler, self.hardware) for guard in guards]
        memory = {"student": _Engine(self.model, self.recipe.sampler, self.hardware).weight_bytes}
        memory["guard"] = sum(engine.weight_bytes for engine in engines)
        resident_bytes = sum(memory.values())
        memory["key-value cache"] = max((engine.kv_cache_bytes(resident_bytes) for engine in engines), default=0)
        tokens = texts.prompt_tokens + texts.response_tokens + _GUARD_TEMPLATE_TOKENS * texts.num_responses
        pairs = texts.prompt_pairs + texts.response_pairs + _GUARD_TEMPLATE_TOKENS * tokens
        group_size = self.recipe.guard.tensor_parallel_size
        seconds = sum(engine.seconds(tokens, 0, 0, pairs) for engine in engines if tokens) * group_size / self.num_gpus
        kinds = ", ".join(guard.kind for guard in self.recipe.guard.single_guards)
        return StageEstimate(name, round(texts.response_tokens), seconds / SCORING_SHARE, seconds, memory, kinds)

    def evaluation(self, name: str, mean_tokens: dict[str, float], assumptions: list[str]) -> StageEstimate:
        """Return the estimate of one evaluation of all sets. All are sampled, and all except reasoning sets are judged.

        Args:
            mean_tokens: label -> mean number of tokens of the responses to harmful and benign sets.
            assumptions: list to which sentences on assumed lengths and sizes are appended.
        """
        sampling = self.recipe.evaluation.sampling
        max_tokens = min(sampling.max_tokens, self.model.max_seq_len)
        judged = reasoning = TextLengths()
        for entry in self.recipe.evaluation.sets:
            size = evaluation_set_size(entry, assumptions)
            if entry.kind == "reasoning":
                reasoning_tokens = min(REASONING_TOKENS, max_tokens)
                assumptions.append(f"answers to reasoning questions have {reasoning_tokens:,.0f} tokens")
                reasoning += TextLengths.assumed(size, entry.samples, reasoning_tokens, max_tokens)
            else:
                label = "harmful" if entry.kind == "harmful" else "benign"
                tokens = mean_tokens.get(label) or next(iter(mean_tokens.values()))
                judged += TextLengths.assumed(size, entry.samples, tokens, max_tokens)
        judging = self.judging(name, judged)
        stage = self.sampling(name, reasoning + judged, sampling, judging.memory["guard"])
        return replace(
            stage,
            seconds=stage.seconds + judging.seconds,
            roofline_seconds=stage.roofline_seconds + judging.roofline_seconds,
            remark=f"{reasoning.num_responses + judged.num_responses:,.0f} responses",
        )

    def training(self, by_label: dict[str, TextLengths]) -> StageEstimate:
        """Return the estimate of training on one response per prompt. The largest pack decides the activation
        checkpointing."""
        recipe, config, model, hardware = self.recipe, self.recipe.training, self.model, self.hardware
        by_label = {label: texts.with_responses(texts.num_prompts) for label, texts in by_label.items()}
        kl_texts = sum((by_label[label] for label in recipe.method.kl_labels & by_label.keys()), TextLengths())
        uses_kl = kl_texts.num_responses > 0
        lora = recipe.lora if config.method == "lora" else None
        fp8, grouped_heads = config.frozen_weight_dtype == "fp8", supports_grouped_heads(torch.bfloat16)
        costs = TrainingCosts(model, lora, _BF16, uses_kl, fp8, grouped_heads)
        texts = sum(by_label.values(), TextLengths())
        steps_per_epoch = math.ceil(texts.num_responses / config.batch_size)
        if config.tokens_per_step:
            steps_per_epoch = _token_counts(texts, 1).tokens / config.tokens_per_step
        epochs = config.epochs if config.steps is None else config.steps / steps_per_epoch
        steps = math.ceil(epochs * steps_per_epoch)
        counts = _token_counts(texts, epochs)
        reference_counts = _token_counts(kl_texts, epochs)
        tokens, max_length = counts.tokens, min(config.max_length, model.max_seq_len)
        tokens_per_step = config.tokens_per_step or config.batch_size * max_length
        max_pack = max(max_length, min(config.max_tokens_per_pack, tokens_per_step))
        packs = steps * max(1.0, tokens / steps / self.num_gpus / config.max_tokens_per_pack)

        usable, zero = (1 - MEMORY_RESERVE) * hardware.memory_bytes, None
        if recipe.zero.is_needed(self.num_gpus):
            memory = DeviceMemory(usable, usable, hardware)
            zero = choose_zero_stage(memory, recipe.zero, costs, max_pack, self.num_gpus)
        checkpointing = (config.activation_checkpointing,) * model.num_layers
        if config.activation_checkpointing == "auto":
            fitting = costs.checkpointing_within(usable - costs.state_bytes(zero, self.num_gpus), max_pack)
            checkpointing = fitting or ("full",) * model.num_layers
        graph_tokens = 0
        if zero is None and config.cuda_graphs == "auto":
            memory = DeviceMemory(usable, usable - costs.weight_bytes(), hardware)
            graph_tokens = choose_max_cuda_graph_tokens(memory, costs, checkpointing, max_pack, tokens / packs)

        compute_seconds = costs.roofline_seconds(checkpointing, counts, steps, hardware)
        roofline_seconds = (compute_seconds + costs.reference_seconds(reference_counts, hardware)) / self.num_gpus
        host_seconds = 0.0 if graph_tokens else packs * model.num_layers * HOST_SECONDS_PER_LAYER
        if zero is not None and zero.stage == 3:
            link_seconds, gather_host_seconds = costs.all_gather_seconds(self.num_gpus, hardware)
            roofline_seconds = max(roofline_seconds, packs * link_seconds)
            host_seconds += packs * gather_host_seconds
        seconds = max(roofline_seconds / TRAINING_SHARE, host_seconds)

        flops = costs.model_flops(counts) + costs.forward_flops(reference_counts)
        mfu = flops / seconds / self.num_gpus / hardware.peak_flop_per_second
        host_bound = ", bound by the host" if seconds == host_seconds else ""
        remark = f"{tokens / seconds:,.0f} tokens/s, MFU {mfu:.0%}{host_bound}"
        remark += f"; activation checkpointing: {describe_checkpointing(checkpointing)}"
        remark += f"; ZeRO stage {zero.stage}" if zero else ""
        remark += "; CUDA graphs" if graph_tokens else ""
        parts = {
            "weights": costs.weight_bytes(zero, self.num_gpus),
            "optimizer": costs.optimizer_bytes(zero, self.num_gpus),
            f"a pack of {max_pack:,} tokens": costs.pack_bytes(checkpointing, max_pack, max_pack),
        }
        if graph_tokens:
            parts["CUDA graphs"] = costs.cuda_graph_bytes(checkpointing, graph_tokens)
        return StageEstimate("train", round(tokens), seconds, roofline_seconds, parts, remark)


def _token_counts(texts: TextLengths, epochs: float) -> TokenCounts:
    tokens, pairs = texts.prompt_tokens + texts.response_tokens, texts.prompt_pairs + texts.response_pairs
    return TokenCounts(epochs * tokens, epochs * texts.response_tokens, epochs * pairs)
