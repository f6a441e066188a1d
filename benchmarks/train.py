"""Fine-tuning: our packed loop against TRL's SFTTrainer and a plain loop on padded batches.

All train the same weights on the same sequences, eight per step. TRL runs with the settings of the paper's code (one
sequence at a time, gradient checkpointing, sdpa) and with its best settings for the device, which are without
checkpointing. On a GPU these are eight sequences at a time, without padding if flash-attn is installed, else padded; on
a CPU one sequence at a time, which needs no padding. Peers lose time in three places: padding to the longest of eight
sequences computes useless tokens, logits of prompt tokens have no loss, and a module for each projection and norm costs
host time.

On a CPU, a model of 6M parameters is bound by matmuls, and a batch of one sequence has no more of them than a pack. A
model of 0.3M parameters is bound by the host, as a GPU is with one short sequence.

The host time of a layer is measured with a pack that is too small to keep any device busy. No step that is launched
kernel by kernel can be faster. 28 layers at 0.9 ms are 25 ms; in that time an H200 computes at most 5k tokens of
Qwen3-0.6B. A step of the paper's eight sequences has about 6k tokens, and another host may be slower. Passes that may
be launch-bound are captured as CUDA graphs (thinksafe/training/cuda_graphs.py): 1,978 launches with LoRA, counted on a
trace, become two. On a GPU the table has both variants, and for each the time of a step of 16 tokens, which is all
overhead.
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

from benchmarks.harness import Measurement, Row, Sections, add_speedups, attempt, import_peer, measure, time_call
from benchmarks.models import fp8_copy, random_decoder, transformers_copy
from benchmarks.shapes import response_lengths
from thinksafe.hardware import hardware_of
from thinksafe.kernels.packed_attention import supports_grouped_heads
from thinksafe.model.activation_checkpointing import CheckpointMode
from thinksafe.model.config import LoraConfig
from thinksafe.model.decoder import Decoder
from thinksafe.model.lora import attach
from thinksafe.training.cost_model import TokenCounts, TrainingCosts, causal_pairs
from thinksafe.training.local_trainer import LocalTrainer
from thinksafe.training.losses import PackLoss
from thinksafe.training.memory_plan import (
    DeviceMemory,
    choose_checkpointing,
    choose_max_cuda_graph_tokens,
    describe_checkpointing,
    pack_sizes,
)
from thinksafe.training.packing import PackedBatch, pack
from thinksafe.training.sequence import TrainingSequence

_PROMPT_TOKENS, _BATCH_SIZE, _PACK_TOKENS = 64, 8, 32_768
_LORA = LoraConfig()
CLAIM = "Packing computes no padding and no logits of prompt tokens, and a lean decoder leaves the host little to do."
_GPU_STEPS = {
    ("qwen3-0.6b", "lora"): 8,
    ("qwen3-8b", "lora"): 6,
    ("qwen3-1.7b", "lora"): 6,
    ("qwen3-0.6b", "full"): 8,
    ("qwen3-4b", "lora"): 6,
    ("qwen3-1.7b", "full"): 6,
}
_CPU_STEPS = dict.fromkeys([("cpu-0.3m", "lora"), ("cpu-0.3m", "full"), ("cpu-6m", "lora")], 6)
"""(key of MODELS, `lora` or `full`) -> number of training steps in a timed call; the same holds for _GPU_STEPS."""


def sections(notes: list[str]) -> Sections:
    """Return the suite's sections, one per model and method, for the GPU, or for the CPU if there is no GPU.

    Args:
        notes: gets facts that a reader of the figures needs, and failures while a section is measured.
    """
    cases = _GPU_STEPS if torch.cuda.is_available() else _CPU_STEPS
    return {
        f"{name}, {method}": partial(_measure_case, name, method, steps, notes)
        for (name, method), steps in cases.items()
    }


def _measure_case(name: str, method: str, steps: int, notes: list[str]) -> list[Row]:
    """Return the speed of training one model on the same sequences: one row per variant that did not fail.

    Args:
        name: key of MODELS.
        method: `lora`, or `full` for all weights.
        steps: steps in a timed call, of eight sequences each.
        notes: gets sizes, settings, absent peers and failures.
    """
    has_gpu = torch.cuda.is_available()
    mean, longest = (700, 8192) if has_gpu else (120, 600)
    device, dtype = (torch.device("cuda"), torch.bfloat16) if has_gpu else (torch.device("cpu"), torch.float32)
    decoder = random_decoder(name, device, dtype)
    # On a GPU, peers are measured at the size for which the project states its targets.
    transformers_model = transformers_copy(decoder, name) if not has_gpu or name == "qwen3-0.6b" else None
    rng = np.random.default_rng(0)
    sequences = [
        TrainingSequence(
            rng.integers(0, decoder.config.vocab_size, _PROMPT_TOKENS + length, dtype=np.int32), _PROMPT_TOKENS
        )
        for length in response_lengths(steps * _BATCH_SIZE, mean, longest, seed=1)
    ]
    fp8_trainers: list[LocalTrainer] = []
    if has_gpu and method == "lora":
        attempt("ThinkSafe, frozen weights in e4m3", lambda: fp8_trainers.append(_fp8_trainer(decoder)), notes)
    if method == "lora":
        attach(decoder, _LORA, seed=0)
    else:
        decoder.requires_grad_(True)
    costs = TrainingCosts(decoder.config, decoder.lora, dtype.itemsize, grouped_heads=supports_grouped_heads(dtype))
    lengths = [len(sequence) for sequence in sequences]
    max_pack, mean_pack = pack_sizes(lengths, _BATCH_SIZE, 0, _PACK_TOKENS)
    memory = DeviceMemory.of(device)
    checkpointing = choose_checkpointing(memory, "auto", costs, max_pack)
    max_graph_tokens = choose_max_cuda_graph_tokens(memory, costs, checkpointing, max_pack, mean_pack)
    notes.append(
        f"{name}, random weights, {steps} steps of {_BATCH_SIZE} sequences, {sum(lengths):,} tokens, squared lengths "
        f"sum to {sum(length**2 for length in lengths):,}; padding is not counted as tokens"
    )
    if has_gpu:
        notes.append(f"{name}, {method}: ThinkSafe, activation checkpointing: {describe_checkpointing(checkpointing)}")
        graphs = f"packs of up to {max_graph_tokens:,} tokens" if max_graph_tokens else "none"
        notes.append(f"{name}, {method}: captured as CUDA graphs: {graphs}")
    trainer = LocalTrainer(decoder, 1.0, 0.0, method == "lora", max_graph_tokens)
    eager_trainer = copy(trainer)  # the same weights and moments
    eager_trainer.loss = PackLoss(decoder, with_reference=False)
    runs = {"ThinkSafe": partial(_train_packed, trainer, checkpointing, sequences, _BATCH_SIZE)}
    if max_graph_tokens:
        runs["ThinkSafe, launched kernel by kernel"] = partial(
            _train_packed, eager_trainer, checkpointing, sequences, _BATCH_SIZE
        )
    if method == "lora":
        sequences_half_kl = [
            replace(sequence, use_reference_kl=index % 2 == 0) for index, sequence in enumerate(sequences)
        ]
        runs["ThinkSafe, +KL on half of the sequences"] = partial(
            _train_packed, trainer, checkpointing, sequences_half_kl, _BATCH_SIZE
        )
    for fp8_trainer in fp8_trainers:
        runs["ThinkSafe, frozen weights in e4m3"] = partial(
            _train_packed, fp8_trainer, checkpointing, sequences, _BATCH_SIZE
        )
    if has_gpu:  # shows the gain of a token budget instead of eight sequences per step
        max_pack, _ = pack_sizes(lengths, len(lengths), 0, _PACK_TOKENS)
        large_pack_checkpointing = choose_checkpointing(DeviceMemory.of(device), "auto", costs, max_pack)
        runs["ThinkSafe, packs of 32k tokens a step"] = partial(
            _train_packed, eager_trainer, large_pack_checkpointing, sequences, len(sequences)
        )
    # A size runs eagerly in its first pack, and is captured in its second.
    warm_up_calls = {name: partial(_repeat_twice, run) for name, run in runs.items()} if max_graph_tokens else {}
    if transformers_model and (model := _prepare_for_peers(transformers_model, method, notes)):
        runs |= dict(_peer_runs(model, sequences, notes))
    measurements = measure(runs, 2 if has_gpu else 3, notes, warm_up_calls=warm_up_calls)
    num_targets = sum(sequence.num_targets for sequence in sequences)
    flop = costs.model_flops(TokenCounts(sum(lengths), num_targets, causal_pairs(lengths)))
    rows = [
        {"model": name, "method": method, "variant": variant} | _speed_columns(measurement, sum(lengths), flop, device)
        for variant, measurement in measurements.items()
    ]
    add_speedups(rows, "tokens/s")
    for row in rows:
        if row["variant"] == "ThinkSafe":
            row["host ms a layer"] = _host_milliseconds(decoder)
            row["ms a step of 16 tokens"] = _step_milliseconds(trainer)
        if row["variant"] == "ThinkSafe, launched kernel by kernel":
            row["ms a step of 16 tokens"] = _step_milliseconds(eager_trainer)
    return rows


def _fp8_trainer(decoder: Decoder) -> LocalTrainer:
    """Return a trainer of new adapters on a copy of the decoder with frozen weights in e4m3."""
    fp8_decoder = fp8_copy(decoder)
    attach(fp8_decoder, _LORA, seed=0)
    fp8_decoder.prepare_fp8_backward()
    return LocalTrainer(fp8_decoder, 1.0, 0.0)


def _speed_columns(measurement: Measurement, tokens: int, flop: float, device: torch.device) -> dict[str, float]:
    """Return the columns `seconds`, `tokens/s`, `TFLOP/s` and, where known, `MFU` and `peak GiB`.

    `MFU` is absent on a CPU and on a GPU of unknown rates. `peak GiB`, the peak memory above that before the call, is
    absent on a CPU.

    Args:
        tokens: tokens of the call, padding not counted.
        flop: model FLOP of the call.
    """
    columns = {
        "seconds": measurement.seconds,
        "tokens/s": tokens / measurement.seconds,
        "TFLOP/s": flop / measurement.seconds / 1e12,
    }
    if hardware := hardware_of(device):
        columns["MFU"] = flop / measurement.seconds / hardware.peak_flop_per_second
    return columns | ({"peak GiB": measurement.peak_bytes / 2**30} if device.type == "cuda" else {})


def _train_packed(
    trainer: LocalTrainer, checkpointing: tuple[CheckpointMode, ...], sequences: list[TrainingSequence], batch_size: int
) -> None:
    trainer.decoder.checkpointing = checkpointing
    for start in range(0, len(sequences), batch_size):
        packs = pack(sequences[start : start + batch_size], _PACK_TOKENS, trainer.device)
        for step_packs in [packs] if batch_size == _BATCH_SIZE else [[single_pack] for single_pack in packs]:
            trainer.step(step_packs, 1e-5)


def _repeat_twice(run: Callable[[], None]) -> None:
    run()
    run()


def _prepare_for_peers(model: nn.Module, method: str, notes: list[str]) -> nn.Module | None:
    """Return the transformers model in training mode: with PEFT's adapters for `lora`, as it is for `full`.

    Return None, with a note in `notes`, if the method is `lora` and PEFT cannot be imported.
    """
    if method == "full":
        return model.train()
    peft = import_peer("peft", notes)
    if peft is None:
        return None
    targets = list(_LORA.target_modules)
    settings = {"r": _LORA.rank, "lora_alpha": _LORA.alpha, "lora_dropout": _LORA.dropout, "target_modules": targets}
    return peft.get_peft_model(model, peft.LoraConfig(**settings)).train()


def _peer_runs(
    model: nn.Module, sequences: list[TrainingSequence], notes: list[str]
) -> Iterator[tuple[str, Callable[[], None]]]:
    trl, datasets = import_peer("trl", notes), import_peer("datasets", notes)
    if trl and datasets:
        has_gpu = torch.cuda.is_available()
        has_flash_attn = has_gpu and import_peer("flash_attn", notes) is not None
        best_settings = {"per_device_train_batch_size": _BATCH_SIZE if has_gpu else 1, "padding_free": has_flash_attn}
        attention = "flash_attention_2" if has_flash_attn else "sdpa"
        paper_settings = {"per_device_train_batch_size": 1, "gradient_checkpointing": True}
        yield "TRL, the paper's settings", _trl_epoch(model, sequences, paper_settings, "sdpa")
        yield (
            "TRL, its best settings",
            _trl_epoch(model, sequences, best_settings | {"gradient_checkpointing": False}, attention),
        )
    yield "transformers, padded batches", _padded_epoch(model, sequences)


def _trl_epoch(
    model: nn.Module, sequences: list[TrainingSequence], settings: dict, attention: str
) -> Callable[[], None]:
    """Return a function that trains the model once on all sequences with TRL's SFTTrainer.

    Args:
        settings: arguments of SFTConfig: `per_device_train_batch_size`, `gradient_checkpointing` and the like.
        attention: transformers' name of the attention implementation.
    """
    import datasets
    import transformers
    import trl
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    word_tokenizer = Tokenizer(WordLevel({"pad": 0, "end": 1}, unk_token="pad"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=word_tokenizer, pad_token="pad", eos_token="end")
    examples = [
        {
            "input_ids": sequence.input_ids.tolist(),
            "labels": [-100] * sequence.num_prompt_tokens + sequence.input_ids[sequence.num_prompt_tokens :].tolist(),
        }
        for sequence in sequences
    ]
    has_gpu = torch.cuda.is_available()

    def epoch() -> None:
        model.gradient_checkpointing_disable()
        model.set_attn_implementation(attention)
        quiet_settings = {"logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            config = trl.SFTConfig(
                folder,
                gradient_accumulation_steps=_BATCH_SIZE // settings["per_device_train_batch_size"],
                num_train_epochs=1,
                learning_rate=1e-5,
                max_grad_norm=1.0,
                max_length=None,
                bf16=has_gpu,
                use_cpu=not has_gpu,
                **quiet_settings,
                **settings,
            )
            dataset = datasets.Dataset.from_list(examples)
            trl.SFTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer).train()

    return epoch


def _padded_epoch(model: nn.Module, sequences: list[TrainingSequence]) -> Callable[[], None]:
    """Return a function that trains the model once on all sequences in a plain loop.

    A step pads eight sequences to the longest and uses transformers' loss, clipping of the gradient, and AdamW.
    """
    trained_parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained_parameters, lr=1e-5, weight_decay=0.0)
    device = trained_parameters[0].device

    def epoch() -> None:
        model.gradient_checkpointing_disable()
        model.set_attn_implementation("sdpa")
        for start in range(0, len(sequences), _BATCH_SIZE):
            batch = sequences[start : start + _BATCH_SIZE]
            width = max(map(len, batch))
            input_ids = torch.zeros(len(batch), width, dtype=torch.long)
            labels, mask = torch.full_like(input_ids, -100), torch.zeros_like(input_ids)
            for row, sequence in enumerate(batch):
                ids = torch.from_numpy(sequence.input_ids).long()
                input_ids[row, : len(ids)], mask[row, : len(ids)] = ids, 1
                labels[row, sequence.num_prompt_tokens : len(ids)] = ids[sequence.num_prompt_tokens :]
            out = model(input_ids.to(device), attention_mask=mask.to(device), labels=labels.to(device))
            out.loss.backward()
            nn.utils.clip_grad_norm_(trained_parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return epoch


def _host_milliseconds(decoder: Decoder) -> float:
    """Return the milliseconds of one layer's forward and backward pass over 16 tokens, launched kernel by kernel.

    It is the time of the whole decoder divided by its number of layers.
    """
    batch = _tiny_batch(decoder.embedding.device)

    def forward_backward() -> None:
        decoder(batch.input_ids, batch.positions, batch.attention).sum().backward()

    milliseconds = _fastest_milliseconds(forward_backward)
    decoder.zero_grad()
    return milliseconds / decoder.config.num_layers


def _step_milliseconds(trainer: LocalTrainer) -> float:
    """Return the milliseconds of one training step, optimizer included, on a pack of 16 tokens."""
    batch = _tiny_batch(trainer.device)
    return _fastest_milliseconds(lambda: trainer.step([batch], 1e-5))


def _tiny_batch(device: torch.device) -> PackedBatch:
    """Return a pack of eight sequences of two tokens."""
    (batch,) = pack([TrainingSequence(np.zeros(2, np.int32), 1)] * _BATCH_SIZE, _PACK_TOKENS, device)
    return batch


def _fastest_milliseconds(call: Callable[[], None]) -> float:
    """Return the milliseconds of the fastest of twenty timed calls, after two calls that compile and capture."""
    for _ in range(2):
        call()
    return 1e3 * min(time_call(call) for _ in range(20))
