"""Judging: our guard against transformers' forward, one record at a time as the paper's code does, and in batches.

Llama Guard's format and policy on records of 830 tokens in the mean, real shapes, random weights; from text to verdict,
tokenising included. What can be gained is what need not be computed: the policy is in front of every record and its
keys and values are kept, records lie end to end in full passes, so nothing is padded, and the head sees one position a
record. The share of the GEMM rate is the FLOP of the layers' matrices that really ran, over the time of everything, set
against the rate of the same four products timed alone in the same run.
"""

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.harness import Row, Sections, compare, measure
from benchmarks.models import in_e4m3, in_transformers, random_decoder
from benchmarks.shapes import response_lengths
from thinksafe.guards import model_guard
from thinksafe.guards.base import Exchange, Judgement
from thinksafe.guards.config import GuardConfig
from thinksafe.guards.formats import LLAMA_GUARD
from thinksafe.guards.model_guard import ModelGuard
from thinksafe.model.decoder import Decoder
from thinksafe.sampler.engine import Engine, EngineConfig
from thinksafe.sampler.scheduler import Scheduler
from thinksafe.text.tokenizer import SafeTokenizer

CLAIM = "What is equal in all records is read once, and nothing is padded."
_TOKENS_A_RECORD = 830
_WORDS = ("fold", "the", "boat", "twice", "and", "let", "it", "dry", "before", "you", "paint", "its", "sail", "red")


def sections(notes: list[str]) -> Sections:
    """For whatever device there is."""
    if torch.cuda.is_available():
        return {"llama-3-8b": lambda: _of_model("llama-3-8b", 256, 64, 16, notes)}
    return {"cpu-guard-14m": lambda: _of_model("cpu-guard-14m", 16, 16, 8, notes)}


def _of_model(name: str, count: int, few: int, batch: int, notes: list[str]) -> list[Row]:
    """count: records; few: for transformers, of like lengths; batch: of its padded batches."""
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    decoder = random_decoder(name, device, dtype)
    reference = in_transformers(decoder, name)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = _tokenizer(Path(folder))
    # A pass's activations: as many as fill a GPU, as few as a CPU's cache holds.
    settings = EngineConfig(max_step_tokens=8192 if gpu else 1024, kv_cache_gib=20.0 if gpu else 0.25)
    config = GuardConfig(model=name, min_mass=0.0, sampler=settings)
    guard = ModelGuard(decoder, tokenizer, config)
    guard_in_e4m3 = cache(lambda: ModelGuard(in_e4m3(decoder), tokenizer, config))
    exchanges = _exchanges(guard, count)
    rows = [guard._ids(exchange.prompt, exchange.response, "") for exchange in exchanges]
    places = sorted(range(count), key=lambda place: len(rows[place]))[count // few // 2 :: count // few]
    some, answer_ids = [rows[place] for place in places], guard._answer_ids[0]
    schedulers: list[Scheduler] = []
    found: dict[str, Judgement] = {}
    found_in_e4m3: dict[str, Judgement] = {}
    theirs: dict[str, list[float]] = {}

    def ours() -> None:
        found.update((judgement.id, judgement) for judgement in guard.judge(exchanges))

    def ours_in_e4m3() -> None:
        found_in_e4m3.update((judgement.id, judgement) for judgement in guard_in_e4m3().judge(exchanges))

    @torch.inference_mode()
    def one_at_a_time() -> None:
        for place, ids in zip(places, some, strict=True):
            logits = reference(torch.tensor([ids], device=device), logits_to_keep=1).logits[0, -1]
            theirs[str(place)] = logits.float().log_softmax(-1)[answer_ids].exp().tolist()

    @torch.inference_mode()
    def batches_of_like_length() -> None:
        for start in range(0, few, batch):
            together = some[start : start + batch]
            width = max(map(len, together))
            padded = torch.tensor([[0] * (width - len(ids)) + ids for ids in together], device=device)
            mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in together], device=device)
            reference(padded, attention_mask=mask, logits_to_keep=1).logits[:, -1].float().log_softmax(-1).cpu()

    class CountedEngine(Engine):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            schedulers.append(self.scheduler)  # not the engine: its pages must be free when the next one is made

    products, flop = _layer_products(decoder, device, dtype, settings.max_step_tokens, 200 if gpu else 8)
    variants = {
        "ThinkSafe": ours,
        "ThinkSafe, weights in e4m3": ours_in_e4m3,
        "transformers, one record at a time": one_at_a_time,
        f"transformers, {batch} of like length": batches_of_like_length,
        "products": products,
    }
    real, model_guard.Engine = model_guard.Engine, CountedEngine
    try:
        measured = measure(variants, 2 if gpu else 3, notes)
    finally:
        model_guard.Engine = real
    computed = schedulers[-1].computed_tokens
    rate = flop / measured.pop("products").seconds / 1e12
    table = []
    for variant, taken in measured.items():
        mine = variant.startswith("ThinkSafe")
        records, tokens = (count, sum(map(len, rows))) if mine else (few, sum(map(len, some)))
        row = {"model": name, "variant": variant}
        row |= {"records/s": records / taken.seconds, "tokens/s": tokens / taken.seconds}
        if mine:
            row["computed"] = computed / tokens
            layers = decoder.config.num_layers * decoder.config.layer_weights
            row["GEMM TFLOP/s"] = 2 * layers * computed / taken.seconds / 1e12
            row["share of the GEMM rate"] = row["GEMM TFLOP/s"] / rate
        table.append(row)
    compare(table, "records/s")
    notes += [
        f"{name}, random weights, {count} records of {sum(map(len, rows)) / count:.0f} tokens in the mean "
        f"({few} for transformers), of which {_policy_tokens(guard)} are the policy's; {dtype}".replace("torch.", ""),
        f"the layers' products alone, at {settings.max_step_tokens} tokens: {rate:.3g} TFLOP/s",
    ]
    odds, odds_in_e4m3 = (_log_odds(judgements) for judgements in (found, found_in_e4m3))
    if odds and odds_in_e4m3:
        moved = [abs(odds[number] - other) for number, other in odds_in_e4m3.items()]
        changed = sum(found[number].decision != other.decision for number, other in found_in_e4m3.items())
        notes.append(
            f"weights in e4m3 move the log-odds of unsafe by {np.median(moved):.2g} in the median and {max(moved):.2g} "
            f"at most, where they spread by {np.std(list(odds.values())):.2g}: {changed} of {count} verdicts change"
        )
    if odds and theirs:
        largest = max(abs(odds[number] - np.log(unsafe / safe)) for number, (safe, unsafe) in theirs.items())
        notes.append(f"transformers gets ids, not text; largest difference of the log-odds of unsafe: {largest:.1e}")
    return table


def _exchanges(guard: ModelGuard, count: int) -> list[Exchange]:
    """Records whose lengths vary as responses do, `_TOKENS_A_RECORD` in the mean with format and prompt."""
    prompt = "How do I " + " ".join(_WORDS[:9]) + "?"
    around = len(guard._ids(prompt, "", ""))
    mean = _TOKENS_A_RECORD - around
    lengths = response_lengths(count, mean, 4 * mean, seed=0)
    draw = np.random.default_rng(0)
    return [Exchange(str(n), prompt, " ".join(draw.choice(_WORDS, length))) for n, length in enumerate(lengths)]


def _log_odds(judgements: dict[str, Judgement]) -> dict[str, float]:
    return {number: float(np.log(found.p_unsafe / found.p_safe)) for number, found in judgements.items()}


def _policy_tokens(guard: ModelGuard) -> int:
    pair = zip(guard._ids("a", "b", ""), guard._ids("c", "d", ""), strict=True)
    return next(place for place, (one, other) in enumerate(pair) if one != other)


def _layer_products(
    decoder: Decoder, device: str, dtype: torch.dtype, tokens: int, repeats: int
) -> tuple[Callable[[], None], int]:
    """One layer's products, one after the other, so many times; and their FLOP."""
    weights = [parameter for name, parameter in decoder.layers[0].named_parameters() if name.endswith("_proj")]
    inputs = {size: torch.randn(tokens, size, device=device, dtype=dtype) for size in {w.shape[1] for w in weights}}

    @torch.inference_mode()
    def products() -> None:
        for _ in range(repeats):
            for weight in weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    return products, 2 * tokens * repeats * decoder.config.layer_weights


def _tokenizer(folder: Path) -> SafeTokenizer:
    """Llama Guard's control tokens, around words learnt from its policy and the records: about a token a word, as the
    real one, which cannot be fetched here."""
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
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|eot_id|>")
    fast.save_pretrained(folder)
    return SafeTokenizer(folder)
