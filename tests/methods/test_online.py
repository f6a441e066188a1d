"""An online method: it samples from the student while it trains, and a killed training continues with the same bytes.

The method of these tests is REINFORCE with the oracle as its reward, the smallest method that needs every part of the
interface: prompts, rollouts with and without steering, verdicts, advantages of both signs, and weights that change
between two steps.
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
from safetensors.torch import load_file

from thinksafe.data.atomic import write_records
from thinksafe.data.sources import load_prompts
from thinksafe.methods.base import OnlineMethod, Rollouts
from thinksafe.pipeline import train_student
from thinksafe.recipe.loading import load_recipe
from thinksafe.run.checkpoints import CheckpointStore
from thinksafe.run.directory import RunDir
from thinksafe.training.local_trainer import LocalTrainer
from thinksafe.training.metrics import read_metrics
from thinksafe.training.packing import TrainingSequence

NUM_PROMPTS = 8
"""Harmful prompts of a run; each step samples from all of them."""


@dataclass(frozen=True)
class Reinforce(OnlineMethod):
    """Raise the probability of safe responses, and lower that of others, by their advantage over the mean reward. Half
    of the responses are steered, since this student has no safe ones without."""

    stages: ClassVar[tuple[str, ...]] = ()

    type: Literal["reinforce"] = "reinforce"
    steering: str = ""
    steps: int = 8
    samples: int = 2

    def num_steps(self, num_prompts: int) -> int:
        return self.steps

    def make_batch(self, step: int, rollouts: Rollouts) -> list[TrainingSequence]:
        unsteered = rollouts.sample(rollouts.prompts, self.samples, step)
        group = unsteered + rollouts.sample(rollouts.prompts, self.samples, step, self.steering)
        rewards = [float(verdict.decision == "safe") for verdict in rollouts.judge(group)]
        REWARDS.append(sum(rewards[: len(unsteered)]) / len(unsteered))
        mean = sum(rewards) / len(rewards)
        return [rollout.training_sequence(reward - mean) for rollout, reward in zip(group, rewards, strict=True)]


REWARDS: list[float] = []
"""Mean reward of the unsteered responses of every step so far."""


class Killed(BaseException):
    pass


def make_run(path, **training):
    """Return a run directory of the organism with harmful prompts, to be trained by Reinforce."""
    recipe = load_recipe("organism", ["sampler={max_num_seqs: 8, max_prefill_tokens: 64, kv_cache_gib: 0.02}"])
    settings = {"learning_rate": 5e-3, "warmup_ratio": 0.0, "checkpoint_every": 2, **training}
    training_config = dataclasses.replace(recipe.training, **settings)
    path.mkdir()
    harmful = [prompt for prompt in load_prompts(recipe.prompts) if prompt.label == "harmful"]
    write_records(path / "prompts.jsonl", harmful[:NUM_PROMPTS])
    return RunDir(
        path,
        dataclasses.replace(recipe, method=Reinforce(steering=recipe.generation.steering), training=training_config),
    )


def train(run) -> None:
    REWARDS.clear()
    train_student(run, CheckpointStore(run.recipe))


def losses_of(run) -> list[float]:
    return [step.loss for step in read_metrics(run.path / "training" / "metrics.jsonl")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(run directory, mean reward of every step) of an uninterrupted training."""
    run = make_run(tmp_path_factory.mktemp("online") / "run")
    train(run)
    return run, list(REWARDS)


@pytest.mark.slow
def test_reward_rises(trained):
    run, rewards = trained
    assert len(rewards) == 8 == len(losses_of(run))
    assert sum(rewards[-2:]) / 2 > rewards[0] + 0.2
    assert run.manifest["stages"]["train"]["steps"] == 8


@pytest.mark.slow
@pytest.mark.parametrize("killed_at", [3, *(pytest.param(step, marks=pytest.mark.exhaustive) for step in (1, 4, 7))])
def test_killed_training_continues_with_the_same_bytes(trained, tmp_path, monkeypatch, killed_at):
    whole, _ = trained
    run, step, num_steps = make_run(tmp_path / "run"), LocalTrainer.step, []

    def killed_step(self, packs, learning_rate):
        num_steps.append(None)
        if len(num_steps) > killed_at:
            raise Killed
        return step(self, packs, learning_rate)

    with monkeypatch.context() as patch:
        patch.setattr(LocalTrainer, "step", killed_step)
        with pytest.raises(Killed):
            train(run)
    train(run)
    assert losses_of(run) == losses_of(whole)
    adapters = [load_file(folder.path / "adapter" / "adapter_model.safetensors") for folder in (run, whole)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all((adapters[0][name] == adapters[1][name]).all() for name in adapters[0])


@pytest.mark.slow
def test_every_step_samples_from_the_weights_of_that_step(trained, tmp_path):
    """Without an update, the student of every step is the same; with one, its rewards are others."""
    _, rewards = trained
    train(make_run(tmp_path / "frozen", learning_rate=1e-12))
    assert rewards[0] == REWARDS[0] and rewards[1:] != REWARDS[1:]
