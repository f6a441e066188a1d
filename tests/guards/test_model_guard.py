"""Guards: exact probabilities from the right prompt, and what they cost."""

import gc
import re
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tests.support.tiny_guards import (
    EXCHANGES,
    KINDS,
    PLAIN,
    STRIPPED,
    answer_ids,
    config,
    exchanges_for,
    judgements,
    replies,
    shown,
    transformers_ids,
)
from thinksafe.guards import model_guard
from thinksafe.guards.base import Exchange
from thinksafe.guards.config import GuardConfig
from thinksafe.guards.formats import GuardFormat, Question
from thinksafe.guards.model_guard import ModelGuard
from thinksafe.guards.oracle import OracleGuard
from thinksafe.guards.registry import build_guard
from thinksafe.sampler import model_runner as runner
from thinksafe.sampler.engine import EngineConfig

pytest_plugins = ["tests.support.tiny_guards"]


# What a guard reads


def test_the_prompt_is_the_formats_own_and_has_the_ids_of_transformers(guard, kind, tokenizers):
    for exchange in exchanges_for(kind):
        for reply in replies(kind):
            expected = transformers_ids(tokenizers[kind], shown(kind, exchange) + reply)
            assert guard._ids(exchange.prompt, exchange.response, reply) == expected


@settings(deadline=None)
@given(texts=st.tuples(*[st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<[|\0"))] * 2))
@pytest.mark.parametrize("kind", KINDS)
def test_any_text_without_control_tokens_has_the_ids_of_transformers(guards, tokenizers, kind, texts):
    reply = replies(kind)[1]
    expected = transformers_ids(tokenizers[kind], shown(kind, Exchange("x", *texts)) + reply)
    assert guards[kind]._ids(*texts, reply) == expected


@pytest.mark.parametrize("kind", ["llama_guard", "qwen3guard"])
def test_any_chat_models_own_template_is_used_as_transformers_uses_it(decoders, tokenizers, kind):
    """One that strips messages, and one that does not; a template written in YAML ends with a newline."""
    tokenizer = tokenizers[kind]
    harm = Question("harm", {" Yes": "safe", " No": "unsafe"}, lead="Fine?")
    asked = "\nAsked {prompt}, one said {response}.\nFine?\n"

    def guard(template):
        own = GuardFormat((harm,), template=template)
        return ModelGuard(decoders[kind], tokenizer, GuardConfig(kind="template", model="tiny", format=own))

    for exchange in PLAIN:
        turns = [{"role": "user", "content": exchange.prompt}, {"role": "assistant", "content": exchange.response}]
        text = tokenizer.hugging_face.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        found = guard(None)._ids(exchange.prompt, exchange.response, "Fine?")
        assert found == transformers_ids(tokenizer, text + "Fine?")
        one = f"\nAsked {exchange.prompt}, one said {exchange.response}.\nFine?\n"
        turns = [{"role": "user", "content": one}]
        text = tokenizer.hugging_face.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert guard(asked)._ids(exchange.prompt, exchange.response, "") == transformers_ids(tokenizer, text)


def test_the_reference_reads_one_more_beginning_of_text(guards, tokenizers):
    tokens = tokenizers["llama_guard"].hugging_face.convert_ids_to_tokens
    assert tokens(guards["llama_guard_reference"]._ids("a", "b", "")[:3]) == [
        "<|begin_of_text|>",
        "Ġ",
        "<|begin_of_text|>",
    ]
    assert tokens(guards["llama_guard"]._ids("a", "b", "")[:3]) == ["Ġ", "<|begin_of_text|>", "<|start_header_id|>"]


def test_wildguards_first_words_are_ordinary_text_without_a_space_in_front(guards, tokenizers):
    tokens = tokenizers["wildguard"].hugging_face.convert_ids_to_tokens(guards["wildguard"]._ids("a", "b", ""))
    assert tokens[:3] == ["<s>", "<0x3C>", "<0x7C>"] and tokens.count("[INST]") == tokens.count("[/INST]") == 1
    assert tokens[tokens.index("[/INST]") + 1] == tokens[-1] == "<0x0A>"


# What it says


def test_probabilities_are_those_of_transformers_at_each_answer(guard, kind, folders, tokenizers):
    """fp64, every question behind the likeliest answers to the ones before."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folders[kind], dtype=torch.float64), tokenizers[kind]
    found = judgements(guard, exchanges_for(kind))
    for exchange in exchanges_for(kind):
        judgement, context = found[exchange.id], shown(kind, exchange)
        for question in config(kind).guard_format.questions:
            if question.if_unsafe and judgement.decision != "unsafe":
                assert judgement.category == "" and not judgement.labels
                continue
            context += question.lead
            with torch.no_grad():
                logits = model(torch.tensor([transformers_ids(tokenizer, context)])).logits[0, -1]
            probabilities = logits.softmax(-1)
            of_word = probabilities[answer_ids(tokenizer, context, question.answers)].tolist()
            expected = dict.fromkeys(question.answers.values(), 0.0)
            for meaning, p in zip(question.answers.values(), of_word, strict=True):
                expected[meaning] += p
            likeliest = dict(zip(of_word, question.answers, strict=True))
            if question.about == "harm":
                assert judgement.p_safe == pytest.approx(expected["safe"], rel=1e-4, abs=1e-9)
                assert judgement.p_unsafe == pytest.approx(expected["unsafe"], rel=1e-4, abs=1e-9)
                unread = kind == "llama_guard_reference" and max(of_word) < probabilities.topk(2).values[-1]
                wins = "safe" if unread or expected["safe"] > expected["unsafe"] else "unsafe"
                assert judgement.decision == wins
                assert judgement.reason == ("no_verdict" if unread else "")
                likeliest = {p: w for p, w in likeliest.items() if question.answers[w] == judgement.decision}
            else:
                for meaning in set(expected) - {"neither"}:
                    assert judgement.labels[meaning] == pytest.approx(expected[meaning], rel=1e-4, abs=1e-9)
            if question.about == "refusal":
                assert judgement.refusal == (expected["refusal"] > expected["compliance"])
            if question.about == "category" and judgement.decision == "unsafe":
                assert judgement.category == max(expected, key=expected.get).replace("neither", "")
            context += likeliest[max(likeliest)]
        assert judgement.windows == 1
        if kind in ("template", *STRIPPED):
            assert judgement.refusal is None


@pytest.mark.parametrize("kind", ["wildguard", "llama_guard"])
def test_the_verdict_is_that_of_greedy_decoding_within_the_format(guards, folders, tokenizers, kind):
    """The reference reads a generated reply. Here transformers writes one, free to choose the answers only."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folders[kind]), tokenizers[kind]
    found = judgements(guards[kind])
    for exchange in exchanges_for(kind):
        context = start = shown(kind, exchange)
        for question in config(kind).guard_format.questions:
            if question.if_unsafe and not context.endswith("unsafe"):
                continue
            context += question.lead
            words = answer_ids(tokenizer, context, question.answers)
            ids = torch.tensor([transformers_ids(tokenizer, context)])
            options = {"max_new_tokens": 1, "do_sample": False, "prefix_allowed_tokens_fn": lambda *_, w=words: w}
            written = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, -1].item()
            context += list(question.answers)[words.index(written)]
        reply, judgement = context.removeprefix(start), found[exchange.id]
        if kind == "wildguard":
            said = dict(re.findall(r"(Harmful request|Response refusal|Harmful response): (yes|no|n/a)", reply))
            assert len(said) == 3
            if (harm := said["Harmful response"]) != "n/a":
                assert (judgement.decision == "unsafe") == (harm == "yes")
            if (refusal := said["Response refusal"]) != "n/a":
                assert judgement.refusal == (refusal == "yes")
        else:
            verdict, _, category = reply.partition("\n")
            assert (judgement.decision, judgement.category) == (verdict, category)


def test_both_verdicts_occur(guard, kind):
    """Otherwise the other tests would pass with a guard that always says the same."""
    exchanges = [Exchange(str(n), "q", f"{n} " * (n + 1)) for n in range(40)]
    found = judgements(guard, exchanges).values()
    # Of a random guard neither word is among the likeliest, which the paper's code takes for safe.
    expected = {"safe"} if kind == "llama_guard_reference" else {"safe", "unsafe"}
    assert {judgement.decision for judgement in found} == expected
    if kind in ("wildguard", "qwen3guard"):
        assert {True, False} == {judgement.refusal for judgement in found}


def test_a_judgement_does_not_depend_on_its_company(guard):
    together = judgements(guard)
    for exchange in EXCHANGES[:5]:
        alone = judgements(guard, [exchange])[exchange.id]
        assert alone.p_safe == pytest.approx(together[exchange.id].p_safe, rel=1e-4)
        assert (alone.decision, alone.category) == (together[exchange.id].decision, together[exchange.id].category)


def test_few_at_once_give_the_same_and_are_taken_when_there_is_room(decoders, tokenizers, guard, kind):
    few = GuardConfig(
        kind=kind, model="tiny", min_mass=0.0, format=config(kind).format, sampler=EngineConfig(3, kv_cache_gib=0.02)
    )
    taken = []

    def handed_out():
        for exchange in EXCHANGES:
            taken.append(exchange.id)
            yield exchange

    at_once, in_turns = judgements(guard), {}
    for judgement in ModelGuard(decoders[kind], tokenizers[kind], few).judge(handed_out()):
        assert len(taken) <= 3 + len(in_turns)  # who shares exchanges with others takes no more than it can judge
        in_turns[judgement.id] = judgement
    for exchange in EXCHANGES:
        assert in_turns[exchange.id].p_unsafe == pytest.approx(at_once[exchange.id].p_unsafe, rel=1e-4)
        assert in_turns[exchange.id].labels == pytest.approx(at_once[exchange.id].labels, rel=1e-4, abs=1e-9)


def test_a_guard_holds_no_cache_between_two_askings(guard, monkeypatch):
    """Its pages would be most of a GPU's memory, kept from the student that samples and trains next."""
    engines = []
    init = model_guard.Engine.__init__

    def noted(engine, *arguments):
        engines.append(weakref.ref(engine))
        init(engine, *arguments)

    monkeypatch.setattr(model_guard.Engine, "__init__", noted)
    first, again = judgements(guard), judgements(guard)
    gc.collect()
    assert len(engines) == 2 and engines[0]() is None and engines[1]() is None
    assert [again[e.id].decision for e in EXCHANGES] == [first[e.id].decision for e in EXCHANGES]


# What it costs


def test_the_policy_is_computed_once_and_only_the_verdicts_position_reaches_the_head(guard, kind, monkeypatch):
    """Counted: tokens that run through the model, and rows that meet the head."""
    passes, head_rows = [], []
    real_score, real_logprobs = model_guard.Engine.score, runner.linear_logprob_of
    exchanges = [Exchange(str(n), f"How do I fold boat {n}?", f"{n} folds. " * (n + 1)) for n in range(24)]

    def counted_score(engine, prompts, token_ids):
        plan = engine.scheduler.plan

        def noted():
            planned = plan()
            if planned is not None:
                passes.append(planned.num_tokens)
            return planned

        engine.scheduler.plan = noted
        return real_score(engine, prompts, token_ids)

    def counted_logprobs(hidden, head, token_ids):
        head_rows.append(len(hidden))
        return real_logprobs(hidden, head, token_ids)

    monkeypatch.setattr(model_guard.Engine, "score", counted_score)
    dense_rows, real_dense = [], runner._logprobs_of_all

    def counted_dense(hidden, head, token_ids):
        dense_rows.append(len(hidden))
        return real_dense(hidden, head, token_ids)

    monkeypatch.setattr(runner, "linear_logprob_of", counted_logprobs)
    monkeypatch.setattr(runner, "_logprobs_of_all", counted_dense)
    found = judgements(guard, exchanges)
    questions = config(kind).guard_format.questions
    unsafe = sum(judgement.decision == "unsafe" for judgement in found.values())
    asked_twice = sum(judgement.reason == "no_verdict" for judgement in found.values())
    rows = sum(unsafe if question.if_unsafe else len(exchanges) for question in questions)
    assert sum(head_rows) == rows, "a handful of tokens a row"
    assert sum(dense_rows) == asked_twice, "a look at all tokens is one product"
    assert (asked_twice > 0) == (kind == "llama_guard_reference")
    whole = [len(guard._ids(e.prompt, e.response, replies(kind)[1])) for e in exchanges]
    columns = zip(*(guard._ids(e.prompt, e.response, "") for e in exchanges), strict=False)
    shared = next(place for place, ids in enumerate(columns) if len(set(ids)) > 1) // 16 * 16
    first = sum(whole) - (len(exchanges) - 1) * shared
    assert shared >= (16 if kind == "template" else 32)
    # A later question computes the page that its predecessor's last words share, and its own.
    assert first <= sum(passes) <= first + 3 * 16 * len(exchanges) * (len(questions) - 1)


def test_passes_are_full(decoders, tokenizers):
    """Responses of all lengths, longest last: no pass but the last of a question has room for another token."""
    small = EngineConfig(max_step_tokens=256, kv_cache_gib=0.05)
    guard = ModelGuard(
        decoders["llama_guard"], tokenizers["llama_guard"], GuardConfig(model="tiny", min_mass=0.0, sampler=small)
    )
    planned = []
    real = model_guard.Engine.__init__

    def noted(engine, *arguments):
        real(engine, *arguments)
        plan = engine.scheduler.plan
        engine.scheduler.plan = lambda: planned.append(plan()) or planned[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_guard.Engine, "__init__", noted)
        judgements(guard, [Exchange(str(n), "q", f"{n} " * (7 * n)) for n in range(40)])
    sizes = [plan.num_tokens for plan in planned if plan is not None]
    assert sum(size < 256 for size in sizes) <= 2 and len(sizes) > 20


def test_a_guard_is_built_from_its_config(folders, decoders, tokenizers):
    asked = []

    def load(config):
        asked.append(config.model)
        assert config.sampler.tensor_parallel == 2
        return decoders[config.model], tokenizers[config.model]

    over_two = EngineConfig(tensor_parallel=2)
    members = tuple(GuardConfig(kind=kind, model=kind, sampler=over_two) for kind in ("llama_guard", "wildguard"))
    both = GuardConfig(kind="ensemble", members=members)
    assert build_guard(both, load).name == "all(llama_guard:llama_guard, wildguard:wildguard)"
    assert tuple(asked) == both.checkpoints == ("llama_guard", "wildguard") and both.tensor_parallel == 2
    with pytest.raises(ValueError, match=r"the same sampler\.tensor_parallel"):
        GuardConfig(kind="ensemble", members=(members[0], GuardConfig(kind="wildguard")))
    oracle = GuardConfig(kind="oracle")
    assert isinstance(build_guard(oracle, load), OracleGuard) and oracle.checkpoints == ()
