"""The estimate: the paper's floors come out of it, it needs no weights, and the report holds it to account."""

import json
import math

import numpy as np
import pytest

from tests.pipeline.test_pipeline import settings
from tests.support.checkpoints import make_checkpoint
from thinksafe.cli.__main__ import main
from thinksafe.data.jsonl import read_records
from thinksafe.data.records import Response
from thinksafe.errors import UserError
from thinksafe.estimate.stages import _sampling, estimate, shape_of
from thinksafe.estimate.table import Price
from thinksafe.estimate.workload import Texts
from thinksafe.formatting import bar, duration, in_short
from thinksafe.hardware import GPU_NAMES, hardware_named
from thinksafe.model.public_configs import PUBLIC
from thinksafe.recipe.loading import load_recipe
from thinksafe.run.directory import RunDir
from tools.recipe_estimates import NAMES, RECIPES, with_expectation

H200 = hardware_named("H200")


def of(recipe: str, *overrides: str, gpu: str = "H200", gpus: int = 1):
    found = estimate(load_recipe(recipe, overrides), hardware_named(gpu), gpus)
    return found, {stage.name: stage for stage in found.stages}


# The figures


def test_the_papers_floors_for_the_smallest_model_come_out():
    """Counted by hand for Qwen3-0.6B on one H200: 27M tokens, the guard 11 minutes at the rate of products and 18 at
    60% of it, training on 97M tokens 8 to 12 minutes."""
    _, found = of("qwen3-0.6b")
    minutes = {name: stage.least_seconds / 60 for name, stage in found.items()}
    assert found["generate"].tokens == pytest.approx(26.5e6, rel=0.03)
    assert 6 < minutes["generate"] < 12
    assert minutes["filter"] == pytest.approx(11, rel=0.05)
    assert found["filter"].seconds / 60 == pytest.approx(18, rel=0.05)
    assert found["train"].tokens == pytest.approx(97e6, rel=0.03)
    assert 8 < minutes["train"] < 12 and found["train"].seconds < 15 * 60


def test_sampling_follows_the_limit_of_a_pass():
    """The table of the sampler's limits: 14.2k tokens/s for Qwen3-8B where a token sees 1,500 others."""
    recipe, response = load_recipe("qwen3-8b"), 2980
    texts = [Texts(10_000, 10_000, prompt=10, response=response, square=response**2)]
    stage = _sampling("generate", texts, shape_of(recipe.model, "model"), recipe.sampler, response, H200, num_gpus=1)
    assert stage.tokens / stage.least_seconds == pytest.approx(14_200, rel=0.05)


def test_lengths_follow_the_law_they_are_taken_from(fresh_seed):
    draws = np.random.default_rng(fresh_seed).lognormal(math.log(500) - 0.32, 0.8, 400_000)
    expected = Texts.expected(1, 1, 500, 10**6)
    assert expected.response == 500 and expected.square == pytest.approx((draws**2).mean(), rel=0.05)


def test_more_gpus_share_the_work_and_cost_the_same():
    (one, alone), (four, shared) = of("qwen3-8b"), of("qwen3-8b", gpus=4)
    assert shared["filter"].seconds == pytest.approx(alone["filter"].seconds / 4)
    assert shared["train"].seconds == pytest.approx(alone["train"].seconds / 4)
    assert one.seconds / 4 < four.seconds < one.seconds / 2


@pytest.mark.parametrize(
    ("override", "stage", "factor"),
    [
        ("training.epochs=6", "train", 2),
        ("generation.samples=2", "filter", 2),
        ("generation.samples=2", "train", 1),
        ("limit=1000", "filter", 1000 / 39_987),
        ("guard={kind: ensemble, members: [{}, {threshold: 0.9}]}", "filter", 2),
        ("training.batch_tokens=32768", "train", 1),
    ],
)
def test_time_follows_the_recipe(override, stage, factor):
    plain = "generation.unsteered_probe=0"
    (_, before), (_, after) = of("qwen3-0.6b", plain), of("qwen3-0.6b", plain, override)
    assert after[stage].seconds / before[stage].seconds == pytest.approx(factor, rel=0.01)


def test_keeping_to_the_reference_costs_its_forward_pass():
    """A third of a step on benign tokens, within the half more that we allow; in full fine-tuning a copy as well."""
    (_, plain), (_, kept) = of("qwen3-8b"), of("qwen3-8b", "training.benign_loss=kl")
    assert 1.2 < kept["train"].seconds / plain["train"].seconds < 1.5
    assert kept["train"].memory["optimiser"] == plain["train"].memory["optimiser"]
    overrides = ("training.method=full", "training.benign_loss=kl")
    full = of("qwen3-0.6b", overrides[0])[1]["train"].memory, of("qwen3-0.6b", *overrides)[1]["train"].memory
    assert full[1]["optimiser"] - full[0]["optimiser"] == full[0]["weights"]


def test_eight_bits_halve_what_decoding_reads():
    _, plain = of("qwen3-8b")
    _, cache = of("qwen3-8b", "sampler.kv_cache_dtype=fp8")
    _, both = of("qwen3-8b", "sampler.kv_cache_dtype=fp8", "sampler.weights=fp8", "guard.sampler.weights=fp8")
    assert 1.3 < plain["generate"].seconds / cache["generate"].seconds < 2
    assert both["generate"].seconds < cache["generate"].seconds
    assert both["generate"].memory["weights"] < 0.6 * plain["generate"].memory["weights"]
    one_by_one = [of("qwen3-8b", "sampler.max_running=1", f"sampler.weights={kept}")[1] for kept in ("auto", "fp8")]
    assert 1.6 < one_by_one[0]["generate"].seconds / one_by_one[1]["generate"].seconds < 2, "bound by reading weights"
    assert 1.8 < plain["filter"].seconds / both["filter"].seconds < 2
    assert both["train"] == plain["train"], "training has a setting of its own"
    _, biased = of("r1-distill-qwen-7b", "sampler.kv_cache_dtype=fp8")
    assert biased["generate"].seconds > 0.75 * of("r1-distill-qwen-7b")[1]["generate"].seconds, "its keys stay in bf16"


def test_frozen_weights_in_eight_bits_halve_the_products_of_training_and_take_the_same_memory():
    """Of a small model attention, head and norms take the larger part, which stay as they are."""
    for name, least, most in (("qwen3-0.6b", 1.0, 1.3), ("qwen3-8b", 1.35, 1.8)):
        plain, frozen = (
            of(name, f"training.frozen_weights={weights}", "training.benign_loss=kl")[1]["train"]
            for weights in ("auto", "fp8")
        )
        assert least < plain.least_seconds / frozen.least_seconds < most, name
        assert all(frozen.memory[held] == plain.memory[held] for held in ("weights", "optimiser"))
    assert of("qwen3-32b", "training.frozen_weights=fp8", gpus=8)[1]["train"].remark.count("ZeRO stage") == 1


def test_gpus_that_hold_a_model_together_make_room(capsys):
    _, alone = of("qwen3-32b", gpu="H100", gpus=2)
    _, together = of("qwen3-32b", "sampler.tensor_parallel=2", gpu="H100", gpus=2)
    assert together["generate"].memory["weights"] < 0.55 * alone["generate"].memory["weights"]
    assert together["generate"].seconds < alone["generate"].seconds, "more rows fit at once"
    with pytest.raises(
        UserError, match=r"sampler\.tensor_parallel: 2 GPUs hold one model together; give --gpus a multiple"
    ):
        of("qwen3-32b", "sampler.tensor_parallel=2", gpus=3)


def test_full_fine_tuning_of_eight_billion_parameters_needs_131_gb_of_states():
    found, by_name = of("qwen3-8b", "training.method=full")
    assert by_name["train"].memory["weights"] + by_name["train"].memory["optimiser"] > 131e9
    assert any(problem.startswith("train needs") for problem in found.problems)


def test_what_is_computed_again_is_chosen_by_the_gpus_memory():
    _, large = of("qwen3-8b")
    _, small = of("qwen3-8b", gpu="H100")
    assert large["train"].remark.endswith("computed again: none")
    assert "selective in" in small["train"].remark
    assert small["train"].peak_bytes < 0.95 * hardware_named("H100").memory_bytes


@pytest.mark.parametrize("gpu", GPU_NAMES)
def test_what_fits_fits_with_room_to_spare(gpu):
    for name in NAMES:
        found, by_name = of(name, gpu=gpu)
        assert all(math.isfinite(stage.seconds) and stage.seconds >= stage.least_seconds for stage in found.stages)
        peak = max(stage.peak_bytes for stage in by_name.values())
        assert bool(found.problems) == (peak > 0.95 * hardware_named(gpu).memory_bytes)


# What it reads


def test_the_table_of_shapes_is_read_as_a_config(tmp_path):
    for name in PUBLIC:
        assert shape_of(name, "model").num_parameters > 5e8
    billions = {name: shape_of(name, "model").num_parameters / 1e9 for name in PUBLIC}
    assert billions["Qwen/Qwen3-14B"] == pytest.approx(14.8, rel=0.01)
    assert billions["Qwen/Qwen3-32B"] == pytest.approx(32.8, rel=0.01)
    assert billions["deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"] == pytest.approx(1.78, rel=0.01)
    assert billions["deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"] == pytest.approx(7.62, rel=0.01)
    assert billions["meta-llama/Llama-Guard-3-8B"] == pytest.approx(8.03, rel=0.01)
    assert billions["allenai/wildguard"] == pytest.approx(7.25, rel=0.01)


def test_a_folder_needs_its_config_alone(tmp_path):
    folder = make_checkpoint("llama", tmp_path / "student")
    for file in folder.iterdir():
        if file.name != "config.json":
            file.unlink()
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"text": "a", "label": "harmful"}\n{"text": "b", "label": "benign"}\n')
    _, found = of("qwen3-0.6b", f"model={folder}", f"prompts={prompts}", "guard={kind: oracle}", "evaluation.sets=[]")
    assert list(found) == ["generate", "probe", "filter", "train"]
    assert found["probe"].tokens == 442 and found["filter"].tokens == found["generate"].tokens + 442
    assert found["filter"].seconds == 0 and found["generate"].tokens == pytest.approx(442 + 512, rel=0.2)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model=some/model"], "model: the shape of 'some/model' is not known here"),
        (["guard.model=some/model"], "guard.model: the shape of 'some/model' is not known here"),
        (["prompts=some/prompts"], "prompts: how many 'some/prompts' holds is not known here"),
        (["prompts=null"], "prompts: missing"),
        (["lora.target_modules=[lm_head]"], "lora.target_modules: lm_head cannot carry an adapter"),
    ],
)
def test_what_cannot_be_known_without_the_hub_is_said(capsys, overrides, expected):
    arguments = [word for override in overrides for word in ("--set", override)]
    assert main(["estimate", "--recipe", "qwen3-0.6b", *arguments]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


def test_an_unknown_set_is_counted_and_named():
    sets = "evaluation.sets=[{name: a, file: some/set, kind: harmful}]"
    found, _ = of("qwen3-0.6b", sets)
    assert "some/set: its size is not known here, taken as 500 rows" in found.assumptions


# What people see


def test_the_command_shows_every_stage_with_its_cost(capsys):
    assert main(["estimate", "--recipe", "qwen3-8b", "--gpu", "h100", "--gpus", "2", "--price", "3.5 EUR"]) == 0
    shown = capsys.readouterr().out
    found, _ = of("qwen3-8b", gpu="H100", gpus=2)
    assert shown.startswith("qwen3-8b on 2 x H100, whose rates are expected from its data sheet")
    for stage in found.stages:
        line = next(line for line in shown.splitlines() if line.strip().startswith(stage.name.replace("_", " ")))
        assert duration(stage.seconds) in line and "█" in line
        assert f"{in_short(stage.tokens)} tokens" in line and f"{stage.peak_bytes / 2**30:.1f} GiB" in line
    hours = 2 * found.seconds / 3600
    assert f"{hours:.1f} GPU hours  {3.5 * hours:,.2f} EUR at 3.50 EUR a GPU hour" in shown
    assert "not measured yet" in shown and "does not fit" not in shown
    assert main(["estimate", "--recipe", "qwen3-32b", "--gpu", "L40S"]) == 0
    assert "does not fit  generate needs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "two"), [("3", "6.00"), ("$2.5", "$5.00"), ("2.50 €/h", "5.00 €"), ("EUR 1", "EUR 2.00")]
)
def test_a_price_keeps_its_currency(text, two):
    assert Price.parse(text).of(2) == two


@pytest.mark.parametrize("text", ["", "free", "1,5", "1 2", "-"])
def test_a_price_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="--price"):
        Price.parse(text)


@pytest.mark.parametrize("arguments", [["--gpu", "TPU"], ["--price", "x"], ["--recipe", "nowhere"]])
def test_a_mistake_is_one_line(capsys, arguments):
    assert main(["estimate", "--recipe", "qwen3-0.6b", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_bars_are_exact_to_an_eighth():
    assert [bar(share, 4, "░") for share in (0, 0.25, 0.28125, 1, 7)] == ["░░░░", "█░░░", "█▏░░", "████", "████"]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_the_estimate_says(name):
    text = (RECIPES / f"{name}.yaml").read_text()
    assert with_expectation(text, name) == text, "run: python -m tools.recipe_estimates"


# Against what happened


def test_the_report_compares_the_estimate_with_what_happened(tmp_path, monkeypatch):
    monkeypatch.setattr("thinksafe.pipeline.preflight.hardware_of", lambda device: H200)
    out = tmp_path / "run"
    arguments = settings(tmp_path / "sets", prompts=8, evaluated=2)
    assert main(["run", *arguments, "--out", str(out)]) == 0
    expected = json.loads((out / "estimate.json").read_text())
    report = json.loads((out / "report.json").read_text())
    assert report["estimate"]["gpu"] == "H200"
    happened = {stage["name"]: stage for stage in report["stages"]}
    assert [stage["name"] for stage in report["estimate"]["stages"]] == list(expected["stages"])
    assert list(expected["stages"]) == [name for name in happened if name != "accept"], "nothing that ran is left out"
    for stage in report["estimate"]["stages"]:
        foreseen = expected["stages"][stage["name"]]
        for key in ("seconds", "tokens"):
            assert stage[key] == [foreseen[key], happened[stage["name"]][key]]
        assert stage["peak_bytes"] == [foreseen["peak_bytes"], None], "no GPU has told"
    total = report["estimate"]["total"]
    for key in ("seconds", "tokens"):
        assert total[key] == [sum(stage[key][moment] for stage in report["estimate"]["stages"]) for moment in (0, 1)]
    assert total["peak_bytes"] == [max(stage["peak_bytes"] for stage in expected["stages"].values()), None]
    assert "Expected and happened" in (out / "report.html").read_text()
    # Once something is done, the estimate stays; given the directory, another one starts from its responses.
    before = (out / "estimate.json").read_bytes()
    assert main(["run", *arguments, "--out", str(out)]) == 0
    assert (out / "estimate.json").read_bytes() == before
    recipe = load_recipe(str(out / "recipe.yaml"))
    again = {stage.name: stage.tokens for stage in estimate(recipe, H200, run=RunDir(out, recipe)).stages}
    for name in ("generate", "probe", "filter"):
        assert again[name] == happened[name]["tokens"], name
    # Whole sequences: the prompts, here with the instruction that training leaves out, and accepted responses.
    steered = sum(one.num_prompt_tokens + one.num_tokens for one in read_records(out / "responses.jsonl", Response))
    assert again["train"] == recipe.training.epochs * steered
    assert 0.5 < happened["train"]["tokens"] / again["train"] <= 1


@pytest.mark.parametrize("lengths", [True, False])
def test_responses_that_were_brought_are_counted_and_one_a_prompt_is_trained_on(tmp_path, lengths):
    """With a recipe that names no prompts, and of files that need not tell how long a response is."""
    counted, (out, file) = {"num_prompt_tokens": 10, "num_tokens": 7} if lengths else {}, (tmp_path / "run", "r.jsonl")
    said = {"text": "<think>\nwell\n</think>\n\nyes .", "label": "benign", **counted}
    rows = [said | {"prompt": f"is {noun} here ?", "sample": sample} for noun in "abcd" for sample in range(3)]
    (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = ["prompts=null", "evaluation.sets=[]"]
    arguments = [word for override in overrides for word in ("--set", override)]
    arguments = ["--recipe", "organism", *arguments, "--responses", str(tmp_path / file), "--out", str(out)]
    assert main(["filter", *arguments]) == 0
    recipe = load_recipe("organism", overrides)
    found = {stage.name: stage for stage in estimate(recipe, H200, run=RunDir(out, recipe)).stages}
    response, whole = (7, 17) if lengths else (160, 310)
    assert found["filter"].tokens == 4 * 3 * response
    assert found["train"].tokens == recipe.training.epochs * 4 * whole


def test_a_recipe_can_still_be_corrected_after_its_estimate(tmp_path, monkeypatch):
    monkeypatch.setattr("thinksafe.pipeline.preflight.hardware_of", lambda device: H200)
    arguments = ["--recipe", "organism", "--out", str(tmp_path / "run")]
    assert main(["generate", *arguments, "--prompts", str(tmp_path / "missing.jsonl")]) == 2
    assert main(["train", *arguments, "--set", "training.epochs=1"]) == 2
    assert json.loads((tmp_path / "run" / "estimate.json").read_text())["gpu"] == "H200"
