"""Online training: the sequences of each step, made from responses of the student as it is then."""

from collections.abc import Sequence

from thinksafe.data.jsonl import RecordFile, to_json
from thinksafe.data.records import Prompt, Verdict, content_hash
from thinksafe.methods.base import OnlineMethod, Rollout
from thinksafe.model.decoder import Decoder
from thinksafe.pipeline.judge import judge_batch
from thinksafe.pipeline.responses import SamplingTask, sample_responses
from thinksafe.run.checkpoints import CheckpointStore
from thinksafe.run.directory import RunDir
from thinksafe.sampler.engine import Engine
from thinksafe.training.sequence import TrainingSequence


class StudentRollouts:
    """The `Rollouts` of a run: the decoder that is trained is also sampled, so no weights are copied."""

    def __init__(self, run: RunDir, checkpoints: CheckpointStore, decoder: Decoder):
        self.prompts: Sequence[Prompt] = RecordFile(run.path / "prompts.jsonl", Prompt)
        self._chat, self._guard = checkpoints.chat, checkpoints.guard
        self._decoder, self._recipe = decoder, run.recipe
        self._engine = Engine(decoder, run.recipe.sampler)

    def sample(self, prompts: Sequence[Prompt], samples: int, step: int, steering: str | None = None) -> list[Rollout]:
        self._engine.forget_prefixes()  # the weights have changed
        self._decoder.eval()
        indices = range(step * samples, (step + 1) * samples)  # each step has other seeds
        tasks = [SamplingTask(prompt, steering, index) for prompt in prompts for index in indices]
        prompt_ids = {prompt.id: tuple(self._chat.prompt_ids(prompt.text)) for prompt in prompts}
        sampling, seed = self._recipe.generation.sampling, self._recipe.seed
        by_key = {
            response.key: Rollout(response, prompt_ids[response.prompt_id], completion.tokens, completion.logprobs)
            for response, completion in sample_responses(self._engine, self._chat, tasks, sampling, seed)
        }
        return [by_key[task.key] for task in tasks]

    def judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        responses = [rollout.response for rollout in rollouts]
        verdicts = {id(response): verdict for response, verdict in judge_batch(self._guard, [self._chat], responses)}
        return [verdicts[id(response)] for response in responses]


class OnlineBatches:
    """The batches of an online method, see `thinksafe.training.loop.Batches`."""

    is_online = True

    def __init__(self, method: OnlineMethod, rollouts: StudentRollouts, settings: str):
        """Count the steps.

        Args:
            settings: text of all settings of the run that affect its results.
        """
        self._method, self._rollouts = method, rollouts
        self.num_steps = method.num_steps(len(rollouts.prompts))
        self.fingerprint = content_hash([settings, *map(to_json, rollouts.prompts)])

    def of_step(self, step: int) -> list[TrainingSequence]:
        return self._method.make_batch(step, self._rollouts)
