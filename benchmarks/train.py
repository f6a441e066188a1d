"""Fine-tuning: our packed loop against TRL's SFTTrainer and a plain loop on padded batches; same weights, sequences and
eight of them a step.

TRL runs at the settings of the paper's code (one sequence at a time, gradient checkpointing, sdpa) and at its best ones
for the device: without checkpointing, and on a GPU eight sequences without padding where flash-attn is there, else
padded; on a CPU one at a time, which pads nothing. Padding to the longest of eight computes tokens nobody needs, logits
of prompt tokens carry no loss, and a module for each projection and norm costs the host time.

On a CPU a model of 6M parameters waits for products, which packing cannot make fewer than a batch of one has; one of
0.3M waits for the host, as a GPU does with one short sequence.

The host's time for a layer is that of a pack too small to keep any device busy: no step can take less that is launched
kernel by kernel. 28 layers at 0.9 ms are 25 ms, in which an H200 computes 5k tokens of Qwen3-0.6B at best; a step of
the paper's eight sequences has about 6k, and a host may be slower. Where that may bind, passes are recorded as CUDA
graphs (thinksafe/training/graphs.py): 1,978 launches with LoRA, counted on a trace, become two. On a GPU both ways
stand in the table, and for either what a step of 16 tokens takes, which is all overhead.

torch.compile in their place was tried (a layer at a time, dynamic shapes, one thread, widths of 64): the host's time
for a layer fell from 0.61 to 0.33 ms, after 36 s of compiling for six layers and 16 s more at the second number of
tokens.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from copy import copy
from dataclasses import replace
from functools import partial
from io import StringIO

import numpy as np
import torch
from torch import nn

from benchmarks.harness import Measured, Row, Sections, attempt, compare, measure, peer, seconds
from benchmarks.models import in_e4m3, in_transformers, random_decoder
from benchmarks.shapes import response_lengths
from thinksafe.hardware import hardware_of
from thinksafe.kernels.packed_attention import keeps_grouped_heads
from thinksafe.model.activation_checkpointing import Keeping
from thinksafe.model.decoder import Decoder
from thinksafe.model.lora import LoraConfig, attach
from thinksafe.training.cost_model import TrainingCosts, Work, causal_pairs
from thinksafe.training.local_engine import SingleEngine
from thinksafe.training.losses import PackLoss
from thinksafe.training.memory_plan import average_pack, described, keeping_on, largest_pack, recorded_on
from thinksafe.training.packing import PackedBatch, TrainingSequence, pack

_PROMPT, _BATCH, _PACK = 64, 8, 32_768
_LORA = LoraConfig()
CLAIM = "Packing computes no padding and no logits of prompt tokens, and a lean decoder leaves the host little to do."
_ON_GPU = {
    ("qwen3-0.6b", "lora"): 8,
    ("qwen3-8b", "lora"): 6,
    ("qwen3-1.7b", "lora"): 6,
    ("qwen3-0.6b", "full"): 8,
    ("qwen3-4b", "lora"): 6,
    ("qwen3-1.7b", "full"): 6,
}
_ON_CPU = dict.fromkeys([("cpu-0.3m", "lora"), ("cpu-0.3m", "full"), ("cpu-6m", "lora")], 6)
"""(model, method) -> steps."""


def sections(notes: list[str]) -> Sections:
    """For whatever device there is."""
    cases = _ON_GPU if torch.cuda.is_available() else _ON_CPU
    return {f"{name}, {method}": partial(_case, name, method, steps, notes) for (name, method), steps in cases.items()}


def _case(name: str, method: str, steps: int, notes: list[str]) -> list[Row]:
    """One model and method: all variants on the same sequences."""
    gpu = torch.cuda.is_available()
    mean, longest = (700, 8192) if gpu else (120, 600)
    device, dtype = (torch.device("cuda"), torch.bfloat16) if gpu else (torch.device("cpu"), torch.float32)
    ours = random_decoder(name, device, dtype)
    # On a GPU peers are met at the size that the targets are stated for.
    theirs = in_transformers(ours, name) if not gpu or name == "qwen3-0.6b" else None
    rng = np.random.default_rng(0)
    sequences = [
        TrainingSequence(rng.integers(0, ours.config.vocab_size, _PROMPT + length, dtype=np.int32), _PROMPT)
        for length in response_lengths(steps * _BATCH, mean, longest, seed=1)
    ]
    frozen: list[SingleEngine] = []
    if gpu and method == "lora":
        attempt("ThinkSafe, frozen weights in e4m3", lambda: frozen.append(_with_frozen_weights(ours)), notes)
    if method == "lora":
        attach(ours, _LORA, seed=0)
    else:
        ours.requires_grad_(True)
    costs = TrainingCosts(ours.config, ours.lora, dtype.itemsize, grouped_heads=keeps_grouped_heads(dtype))
    lengths = [len(sequence) for sequence in sequences]
    largest = largest_pack(lengths, _BATCH, 0, _PACK)
    keeping = keeping_on(device, "auto", costs, largest)
    recorded = recorded_on(device, costs, keeping, largest, average_pack(lengths, _BATCH, 0, _PACK))
    notes.append(
        f"{name}, random weights, {steps} steps of {_BATCH} sequences, {sum(lengths):,} tokens, squared lengths sum to "
        f"{sum(length**2 for length in lengths):,}; padding is not counted as tokens"
    )
    if gpu:
        notes.append(f"{name}, {method}: ThinkSafe computes again: {described(keeping)}")
        graphs = f"packs of up to {recorded:,} tokens" if recorded else "none"
        notes.append(f"{name}, {method}: recorded as CUDA graphs: {graphs}")
    engine = SingleEngine(ours, 1.0, 0.0, method == "lora", recorded)
    launched = copy(engine)  # the same weights and moments
    launched.loss = PackLoss(ours, with_reference=False)
    works = {"ThinkSafe": partial(_packed, engine, keeping, sequences, _BATCH)}
    if recorded:
        works["ThinkSafe, launched kernel by kernel"] = partial(_packed, launched, keeping, sequences, _BATCH)
    if method == "lora":
        half = [replace(one, keeps_to_reference=index % 2 == 0) for index, one in enumerate(sequences)]
        works["ThinkSafe, +KL on half of the sequences"] = partial(_packed, engine, keeping, half, _BATCH)
    for other in frozen:
        works["ThinkSafe, frozen weights in e4m3"] = partial(_packed, other, keeping, sequences, _BATCH)
    if gpu:  # what a token budget gives where the batch is free
        in_large = keeping_on(device, "auto", costs, largest_pack(lengths, len(lengths), 0, _PACK))
        works["ThinkSafe, packs of 32k tokens a step"] = partial(_packed, launched, in_large, sequences, len(sequences))
    # A pack's size is computed when it comes first, and recorded when it comes again.
    twice = {name: partial(_twice, work) for name, work in works.items()} if recorded else {}
    if theirs and (model := _trained_by_peers(theirs, method, notes)):
        works |= dict(_peers(model, sequences, notes))
    measured = measure(works, 2 if gpu else 3, notes, first=twice)
    targets = sum(sequence.num_targets for sequence in sequences)
    flop = costs.useful_flop(Work(sum(lengths), targets, causal_pairs(lengths)))
    rows = [
        {"model": name, "method": method, "variant": variant} | _figures(found, sum(lengths), flop, device)
        for variant, found in measured.items()
    ]
    compare(rows, "tokens/s")
    for row in rows:
        if row["variant"] == "ThinkSafe":
            row["host ms a layer"] = _host_milliseconds(ours)
            row["ms a step of 16 tokens"] = _least_milliseconds(engine)
        if row["variant"] == "ThinkSafe, launched kernel by kernel":
            row["ms a step of 16 tokens"] = _least_milliseconds(launched)
    return rows


def _with_frozen_weights(decoder: Decoder) -> SingleEngine:
    """The same weights in e4m3, with adapters."""
    twin = in_e4m3(decoder)
    attach(twin, _LORA, seed=0)
    twin.pass_gradients()
    return SingleEngine(twin, 1.0, 0.0)


def _figures(found: Measured, tokens: int, flop: float, device: torch.device) -> dict[str, float]:
    """Rate, useful FLOP, their share of what the GPU promises, and memory beyond what is there between steps."""
    figures = {"seconds": found.seconds, "tokens/s": tokens / found.seconds, "TFLOP/s": flop / found.seconds / 1e12}
    if hardware := hardware_of(device):
        figures["MFU"] = flop / found.seconds / hardware.peak_flop_per_second
    return figures | ({"peak GiB": found.peak_bytes / 2**30} if device.type == "cuda" else {})


def _packed(
    engine: SingleEngine, keeping: tuple[Keeping, ...], sequences: list[TrainingSequence], batch_size: int
) -> None:
    engine.decoder.keeping = keeping
    for start in range(0, len(sequences), batch_size):
        packs = pack(sequences[start : start + batch_size], _PACK, engine.device)
        for group in [packs] if batch_size == _BATCH else [[one] for one in packs]:
            engine.step(group, 1e-5)


def _twice(work: Callable[[], None]) -> None:
    work()
    work()


def _trained_by_peers(model: nn.Module, method: str, notes: list[str]) -> nn.Module | None:
    """The same model as peers train it; None where PEFT is wanted and absent."""
    if method == "full":
        return model.train()
    peft = peer("peft", notes)
    if peft is None:
        return None
    targets = list(_LORA.target_modules)
    settings = {"r": _LORA.rank, "lora_alpha": _LORA.alpha, "lora_dropout": _LORA.dropout, "target_modules": targets}
    return peft.get_peft_model(model, peft.LoraConfig(**settings)).train()


def _peers(
    model: nn.Module, sequences: list[TrainingSequence], notes: list[str]
) -> Iterator[tuple[str, Callable[[], None]]]:
    trl, datasets = peer("trl", notes), peer("datasets", notes)
    if trl and datasets:
        gpu = torch.cuda.is_available()
        flash = gpu and peer("flash_attn", notes) is not None
        best = {"per_device_train_batch_size": _BATCH if gpu else 1, "padding_free": flash}
        attention = "flash_attention_2" if flash else "sdpa"
        reference = {"per_device_train_batch_size": 1, "gradient_checkpointing": True}
        yield "TRL, the paper's settings", _with_trl(model, sequences, reference, "sdpa")
        yield "TRL, its best settings", _with_trl(model, sequences, best | {"gradient_checkpointing": False}, attention)
    yield "transformers, padded batches", _padded(model, sequences)


def _with_trl(
    model: nn.Module, sequences: list[TrainingSequence], settings: dict, attention: str
) -> Callable[[], None]:
    """An epoch of SFTTrainer over sequences that are tokenised already."""
    import datasets
    import transformers
    import trl
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = Tokenizer(WordLevel({"pad": 0, "end": 1}, unk_token="pad"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="pad", eos_token="end")
    examples = [
        {
            "input_ids": sequence.input_ids.tolist(),
            "labels": [-100] * sequence.response_start + sequence.input_ids[sequence.response_start :].tolist(),
        }
        for sequence in sequences
    ]
    gpu = torch.cuda.is_available()

    def epoch() -> None:
        model.gradient_checkpointing_disable()
        model.set_attn_implementation(attention)
        quiet = {"logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            config = trl.SFTConfig(
                folder,
                gradient_accumulation_steps=_BATCH // settings["per_device_train_batch_size"],
                num_train_epochs=1,
                learning_rate=1e-5,
                max_grad_norm=1.0,
                max_length=None,
                bf16=gpu,
                use_cpu=not gpu,
                **quiet,
                **settings,
            )
            dataset = datasets.Dataset.from_list(examples)
            trl.SFTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer).train()

    return epoch


def _padded(model: nn.Module, sequences: list[TrainingSequence]) -> Callable[[], None]:
    """The plain loop: eight sequences padded to the longest, the model's own loss, AdamW."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0)
    device = trained[0].device

    def epoch() -> None:
        model.gradient_checkpointing_disable()
        model.set_attn_implementation("sdpa")
        for start in range(0, len(sequences), _BATCH):
            batch = sequences[start : start + _BATCH]
            width = max(map(len, batch))
            input_ids = torch.zeros(len(batch), width, dtype=torch.long)
            labels, mask = torch.full_like(input_ids, -100), torch.zeros_like(input_ids)
            for row, sequence in enumerate(batch):
                ids = torch.from_numpy(sequence.input_ids).long()
                input_ids[row, : len(ids)], mask[row, : len(ids)] = ids, 1
                labels[row, sequence.response_start : len(ids)] = ids[sequence.response_start :]
            out = model(input_ids.to(device), attention_mask=mask.to(device), labels=labels.to(device))
            out.loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return epoch


def _host_milliseconds(decoder: Decoder) -> float:
    """A layer's forward and backward pass on next to no tokens, launched kernel by kernel."""
    batch = _tiny(decoder.embedding.device)

    def passes() -> None:
        decoder(batch.input_ids, batch.positions, batch.attention).sum().backward()

    taken = _least(passes)
    decoder.zero_grad()
    return taken / decoder.config.num_layers


def _least_milliseconds(engine: SingleEngine) -> float:
    """A whole step on next to no tokens."""
    batch = _tiny(engine.device)
    return _least(lambda: engine.step([batch], 1e-5))


def _tiny(device: torch.device) -> PackedBatch:
    """Eight sequences of two tokens."""
    (batch,) = pack([TrainingSequence(np.zeros(2, np.int32), 1)] * _BATCH, _PACK, device)
    return batch


def _least(work: Callable[[], None]) -> float:
    """Milliseconds of the fastest of twenty calls, after two that compile and record."""
    for _ in range(2):
        work()
    return 1e3 * min(seconds(work) for _ in range(20))
