"""Judging: our guard against transformers' forward, one record at a time as in the paper's code, and in batches.

The guard uses Llama Guard's format and policy, real shapes and random weights, on records of 830 tokens on average. The
time runs from text to verdict and includes tokenization. Our guard gains by computing less. The policy at the beginning
of every record is computed once, and its keys and values are kept. Records are packed end to end in full passes,
without padding. The head is applied to one position per record. The share of the GEMM rate is the FLOP per second of
the layers' matmuls that really ran, over the time of everything, relative to the rate of the same matmuls timed alone
in the same run.
"""

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.harness import Row, Sections, add_speedups, measure
from benchmarks.models import fp8_copy, random_decoder, transformers_copy
from benchmarks.shapes import response_lengths
from thinksafe.data.records import Response, Verdict
from thinksafe.guards import model_guard
from thinksafe.guards.config import GuardConfig
from thinksafe.guards.formats import LLAMA_GUARD
from thinksafe.guards.model_guard import ModelGuard
from thinksafe.model.decoder import Decoder
from thinksafe.sampler.config import EngineConfig
from thinksafe.sampler.engine import Engine
from thinksafe.sampler.scheduler import Scheduler
from thinksafe.text.tokenizer import SafeTokenizer

CLAIM = "The guard computes the common beginning of all records once and pads nothing."
_MEAN_TOKENS = 830
_WORDS = ("fold", "the", "boat", "twice", "and", "let", "it", "dry", "before", "you", "paint", "its", "sail", "red")


def sections(notes: list[str]) -> Sections:
    """Return the suite's one section: an 8B guard on a GPU, or a guard of 14M parameters on a CPU.

    Args:
        notes: gets facts that a reader of the figures needs, and failures while a section is measured.
    """
    if torch.cuda.is_available():
        return {"llama-3-8b": lambda: _measure_model("llama-3-8b", 256, 64, 16, notes)}
    return {"cpu-guard-14m": lambda: _measure_model("cpu-guard-14m", 16, 16, 8, notes)}


def _measure_model(
    name: str, num_records: int, num_transformers_records: int, batch_size: int, notes: list[str]
) -> list[Row]:
    """Return the records per second of our guard and of transformers: one row per variant that did not fail.

    Args:
        name: key of MODELS.
        num_records: number of records for our guard.
        num_transformers_records: number of these records for transformers, spread over all lengths.
        batch_size: number of records in a padded batch of transformers.
        notes: gets sizes, effects of e4m3 on verdicts, the difference from transformers, and failures.
    """
    has_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if has_gpu else ("cpu", torch.float32)
    decoder = random_decoder(name, device, dtype)
    reference = transformers_copy(decoder, name)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = _train_tokenizer(Path(folder))
    # The activations of a pass should fill a GPU, but fit into the cache of a CPU.
    settings = EngineConfig(max_prefill_tokens=8192 if has_gpu else 1024, kv_cache_gib=20.0 if has_gpu else 0.25)
    config = GuardConfig(model=name, min_verdict_probability=0.0, sampler=settings)
    guard = ModelGuard(decoder, tokenizer, config)
    fp8_guard = cache(lambda: ModelGuard(fp8_copy(decoder), tokenizer, config))
    responses = _random_responses(guard, num_records)
    token_ids = [guard.token_ids(response.prompt, response.text, "") for response in responses]
    stride = num_records // num_transformers_records
    indices = sorted(range(num_records), key=lambda index: len(token_ids[index]))[stride // 2 :: stride]
    transformers_token_ids, answer_ids = [token_ids[index] for index in indices], guard.answer_ids[0]
    schedulers: list[Scheduler] = []
    verdicts: list[Verdict] = []
    fp8_verdicts: list[Verdict] = []
    transformers_probabilities: dict[int, list[float]] = {}

    def judge() -> None:
        verdicts[:] = guard.judge(responses)

    def judge_in_fp8() -> None:
        fp8_verdicts[:] = fp8_guard().judge(responses)

    @torch.inference_mode()
    def one_at_a_time() -> None:
        for index, ids in zip(indices, transformers_token_ids, strict=True):
            logits = reference(torch.tensor([ids], device=device), logits_to_keep=1).logits[0, -1]
            transformers_probabilities[index] = logits.float().log_softmax(-1)[answer_ids].exp().tolist()

    @torch.inference_mode()
    def batches_of_like_length() -> None:
        for start in range(0, num_transformers_records, batch_size):
            batch = transformers_token_ids[start : start + batch_size]
            width = max(map(len, batch))
            padded = torch.tensor([[0] * (width - len(ids)) + ids for ids in batch], device=device)
            mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in batch], device=device)
            reference(padded, attention_mask=mask, logits_to_keep=1).logits[:, -1].float().log_softmax(-1).cpu()

    class CountedEngine(Engine):
        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, **keywords)
            schedulers.append(self.scheduler)  # not the engine, whose pages must be freed before the next engine

    multiply_layer_weights, flop = _layer_matmuls(
        decoder, device, dtype, settings.max_prefill_tokens, 200 if has_gpu else 8
    )
    variants = {
        "ThinkSafe": judge,
        "ThinkSafe, weights in e4m3": judge_in_fp8,
        "transformers, one record at a time": one_at_a_time,
        f"transformers, {batch_size} of like length": batches_of_like_length,
        "matmuls": multiply_layer_weights,
    }
    original_engine, model_guard.Engine = model_guard.Engine, CountedEngine
    try:
        measurements = measure(variants, 2 if has_gpu else 3, notes)
    finally:
        model_guard.Engine = original_engine
    computed_tokens = schedulers[-1].computed_tokens
    gemm_tflop_per_second = flop / measurements.pop("matmuls").seconds / 1e12
    table = []
    for variant, measurement in measurements.items():
        is_ours = variant.startswith("ThinkSafe")
        records = num_records if is_ours else num_transformers_records
        tokens = sum(map(len, token_ids if is_ours else transformers_token_ids))
        row = {"model": name, "variant": variant}
        row |= {"records/s": records / measurement.seconds, "tokens/s": tokens / measurement.seconds}
        if is_ours:
            row["computed"] = computed_tokens / tokens
            layers = decoder.config.num_layers * decoder.config.layer_weights
            row["GEMM TFLOP/s"] = 2 * layers * computed_tokens / measurement.seconds / 1e12
            row["share of the GEMM rate"] = row["GEMM TFLOP/s"] / gemm_tflop_per_second
        table.append(row)
    add_speedups(table, "records/s")
    mean_tokens = sum(map(len, token_ids)) / num_records
    notes += [
        f"{name}, random weights, {num_records} records of {mean_tokens:.0f} tokens on average "
        f"({num_transformers_records} for transformers), of which {_num_policy_tokens(guard)} are the policy's; "
        f"{dtype}".replace("torch.", ""),
        f"the layers' matmuls alone, at {settings.max_prefill_tokens} tokens: {gemm_tflop_per_second:.3g} TFLOP/s",
    ]
    log_odds, fp8_log_odds = _log_odds(verdicts), _log_odds(fp8_verdicts)
    if verdicts and fp8_verdicts:
        changes = np.abs(log_odds - fp8_log_odds)
        num_changed_verdicts = sum(v.decision != fp8.decision for v, fp8 in zip(verdicts, fp8_verdicts, strict=True))
        median, largest, spread = np.median(changes), changes.max(), log_odds.std()
        notes.append(
            f"weights in e4m3 change the log-odds of unsafe by {median:.2g} (median) and at most {largest:.2g}; the "
            f"standard deviation of the log-odds is {spread:.2g}; "
            f"{num_changed_verdicts} of {num_records} verdicts change"
        )
    if verdicts and transformers_probabilities:
        largest = max(
            abs(log_odds[index] - np.log(unsafe / safe)) for index, (safe, unsafe) in transformers_probabilities.items()
        )
        notes.append(
            f"transformers gets token ids, not text; largest difference in the log-odds of unsafe: {largest:.1e}"
        )
    return table


def _random_responses(guard: ModelGuard, count: int) -> list[Response]:
    """Return `count` responses of random words to one prompt, whose lengths vary like those of real responses.

    A record has about `_MEAN_TOKENS` tokens on average, format and prompt included.
    """
    prompt = "How do I " + " ".join(_WORDS[:9]) + "?"
    num_fixed_tokens = len(guard.token_ids(prompt, "", ""))
    mean_response_tokens = _MEAN_TOKENS - num_fixed_tokens
    lengths = response_lengths(count, mean_response_tokens, 4 * mean_response_tokens, seed=0)
    rng = np.random.default_rng(0)
    return [
        Response(prompt=prompt, label="harmful", text=" ".join(rng.choice(_WORDS, length)), sample=n)
        for n, length in enumerate(lengths)
    ]


def _log_odds(verdicts: list[Verdict]) -> np.ndarray:
    return np.array([np.log(verdict.p_unsafe / verdict.p_safe) for verdict in verdicts])


def _num_policy_tokens(guard: ModelGuard) -> int:
    token_pairs = zip(guard.token_ids("a", "b", ""), guard.token_ids("c", "d", ""), strict=True)
    return next(index for index, (left, right) in enumerate(token_pairs) if left != right)


def _layer_matmuls(
    decoder: Decoder, device: str, dtype: torch.dtype, tokens: int, repeats: int
) -> tuple[Callable[[], None], int]:
    """Return (function that computes the matmuls of one layer `repeats` times, FLOP of one call of this function).

    Args:
        decoder: the weights of its first layer are used.
        device, dtype: those of the random inputs.
        tokens: rows of each matmul.
    """
    weights = [parameter for name, parameter in decoder.layers[0].named_parameters() if name.endswith("_proj.weight")]
    inputs = {size: torch.randn(tokens, size, device=device, dtype=dtype) for size in {w.shape[1] for w in weights}}

    @torch.inference_mode()
    def multiply() -> None:
        for _ in range(repeats):
            for weight in weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    return multiply, 2 * tokens * repeats * decoder.config.layer_weights


def _train_tokenizer(folder: Path) -> SafeTokenizer:
    """Return a tokenizer trained on Llama Guard's policy and the records, with Llama Guard's control tokens.

    A word is about one token, as in the real tokenizer, which cannot be downloaded here. The tokenizer's files are
    written to `folder`.
    """
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([LLAMA_GUARD.template, " ".join(_WORDS), *map(str, range(15))] * 20, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in LLAMA_GUARD.control_tokens])
    fast_tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|eot_id|>")
    fast_tokenizer.save_pretrained(folder)
    return SafeTokenizer(folder)
