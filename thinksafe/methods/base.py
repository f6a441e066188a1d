"""What a method is: the stages that make its examples, the response it keeps of each prompt, and the loss of an
example.

A method is the section `method` of a recipe, whose `type` picks the class. Everything in which methods differ is in
these classes; sampler, guards, training loop and run directory are the same for all.

An offline method (`Method`) makes a fixed set of examples once and trains on it. An online method (`OnlineMethod`)
samples, scores and trains in turns: it makes the sequences of every step from responses of the student as it is then.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from thinksafe.data.records import Example, Label, Prompt, Response, Verdict
from thinksafe.data.selection import Attempt, choose
from thinksafe.section import Section
from thinksafe.text.chat import Chat
from thinksafe.training.config import TrainingConfig
from thinksafe.training.sequence import TrainingItem, TrainingSequence


@dataclass(frozen=True)
class Method(Section):
    """What the student learns from. The key `type` names the method; docs/methods.md describes all of them."""

    stages: ClassVar[tuple[str, ...]] = ()
    """Stages that make the files training reads, in order: keys of `thinksafe.pipeline.STAGES`."""
    example_type: ClassVar[type[Example]] = Example
    """Kind of the records of accepted.jsonl."""
    needs_rejected: ClassVar[bool] = False
    """Whether an example needs an unsafe unsteered response to its prompt; see `example`."""
    has_safety_heads: ClassVar[bool] = False
    """Whether SafeKey's heads are trained beside the student."""
    type: ClassVar[str]
    """Name of the method in a recipe."""

    def check_settings(self, generation: Any, training: TrainingConfig) -> None:
        """Raise a ValueError, whose message begins with a key, if another section of the recipe contradicts the method.

        Args:
            generation: section `generation` of the recipe.
            training: section `training`.
        """

    @property
    def responder(self) -> str | None:
        """Checkpoint folder or hub name of the model that answers the prompts; None for the student."""
        return None

    @property
    def kl_labels(self) -> frozenset[Label]:
        """Labels of the examples whose loss is the KL divergence from the untrained student."""
        return frozenset()

    def choose(self, attempts: Sequence[Attempt], seed: int) -> Attempt | None:
        """Return the attempt at one prompt that becomes its example, or None if there is none.

        Args:
            seed: seed of the run, for a method that draws one.
        """
        return choose(attempts)

    def example(self, kept: Attempt, rejected: str | None) -> Example | None:
        """Return the example of a chosen attempt, or None if the method cannot use it.

        Args:
            rejected: an unsafe unsteered response to the prompt; None without one, or unless `needs_rejected`.
        """
        return kept.example

    def training_sequence(self, example: Example, chat: Chat) -> TrainingItem:
        """Return an example as token ids, with the loss of each token.

        By default it is the student's template with the prompt, then the response, whose tokens have the example's
        weight and the cross-entropy loss, or the KL loss for a label in `kl_labels`.

        Args:
            chat: tokenizer and chat template of the student.

        Raises:
            ValueError: the response is malformed, see `thinksafe.text.chat.parse_response`.
        """
        prompt = chat.prompt_ids(example.prompt)
        ids = np.array(prompt + chat.response_ids(example.response), dtype=np.int32)
        uses_kl = example.label in self.kl_labels
        return TrainingSequence(ids, len(prompt), example.prompt_id, example.weight, uses_kl)


def check_unsteered(method: Method, generation: Any) -> None:
    """Raise a ValueError if the section `generation` of a recipe steers, for a method that samples without steering."""
    if any(rung.steering for rung in generation.rungs):
        raise ValueError(f"generation.steering: method {method.type} samples without steering; set it to null")


@dataclass(frozen=True)
class Rollout:
    """A response that the student sampled during its training.

    Attributes:
        prompt_ids: token ids of the prompt in the student's template, without steering.
        token_ids: token ids of the response, without the stop token.
        logprobs: log-probability in nats of each of them when it was sampled, before temperature.
    """

    response: Response
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    def training_sequence(self, advantage: float) -> TrainingSequence:
        """Return the prompt without steering and the sampled tokens, with an advantage."""
        ids = np.array(self.prompt_ids + self.token_ids, dtype=np.int32)
        return TrainingSequence(ids, len(self.prompt_ids), self.response.prompt_id, advantage=advantage)


class Rollouts(Protocol):
    """The student during an online training, and the run's guard. All ranks call both methods together.

    Attributes:
        prompts: the prompts of the run.
    """

    prompts: Sequence[Prompt]

    def sample(self, prompts: Sequence[Prompt], samples: int, step: int, steering: str | None = None) -> list[Rollout]:
        """Return `samples` responses of the student as it is now to each prompt, in order of prompt and sample.

        Args:
            step: step that asks; each step draws other responses.
            steering: instruction around the prompts, as in `generation.steering`.
        """

    def judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """Return the guard's verdict on each response, in order; `dropped` if the response is malformed."""


@dataclass(frozen=True)
class OnlineMethod(Method):
    """A method that samples from the student while it trains."""

    @abstractmethod
    def num_steps(self, num_prompts: int) -> int:
        """Return the number of optimizer steps for this number of prompts."""

    @abstractmethod
    def make_batch(self, step: int, rollouts: Rollouts) -> list[TrainingSequence]:
        """Return the sequences of a step, counted from 0, for all ranks together; every rank must return the same.

        A policy gradient gives each response its advantage as `TrainingSequence.advantage`. At least one sequence must
        have a target.
        """
