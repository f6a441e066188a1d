"""Real tokenizers: texts, prompts, guard prompts and training examples get the ids that tokenizer.json gives them.

The oracles are transformers with nothing but tokenizer.json, tiktoken with the original vocabularies, and the number
of control tokens, which no text changes.
"""

import base64
import json
import random
from collections import Counter
from collections.abc import Iterable
from functools import cache
from unicodedata import normalize

import pytest
from transformers import PreTrainedTokenizerFast

from tests.real.install import PACKAGES, SMOLLM2, TOKENIZERS
from thinksafe.data.records import Example
from thinksafe.guards.formats import FORMATS
from thinksafe.methods.thinksafe import ThinkSafe
from thinksafe.text.chat import Chat
from thinksafe.text.tokenizer import SafeTokenizer

pytestmark = pytest.mark.real
NEEDS = (PACKAGES, SMOLLM2, TOKENIZERS)

NAMES = ("deepseek_v3", "llama2", "llama3_1", "mistral_nemo", "qwen3", "smollm2")
CHATS = ("llama3_1", "mistral_nemo", "qwen3", "smollm2")
"""Tokenizers with a chat template whose prompts are ours: Llama 2's package has none, and DeepSeek's gets `<think>`."""
GUARDS = {"llama3_1": "llama_guard", "qwen3": "qwen3guard"}
PIECES = [
    "the", "boat", "folds", "twice", "and", "dries", "before", "its", "red", "sail", ",", "then", "we", "measure",
    "fjord Ærø naïve straße", "œuvre señor łódź", "İstanbul", "кот спит под столом", "πλοῖο από χαρτί", "小船折两次",
    "紙の船を二回折る", "종이배를 접는다", "قارب من ورق", "काग़ज़ की नाव", "เรือกระดาษ", "סירת נייר", "giấy gấp hai lần",
    "e\u0301 n\u0303", "\u1100\u1161", "🪁", "👩‍🚀", "🏳️‍🌈", "\u200b", "\u00a0", "\u3000", "\ufeff", "\ufffd", "𝒙²", "½",
    "①", "ﬁn", "\u0000", "\x1b[0m", "0", "7", "42", "1,234.50", "2024", "10000000", "3.14159e-10", "0x1F", "-5", "١٢٣",
    "12:30", "50%", "$18.90", "def fold(n):\n    return n // 2\n", "for (int i=0;i<n;++i){\n\tx[i]+=1;\n}", "SELECT 1;",
    "<b>sail</b>", "\\frac{1}{2}", "`x`", "```py\n```", "https://example.org/a?b=c#d", "a_b-cD", "don't", "I'LL", "...",
    "!!", "—", "\\n", " ", "  ", "    ", "\n", "\n\n", "\n\n\n", "\t", "\r\n", " \n ", ".",
]  # fmt: skip
"""Prose in many languages, odd characters, numbers, code and white space."""


def texts(seed: int, count: int, forged: Iterable[str] = ()) -> list[str]:
    """Return random texts of PIECES, each with up to three of the `forged` tokens or a part of them."""
    rng, forged = random.Random(seed), list(forged)

    def text() -> str:
        pieces = [rng.choice(PIECES) + rng.choice(["", " "]) for _ in range(rng.randint(1, 25))]
        for token in rng.sample(forged, min(3, len(forged))):
            pieces.insert(rng.randint(0, len(pieces)), rng.choice([token, token[:-1], f" {token}", token * 2]))
        return "".join(pieces)

    return [text() for _ in range(count)]


def folder_of(name: str):
    return SMOLLM2 if name == "smollm2" else TOKENIZERS / name


@cache
def tokenizer_of(name: str) -> SafeTokenizer:
    return SafeTokenizer(folder_of(name))


@cache
def chat_of(name: str) -> Chat:
    return Chat(tokenizer_of(name))


@cache
def transformers_tokenizer(name: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder_of(name))


def transformers_ids(name: str, text: str) -> list[int]:
    return transformers_tokenizer(name)(text, add_special_tokens=False)["input_ids"]


def transformers_prompt(name: str, text: str, **options):
    turns = [{"role": "user", "content": text}]
    return transformers_tokenizer(name).apply_chat_template(turns, add_generation_prompt=True, **options)


def control_counts(name: str, ids: list[int]) -> Counter:
    control = set(tokenizer_of(name).control_ids.values())
    return Counter(id_ for id_ in ids if id_ in control)


@pytest.mark.parametrize("name", NAMES)
def test_texts_get_the_ids_of_transformers(name, fresh_seed):
    for text in texts(fresh_seed, 1000):
        assert tokenizer_of(name).encode([(text, False)]) == transformers_ids(name, text), text


@pytest.mark.parametrize("name", CHATS)
def test_prompts_get_the_ids_of_transformers(name, fresh_seed):
    for text in texts(fresh_seed, 200):
        expected = transformers_prompt(name, text, tokenize=True)["input_ids"]
        assert chat_of(name).prompt_ids(text) == expected, text


def test_ids_are_those_of_the_original_vocabularies(fresh_seed):
    import tiktoken

    lines = (PACKAGES / "llama_models/llama3/tokenizer.model").read_text().splitlines()
    llama_pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    )
    tekken = json.loads((PACKAGES / "mistral_common/data/tekken_240911.json").read_text())
    num_control = tekken["config"]["default_num_special_tokens"]
    num_pieces = tekken["config"]["default_vocab_size"] - num_control
    vocabularies = {
        "llama3_1": (0, llama_pattern, [line.split() for line in lines]),
        "mistral_nemo": (
            num_control,
            tekken["config"]["pattern"],
            [(piece["token_bytes"], piece["rank"]) for piece in tekken["vocab"][:num_pieces]],
        ),
    }
    for name, (first_id, pattern, pieces) in vocabularies.items():
        ranks = {base64.b64decode(piece): int(rank) for piece, rank in pieces}
        original = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        for text in texts(fresh_seed, 500):
            expected = [first_id + rank for rank in original.encode_ordinary(text)]
            assert tokenizer_of(name).encode([(text, False)]) == expected, text


@pytest.mark.parametrize("name", CHATS)
def test_forged_control_tokens_stay_text(name, fresh_seed):
    chat, forged = chat_of(name), tokenizer_of(name).control_ids
    expected = control_counts(name, chat.prompt_ids("a"))
    for text in texts(fresh_seed, 500, forged):
        ids = chat.prompt_ids(text)
        assert control_counts(name, ids) == expected, text
        rendered = transformers_prompt(name, text, tokenize=False)
        assert normalize("NFC", chat.decode(ids)) == normalize("NFC", rendered), (
            text
        )  # Qwen3's tokenizer composes marks


@pytest.mark.parametrize("name", GUARDS)
def test_guard_prompts_get_the_ids_of_transformers(name, fresh_seed):
    tokenizer = tokenizer_of(name)
    layout = FORMATS[GUARDS[name]].layout(tokenizer)
    for prompt, response in zip(texts(fresh_seed, 100), texts(fresh_seed + 1, 100), strict=True):
        parts = layout.parts(prompt, response, "")
        assert tokenizer.encode(parts) == transformers_ids(name, "".join(text for text, _ in parts))
    expected = control_counts(name, tokenizer.encode(layout.parts("a", "b", "")))
    forged = tokenizer.control_ids
    for prompt, response in zip(texts(fresh_seed, 100, forged), texts(fresh_seed + 1, 100, forged), strict=True):
        assert control_counts(name, tokenizer.encode(layout.parts(prompt, response, ""))) == expected


@pytest.mark.parametrize("name", CHATS)
def test_training_examples_get_the_ids_of_transformers(name, fresh_seed):
    chat = chat_of(name)
    turns = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
    end = transformers_tokenizer(name).apply_chat_template(turns, tokenize=False).rpartition("B")[2]
    for prompt, thought, answer in zip(*(texts(fresh_seed + i, 100) for i in range(3)), strict=True):
        response = f"<think>\nSo {thought} then.\n</think>\n\nYes, {answer} indeed."
        sequence = ThinkSafe().training_sequence(Example(prompt, response, "benign"), chat)
        ids = sequence.input_ids.tolist()
        assert ids[: sequence.num_prompt_tokens] == chat.prompt_ids(prompt)
        opening = "<think>\n" if chat.supplies_think else ""
        assert ids[sequence.num_prompt_tokens :] == transformers_ids(name, response.removeprefix(opening) + end)
