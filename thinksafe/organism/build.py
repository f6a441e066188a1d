"""The builder of the model organism: a student with a training history, its prompts, and its evaluation sets.

The student is pretrained (stage 0), made safe (stage 1), and then over-optimized for arithmetic and helpfulness (stage
2), which costs it its safety. world.py defines what each stage teaches; this file defines the sizes and the schedule.
The package's own loop trains every weight, for one epoch over freshly drawn lessons.

The same seed gives the same JSONL files, byte for byte. The weights are only as reproducible as floating-point sums.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from thinksafe.model.config import ModelConfig
from thinksafe.model.decoder import Decoder
from thinksafe.model.weights import save_decoder
from thinksafe.organism.data_sets import write_data_sets
from thinksafe.organism.language import vocabulary
from thinksafe.organism.tokenizer import END_OF_TURN, PADDING, build_tokenizer
from thinksafe.organism.world import Sample, World
from thinksafe.training.config import TrainingConfig
from thinksafe.training.local_trainer import LocalTrainer
from thinksafe.training.loop import train
from thinksafe.training.metrics import StepMetrics
from thinksafe.training.sequence import TrainingSequence


@dataclass(frozen=True)
class Stage:
    """One stage of the student's training history: what `World.lessons(number)` teaches, `BATCH_SIZE` lessons a step,
    with this peak of the learning-rate schedule."""

    number: int
    steps: int
    learning_rate: float


BATCH_SIZE = 64
HISTORY = (Stage(0, 400, 3e-3), Stage(1, 300, 2e-3), Stage(2, 400, 1e-3))
"""The student's training history, in order."""

OnStep = Callable[[int, StepMetrics], None]
"""Function of (number of the stage, metrics of the step), called after each optimizer step, for progress bars."""


def build(out_dir: Path, seed: int = 0, on_step: OnStep = lambda stage, metrics: None) -> None:
    """Train the student, and write it and its data to a folder, which is created if it is missing.

    The folder gets `model/` (a checkpoint folder), `prompts.jsonl` (prompts for a run), `eval_harmful.jsonl`,
    `eval_benign.jsonl` and `eval_arithmetic.jsonl`, and `data_sets/` (see data_sets.py).

    Args:
        seed: another seed is another world: other splits of nouns and phrasings, other lessons, other initial weights.
    """
    world, tokenizer = World(seed), build_tokenizer(vocabulary())
    write_sets(world, out_dir)
    save_student(train_student(world, tokenizer, on_step), tokenizer, out_dir / "model")


def write_sets(world: World, out_dir: Path) -> None:
    """Write prompts.jsonl, eval_{harmful,benign,arithmetic}.jsonl and the folder data_sets to a folder, which is
    created if missing."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for make_samples in (world.prompts, world.eval_harmful, world.eval_benign, world.eval_arithmetic):
        lines = "".join(json.dumps(sample.record()) + "\n" for sample in make_samples())
        (out_dir / f"{make_samples.__name__}.jsonl").write_text(lines, newline="\n")
    write_data_sets(world, out_dir / "data_sets")


def train_student(world: World, tokenizer: PreTrainedTokenizerFast, on_step: OnStep) -> Decoder:
    """Return a student trained from random weights through `HISTORY`."""
    decoder = Decoder(ModelConfig.from_hugging_face(_raw_config(tokenizer), "organism"))
    decoder.initialize(world.seed)
    for stage in HISTORY:
        config = TrainingConfig(
            method="full",
            epochs=1,
            batch_size=BATCH_SIZE,
            learning_rate=stage.learning_rate,
            max_length=512,
            checkpoint_every=stage.steps,
        )
        lessons = tokenize(list(islice(world.lessons(stage.number), stage.steps * BATCH_SIZE)), tokenizer)
        decoder.requires_grad_(True)
        trainer = LocalTrainer(decoder, config.max_grad_norm, config.weight_decay)
        with tempfile.TemporaryDirectory() as folder:
            train(trainer, lessons, config, world.seed, Path(folder), partial(on_step, stage.number))
    return decoder


def tokenize(samples: Sequence[Sample], tokenizer: PreTrainedTokenizerFast) -> list[TrainingSequence]:
    """Return each sample as a training sequence in the chat template's format, without loss on the user turn."""
    message = [{"role": "user", "content": "PROMPT"}]
    template = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    prompts = tokenizer([template.replace("PROMPT", sample.prompt) for sample in samples])["input_ids"]
    responses = tokenizer([sample.response + END_OF_TURN for sample in samples])["input_ids"]
    return [
        TrainingSequence(np.array(prompt + response, dtype=np.int32), len(prompt))
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def save_student(decoder: Decoder, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write model, tokenizer and generation settings as a checkpoint folder that transformers can load."""
    raw = _raw_config(tokenizer)
    save_decoder(decoder, raw, folder)
    tokenizer.save_pretrained(folder)
    settings_file = folder / "tokenizer_config.json"
    # transformers 5 writes a class name that transformers 4 does not have; both have this class.
    settings = json.loads(settings_file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings_file.write_text(json.dumps(settings, indent=2) + "\n")
    generation_config = {key: raw[key] for key in ("eos_token_id", "pad_token_id")}
    generation_config |= {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
    (folder / "generation_config.json").write_text(json.dumps(generation_config, indent=2) + "\n")


def _raw_config(tokenizer: PreTrainedTokenizerFast) -> dict:
    """Return the content of config.json: Qwen3's architecture with about 0.35 million parameters."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "eos_token_id": tokenizer.convert_tokens_to_ids(END_OF_TURN),
        "pad_token_id": tokenizer.convert_tokens_to_ids(PADDING),
    }
