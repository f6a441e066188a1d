"""The estimate agrees with counts by hand, needs no weights, and is compared with the actual run in the report."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from tests.support.checkpoints import make_checkpoint
from tests.support.organism_runs import run_arguments
from thinksafe.cli.__main__ import main
from thinksafe.data.jsonl import read_records
from thinksafe.data.records import Response
from thinksafe.errors import UserError
from thinksafe.estimate.stages import Estimator, estimate, shape_of
from thinksafe.estimate.table import Price
from thinksafe.estimate.workload import TextLengths
from thinksafe.formatting import bar, duration, short_number
from thinksafe.hardware import GPU_NAMES, hardware_named
from thinksafe.model.config import ModelConfig
from thinksafe.model.public_configs import PUBLIC_CONFIGS
from thinksafe.recipe.loading import load_recipe
from thinksafe.run.directory import RunDir
from tools.recipe_estimates import RECIPE_NAMES, RECIPES, with_estimate_comment

H200 = hardware_named("H200")


def estimate_of(recipe: str, *overrides: str, gpu: str = "H200", gpus: int = 1):
    result = estimate(load_recipe(recipe, overrides), hardware_named(gpu), gpus)
    return result, {stage.name: stage for stage in result.stages}


# Times and memory


def test_estimate_of_smallest_model_matches_hand_count():
    """By hand, for Qwen3-0.6B on one H200: 27M sampled tokens; 11 minutes for the guard at the rate of matmuls, 18 at
    60% of it; 8 to 12 minutes for training on 97M tokens."""
    _, stages = estimate_of("qwen3-0.6b")
    minutes = {name: stage.roofline_seconds / 60 for name, stage in stages.items()}
    assert stages["generate"].tokens == pytest.approx(26.5e6, rel=0.03)
    assert 6 < minutes["generate"] < 12
    assert minutes["filter"] == pytest.approx(11, rel=0.05)
    assert stages["filter"].seconds / 60 == pytest.approx(18, rel=0.05)
    assert stages["train"].tokens == pytest.approx(97e6, rel=0.03)
    assert 8 < minutes["train"] < 12 and stages["train"].seconds < 15 * 60


def test_sampling_rate_matches_the_sampler_roofline():
    """The sampler's roofline table: 14.2k tokens/s for Qwen3-8B at a mean context of 1,500 tokens."""
    recipe, response = load_recipe("qwen3-8b"), 2980
    texts = TextLengths.from_means(10_000, 10_000, prompt=10, response=response, squared_response=response**2)
    model = ModelConfig.from_hugging_face(PUBLIC_CONFIGS[recipe.model], recipe.model)
    sampling = replace(recipe.generation.sampling, max_tokens=response)
    stage = Estimator(recipe, model, H200, num_gpus=1).sampling("generate", texts, sampling)
    assert stage.tokens / stage.roofline_seconds == pytest.approx(14_200, rel=0.05)


def test_mean_squared_length_is_that_of_a_log_normal(fresh_seed):
    draws = np.random.default_rng(fresh_seed).lognormal(math.log(500) - 0.32, 0.8, 400_000)
    expected = TextLengths.assumed(1, 1, 500, 10**6)
    mean_squared = 2 * (expected.response_pairs - expected.prompt_tokens * 500)
    assert expected.response_tokens == 500 and mean_squared == pytest.approx((draws**2).mean(), rel=0.05)


def test_more_gpus_share_the_work():
    one_gpu, one_gpu_stages = estimate_of("qwen3-8b")
    four_gpus, four_gpu_stages = estimate_of("qwen3-8b", gpus=4)
    assert four_gpu_stages["filter"].seconds == pytest.approx(one_gpu_stages["filter"].seconds / 4)
    assert four_gpu_stages["train"].seconds == pytest.approx(one_gpu_stages["train"].seconds / 4)
    assert one_gpu.seconds / 4 < four_gpus.seconds < one_gpu.seconds / 2


@pytest.mark.parametrize(
    ("override", "stage", "factor"),
    [
        ("training.epochs=6", "train", 2),
        ("generation.samples=2", "filter", 2),
        ("generation.samples=2", "train", 1),
        ("max_prompts=1000", "filter", 1000 / 39_987),
        ("guard={kind: ensemble, members: [{}, {threshold: 0.9}]}", "filter", 2),
        ("training.tokens_per_step=32768", "train", 1),
    ],
)
def test_time_scales_with_recipe_settings(override, stage, factor):
    plain = "generation.num_unsteered_prompts=0"
    (_, before), (_, after) = estimate_of("qwen3-0.6b", plain), estimate_of("qwen3-0.6b", plain, override)
    assert after[stage].seconds / before[stage].seconds == pytest.approx(factor, rel=0.01)


def test_kl_costs_a_forward_pass_of_the_reference():
    """The pass costs a third of a step on benign tokens; full fine-tuning also needs memory for a copy."""
    (_, plain), (_, with_kl) = estimate_of("qwen3-8b"), estimate_of("qwen3-8b", "method.benign_loss=kl")
    assert 1.2 < with_kl["train"].seconds / plain["train"].seconds < 1.5
    assert with_kl["train"].memory["optimizer"] == plain["train"].memory["optimizer"]
    overrides = ("training.method=full", "method.benign_loss=kl")
    full = (
        estimate_of("qwen3-0.6b", overrides[0])[1]["train"].memory,
        estimate_of("qwen3-0.6b", *overrides)[1]["train"].memory,
    )
    assert full[1]["optimizer"] - full[0]["optimizer"] == full[0]["weights"]


def test_fp8_halves_the_traffic_of_decoding():
    _, plain = estimate_of("qwen3-8b")
    _, cache = estimate_of("qwen3-8b", "sampler.kv_cache_dtype=fp8")
    _, both = estimate_of(
        "qwen3-8b", "sampler.kv_cache_dtype=fp8", "sampler.weight_dtype=fp8", "guard.sampler.weight_dtype=fp8"
    )
    assert 1.3 < plain["generate"].seconds / cache["generate"].seconds < 2
    assert both["generate"].seconds < cache["generate"].seconds
    assert both["generate"].memory["weights"] < 0.6 * plain["generate"].memory["weights"]
    single_rows = [
        estimate_of("qwen3-8b", "sampler.max_num_seqs=1", f"sampler.weight_dtype={dtype}")[1]["generate"]
        for dtype in ("auto", "fp8")
    ]
    assert 1.6 < single_rows[0].seconds / single_rows[1].seconds < 2, "a single row is bound by reading weights"
    assert 1.8 < plain["filter"].seconds / both["filter"].seconds < 2
    assert both["train"] == plain["train"], "training has another setting, frozen_weight_dtype"
    _, biased = estimate_of("r1-distill-qwen-7b", "sampler.kv_cache_dtype=fp8")
    assert biased["generate"].seconds > 0.75 * estimate_of("r1-distill-qwen-7b")[1]["generate"].seconds, (
        "keys of the Qwen2 family stay in bf16"
    )


def test_fp8_frozen_weights_speed_up_training_at_equal_memory():
    """In a small model attention, head and norms, which keep their dtype, take most of the time."""
    for name, lower, upper in (("qwen3-0.6b", 1.0, 1.3), ("qwen3-8b", 1.35, 1.8)):
        plain, frozen = (
            estimate_of(name, f"training.frozen_weight_dtype={weights}", "method.benign_loss=kl")[1]["train"]
            for weights in ("auto", "fp8")
        )
        assert lower < plain.roofline_seconds / frozen.roofline_seconds < upper, name
        assert all(frozen.memory[part] == plain.memory[part] for part in ("weights", "optimizer"))
    assert (
        estimate_of("qwen3-32b", "training.frozen_weight_dtype=fp8", gpus=8)[1]["train"].remark.count("ZeRO stage") == 1
    )


def test_tensor_parallelism_frees_memory(capsys):
    _, separate = estimate_of("qwen3-32b", gpu="H100", gpus=2)
    _, parallel = estimate_of("qwen3-32b", "sampler.tensor_parallel_size=2", gpu="H100", gpus=2)
    assert parallel["generate"].memory["weights"] < 0.55 * separate["generate"].memory["weights"]
    assert parallel["generate"].seconds < separate["generate"].seconds, "a larger batch fits"
    message = r"sampler\.tensor_parallel_size: 2 GPUs share one copy of the model, so --gpus must be a multiple of 2"
    with pytest.raises(UserError, match=message):
        estimate_of("qwen3-32b", "sampler.tensor_parallel_size=2", gpus=3)


def test_8b_full_fine_tuning_needs_131_gb_of_state():
    result, stages = estimate_of("qwen3-8b", "training.method=full")
    assert stages["train"].memory["weights"] + stages["train"].memory["optimizer"] > 131e9
    assert any(problem.startswith("train needs") for problem in result.problems)


def test_activation_checkpointing_depends_on_gpu_memory():
    _, large = estimate_of("qwen3-8b")
    _, small = estimate_of("qwen3-8b", gpu="H100")
    assert large["train"].remark.endswith("activation checkpointing: none")
    assert "selective in" in small["train"].remark
    assert small["train"].peak_bytes < 0.95 * hardware_named("H100").memory_bytes


@pytest.mark.parametrize("gpu", GPU_NAMES)
def test_problems_name_stages_above_95_percent_of_memory(gpu):
    for name in RECIPE_NAMES:
        result, stages = estimate_of(name, gpu=gpu)
        assert all(math.isfinite(stage.seconds) and stage.seconds >= stage.roofline_seconds for stage in result.stages)
        peak = max(stage.peak_bytes for stage in stages.values())
        assert bool(result.problems) == (peak > 0.95 * hardware_named(gpu).memory_bytes)


# Inputs


def test_public_configs_have_known_parameter_counts(tmp_path):
    for name in PUBLIC_CONFIGS:
        assert shape_of(name, "model").num_parameters > 5e8
    billions = {name: shape_of(name, "model").num_parameters / 1e9 for name in PUBLIC_CONFIGS}
    assert billions["Qwen/Qwen3-14B"] == pytest.approx(14.8, rel=0.01)
    assert billions["Qwen/Qwen3-32B"] == pytest.approx(32.8, rel=0.01)
    assert billions["deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"] == pytest.approx(1.78, rel=0.01)
    assert billions["deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"] == pytest.approx(7.62, rel=0.01)
    assert billions["meta-llama/Llama-Guard-3-8B"] == pytest.approx(8.03, rel=0.01)
    assert billions["allenai/wildguard"] == pytest.approx(7.25, rel=0.01)


def test_model_folder_needs_only_its_config(tmp_path):
    folder = make_checkpoint("llama", tmp_path / "student")
    for file in folder.iterdir():
        if file.name != "config.json":
            file.unlink()
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"text": "a", "label": "harmful"}\n{"text": "b", "label": "benign"}\n')
    _, stages = estimate_of(
        "qwen3-0.6b", f"model={folder}", f"prompts={prompts}", "guard={kind: oracle}", "evaluation.sets=[]"
    )
    assert list(stages) == ["generate", "probe", "filter", "train"]
    assert stages["probe"].tokens == 442 and stages["filter"].tokens == stages["generate"].tokens + 442
    assert stages["filter"].seconds == 0 and stages["generate"].tokens == pytest.approx(442 + 512, rel=0.2)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model=some/model"], "model: the shape of 'some/model' is unknown"),
        (["guard.model=some/model"], "guard.model: the shape of 'some/model' is unknown"),
        (["prompts=some/prompts"], "prompts: there is no file or folder 'some/prompts', and the estimate downloads"),
        (["prompts=null"], "prompts: missing"),
        (["lora.target_modules=[lm_head]"], "lora.target_modules: lm_head cannot carry an adapter"),
    ],
)
def test_unknown_models_and_prompts_are_named(capsys, overrides, expected):
    arguments = [word for override in overrides for word in ("--set", override)]
    assert main(["estimate", "--recipe", "qwen3-0.6b", *arguments]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


def test_unknown_set_size_is_assumed_and_named():
    sets = "evaluation.sets=[{name: a, source: some/set, kind: harmful}]"
    result, _ = estimate_of("qwen3-0.6b", sets)
    assert "some/set: the size is unknown, 500 rows are assumed" in result.assumptions


# Output


def test_command_prints_every_stage_and_the_cost(capsys):
    assert main(["estimate", "--recipe", "qwen3-8b", "--gpu", "h100", "--gpus", "2", "--price", "3.5 EUR"]) == 0
    printed = capsys.readouterr().out
    result, _ = estimate_of("qwen3-8b", gpu="H100", gpus=2)
    assert printed.startswith("qwen3-8b on 2 x H100, whose rates are expected from its data sheet")
    for stage in result.stages:
        title = "unsteered" if stage.name == "probe" else stage.name.replace("_", " ")
        line = next(line for line in printed.splitlines() if line.strip().startswith(title))
        assert duration(stage.seconds) in line and "█" in line
        assert f"{short_number(stage.tokens)} tokens" in line and f"{stage.peak_bytes / 2**30:.1f} GiB" in line
    hours = 2 * result.seconds / 3600
    assert f"{hours:.1f} GPU hours  {3.5 * hours:,.2f} EUR at 3.50 EUR a GPU hour" in printed
    assert "counted, not measured" in printed and "does not fit" not in printed
    assert main(["estimate", "--recipe", "qwen3-32b", "--gpu", "L40S"]) == 0
    assert "does not fit  generate needs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "two"), [("3", "6.00"), ("$2.5", "$5.00"), ("2.50 €/h", "5.00 €"), ("EUR 1", "EUR 2.00")]
)
def test_price_keeps_its_currency(text, two):
    assert Price.parse(text).format(2) == two


@pytest.mark.parametrize("text", ["", "free", "1,5", "1 2", "-"])
def test_invalid_price_is_a_user_error(text):
    with pytest.raises(UserError, match="--price"):
        Price.parse(text)


@pytest.mark.parametrize("arguments", [["--gpu", "TPU"], ["--price", "x"], ["--recipe", "nowhere"]])
def test_mistake_is_one_line(capsys, arguments):
    assert main(["estimate", "--recipe", "qwen3-0.6b", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_bars_are_exact_to_an_eighth():
    assert [bar(share, 4, "░") for share in (0, 0.25, 0.28125, 1, 7)] == ["░░░░", "█░░░", "█▏░░", "████", "████"]


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_recipe_comment_is_the_estimate_counted_not_measured(name):
    text = (RECIPES / f"{name}.yaml").read_text()
    assert with_estimate_comment(text, name) == text, "run: python -m tools.recipe_estimates"
    assert "counted, not measured" in text


# Comparison with the actual run


@pytest.mark.slow
def test_report_compares_the_estimate_with_the_actual_run(tmp_path, monkeypatch):
    monkeypatch.setattr("thinksafe.pipeline.preflight.hardware_of", lambda device: H200)
    out = tmp_path / "run"
    arguments = run_arguments(tmp_path / "sets", num_prompts=8, num_evaluated=2)
    assert main(["run", *arguments, "--out", str(out)]) == 0
    expected = json.loads((out / "estimate.json").read_text())
    report = json.loads((out / "report.json").read_text())
    assert report["estimate"]["gpu"] == "H200"
    actual = {stage["name"]: stage for stage in report["stages"]}
    assert [stage["name"] for stage in report["estimate"]["stages"]] == list(expected["stages"])
    assert list(expected["stages"]) == [name for name in actual if name != "accept"], "every other stage is estimated"
    for stage in report["estimate"]["stages"]:
        expected_stage = expected["stages"][stage["name"]]
        for key in ("seconds", "tokens"):
            assert stage[key] == [expected_stage[key], actual[stage["name"]][key]]
        assert stage["peak_bytes"] == [expected_stage["peak_bytes"], None], "a CPU has no peak"
    total = report["estimate"]["total"]
    for key in ("seconds", "tokens"):
        assert total[key] == [sum(stage[key][moment] for stage in report["estimate"]["stages"]) for moment in (0, 1)]
    assert total["peak_bytes"] == [max(stage["peak_bytes"] for stage in expected["stages"].values()), None]
    assert "Estimate and measurement" in (out / "report.html").read_text()
    # Once a stage is done, the estimate is not replaced. A new estimate with the run directory uses its responses.
    before = (out / "estimate.json").read_bytes()
    assert main(["run", *arguments, "--out", str(out)]) == 0
    assert (out / "estimate.json").read_bytes() == before
    recipe = load_recipe(str(out / "recipe.yaml"))
    new_tokens = {stage.name: stage.tokens for stage in estimate(recipe, H200, run=RunDir(out, recipe)).stages}
    for name in ("generate", "probe", "filter"):
        assert new_tokens[name] == actual[name]["tokens"], name
    # Training counts whole sequences. The estimate includes the steering instruction, which training leaves out.
    responses = read_records(out / "responses.jsonl", Response)
    steered = sum(response.num_prompt_tokens + response.num_tokens for response in responses)
    assert new_tokens["train"] == recipe.training.epochs * steered
    assert 0.5 < actual["train"]["tokens"] / new_tokens["train"] <= 1


@pytest.mark.parametrize("lengths", [True, False])
def test_imported_responses_count_and_one_per_prompt_is_trained(tmp_path, lengths):
    """The recipe names no prompts, and the imported file may lack token counts."""
    counted, (out, file) = {"num_prompt_tokens": 10, "num_tokens": 7} if lengths else {}, (tmp_path / "run", "r.jsonl")
    row = {"text": "<think>\nwell\n</think>\n\nyes .", "label": "benign", **counted}
    rows = [row | {"prompt": f"is {noun} here ?", "sample": sample} for noun in "abcd" for sample in range(3)]
    (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = ["prompts=null", "evaluation.sets=[]"]
    arguments = [word for override in overrides for word in ("--set", override)]
    arguments = ["--recipe", "organism", *arguments, "--responses", str(tmp_path / file), "--out", str(out)]
    assert main(["filter", *arguments]) == 0
    recipe = load_recipe("organism", overrides)
    stages = {stage.name: stage for stage in estimate(recipe, H200, run=RunDir(out, recipe)).stages}
    response, whole = (7, 17) if lengths else (160, 310)
    assert stages["filter"].tokens == 4 * 3 * response
    assert stages["train"].tokens == recipe.training.epochs * 4 * whole


def test_recipe_can_be_corrected_after_its_estimate(tmp_path, monkeypatch):
    monkeypatch.setattr("thinksafe.pipeline.preflight.hardware_of", lambda device: H200)
    arguments = ["--recipe", "organism", "--out", str(tmp_path / "run")]
    assert main(["generate", *arguments, "--prompts", str(tmp_path / "missing.jsonl")]) == 2
    assert main(["train", *arguments, "--set", "training.epochs=1"]) == 2
    assert json.loads((tmp_path / "run" / "estimate.json").read_text())["gpu"] == "H200"
