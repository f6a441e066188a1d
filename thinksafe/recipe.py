"""One recipe says everything about a run. It comes from YAML and `--set key=value` and is checked at once.

Each section's keys are documented on its class, and `thinksafe recipe` prints them. A recipe names files relative to
the folder it lies in. With `base: NAME` it says only what differs from another recipe.
"""

import difflib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from thinksafe.errors import UserError, in_words
from thinksafe.evaluation.answers import AnswerKind
from thinksafe.guards.interface import GuardConfig
from thinksafe.model.lora import LoraConfig
from thinksafe.paths import RECIPES, bundled_recipes
from thinksafe.sampler.engine import EngineConfig
from thinksafe.sampler.request import SamplingConfig
from thinksafe.steering import Rung
from thinksafe.training.distributed import ZeroConfig
from thinksafe.training.loop import TrainingConfig
from thinksafe.training.trackers import TrackerName


@dataclass(frozen=True)
class GenerationConfig:
    """How responses are sampled from the frozen student.

    Attributes:
        steering: instruction around harmful prompts: `prefix`, `suffix`, `risk`, `intent`, a text with {prompt} in it,
            or null for none.
        samples: responses a prompt; the first one that the guard accepts is kept.
        ladder: further attempts at prompts whose responses were all rejected, one after the other. Empty is the paper's
            single attempt.
        max_retries: responses that all further attempts may sample together; null for as many as the ladder asks.
        unsteered_probe: harmful prompts also sampled without steering, to measure what steering gains; not trained on.
        sampling: how tokens are drawn.
    """

    __pydantic_config__ = {"extra": "forbid"}

    steering: str | None = "prefix"
    samples: int = 1
    ladder: tuple[Rung, ...] = ()
    max_retries: int | None = None
    unsteered_probe: int = 200
    sampling: SamplingConfig = SamplingConfig()

    def __post_init__(self):
        Rung(self.steering, self.samples)
        if self.max_retries is not None and self.max_retries < 0:
            raise ValueError("max_retries must not be negative")
        if self.unsteered_probe < 0:
            raise ValueError("unsteered_probe must not be negative")

    @property
    def rungs(self) -> tuple[Rung, ...]:
        """The first attempt, and all further ones."""
        return (Rung(self.steering, self.samples), *self.ladder)


@dataclass(frozen=True)
class EvaluationSet:
    """One benchmark.

    Attributes:
        name: shown in the report.
        file: .jsonl, .json or .parquet file, a folder of them, or a data set on the hub; reasoning sets need `answer`.
        kind: `harmful` (share of unsafe responses), `over_refusal` (share of refusals) or `reasoning` (mean pass@1).
        config: of a data set on the hub, if it has several.
        split: of a data set on the hub (`test` by default), or of its copy in a folder.
        columns: where to find `text`, `answer` and `label` if the columns have other names, {text: question}; then
            nothing else is read. A row without a label is harmful in a `harmful` set, else benign.
        where: keep only rows with this value in this column, {label: safe}.
        answer_after: mark that stands before the final answer, where the column holds the whole solution.
        samples: responses a prompt.
        answer: how reasoning answers are compared.
        instruction: text with {prompt} in it that poses the question, or null for the prompt as it is.
    """

    __pydantic_config__ = {"extra": "forbid"}

    name: str
    file: str
    kind: Literal["harmful", "over_refusal", "reasoning"]
    config: str | None = None
    split: str | None = None
    columns: dict[Literal["text", "answer", "label"], str] | None = None
    where: dict[str, str] | None = None
    answer_after: str | None = None
    samples: int = 1
    answer: AnswerKind = "math"
    instruction: str | None = None

    def __post_init__(self):
        if self.samples < 1:
            raise ValueError("samples must be at least 1")
        if self.columns is not None and "text" not in self.columns:
            raise ValueError("columns must say where the text is")
        if not self.name or not all(c.isalnum() or c in "-_." for c in self.name):
            raise ValueError("name must consist of letters, digits, '-', '_' and '.'")
        if self.instruction is not None and self.instruction.count("{prompt}") != 1:
            raise ValueError("instruction must hold {prompt} exactly once")


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured before and after, and how responses are drawn for it.

    Attributes:
        sets: the benchmarks; without any a run has no before and after.
        sampling: how tokens are drawn.
    """

    __pydantic_config__ = {"extra": "forbid"}

    sets: tuple[EvaluationSet, ...] = ()
    sampling: SamplingConfig = SamplingConfig()

    def __post_init__(self):
        names = [evaluation_set.name for evaluation_set in self.sets]
        if len(set(names)) < len(names):
            raise ValueError("two evaluation sets have the same name")


@dataclass(frozen=True)
class Recipe:
    """A whole run.

    Attributes:
        name: shown in the report.
        model: checkpoint folder or hub name of the student.
        prompts: .jsonl, .json or .parquet file, a folder of them, or a data set on the hub (its `train` split);
            only `generate` reads it.
        limit: use only the first so many prompts; null for all.
        seed: of everything random.
        device: `auto` takes a GPU where there is one.
        dtype: `auto` is bfloat16 on a GPU and float32 on a CPU.
        trackers: where training is also seen, `tensorboard` (event files in training/tensorboard) and `wandb` (Weights
            & Biases); metrics.jsonl is always written.
    """

    __pydantic_config__ = {"extra": "forbid"}

    name: str
    model: str
    prompts: str | None = None
    limit: int | None = None
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    trackers: tuple[TrackerName, ...] = ()
    generation: GenerationConfig = GenerationConfig()
    guard: GuardConfig = GuardConfig()
    sampler: EngineConfig = EngineConfig()
    lora: LoraConfig = LoraConfig()
    training: TrainingConfig = TrainingConfig()
    zero: ZeroConfig = ZeroConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self):
        if self.limit is not None and self.limit < 1:
            raise ValueError("limit must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError("seed must lie in [0, 2^63)")
        if self.training.frozen_weights == "fp8" and (self.zero.stage == 3 or self.zero.offload_parameters):
            raise ValueError("training.frozen_weights: fp8 keeps the base whole on every GPU, ZeRO stage 3 shards it")

    def to_yaml(self) -> str:
        """Every key with its value, as it is written into the run directory."""
        return yaml.safe_dump(json.loads(json.dumps(asdict(self))), sort_keys=False, allow_unicode=True)


def load_recipe(name_or_file: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        name_or_file: a YAML file, or the name of a bundled recipe.
        overrides: `key=value` with dots for nesting (`training.epochs=1`); values are YAML.

    Raises:
        UserError: naming the file and the key.
    """
    raw, file = _read(name_or_file, "--recipe", Path(), ())
    for override in overrides:
        _apply(raw, override)
    _resolve_paths(raw, Path.cwd())
    return check_recipe(raw, f"{file} with --set" if overrides else str(file))


def _read(name_or_file: str, key: str, folder: Path, inheriting: tuple[Path, ...]) -> tuple[dict[str, Any], Path]:
    """A recipe's plain values on top of those of its base, and its file.

    Args:
        key: that named it.
        folder: that a relative name starts from.
        inheriting: the recipes whose base it is.
    """
    file = folder / name_or_file
    if not file.is_file():
        if name_or_file not in bundled_recipes():
            known = ", ".join(bundled_recipes())
            raise UserError(f"{key}: no file {name_or_file!r}, and the bundled recipes are: {known}")
        file = Path(str(RECIPES / f"{name_or_file}.yaml"))
    if file.resolve() in inheriting:
        raise UserError(f"{inheriting[-1]}: base: {name_or_file!r} is built on this recipe itself")
    try:
        raw = _plain(yaml.safe_load(file.read_text()))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(raw, dict):
        raise UserError(f"{file}: a recipe is a mapping of keys to values")
    _resolve_paths(raw, file.parent)
    if (base := raw.pop("base", None)) is not None:
        inherited, _ = _read(str(base), f"{file}: base", file.parent, (*inheriting, file.resolve()))
        raw = _merged(inherited, raw)
    return raw, file


def _plain(value: Any) -> Any:
    """Each place with a section and a list of its own: YAML's anchors share them, and changing one changed the other.

    Raises:
        yaml.YAMLError: a section that is inside itself.
    """
    try:
        if isinstance(value, dict):
            return {key: _plain(entry) for key, entry in value.items()}
        return [_plain(entry) for entry in value] if isinstance(value, list) else value
    except RecursionError:
        raise yaml.YAMLError("an anchor holds itself") from None


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Sections key by key; a list, or any other value, as a whole."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merged(base[key], value) if both else value
    return merged


def check_recipe(raw: dict[str, Any], source: str) -> Recipe:
    """A recipe from plain values.

    Raises:
        UserError: the first thing that is wrong.
    """
    try:
        recipe = TypeAdapter(Recipe).validate_python(raw)
        json.dumps(asdict(recipe), allow_nan=False)
        return recipe
    except ValidationError as error:
        # An unknown key first: it explains the one that is missing.
        problem = min(error.errors(), key=lambda problem: problem["type"] != "unexpected_keyword_argument")
        place = [str(part) for part in problem["loc"]]
        key = ".".join(place)
        if problem["type"] == "unexpected_keyword_argument":
            close = difflib.get_close_matches(place[-1], _known_keys(place[:-1]), n=1)
            hint = f"; did you mean {'.'.join([*place[:-1], close[0]])}?" if close else ""
            raise UserError(f"{source}: unknown key {key}{hint}") from None
        if problem["type"] == "missing":
            raise UserError(f"{source}: key {key} is missing") from None
        found = "" if isinstance(problem["input"], dict) else f" (found {problem['input']!r})"
        raise UserError(f"{source}: {key + ': ' if key else ''}{_in_words(problem, place)}{found}") from None
    except ValueError:
        raise UserError(f"{source}: every number must be finite, and one is not") from None


def _in_words(problem: Any, place: list[str]) -> str:
    """What is wrong with a value, in the words of YAML and not of Python."""
    if problem["type"].startswith("dataclass"):
        return f"must be a section of keys ({', '.join(_known_keys(place))})"
    return in_words(problem)


def _known_keys(place: list[str]) -> list[str]:
    kind: Any = Recipe
    for part in place:
        if not part.isdigit():
            hint = get_type_hints(kind).get(part)
            kind = next((kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)), None)
        if kind is None:
            return []
    return [field.name for field in fields(kind)]


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override!r}: expected key=value, such as training.epochs=1")
    *path, last = key.split(".")
    section: Any = raw
    for part in path:
        section = section.setdefault(part, {}) if isinstance(section, dict) else section
        if isinstance(section, list) and part.isdigit():
            raise UserError(f"--set {key}: lists are set whole, not by index")
    if not isinstance(section, dict):
        raise UserError(f"--set {key}: {'.'.join(path)} is not a section")
    section[last] = _override_value(value)


def _override_value(text: str) -> Any:
    """Numbers, truth values, null, {...} and [...] as YAML reads them; all else is text, colons and all."""
    try:
        value = _plain(yaml.safe_load(text))
    except yaml.YAMLError:
        return text
    bracketed = text.lstrip().startswith(("{", "["))
    quoted = text.lstrip().startswith(("'", '"'))
    scalar = value is None or isinstance(value, (bool, int, float))
    return value if scalar or bracketed or quoted else text


def _resolve_paths(raw: dict[str, Any], folder: Path) -> None:
    """A relative name that exists beside the recipe is that file; others, `package:...` and hub names too, stay."""

    def resolved(name: Any) -> Any:
        beside = folder / name if isinstance(name, str) and name else None
        return str(beside.resolve()) if beside is not None and beside.exists() else name

    for key in ("model", "prompts"):
        if key in raw:
            raw[key] = resolved(raw[key])
    guards = [raw.get("guard")]
    for guard in guards:
        if isinstance(guard, dict):
            guards += guard["members"] if isinstance(guard.get("members"), list) else []
            if "model" in guard:
                guard["model"] = resolved(guard["model"])
    evaluation = raw.get("evaluation")
    if isinstance(evaluation, dict) and isinstance(evaluation.get("sets"), list):
        for entry in evaluation["sets"]:
            if isinstance(entry, dict) and "file" in entry:
                entry["file"] = resolved(entry["file"])
