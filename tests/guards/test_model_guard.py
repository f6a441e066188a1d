"""Model guards: the right prompt, exact probabilities, and their cost.

The oracles are transformers (token ids, fp64 logits, greedy decoding) and counts of tokens and of rows at the LM head.
"""

import gc
import re
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tests.support.tiny_guards import (
    KINDS,
    RESPONSES,
    RESPONSES_WITHOUT_THINK_TAGS,
    STRIPPED_KINDS,
    answer_ids,
    config,
    guard_prompt,
    replies,
    response_to,
    responses_for,
    transformers_ids,
    verdicts_by_id,
)
from thinksafe.guards import model_guard
from thinksafe.guards.config import GuardConfig
from thinksafe.guards.formats import GuardFormat, Question
from thinksafe.guards.model_guard import ModelGuard
from thinksafe.guards.oracle import OracleGuard
from thinksafe.guards.registry import build_guard
from thinksafe.sampler import model_runner as runner
from thinksafe.sampler.config import EngineConfig

pytest_plugins = ["tests.support.tiny_guards"]

one_kind = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "wildguard" else pytest.mark.exhaustive) for kind in KINDS]
)
"""For promises of the code that all kinds share."""


# The prompt


def test_prompt_has_the_ids_of_transformers(guard, kind, tokenizers):
    for response in responses_for(kind):
        for reply in replies(kind):
            expected = transformers_ids(tokenizers[kind], guard_prompt(kind, response) + reply)
            assert guard.token_ids(response.prompt, response.text, reply) == expected


@settings(deadline=None)
@given(texts=st.tuples(*[st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<[|\0"))] * 2))
@pytest.mark.parametrize("kind", KINDS)
def test_any_text_without_control_tokens_has_the_ids_of_transformers(guards, tokenizers, kind, texts):
    reply = replies(kind)[1]
    expected = transformers_ids(tokenizers[kind], guard_prompt(kind, response_to(*texts)) + reply)
    assert guards[kind].token_ids(*texts, reply) == expected


@pytest.mark.parametrize("kind", ["llama_guard", "qwen3guard"])
def test_chat_template_is_applied_as_in_transformers(decoders, tokenizers, kind):
    """Llama's template strips messages, Qwen's does not; a template written in YAML ends with a newline."""
    tokenizer = tokenizers[kind]
    harm = Question("harm", {" Yes": "safe", " No": "unsafe"}, answer_prefix="Fine?")
    template_text = "\nAsked {prompt}, answered {response}.\nFine?\n"

    def guard(template):
        custom_format = GuardFormat((harm,), template=template)
        return ModelGuard(decoders[kind], tokenizer, GuardConfig(kind="template", model="tiny", format=custom_format))

    for response in RESPONSES_WITHOUT_THINK_TAGS:
        turns = [{"role": "user", "content": response.prompt}, {"role": "assistant", "content": response.text}]
        text = tokenizer.hugging_face.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = guard(None).token_ids(response.prompt, response.text, "Fine?")
        assert ids == transformers_ids(tokenizer, text + "Fine?")
        user_text = f"\nAsked {response.prompt}, answered {response.text}.\nFine?\n"
        turns = [{"role": "user", "content": user_text}]
        text = tokenizer.hugging_face.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert guard(template_text).token_ids(response.prompt, response.text, "") == transformers_ids(tokenizer, text)


def test_reference_prompt_has_a_second_begin_of_text(guards, tokenizers):
    tokens = tokenizers["llama_guard"].hugging_face.convert_ids_to_tokens
    assert tokens(guards["llama_guard_reference"].token_ids("a", "b", "")[:3]) == [
        "<|begin_of_text|>",
        "Ġ",
        "<|begin_of_text|>",
    ]
    assert tokens(guards["llama_guard"].token_ids("a", "b", "")[:3]) == [
        "Ġ",
        "<|begin_of_text|>",
        "<|start_header_id|>",
    ]


def test_wildguard_prompt_begins_without_a_space(guards, tokenizers):
    tokens = tokenizers["wildguard"].hugging_face.convert_ids_to_tokens(guards["wildguard"].token_ids("a", "b", ""))
    assert tokens[:3] == ["<s>", "<0x3C>", "<0x7C>"] and tokens.count("[INST]") == tokens.count("[/INST]") == 1
    assert tokens[tokens.index("[/INST]") + 1] == tokens[-1] == "<0x0A>"


# Probabilities and decisions


def test_probabilities_equal_those_of_transformers(guard, kind, folders, tokenizers):
    """The oracle runs in fp64; every question follows the likeliest answers to the questions before."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folders[kind], dtype=torch.float64), tokenizers[kind]
    verdicts = verdicts_by_id(guard, responses_for(kind))
    for response in responses_for(kind):
        verdict, context = verdicts[response.prompt_id], guard_prompt(kind, response)
        for question in config(kind).guard_format.questions:
            if question.only_if_unsafe and verdict.decision != "unsafe":
                assert verdict.category == "" and not verdict.labels
                continue
            context += question.answer_prefix
            with torch.no_grad():
                logits = model(torch.tensor([transformers_ids(tokenizer, context)])).logits[0, -1]
            probabilities = logits.softmax(-1)
            answer_probabilities = probabilities[answer_ids(tokenizer, context, question.answers)].tolist()
            expected = dict.fromkeys(question.answers.values(), 0.0)
            for meaning, p in zip(question.answers.values(), answer_probabilities, strict=True):
                expected[meaning] += p
            likeliest = dict(zip(answer_probabilities, question.answers, strict=True))
            if question.topic == "harm":
                assert verdict.p_safe == pytest.approx(expected["safe"], rel=1e-4, abs=1e-9)
                assert verdict.p_unsafe == pytest.approx(expected["unsafe"], rel=1e-4, abs=1e-9)
                no_verdict = (
                    kind == "llama_guard_reference" and max(answer_probabilities) < probabilities.topk(2).values[-1]
                )
                expected_decision = "safe" if no_verdict or expected["safe"] > expected["unsafe"] else "unsafe"
                assert verdict.decision == expected_decision
                assert verdict.reason == (
                    "no_verdict" if no_verdict else "unsafe" if verdict.decision == "unsafe" else ""
                )
                likeliest = {p: w for p, w in likeliest.items() if question.answers[w] == verdict.decision}
            else:
                for meaning in set(expected) - {"neither"}:
                    assert verdict.labels[meaning] == pytest.approx(expected[meaning], rel=1e-4, abs=1e-9)
            if question.topic == "refusal":
                assert verdict.refusal == (expected["refusal"] > expected["compliance"])
            if question.topic == "category" and verdict.decision == "unsafe":
                assert verdict.category == max(expected, key=expected.get).replace("neither", "")
            context += likeliest[max(likeliest)]
        assert verdict.windows == 1
        if kind in ("template", *STRIPPED_KINDS):
            assert verdict.refusal is None


@pytest.mark.parametrize("kind", ["wildguard", "llama_guard"])
def test_decision_equals_greedy_decoding_within_the_format(guards, folders, tokenizers, kind):
    """Transformers generates a reply in which only the answers are free."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folders[kind]), tokenizers[kind]
    verdicts = verdicts_by_id(guards[kind])
    for response in responses_for(kind):
        context = start = guard_prompt(kind, response)
        for question in config(kind).guard_format.questions:
            if question.only_if_unsafe and not context.endswith("unsafe"):
                continue
            context += question.answer_prefix
            words = answer_ids(tokenizer, context, question.answers)
            ids = torch.tensor([transformers_ids(tokenizer, context)])
            options = {"max_new_tokens": 1, "do_sample": False, "prefix_allowed_tokens_fn": lambda *_, w=words: w}
            generated = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, -1].item()
            context += list(question.answers)[words.index(generated)]
        reply, verdict = context.removeprefix(start), verdicts[response.prompt_id]
        if kind == "wildguard":
            answers = dict(re.findall(r"(Harmful request|Response refusal|Harmful response): (yes|no|n/a)", reply))
            assert len(answers) == 3
            if (harm := answers["Harmful response"]) != "n/a":
                assert (verdict.decision == "unsafe") == (harm == "yes")
            if (refusal := answers["Response refusal"]) != "n/a":
                assert verdict.refusal == (refusal == "yes")
        else:
            first_line, _, category = reply.partition("\n")
            assert (verdict.decision, verdict.category) == (first_line, category)


def test_both_verdicts_occur(guard, kind):
    """Without this, the other tests would pass with a guard that always gives the same decision."""
    responses = [response_to("q", f"{n} " * (n + 1), str(n)) for n in range(40)]
    verdicts = verdicts_by_id(guard, responses).values()
    # With random weights neither verdict is among the likeliest tokens; the paper's code calls that safe.
    expected = {"safe"} if kind == "llama_guard_reference" else {"safe", "unsafe"}
    assert {verdict.decision for verdict in verdicts} == expected
    if kind in ("wildguard", "qwen3guard"):
        assert {True, False} == {verdict.refusal for verdict in verdicts}


def test_result_does_not_depend_on_the_batch(guard):
    verdicts = verdicts_by_id(guard)
    for response in RESPONSES[:5]:
        single_verdict = verdicts_by_id(guard, [response])[response.prompt_id]
        assert single_verdict.p_safe == pytest.approx(verdicts[response.prompt_id].p_safe, rel=1e-4)
        expected = (verdicts[response.prompt_id].decision, verdicts[response.prompt_id].category)
        assert (single_verdict.decision, single_verdict.category) == expected


@one_kind
def test_small_batches_give_the_same_and_read_responses_late(decoders, tokenizers, guard, kind):
    small_config = GuardConfig(
        kind=kind,
        model="tiny",
        min_verdict_probability=0.0,
        format=config(kind).format,
        sampler=EngineConfig(3, kv_cache_gib=0.02),
    )
    requested_ids = []

    def source():
        for response in RESPONSES:
            requested_ids.append(response.prompt_id)
            yield response

    expected, verdicts = verdicts_by_id(guard), {}
    small_guard = build_guard(small_config, lambda _: (decoders[kind], tokenizers[kind]))
    for verdict in small_guard.judge(source()):
        assert len(requested_ids) <= 3 + len(verdicts), "the others stay available to other workers"
        verdicts[verdict.prompt_id] = verdict
    assert verdicts.keys() == expected.keys()
    for id_, verdict in verdicts.items():
        assert verdict.p_unsafe == pytest.approx(expected[id_].p_unsafe, rel=1e-4)
        assert verdict.labels == pytest.approx(expected[id_].labels, rel=1e-4, abs=1e-9)


@one_kind
def test_guard_frees_its_cache_between_two_calls(guard, monkeypatch):
    """The pages would occupy most of the GPU memory that the student needs for sampling and training."""
    engines = []
    init = model_guard.Engine.__init__

    def recording_init(engine, *arguments, **keywords):
        engines.append(weakref.ref(engine))
        init(engine, *arguments, **keywords)

    monkeypatch.setattr(model_guard.Engine, "__init__", recording_init)
    first_verdicts, second_verdicts = verdicts_by_id(guard), verdicts_by_id(guard)
    gc.collect()
    assert len(engines) == 2 and engines[0]() is None and engines[1]() is None
    assert [v.decision for v in second_verdicts.values()] == [v.decision for v in first_verdicts.values()]


# Cost


def test_policy_is_computed_once_and_only_verdicts_reach_the_head(guard, kind, monkeypatch):
    """The test counts tokens that run through the model, and rows that reach the LM head."""
    passes, head_rows = [], []
    real_score, real_logprobs = model_guard.Engine.score, runner.linear_logprob_of
    responses = [response_to(f"How do I fold boat {n}?", f"{n} folds. " * (n + 1), str(n)) for n in range(24)]

    def counted_score(engine, prompts, token_ids):
        schedule = engine.scheduler.schedule

        def recording_schedule():
            batch = schedule()
            if batch is not None:
                passes.append(batch.num_tokens)
            return batch

        engine.scheduler.schedule = recording_schedule
        return real_score(engine, prompts, token_ids)

    def counted_logprobs(hidden, head, token_ids):
        head_rows.append(len(hidden))
        return real_logprobs(hidden, head, token_ids)

    monkeypatch.setattr(model_guard.Engine, "score", counted_score)
    dense_rows, real_dense = [], runner._logprobs_from_logits

    def counted_dense(hidden, head, token_ids):
        dense_rows.append(len(hidden))
        return real_dense(hidden, head, token_ids)

    monkeypatch.setattr(runner, "linear_logprob_of", counted_logprobs)
    monkeypatch.setattr(runner, "_logprobs_from_logits", counted_dense)
    verdicts = verdicts_by_id(guard, responses)
    questions, num_responses = config(kind).guard_format.questions, len(responses)
    num_unsafe = sum(verdict.decision == "unsafe" for verdict in verdicts.values())
    num_without_verdict = sum(verdict.reason == "no_verdict" for verdict in verdicts.values())
    rows = sum(num_unsafe if question.only_if_unsafe else num_responses for question in questions)
    assert sum(head_rows) == rows, "each row scores a few tokens"
    assert sum(dense_rows) == num_without_verdict, "scoring all tokens is one matmul"
    assert (num_without_verdict > 0) == (kind == "llama_guard_reference")
    lengths = [len(guard.token_ids(r.prompt, r.text, replies(kind)[1])) for r in responses]
    columns = zip(*(guard.token_ids(r.prompt, r.text, "") for r in responses), strict=False)
    shared = next(index for index, ids in enumerate(columns) if len(set(ids)) > 1) // 16 * 16
    first_question_tokens = sum(lengths) - (num_responses - 1) * shared
    assert shared >= (16 if kind == "template" else 32)
    # A later question recomputes the page that holds the end of the previous prompt, and computes its own tokens.
    assert first_question_tokens <= sum(passes) <= first_question_tokens + 3 * 16 * num_responses * (len(questions) - 1)


@pytest.mark.slow
def test_passes_are_full(decoders, tokenizers):
    """Responses have all lengths, the longest last; only the last pass of a question may have room for more tokens."""
    small = EngineConfig(max_prefill_tokens=256, kv_cache_gib=0.05)
    guard = ModelGuard(
        decoders["llama_guard"],
        tokenizers["llama_guard"],
        GuardConfig(model="tiny", min_verdict_probability=0.0, sampler=small),
    )
    scheduled = []
    real_init = model_guard.Engine.__init__

    def recording_init(engine, *arguments, **keywords):
        real_init(engine, *arguments, **keywords)
        schedule = engine.scheduler.schedule
        engine.scheduler.schedule = lambda: scheduled.append(schedule()) or scheduled[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_guard.Engine, "__init__", recording_init)
        verdicts_by_id(guard, [response_to("q", f"{n} " * (7 * n), str(n)) for n in range(40)])
    sizes = [batch.num_tokens for batch in scheduled if batch is not None]
    assert sum(size < 256 for size in sizes) <= 2 and len(sizes) > 20


def test_guard_is_built_from_its_config(folders, decoders, tokenizers):
    loaded_models = []

    def load(config):
        loaded_models.append(config.model)
        assert config.sampler.tensor_parallel_size == 2
        return decoders[config.model], tokenizers[config.model]

    two_gpus = EngineConfig(tensor_parallel_size=2)
    members = tuple(GuardConfig(kind=kind, model=kind, sampler=two_gpus) for kind in ("llama_guard", "wildguard"))
    ensemble = GuardConfig(kind="ensemble", members=members)
    assert build_guard(ensemble, load).name == "all(llama_guard:llama_guard, wildguard:wildguard)"
    assert (
        tuple(loaded_models) == ensemble.checkpoints == ("llama_guard", "wildguard")
        and ensemble.tensor_parallel_size == 2
    )
    with pytest.raises(ValueError, match=r"the same sampler\.tensor_parallel_size"):
        GuardConfig(kind="ensemble", members=(members[0], GuardConfig(kind="wildguard")))
    oracle = GuardConfig(kind="oracle")
    assert isinstance(build_guard(oracle, load), OracleGuard) and oracle.checkpoints == ()
