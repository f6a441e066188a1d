"""Estimate of a run before it starts: time, memory and tokens of each stage, from counted FLOPs and bytes.

The estimate reads configurations of models, never weights. The roofline time of a stage is what the GPU's rates allow.
The expected time is the roofline time divided by the share of the roofline that we aim for: no stage has been measured
on a GPU yet. Response lengths come from the paper, or from the responses that a run directory already holds.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from thinksafe.errors import UserError
from thinksafe.estimate.workload import (
    REASONING_TOKENS,
    TextLengths,
    evaluation_set_size,
    response_lengths,
    unsteered_response_lengths,
)
from thinksafe.hardware import Hardware
from thinksafe.model.config import ModelConfig
from thinksafe.model.lora import check_targets
from thinksafe.model.public_configs import PUBLIC_CONFIGS
from thinksafe.model.weights import load_config
from thinksafe.paths import expand_path
from thinksafe.recipe.schema import Recipe
from thinksafe.run.directory import RunDir
from thinksafe.sampler.engine import EngineConfig
from thinksafe.sampler.kv_cache import CacheFormat
from thinksafe.training.cost_model import HOST_SECONDS_PER_LAYER, TokenCounts, TrainingCosts
from thinksafe.training.memory_plan import (
    MEMORY_RESERVE,
    describe_checkpointing,
    max_cuda_graph_tokens_within,
    zero_stage_within,
)

SAMPLING_SHARE, SCORING_SHARE, TRAINING_SHARE = 0.70, 0.60, 0.60
"""Shares of the roofline that we aim for: expected seconds = roofline seconds / share. No GPU run has measured them."""

_BF16 = 2
_KV_CACHE_SHARE = 0.85
"""Share of the memory left by the weights that the KV cache of the sampler occupies."""
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
    """Estimate of a run.

    Attributes:
        gpu: short name of the GPU.
        num_gpus: number of GPUs that share the work.
        measured: whether the GPU's rates were measured; stages are always counted.
        stages: estimates of the stages, in order.
        assumptions: sentences on what the estimate assumes.
        problems: one sentence for each stage that needs more memory than the GPU has; empty if all stages fit.
    """

    gpu: str
    num_gpus: int
    measured: bool
    stages: tuple[StageEstimate, ...]
    assumptions: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Expected time of all stages, one after another."""
        return sum(stage.seconds for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """Return GPU, number of GPUs and all stages as a JSON object, which the run directory keeps and the report
        later compares with the actual run."""
        stages = {stage.name: asdict(stage) | {"peak_bytes": stage.peak_bytes} for stage in self.stages}
        return {"gpu": self.gpu, "num_gpus": self.num_gpus, "measured": self.measured, "stages": stages}


def estimate(recipe: Recipe, hardware: Hardware, num_gpus: int = 1, run: RunDir | None = None) -> Estimate:
    """Return the estimate of every stage of a recipe on `num_gpus` GPUs of one kind. Nothing is downloaded.

    Args:
        run: run directory whose responses give the response lengths; None for the lengths of the paper.

    Raises:
        UserError: the configuration of a model or the number of prompts is unknown, a LoRA target is no projection, or
            `num_gpus` is not a multiple of the tensor-parallel size.
    """
    assumptions = ["every element has two bytes, although dtype is float32"] if recipe.dtype == "float32" else []
    model = shape_of(recipe.model, "model")
    if recipe.training.method == "lora":
        check_targets(model, recipe.lora)
    by_label = response_lengths(recipe, model, run, assumptions)
    if recipe.generation.ladder:
        assumptions.append("further attempts, on the ladder or after marks, are not counted")
    steered, unsteered = list(by_label.values()), unsteered_response_lengths(recipe, by_label, run)
    max_tokens = recipe.generation.sampling.max_tokens
    stages = [
        _sampling_stage(name, texts, model, recipe.sampler, max_tokens, hardware, num_gpus)
        for name, texts in (("generate", steered), ("probe", unsteered))
        if texts
    ]
    stages.append(_judging_stage("filter", steered + unsteered, recipe, model, hardware, num_gpus))
    if recipe.evaluation.sets:
        evaluation = _evaluation_stage("evaluate_before", recipe, model, by_label, hardware, num_gpus, assumptions)
        stages += [evaluation, _training_stage(by_label, recipe, model, hardware, num_gpus)]
        stages.append(replace(evaluation, name="evaluate_after"))
    else:
        stages.append(_training_stage(by_label, recipe, model, hardware, num_gpus))
    usable = (1 - MEMORY_RESERVE) * hardware.memory_bytes
    problems = [
        f"{stage.name} needs {stage.peak_bytes / 2**30:.1f} GiB, but {usable / 2**30:.1f} GiB are usable"
        for stage in stages
        if stage.peak_bytes > usable
    ]
    return Estimate(
        hardware.name, num_gpus, hardware.measured, tuple(stages), tuple(dict.fromkeys(assumptions)), tuple(problems)
    )


def shape_of(name: str, key: str) -> ModelConfig:
    """Return the configuration of a model from the first source that has it: the folder `name`, `PUBLIC_CONFIGS`, or
    the local cache of the Hugging Face hub. Nothing is downloaded.

    Args:
        name: a checkpoint folder, or a name on the Hugging Face hub.
        key: recipe key that holds `name`, for the error message.

    Raises:
        UserError: no source has the model, or its config.json is invalid or not supported.
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


def _sampling_stage(
    name: str,
    texts: Sequence[TextLengths],
    model: ModelConfig,
    config: EngineConfig,
    max_tokens: int,
    hardware: Hardware,
    num_gpus: int,
    guard_bytes: int = 0,
) -> StageEstimate:
    """Return the estimate of sampling, or raise a UserError if `num_gpus` is not a multiple of the tensor-parallel
    size.

    Every row of a decode pass reads its context, and all rows share one read of the weights. A pass takes
    max(weight bytes / bandwidth, GEMM FLOP / rate) + max(cache bytes / bandwidth, attention FLOP / rate) seconds. The
    estimate adds the prefill, and one last response that runs alone.

    Args:
        name: name of the stage.
        texts: groups of responses to sample.
        max_tokens: largest number of tokens of a response.
        guard_bytes: bytes of a guard's weights that stay on the GPU meanwhile.
    """
    group_size, fp8 = config.tensor_parallel_size, config.weight_dtype == "fp8"
    if num_gpus % group_size:
        raise UserError(
            f"sampler.tensor_parallel_size: {group_size} GPUs share one copy of the model, so --gpus must be a "
            f"multiple of {group_size}"
        )
    weight_bytes, bytes_per_token = _weight_bytes(model, config), _kv_bytes_per_token(model, config)
    cache_bytes = _kv_cache_bytes(config, model, hardware, weight_bytes + guard_bytes)
    num_responses = sum(lengths.num_responses for lengths in texts)
    tokens = sum(lengths.response_tokens for lengths in texts)
    pairs = sum(lengths.response_pairs for lengths in texts)
    context, num_groups = pairs / tokens, num_gpus / group_size
    batch_size = max(
        1.0, min(config.max_num_seqs, cache_bytes / (bytes_per_token * context), num_responses / num_groups)
    )
    bandwidth, flop_rate = hardware.bytes_per_second, hardware.flop_per_second
    layers, head = model.num_layers * model.layer_weights / group_size, model.head_weights
    weight_seconds = ((1 if fp8 else _BF16) * layers + _BF16 * head) / bandwidth
    matmul_seconds = max(weight_seconds, 2 * (layers * (0.5 if fp8 else 1) + head) * batch_size / flop_rate)
    attention_flops = model.attention_flop(batch_size * context) / group_size
    attention_seconds = max(batch_size * context * bytes_per_token / bandwidth, attention_flops / flop_rate)
    prefill_flops = sum(
        2 * layers * (0.5 if fp8 else 1) * lengths.num_responses * lengths.mean_prompt_tokens
        + model.attention_flop(lengths.num_responses * lengths.mean_prompt_tokens**2 / 2) / group_size
        for lengths in texts
    )
    # At the end one response continues alone to max_tokens; each of its tokens costs one read of the weights.
    tail_seconds = min(max_tokens, model.max_seq_len) * weight_seconds
    decode_seconds = tokens / batch_size * (matmul_seconds + attention_seconds)
    roofline_seconds = (decode_seconds + prefill_flops / flop_rate) / num_groups + tail_seconds
    remark = f"{tokens / roofline_seconds * SAMPLING_SHARE:,.0f} tokens/s, batch size {batch_size:,.0f}"
    memory = (
        {"weights": weight_bytes} | ({"guard": guard_bytes} if guard_bytes else {}) | {"key-value cache": cache_bytes}
    )
    return StageEstimate(name, round(tokens), roofline_seconds / SAMPLING_SHARE, roofline_seconds, memory, remark)


def _weight_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """Return the bytes of a frozen model on one GPU: its part of the layers' projections, in e4m3 or bf16, and all of
    the other weights, in bf16."""
    projections = model.num_layers * model.layer_weights
    size = 1 if config.weight_dtype == "fp8" else _BF16
    return size * projections // config.tensor_parallel_size + _BF16 * (model.num_parameters - projections)


def _kv_bytes_per_token(model: ModelConfig, config: EngineConfig) -> float:
    """Return the bytes that one token occupies in the KV cache of one GPU, over all layers."""
    cache_format = CacheFormat.of(model, torch.bfloat16, config.kv_cache_dtype)
    return cache_format.bytes_per_token(model) / config.tensor_parallel_size


def _kv_cache_bytes(config: EngineConfig, model: ModelConfig, hardware: Hardware, resident: float) -> int:
    """Return the bytes of the KV cache on one GPU: `kv_cache_gib`, or a share of the free memory; at most the bytes of
    `max_num_seqs` sequences at full context.

    Args:
        resident: bytes of the weights that occupy the GPU already.
    """
    free_bytes = max(0.0, (1 - MEMORY_RESERVE) * hardware.memory_bytes - resident)
    max_bytes = config.max_num_seqs * model.max_seq_len * _kv_bytes_per_token(model, config)
    cache_bytes = _KV_CACHE_SHARE * free_bytes if config.kv_cache_gib is None else config.kv_cache_gib * 2**30
    return int(min(cache_bytes, max_bytes))


def _judging_stage(
    name: str, texts: Sequence[TextLengths], recipe: Recipe, model: ModelConfig, hardware: Hardware, num_gpus: int
) -> StageEstimate:
    """Return the estimate of judging: every guard reads every prompt and response. Its language-model head runs at one
    position of each text, which is not counted. An oracle costs nothing.

    Args:
        name: name of the stage.
        texts: groups of responses to judge.
        model: configuration of the student, which stays in memory.
    """
    members = [member for member in recipe.guard.single_guards if member.kind != "oracle"]
    models = [shape_of(member.model, "guard.model") for member in members]
    memory = {"student": _weight_bytes(model, recipe.sampler)}
    memory["guard"] = sum(_weight_bytes(shape, member.sampler) for shape, member in zip(models, members, strict=True))
    flops, cache_bytes = 0.0, 0
    for member, shape in zip(members, models, strict=True):
        flop_cost = 0.5 if member.sampler.weight_dtype == "fp8" else 1
        for lengths in texts:
            tokens_read = lengths.mean_prompt_tokens + lengths.mean_response_tokens + _GUARD_TEMPLATE_TOKENS
            flops += 2 * shape.num_layers * shape.layer_weights * lengths.num_responses * tokens_read * flop_cost
            template_pairs = lengths.num_responses * _GUARD_TEMPLATE_TOKENS * tokens_read
            flops += shape.attention_flop(lengths.causal_pairs + template_pairs)
        cache_bytes = max(cache_bytes, _kv_cache_bytes(member.sampler, shape, hardware, sum(memory.values())))
    roofline_seconds = flops / hardware.flop_per_second / num_gpus
    kinds = ", ".join(member.kind for member in recipe.guard.single_guards)
    tokens = round(sum(lengths.response_tokens for lengths in texts))
    memory["key-value cache"] = cache_bytes
    return StageEstimate(name, tokens, roofline_seconds / SCORING_SHARE, roofline_seconds, memory, kinds)


def _evaluation_stage(
    name: str,
    recipe: Recipe,
    model: ModelConfig,
    by_label: dict[str, TextLengths],
    hardware: Hardware,
    num_gpus: int,
    assumptions: list[str],
) -> StageEstimate:
    """Return the estimate of one evaluation of all sets. All are sampled, and all except reasoning sets are judged.

    Args:
        name: name of the stage.
        by_label: response lengths in training, from which those of harmful and benign sets are taken.
        assumptions: list to which sentences on assumed lengths and sizes are appended.
    """
    reasoning_lengths: list[TextLengths] = []
    judged_lengths: list[TextLengths] = []
    sampling = recipe.evaluation.sampling
    max_tokens = min(sampling.max_tokens, model.max_seq_len)
    for entry in recipe.evaluation.sets:
        is_reasoning = entry.kind == "reasoning"
        similar = by_label.get("harmful" if entry.kind == "harmful" else "benign") or next(iter(by_label.values()))
        response_tokens = REASONING_TOKENS if is_reasoning else similar.mean_response_tokens
        size = evaluation_set_size(entry, assumptions)
        lengths = TextLengths.from_mean(size, entry.samples, response_tokens, max_tokens)
        (reasoning_lengths if is_reasoning else judged_lengths).append(lengths)
        if is_reasoning:
            assumptions.append(f"answers to reasoning questions have {min(response_tokens, max_tokens):,.0f} tokens")
    all_lengths = reasoning_lengths + judged_lengths
    judging = _judging_stage(name, judged_lengths, recipe, model, hardware, num_gpus)
    guard_bytes = judging.memory["guard"]
    sampling_stage = _sampling_stage(
        name, all_lengths, model, recipe.sampler, sampling.max_tokens, hardware, num_gpus, guard_bytes
    )
    seconds = sampling_stage.seconds + judging.seconds
    roofline_seconds = sampling_stage.roofline_seconds + judging.roofline_seconds
    num_responses = sum(lengths.num_responses for lengths in all_lengths)
    return StageEstimate(
        name, sampling_stage.tokens, seconds, roofline_seconds, sampling_stage.memory, f"{num_responses:,.0f} responses"
    )


def _training_stage(
    by_label: dict[str, TextLengths], recipe: Recipe, model: ModelConfig, hardware: Hardware, num_gpus: int
) -> StageEstimate:
    """Return the estimate of training on one response per prompt. The largest pack decides the activation
    checkpointing.

    Args:
        by_label: number of prompts and response lengths of each label.
    """
    config = recipe.training
    by_label = {label: replace(lengths, num_responses=lengths.num_prompts) for label, lengths in by_label.items()}
    reference_lengths = [by_label["benign"]] if config.benign_loss == "kl" and "benign" in by_label else []
    lora = recipe.lora if config.method == "lora" else None
    costs = TrainingCosts(model, lora, _BF16, bool(reference_lengths), config.frozen_weight_dtype == "fp8")
    counts = _token_counts(by_label.values(), config.epochs)
    reference_counts = _token_counts(reference_lengths, config.epochs)
    num_examples, tokens = sum(lengths.num_responses for lengths in by_label.values()), counts.tokens
    steps = config.epochs * math.ceil(num_examples / config.batch_size)
    max_length = min(config.max_length, model.max_seq_len)
    tokens_per_step = config.batch_size * max_length
    if config.tokens_per_step:
        steps, tokens_per_step = math.ceil(tokens / config.tokens_per_step), config.tokens_per_step
    max_pack = max(max_length, min(config.max_tokens_per_pack, tokens_per_step))
    usable, zero = (1 - MEMORY_RESERVE) * hardware.memory_bytes, None
    if recipe.zero.is_needed(num_gpus):
        zero = zero_stage_within(usable, hardware, recipe.zero, costs, max_pack, num_gpus)
    free_bytes = usable - costs.state_bytes(zero, num_gpus)
    if config.activation_checkpointing == "auto":
        checkpointing = costs.checkpointing_within(free_bytes, max_pack) or ("full",) * model.num_layers
    else:
        checkpointing = (config.activation_checkpointing,) * model.num_layers
    flops = costs.model_flops(counts) + costs.reference_flops(reference_counts)
    roofline_seconds = costs.roofline_seconds(checkpointing, counts, steps, hardware)
    roofline_seconds += costs.reference_seconds(reference_counts, hardware)
    roofline_seconds /= num_gpus
    packs_per_step = max(1.0, tokens / steps / num_gpus / config.max_tokens_per_pack)
    graph_tokens = 0
    if zero is None and config.cuda_graphs == "auto":
        graph_tokens = max_cuda_graph_tokens_within(
            free_bytes, hardware, costs, checkpointing, max_pack, tokens / steps / packs_per_step
        )
    host_seconds = 0.0 if graph_tokens else steps * packs_per_step * model.num_layers * HOST_SECONDS_PER_LAYER
    if zero is not None and zero.stage == 3:
        link_seconds, gather_host_seconds = costs.all_gather_seconds(num_gpus, hardware)
        roofline_seconds = max(roofline_seconds, steps * packs_per_step * link_seconds)
        host_seconds += steps * packs_per_step * gather_host_seconds
    seconds = max(roofline_seconds / TRAINING_SHARE, host_seconds)
    mfu = flops / seconds / num_gpus / hardware.peak_flop_per_second
    host_bound = ", bound by the host" if seconds == host_seconds else ""
    remark = f"{tokens / seconds:,.0f} tokens/s, MFU {mfu:.0%}{host_bound}"
    remark += f"; activation checkpointing: {describe_checkpointing(checkpointing)}"
    remark += f"; ZeRO stage {zero.stage}" if zero else ""
    remark += "; CUDA graphs" if graph_tokens else ""
    memory = {
        "weights": costs.weight_bytes(zero, num_gpus),
        "optimizer": costs.optimizer_bytes(zero, num_gpus),
        f"a pack of {max_pack:,} tokens": costs.pack_bytes(checkpointing, max_pack, max_pack),
    }
    if graph_tokens:
        memory["CUDA graphs"] = costs.cuda_graph_bytes(checkpointing, graph_tokens)
    return StageEstimate("train", round(tokens), seconds, roofline_seconds, memory, remark)


def _token_counts(texts: Iterable[TextLengths], epochs: int) -> TokenCounts:
    """Return the token counts of `epochs` passes over all `texts`."""
    sums = [
        (
            lengths.num_responses * lengths.mean_prompt_tokens + lengths.response_tokens,
            lengths.response_tokens,
            lengths.causal_pairs,
        )
        for lengths in texts
    ]
    return TokenCounts(*(epochs * sum(column) for column in zip((0, 0, 0), *sums, strict=True)))
