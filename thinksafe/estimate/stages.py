"""What a run will take, before anything runs: time, memory and tokens of each stage, from counted FLOP and bytes.

Only shapes are read, never weights. A stage's least time is what the GPU's rates allow; what is expected is that time
divided by the share of it that we aim for, since nothing has been measured on a GPU yet. How long responses will be
comes from the paper, or from the responses that a run directory already holds.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from thinksafe.errors import UserError
from thinksafe.estimate.workload import (
    _REASONING_TOKENS,
    Texts,
    _probed,
    _responses,
    _rows,
)
from thinksafe.guards.config import GuardConfig
from thinksafe.hardware import Hardware
from thinksafe.model.config import ModelConfig
from thinksafe.model.lora import check_targets
from thinksafe.model.public_configs import PUBLIC
from thinksafe.model.weights import load_config
from thinksafe.paths import expand
from thinksafe.recipe.schema import Recipe
from thinksafe.run.directory import RunDir
from thinksafe.sampler.engine import EngineConfig
from thinksafe.sampler.kv_cache import CacheFormat
from thinksafe.training.cost_model import HOST_SECONDS_PER_LAYER, TrainingCosts, Work
from thinksafe.training.memory_plan import SPARE, described, recorded_within, sharding_within

# Shares of what the hardware allows that we aim for.
SAMPLING_SHARE, SCORING_SHARE, TRAINING_SHARE = 0.70, 0.60, 0.60

_BF16 = 2
_POOL = 0.85
"""Share of the memory left by the weights that the sampler takes for its pages."""
_GUARD_TOKENS = 80
"""Tokens of a guard's prompt beside prompt and response; its policy text, the same for all, is read once."""


@dataclass(frozen=True)
class Stage:
    """One stage's estimate.

    Attributes:
        name: as in the manifest.
        tokens: of responses, which is what a stage counts; of whole sequences in training.
        seconds: expected.
        least_seconds: what the hardware's rates allow.
        memory: bytes by what holds them.
        remark: what was chosen or limits the stage.
    """

    name: str
    tokens: int
    seconds: float
    least_seconds: float
    memory: dict[str, int]
    remark: str = ""

    @property
    def peak_bytes(self) -> int:
        return sum(self.memory.values())


@dataclass(frozen=True)
class Estimate:
    """A run's estimate.

    Attributes:
        gpu: its short name; num_gpus: how many share the work.
        measured: whether the GPU's rates were measured.
        stages: in order.
        assumptions: what a reader must know.
        problems: why the run will not work on this GPU.
    """

    gpu: str
    num_gpus: int
    measured: bool
    stages: tuple[Stage, ...]
    assumptions: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Of all stages, one after another."""
        return sum(stage.seconds for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """What the report later compares with what happened."""
        stages = {stage.name: asdict(stage) | {"peak_bytes": stage.peak_bytes} for stage in self.stages}
        return {"gpu": self.gpu, "num_gpus": self.num_gpus, "measured": self.measured, "stages": stages}


def estimate(recipe: Recipe, hardware: Hardware, num_gpus: int = 1, run: RunDir | None = None) -> Estimate:
    """Every stage of a recipe on so many GPUs of a kind.

    Args:
        run: a run directory whose responses tell how long responses are.

    Raises:
        UserError: the shape of a model, or the number of prompts, is not known here.
    """
    assumptions = ["every number takes two bytes, whatever the recipe's dtype"] if recipe.dtype == "float32" else []
    model = shape_of(recipe.model, "model")
    if recipe.training.method == "lora":
        check_targets(model, recipe.lora)
    by_label = _responses(recipe, model, run, assumptions)
    if recipe.generation.ladder:
        assumptions.append("further attempts, up the ladder or after marks, are not counted")
    sampled, probed = list(by_label.values()), _probed(recipe, by_label, run)
    longest = recipe.generation.sampling.max_tokens
    stages = [
        _sampling(name, texts, model, recipe.sampler, longest, hardware, num_gpus)
        for name, texts in (("generate", sampled), ("probe", probed))
        if texts
    ]
    stages.append(_judging("filter", sampled + probed, recipe, model, hardware, num_gpus))
    if recipe.evaluation.sets:
        before = _evaluation("evaluate_before", recipe, model, by_label, hardware, num_gpus, assumptions)
        stages += [before, _training(by_label, recipe, model, hardware, num_gpus)]
        stages.append(replace(before, name="evaluate_after"))
    else:
        stages.append(_training(by_label, recipe, model, hardware, num_gpus))
    usable = (1 - SPARE) * hardware.memory_bytes
    problems = [
        f"{stage.name} needs {stage.peak_bytes / 2**30:.1f} GiB, and {usable / 2**30:.1f} can be used"
        for stage in stages
        if stage.peak_bytes > usable
    ]
    return Estimate(
        hardware.name, num_gpus, hardware.measured, tuple(stages), tuple(dict.fromkeys(assumptions)), tuple(problems)
    )


def shape_of(name: str, key: str) -> ModelConfig:
    """A model's shape, from its folder, from what the hub's client has fetched before, or from our table.

    Raises:
        UserError: it is in none of them.
    """
    from huggingface_hub import try_to_load_from_cache

    folder = expand(name)
    if folder.is_dir():
        return load_config(folder)[0]
    if name in PUBLIC:
        return ModelConfig.from_hugging_face(PUBLIC[name], name)
    cached = try_to_load_from_cache(name, "config.json") if name.count("/") == 1 else None
    if isinstance(cached, str):
        return load_config(expand(cached).parent)[0]
    raise UserError(
        f"{key}: the shape of {name!r} is not known here; download it, or give a folder with its config.json"
    )


def _sampling(
    name: str,
    texts: Sequence[Texts],
    model: ModelConfig,
    config: EngineConfig,
    max_tokens: int,
    hardware: Hardware,
    num_gpus: int,
    guard_bytes: int = 0,
) -> Stage:
    """Every row of a pass reads its own context and all rows share the weights, as sampler/limits.py counts it."""
    together, fp8 = config.tensor_parallel, config.weights == "fp8"
    if num_gpus % together:
        raise UserError(
            f"sampler.tensor_parallel: {together} GPUs hold one model together; give --gpus a multiple of it"
        )
    weights, per_token = _weight_bytes(model, config), _cached_bytes(model, config)
    pool = _pool_bytes(config, model, hardware, weights + guard_bytes)
    count, tokens, pairs = (sum(getattr(one, what) for one in texts) for what in ("count", "tokens", "pairs"))
    context, groups = pairs / tokens, num_gpus / together
    rows = max(1.0, min(config.max_running, pool / (per_token * context), count / groups))
    bandwidth, rate = hardware.bytes_per_second, hardware.flop_per_second
    layers, head = model.num_layers * model.layer_weights / together, model.head_weights
    reading = ((1 if fp8 else _BF16) * layers + _BF16 * head) / bandwidth
    products = max(reading, 2 * (layers * (0.5 if fp8 else 1) + head) * rows / rate)
    attention = max(rows * context * per_token / bandwidth, model.attention_flop(rows * context) / together / rate)
    prompts = sum(
        2 * layers * (0.5 if fp8 else 1) * one.count * one.prompt
        + model.attention_flop(one.count * one.prompt**2 / 2) / together
        for one in texts
    )
    # One response that runs to the limit is written alone at the end, at a row's pace.
    tail = min(max_tokens, model.max_seq_len) * reading
    least = (tokens / rows * (products + attention) + prompts / rate) / groups + tail
    remark = f"{tokens / least * SAMPLING_SHARE:,.0f} tokens/s, {rows:,.0f} at once"
    memory = {"weights": weights} | ({"guard": guard_bytes} if guard_bytes else {}) | {"key-value cache": pool}
    return Stage(name, round(tokens), least / SAMPLING_SHARE, least, memory, remark)


def _weight_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """Of a frozen model on one GPU: projections in e4m3 where that is asked for, and dealt out; the rest in bf16."""
    projections = model.num_layers * model.layer_weights
    size = 1 if config.weights == "fp8" else _BF16
    return size * projections // config.tensor_parallel + _BF16 * (model.num_parameters - projections)


def _cached_bytes(model: ModelConfig, config: EngineConfig) -> float:
    """What a token adds to the cache on one GPU."""
    kept_as = CacheFormat.of(model, torch.bfloat16, config.kv_cache_dtype)
    return kept_as.bytes_per_token(model) / config.tensor_parallel


def _pool_bytes(config: EngineConfig, model: ModelConfig, hardware: Hardware, resident: float) -> int:
    """What the sampler takes for its pages: of what is free, and never more than every row at full context."""
    free = max(0.0, (1 - SPARE) * hardware.memory_bytes - resident)
    most = config.max_running * model.max_seq_len * _cached_bytes(model, config)
    return int(min(config.kv_cache_gib * 2**30 or _POOL * free, most))


def _members(config: GuardConfig) -> list[GuardConfig]:
    """The guards of an ensemble, or the one that it is."""
    return [one for member in config.members for one in _members(member)] or [config]


def _judging(
    name: str, texts: Sequence[Texts], recipe: Recipe, model: ModelConfig, hardware: Hardware, num_gpus: int
) -> Stage:
    """Every guard reads every prompt and response; only the verdict's position reaches its head."""
    members = [member for member in _members(recipe.guard) if member.kind != "oracle"]
    models = [shape_of(member.model, "guard.model") for member in members]
    memory = {"student": _weight_bytes(model, recipe.sampler)}
    memory["guard"] = sum(_weight_bytes(one, member.sampler) for one, member in zip(models, members, strict=True))
    flop, pool = 0.0, 0
    for member, one in zip(members, models, strict=True):
        cheaper = 0.5 if member.sampler.weights == "fp8" else 1
        for text in texts:
            read = text.prompt + text.response + _GUARD_TOKENS
            flop += 2 * one.num_layers * one.layer_weights * text.count * read * cheaper
            flop += one.attention_flop(text.all_pairs + text.count * _GUARD_TOKENS * read)
        pool = max(pool, _pool_bytes(member.sampler, one, hardware, sum(memory.values())))
    least = flop / hardware.flop_per_second / num_gpus
    kinds = ", ".join(member.kind for member in _members(recipe.guard))
    tokens = round(sum(text.tokens for text in texts))
    return Stage(name, tokens, least / SCORING_SHARE, least, memory | {"key-value cache": pool}, kinds)


def _evaluation(
    name: str,
    recipe: Recipe,
    model: ModelConfig,
    by_label: dict[str, Texts],
    hardware: Hardware,
    num_gpus: int,
    assumptions: list[str],
) -> Stage:
    """All sets: sampled, and judged unless they are about reasoning."""
    texts: dict[bool, list[Texts]] = {True: [], False: []}
    sampling = recipe.evaluation.sampling
    longest = min(sampling.max_tokens, model.max_seq_len)
    for entry in recipe.evaluation.sets:
        reasoning = entry.kind == "reasoning"
        usual = by_label.get("harmful" if entry.kind == "harmful" else "benign") or next(iter(by_label.values()))
        response = _REASONING_TOKENS if reasoning else usual.response
        rows = _rows(entry, assumptions)
        texts[reasoning].append(Texts.expected(rows, entry.samples, response, longest))
        if reasoning:
            assumptions.append(f"answers to reasoning questions of {min(response, longest):,.0f} tokens")
    every = texts[True] + texts[False]
    judged = _judging(name, texts[False], recipe, model, hardware, num_gpus)
    guard_bytes = judged.memory["guard"]
    sampled = _sampling(name, every, model, recipe.sampler, sampling.max_tokens, hardware, num_gpus, guard_bytes)
    seconds, least = sampled.seconds + judged.seconds, sampled.least_seconds + judged.least_seconds
    responses = sum(one.count for one in every)
    return Stage(name, sampled.tokens, seconds, least, sampled.memory, f"{responses:,.0f} responses")


def _training(
    by_label: dict[str, Texts], recipe: Recipe, model: ModelConfig, hardware: Hardware, num_gpus: int
) -> Stage:
    """A response a prompt, for so many epochs; the largest pack decides what is kept for the backward pass."""
    config = recipe.training
    by_label = {label: replace(texts, count=texts.prompts) for label, texts in by_label.items()}
    compared = [by_label["benign"]] if config.benign_loss == "kl" and "benign" in by_label else []
    lora = recipe.lora if config.method == "lora" else None
    costs = TrainingCosts(model, lora, _BF16, bool(compared), config.frozen_weights == "fp8")
    work = _work(by_label.values(), config.epochs)
    count, tokens = sum(one.count for one in by_label.values()), work.tokens
    steps = config.epochs * math.ceil(count / config.batch_size)
    longest = min(config.max_length, model.max_seq_len)
    in_a_step = config.batch_size * longest
    if config.batch_tokens:
        steps, in_a_step = math.ceil(tokens / config.batch_tokens), config.batch_tokens
    largest = max(longest, min(config.max_tokens_per_pack, in_a_step))
    usable, zero = (1 - SPARE) * hardware.memory_bytes, None
    if recipe.zero.is_needed(num_gpus):
        zero = sharding_within(usable, hardware, recipe.zero, costs, largest, num_gpus)
    free = usable - costs.state_bytes(zero, num_gpus)
    if config.activation_checkpointing == "auto":
        keeping = costs.choose(free, largest) or ("full",) * model.num_layers
    else:
        keeping = (config.activation_checkpointing,) * model.num_layers
    reference_flop = costs.reference_flop(_work(compared, config.epochs))
    least = costs.least_seconds(keeping, work, steps, hardware)
    least += costs.reference_seconds(_work(compared, config.epochs), hardware)
    least /= num_gpus
    packs = max(1.0, tokens / steps / num_gpus / config.max_tokens_per_pack)
    recorded = 0
    if zero is None and config.cuda_graphs == "auto":
        recorded = recorded_within(free, hardware, costs, keeping, largest, tokens / steps / packs)
    host = 0.0 if recorded else steps * packs * model.num_layers * HOST_SECONDS_PER_LAYER
    if zero is not None and zero.stage == 3:
        link, gathering = costs.gathering_seconds(num_gpus, hardware)
        least, host = max(least, steps * packs * link), host + steps * packs * gathering
    seconds = max(least / TRAINING_SHARE, host)
    mfu = (costs.useful_flop(work) + reference_flop) / seconds / num_gpus / hardware.peak_flop_per_second
    bound = ", bound by the host" if seconds == host else ""
    remark = f"{tokens / seconds:,.0f} tokens/s, MFU {mfu:.0%}{bound}; computed again: {described(keeping)}"
    remark += f"; ZeRO stage {zero.stage}" if zero else ""
    remark += "; CUDA graphs" if recorded else ""
    memory = {
        "weights": costs.weight_bytes(zero, num_gpus),
        "optimiser": costs.optimizer_bytes(zero, num_gpus),
        f"a pack of {largest:,} tokens": costs.step_bytes(keeping, largest, largest),
    }
    if recorded:
        memory["CUDA graphs"] = costs.graph_bytes(keeping, recorded)
    return Stage("train", round(tokens), seconds, least, memory, remark)


def _work(texts: Iterable[Texts], epochs: int) -> Work:
    sums = [(one.count * one.prompt + one.tokens, one.tokens, one.all_pairs) for one in texts]
    return Work(*(epochs * sum(column) for column in zip((0, 0, 0), *sums, strict=True)))
