"""The checkpoints of a run, each loaded once and shared by the stages that need it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from thinksafe.distributed.workers import ALONE, Workers
from thinksafe.errors import UserError
from thinksafe.guards.base import Guard
from thinksafe.guards.config import GuardConfig
from thinksafe.guards.registry import build_guard
from thinksafe.kernels.fp8 import supported
from thinksafe.model.decoder import Decoder
from thinksafe.model.lora import detach, load_adapter, refuse_other_base
from thinksafe.model.tensor_parallel import WHOLE, Shard
from thinksafe.model.weights import WeightDtype, load_config, load_decoder, resolve
from thinksafe.recipe.schema import Recipe
from thinksafe.sampler.engine import EngineConfig
from thinksafe.text.chat import Chat
from thinksafe.text.tokenizer import SafeTokenizer

_SMALL = 256
"""Hidden size below which a second CPU thread gains nothing, and on a busy machine costs twentyfold by spinning."""


def _check_vocabulary(folder: Path, tokenizer: SafeTokenizer) -> None:
    """A token id beyond the embedding would be read as an index out of range, deep in a step."""
    known, used = load_config(folder)[0].vocab_size, len(tokenizer.hugging_face)
    if used > known:
        raise UserError(
            f"{folder}: the tokenizer has {used} tokens, config.json's vocab_size is {known}; they do not fit"
        )


@dataclass(frozen=True)
class _Holding:
    """How a decoder's weights are held: by how many processes, whether these add up in order, and in what."""

    processes: int = 1
    in_order: bool = False
    weights: WeightDtype = "auto"

    @classmethod
    def wanted_by(cls, sampler: EngineConfig) -> "_Holding":
        together = sampler.tensor_parallel
        return cls(together, sampler.batch_invariant and together > 1, sampler.weights)


class Models:
    """Loads lazily: a stage that finds its work done loads nothing.

    Attributes:
        device, dtype: where and how weights are kept.
    """

    def __init__(self, recipe: Recipe, workers: Workers = ALONE):
        """Choose device and dtype.

        Raises:
            UserError: a GPU is asked for and there is none, or fewer than workers.
        """
        if recipe.device == "cuda" and not torch.cuda.is_available():
            raise UserError("device: cuda is asked for, but torch sees no GPU; use device=auto or device=cpu")
        gpu = recipe.device == "cuda" or (recipe.device == "auto" and torch.cuda.is_available())
        if gpu and workers.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"this machine has {torch.cuda.device_count()} GPUs for more workers; start one worker a GPU"
            )
        if gpu:
            torch.cuda.set_device(workers.local_rank)
        self.device = torch.device("cuda" if gpu else "cpu")
        dtype = ("bfloat16" if gpu else "float32") if recipe.dtype == "auto" else recipe.dtype
        self.dtype: torch.dtype = getattr(torch, dtype)
        self._recipe, self._workers = recipe, workers
        self._loaded: tuple[tuple[Path, _Holding], Decoder] | None = None

    @cached_property
    def base(self) -> Path:
        """Folder of the student's checkpoint."""
        return resolve(self._recipe.model)

    @cached_property
    def chat(self) -> Chat:
        """The student's tokenizer and template."""
        chat = Chat(self.base)
        _check_vocabulary(self.base, chat.tokenizer)
        return chat

    @cached_property
    def guard(self) -> Guard:
        """The guard of the recipe."""
        return build_guard(self._recipe.guard, self._judge)

    def check_guard(self) -> None:
        """Whether the guard's checkpoints fit their formats, which their tokenizers tell: no weights are read.

        Raises:
            UserError: a checkpoint that is not there, or does not fit.
        """
        build_guard(self._recipe.guard, lambda config: (None, self._guard_files(config)[1]))

    def _judge(self, config: GuardConfig) -> tuple[Decoder, SafeTokenizer]:
        """A checkpoint that judges."""
        folder, tokenizer = self._guard_files(config)
        return self._load(folder, _Holding.wanted_by(config.sampler)), tokenizer

    def _guard_files(self, config: GuardConfig) -> tuple[Path, SafeTokenizer]:
        folder = resolve(config.model, "guard.model")
        tokenizer = SafeTokenizer(folder)
        _check_vocabulary(folder, tokenizer)
        return folder, tokenizer

    def student(self, on_host: bool = False, weights: WeightDtype = "auto") -> Decoder:
        """The student as it is trained: whole, without adapter.

        Args:
            on_host: in host memory, for a device that has no room for all of it.
            weights: of its projections; `auto` as the checkpoint has them.
        """
        if on_host and self.device.type != "cpu":
            self._loaded = None
            return load_decoder(self.base, self.dtype, "cpu")
        return self._student(self.base, None, _Holding(weights=weights))

    def sampled_student(self, folder: Path | None = None, adapter: Path | None = None) -> Decoder:
        """The student as it answers: with this adapter on, or none, this process's part of it where several GPUs hold
        it, in e4m3 where the recipe says so. `folder` is another checkpoint of it, after full fine-tuning."""
        return self._student(folder or self.base, adapter, _Holding.wanted_by(self._recipe.sampler))

    def _student(self, folder: Path, adapter: Path | None, holding: _Holding) -> Decoder:
        wanted = (folder, holding)
        if self._loaded is None or self._loaded[0] != wanted:
            self._loaded = None  # the old weights go before the new ones come
            self._loaded = (wanted, self._load(*wanted))
        decoder = self._loaded[1]
        if self.device.type == "cpu" and decoder.config.hidden_size < _SMALL:
            torch.set_num_threads(1)
        detach(decoder)
        if adapter is not None:
            refuse_other_base(adapter, folder)
            load_adapter(decoder, adapter)
        return decoder.requires_grad_(False).eval()

    def _load(self, folder: Path, holding: _Holding) -> Decoder:
        if holding.weights == "fp8" and not supported(self.device):
            raise UserError(
                "fp8 weights need a GPU of compute capability 8.9 or more; set sampler.weights, guard.sampler.weights "
                "or training.frozen_weights to auto"
            )
        shard, processes = WHOLE, holding.processes
        if processes > 1:
            group = self._workers.neighbours(processes, self.device)
            shard = Shard(self._workers.rank % processes, processes, group, holding.in_order)
        return load_decoder(folder, self.dtype, self.device, shard, holding.weights)

    def forget_student(self) -> None:
        """The loaded weights were trained on in place: the next stage reads them anew."""
        self._loaded = None

    def forget_guard(self) -> None:
        """Training wants the guard's memory; the next stage that judges loads it again."""
        self.__dict__.pop("guard", None)
