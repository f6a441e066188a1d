"""The checkpoints of a run, each loaded once and shared by the stages that need it."""

from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path

import torch

from thinksafe.distributed.workers import SINGLE_PROCESS, Workers
from thinksafe.errors import UserError
from thinksafe.guards.base import Guard
from thinksafe.guards.config import GuardConfig
from thinksafe.guards.registry import build_guard
from thinksafe.kernels.fp8 import supports_fp8
from thinksafe.model.config import WeightDtype
from thinksafe.model.decoder import Decoder
from thinksafe.model.lora import check_same_base, detach, load_adapter
from thinksafe.model.tensor_parallel import UNSHARDED, TensorShard
from thinksafe.model.weights import load_config, load_decoder, resolve_checkpoint
from thinksafe.recipe.schema import Recipe
from thinksafe.run.progress import print_note
from thinksafe.sampler.config import EngineConfig
from thinksafe.text.chat import Chat
from thinksafe.text.tokenizer import SafeTokenizer

_SMALL_HIDDEN_SIZE = 256
"""Hidden size below which a second CPU thread saves no time; on a busy machine its spinning costs a factor of 20."""


def _check_vocabulary(folder: Path, tokenizer: SafeTokenizer) -> None:
    """Raise a UserError if a token id has no embedding, which would fail as an index out of range in a step."""
    vocab_size, largest_id = load_config(folder)[0].vocab_size, max(tokenizer.hugging_face.get_vocab().values())
    if largest_id >= vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has a token with id {largest_id}, but vocab_size in config.json is {vocab_size}; "
            "use the tokenizer that belongs to this model"
        )


@dataclass(frozen=True)
class WeightLayout:
    """How a decoder's weights are stored.

    Attributes:
        num_processes: number of processes that share one copy of the weights, each with one shard.
        ordered_sum: whether these processes add partial sums in rank order, so that the bits of the result are fixed;
            else an all-reduce chooses the order.
        weight_dtype: dtype of the weight matrices of all projections; `auto` is the dtype of all other weights.
    """

    num_processes: int = 1
    ordered_sum: bool = False
    weight_dtype: WeightDtype = "auto"

    @classmethod
    def for_sampler(cls, sampler: EngineConfig) -> "WeightLayout":
        num_processes = sampler.tensor_parallel_size
        return cls(num_processes, sampler.batch_invariant and num_processes > 1, sampler.weight_dtype)


class CheckpointStore:
    """The checkpoints of a run, loaded lazily: a stage that finds its work done loads nothing.

    The store holds the guard and one copy of the student. A call that needs the student's weights in another layout or
    from another folder frees the copy and loads a new one; any other call returns the same object again.

    Attributes:
        device: this worker's GPU, or the CPU.
        dtype: dtype of the weights, except of projections with another `weight_dtype`.
    """

    def __init__(self, recipe: Recipe, workers: Workers = SINGLE_PROCESS, date: datetime | None = None):
        """Choose device and dtype; load nothing.

        Args:
            date: date that the chat templates write (`RunDir.created`); None for the present.

        Raises:
            UserError: this machine does not have the GPUs that are needed.
        """
        if recipe.device == "cuda" and not torch.cuda.is_available():
            raise UserError("device: cuda needs a GPU, but torch finds none; use device=auto or device=cpu")
        gpu = recipe.device == "cuda" or (recipe.device == "auto" and torch.cuda.is_available())
        if gpu and workers.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"this machine has {torch.cuda.device_count()} GPUs but more workers; start one worker for each GPU"
            )
        if gpu:
            torch.cuda.set_device(workers.local_rank)
        self.device = torch.device("cuda" if gpu else "cpu")
        dtype = ("bfloat16" if gpu else "float32") if recipe.dtype == "auto" else recipe.dtype
        self.dtype: torch.dtype = getattr(torch, dtype)
        self._recipe, self._workers, self._date = recipe, workers, date
        self._loaded: tuple[tuple[Path, WeightLayout], Decoder] | None = None

    @cached_property
    def base(self) -> Path:
        """Folder of the untrained student's checkpoint; a name on the hub is downloaded first."""
        return resolve_checkpoint(self._recipe.model)

    @cached_property
    def chat(self) -> Chat:
        """The student's tokenizer and chat template. The leader prints a line if the model will not think."""
        chat = Chat(SafeTokenizer(self.base, self._date), self._recipe.template_arguments)
        _check_vocabulary(self.base, chat.tokenizer)
        if chat.thinking_note and self._workers.is_leader:
            print_note("no thinking", chat.thinking_note)
        return chat

    @cached_property
    def teacher_chat(self) -> Chat | None:
        """The tokenizer and chat template of the method's responder; None if the student answers the prompts."""
        if self._recipe.method.responder is None:
            return None
        folder = resolve_checkpoint(self._recipe.method.responder, "method.model")
        chat = Chat(SafeTokenizer(folder, self._date))
        _check_vocabulary(folder, chat.tokenizer)
        return chat

    @property
    def chats(self) -> list[Chat]:
        """The chats of the models whose responses the run holds: the student's, and the teacher's if there is one."""
        return [chat for chat in (self.chat, self.teacher_chat) if chat is not None]

    def responder(self) -> tuple[Decoder, Chat]:
        """Return the model that answers the prompts for the recipe's method, for sampling, and its chat: the teacher,
        or the student."""
        chat = self.teacher_chat or self.chat  # a mistake in it shows before weights are loaded
        return self.sampled_student(chat.folder), chat

    @cached_property
    def guard(self) -> Guard:
        """The guard of the recipe, with its models loaded; it is kept until `release_guard`."""
        return build_guard(self._recipe.guard, self._load_guard_model)

    def check_guard(self) -> None:
        """Raise a UserError if a checkpoint of the guard does not exist or does not fit its format. No weights are
        read."""
        build_guard(self._recipe.guard, lambda config: (None, self._guard_tokenizer(config)[1]))

    def _load_guard_model(self, config: GuardConfig) -> tuple[Decoder, SafeTokenizer]:
        folder, tokenizer = self._guard_tokenizer(config)
        return self._load(folder, WeightLayout.for_sampler(config.sampler)), tokenizer

    def _guard_tokenizer(self, config: GuardConfig) -> tuple[Path, SafeTokenizer]:
        folder = resolve_checkpoint(config.model, "guard.model")
        tokenizer = SafeTokenizer(folder, self._date)
        _check_vocabulary(folder, tokenizer)
        return folder, tokenizer

    def student(self, on_host: bool = False, weight_dtype: WeightDtype = "auto") -> Decoder:
        """Return the untrained student for training: unsharded, without an adapter, and with all weights frozen.

        Args:
            on_host: return a new copy in host memory, because the device's memory cannot hold it; all its weights have
                `dtype`. On the CPU this flag changes nothing.
            weight_dtype: dtype of its projections; `auto` is the dtype of all other weights. Not used with `on_host`.
        """
        if on_host and self.device.type != "cpu":
            self._loaded = None
            return load_decoder(self.base, self.dtype, "cpu")
        return self._student(self.base, None, WeightLayout(weight_dtype=weight_dtype))

    def sampled_student(self, folder: Path | None = None, adapter: Path | None = None) -> Decoder:
        """Return the student for sampling, or this process's shard of it under tensor parallelism.

        The next call of this method or of `student` may change the adapter of the object that was returned.

        Args:
            folder: checkpoint after full fine-tuning; None for the recipe's checkpoint.
            adapter: folder of the adapter to attach; None for no adapter.

        Raises:
            UserError: the checkpoint or the adapter cannot be loaded, or they do not fit each other.
        """
        return self._student(folder or self.base, adapter, WeightLayout.for_sampler(self._recipe.sampler))

    def _student(self, folder: Path, adapter: Path | None, layout: WeightLayout) -> Decoder:
        """Return the decoder of a folder, loaded again only if folder or layout differ from the last call's."""
        key = (folder, layout)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # free the old weights before the new ones are loaded
            self._loaded = (key, self._load(*key))
        decoder = self._loaded[1]
        if self.device.type == "cpu" and decoder.config.hidden_size < _SMALL_HIDDEN_SIZE:
            torch.set_num_threads(1)
        detach(decoder)
        if adapter is not None:
            check_same_base(adapter, folder)
            load_adapter(decoder, adapter)
        return decoder.requires_grad_(False).eval()

    def _load(self, folder: Path, layout: WeightLayout) -> Decoder:
        """Return a decoder, or this process's shard of it, newly loaded on the device."""
        if layout.weight_dtype == "fp8" and not supports_fp8(self.device):
            raise UserError(
                "fp8 weights need a GPU of compute capability 8.9 or more; set sampler.weight_dtype, "
                "guard.sampler.weight_dtype or training.frozen_weight_dtype to auto"
            )
        shard, num_processes = UNSHARDED, layout.num_processes
        if num_processes > 1:
            group = self._workers.tensor_parallel_group(num_processes, self.device)
            shard = TensorShard(self._workers.rank % num_processes, num_processes, group, layout.ordered_sum)
        return load_decoder(folder, self.dtype, self.device, shard, layout.weight_dtype)

    def release_student(self) -> None:
        """Forget the loaded student, because training changed its weights in place; the next call loads it again."""
        self._loaded = None

    def release_guard(self) -> None:
        """Forget the loaded guard, because training needs its memory; the next use of `guard` loads it again."""
        self.__dict__.pop("guard", None)
