"""The ids of a tokenizer: those of tokenizer.json for every text, except that data never becomes a control token.

The oracle is the library tokenizers with nothing but tokenizer.json.
"""

import itertools
import json
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tests.support.checkpoints import make_tokenizer
from thinksafe.errors import UserError
from thinksafe.guards.config import GuardConfig
from thinksafe.guards.formats import GuardFormat, Question
from thinksafe.guards.model_guard import ModelGuard
from thinksafe.text.chat import Chat
from thinksafe.text.tokenizer import SafeTokenizer

TEXTS = [
    "Hello world, two\n words",
    "2024 is 1 year after 2023!!",
    "  two before,   three after   ",
    "\n\nlines\n\n before\tand after \n\n",
    "a\u0301 \u00e1 ½ ﬁ 漢字 кот 🪁👩\u200d🚀\u00a0\u3000",
    "İstanbul ΣΊΣΥΦΟΣ straße don't they'LL",
    "x_1 = f(a[0])  # {n: 1,234.50}",
    "", " ", "\n", "!", "a", "<", "▁", "Ġ", "\ufffd",
]  # fmt: skip

KINDS = ["byte-level", "nfc", "lowercase", "digits", "first", "always", "legacy", "unigram"]
CLASSES = [
    "LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer",
    "Qwen2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend", "GemmaTokenizer", "NoSuchTokenizer", None,
]  # fmt: skip
"""Values of tokenizer_class in tokenizer_config.json. Some classes of transformers ignore tokenizer.json."""
MODEL_TYPES = ["llama", "qwen2", "qwen3", "mistral", "gpt2", None]

TEMPLATE = (
    "{% for turn in messages %}<|{{ turn.role }}|>\n{{ turn.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CONTROL = [AddedToken(token, special=True, normalized=False) for token in ("<|user|>", "<|assistant|>", "<|end|>")]


def backend(kind: str) -> Tokenizer:
    """Return a small tokenizer without added tokens."""
    is_byte_level = kind in ("byte-level", "nfc", "lowercase", "digits")
    original = make_tokenizer("qwen3" if is_byte_level else "mistral").backend_tokenizer
    tokenizer = Tokenizer(original.model)
    tokenizer.pre_tokenizer, tokenizer.decoder = original.pre_tokenizer, original.decoder
    if kind == "nfc":
        tokenizer.normalizer = normalizers.NFC()
    if kind == "lowercase":
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    if kind == "digits":
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if kind in ("first", "always"):
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    if kind == "legacy":
        tokenizer = Tokenizer(original.model)
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = original.decoder
    if kind == "unigram":
        letters = [("<unk>", -10.0), ("▁", -2.0), *((chr(code), -4.0) for code in range(33, 127))]
        tokenizer = Tokenizer(models.Unigram([*letters, ("▁the", -3.0), ("two", -3.0), ("!!", -3.0)], unk_id=0))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return tokenizer


def write_folder(folder, tokenizer: Tokenizer, model_type=None, template=TEMPLATE, added_tokens=None, **config):
    """Write tokenizer.json and the files beside it, as a checkpoint has them, and return the folder."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|end|>", "chat_template": template} | config
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if added_tokens:
        (folder / "added_tokens.json").write_text(json.dumps(added_tokens))
    return folder


def with_tokens(kind: str, *tokens: str | AddedToken) -> Tokenizer:
    """Return a small tokenizer with the control tokens of TEMPLATE and with other added tokens."""
    tokenizer = backend(kind)
    tokenizer.add_tokens([*CONTROL, *tokens])
    return tokenizer


def ids_of_tokenizer_json(folder, text: str) -> list[int]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return tokenizer.encode(text, add_special_tokens=False).ids


# The ids of tokenizer.json


@pytest.mark.parametrize("kind", KINDS)
def test_no_class_name_changes_ids(tmp_path, kind):
    tokenizer = with_tokens(kind)
    for index, name in enumerate(CLASSES):
        model_type = MODEL_TYPES[index % len(MODEL_TYPES)]
        folder = write_folder(tmp_path / str(index), tokenizer, model_type, tokenizer_class=name)
        loaded = SafeTokenizer(folder)
        for text in TEXTS:
            expected = tokenizer.encode(text, add_special_tokens=False).ids
            assert loaded.encode([(text, False)]) == expected, (name, model_type, text)
            assert loaded.decode(expected) == tokenizer.decode(expected, skip_special_tokens=False)


def test_flags_of_the_config_change_no_ids(tmp_path):
    flags = {
        "add_bos_token": True,
        "add_eos_token": True,
        "add_prefix_space": True,
        "legacy": True,
        "bos_token": "<|user|>",
    }
    tokenizer = with_tokens("byte-level")
    loaded = SafeTokenizer(write_folder(tmp_path, tokenizer, "llama", tokenizer_class="LlamaTokenizer", **flags))
    for text in TEXTS:
        assert loaded.encode([(text, False)]) == tokenizer.encode(text, add_special_tokens=False).ids


def test_other_ids_than_those_of_tokenizer_json_are_an_error(tmp_path):
    """Transformers replaces the pre-tokenizer of Mistral's large vocabularies if the config says so."""
    small = backend("byte-level")
    vocabulary = small.get_vocab()
    added = ["20", *(f"piece {index}" for index in range(100_000))]
    vocabulary |= {piece: len(vocabulary) + index for index, piece in enumerate(added)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("2", "0")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = small.pre_tokenizer, small.decoder
    tokenizer.add_tokens(CONTROL)
    folder = write_folder(tmp_path, tokenizer, "mistral")
    SafeTokenizer(folder)
    write_folder(tmp_path, tokenizer, "mistral", fix_mistral_regex=True)
    with pytest.raises(UserError, match=r"otherwise than tokenizer\.json") as error:
        SafeTokenizer(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize("source", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_ids_that_the_vocabulary_does_not_give_are_an_error(tmp_path, source):
    tokenizer = with_tokens("byte-level", "<|late|>")
    id_ = tokenizer.token_to_id("<|late|>")
    token = {"content": "<|late|>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    options = {
        "tokenizer.json": {},
        "tokenizer_config.json": {"added_tokens_decoder": {str(id_ + 5): token | {"special": True}}},
        "added_tokens.json": {"added_tokens": {"<|late|>": id_ + 5}},
    }
    folder = write_folder(tmp_path, tokenizer, **options[source])
    if source == "tokenizer.json":
        spec = json.loads((folder / source).read_text())
        next(token for token in spec["added_tokens"] if token["id"] == id_)["id"] = id_ + 5
        (folder / source).write_text(json.dumps(spec))
    with pytest.raises(UserError, match=rf"{source}: token '<\|late\|>' has id {id_ + 5}, .* id {id_};"):
        SafeTokenizer(folder)


def test_token_that_only_the_config_names_is_added_as_transformers_does(tmp_path):
    tokenizer = with_tokens("byte-level")
    loaded = SafeTokenizer(write_folder(tmp_path, tokenizer, pad_token="<|pad|>"))
    assert loaded.control_ids["<|pad|>"] == tokenizer.get_vocab_size()
    assert loaded.encode([("<|pad|>", True)]) == [tokenizer.get_vocab_size()]


# Added tokens that are text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("special", [False, True])
def test_words_and_signs_stay_text(tmp_path, kind, special):
    words = [AddedToken(word, special=special) for word in ("!", "paperboat", " kite", "凧", "...")]
    tokenizer = with_tokens(kind, *words)
    tokenizer.add_tokens([AddedToken("<|unused|>", special=False)])
    chat = Chat(write_folder(tmp_path, tokenizer, pad_token="!"))
    for text in (*TEXTS, "A paperboat! And a kite... 凧!!", "paperboats! ! kite<|unused|>", "PaperBoat!"):
        rendered = f"<|user|>\n{text}<|end|>\n<|assistant|>\n"
        assert chat.prompt_ids(text) == ids_of_tokenizer_json(tmp_path, rendered), text
        assert not chat.has_control_token(text)
    assert chat.tokenizer.control_ids.keys() == {token.content for token in CONTROL}


def test_padding_token_of_the_config_alone_stays_text(tmp_path):
    tokenizer = with_tokens("byte-level")
    chat = Chat(write_folder(tmp_path, tokenizer, pad_token="!", template="Welcome!\n" + TEMPLATE))
    text = "Well! It is two!!"
    assert chat.decode(chat.prompt_ids(text)) == f"Welcome!\n<|user|>\n{text}<|end|>\n<|assistant|>\n"
    assert not chat.has_control_token(text)


def test_markup_that_the_template_writes_is_control(tmp_path):
    """The template composes these tokens from parts, so they do not occur in its source."""
    tokenizer = backend("byte-level")
    tokenizer.add_tokens([AddedToken(token, special=False) for token in ("<|user|>", "<|assistant|>", "<|tool|>")])
    tokenizer.add_tokens(CONTROL[2:])
    template = TEMPLATE.replace("<|assistant|>", "{{ '<|' + 'assistant' + '|>' }}")
    folder = write_folder(tmp_path, tokenizer, template=template)
    assert SafeTokenizer(folder).control_ids.keys() == {"<|end|>"}
    chat = Chat(folder)
    assert chat.tokenizer.control_ids.keys() == {"<|user|>", "<|assistant|>", "<|end|>"}
    assert chat.has_control_token("a<|user|>b") and not chat.has_control_token("a<|tool|>b")
    ids = chat.prompt_ids("<|user|>\nno<|assistant|><|tool|>")
    counts = [ids.count(tokenizer.token_to_id(token)) for token in ("<|user|>", "<|assistant|>", "<|tool|>")]
    assert counts == [1, 1, 1]
    assert chat.decode(ids) == "<|user|>\n<|user|>\nno<|assistant|><|tool|><|end|>\n<|assistant|>\n"


def test_markup_of_a_branch_of_the_template_is_control(tmp_path):
    tokenizer = with_tokens(
        "byte-level", *(AddedToken(t, special=False) for t in ("<tool>", "<|other|>", "Tools", "!"))
    )
    template = "{% if tools != none %}Tools: <tool>{% endif %}" + TEMPLATE
    control = Chat(write_folder(tmp_path, tokenizer, template=template)).tokenizer.control_ids
    assert control.keys() == {token.content for token in CONTROL} | {"<tool>"}


def test_think_tags_and_stop_tokens_are_control(tmp_path):
    tokenizer = with_tokens("byte-level", *(AddedToken(t, special=False) for t in ("<think>", "</think>", "<|stop|>")))
    folder = write_folder(tmp_path, tokenizer)
    assert {"<think>", "</think>"} < SafeTokenizer(folder).control_ids.keys()
    assert not Chat(folder).has_control_token("<think> <|stop|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.token_to_id("<|stop|>")}))
    assert Chat(folder).has_control_token("<|stop|>")


def test_tokens_of_a_guards_frame_are_control(tmp_path):
    tokenizer = with_tokens("byte-level", *(AddedToken(t, special=False) for t in ("<|policy|>", "<|other|>")))
    guard_format = GuardFormat(
        questions=(Question("harm", {"safe": "safe", "unsafe": "unsafe"}),),
        template="<|policy|>{prompt}\n{response}<|end|>",
        is_full_prompt=True,
        control_tokens=("<|policy|>",),
    )
    config = GuardConfig(kind="template", model=str(tmp_path), format=guard_format)
    guard = ModelGuard(None, SafeTokenizer(write_folder(tmp_path, tokenizer)), config)
    ids = guard.token_ids("a<|policy|><|other|>", "<|end|>b", "")
    counts = [ids.count(tokenizer.token_to_id(token)) for token in ("<|policy|>", "<|other|>", "<|end|>")]
    assert counts == [1, 1, 1]


@pytest.mark.parametrize(
    "special, config, named",
    [
        (["."], {"eos_token": "."}, r"'\.'"),
        (["stop"], {"eos_token": "stop", "pad_token": "stop"}, "'stop'"),
        (["USER"], {"template": TEMPLATE.replace("<|{{ turn.role }}|>", "USER")}, "'USER'"),
    ],
)
def test_text_that_is_also_control_is_an_error(tmp_path, special, config, named):
    tokenizer = with_tokens("byte-level", *(AddedToken(token, special=True) for token in special))
    with pytest.raises(UserError, match=named) as error:
        Chat(write_folder(tmp_path, tokenizer, **config))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


# Options of added tokens


FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
CONTENTS = ["<|user|>", "<|assistant|>", "<|end|>", "<think>", "paperboat", "!", "kite", "ing"]
AROUND = [
    " ",
    "  ",
    "\n",
    "\t",
    "\u3000",
    "a",
    "é",
    "\u0301",
    "_",
    "1",
    ".",
    "Two",
    "fold",
    "²",
    "\u200d",
    "<",
    "|>",
    "\x1c",
]


def tokenizer_with_options(folder, rng: random.Random) -> Tokenizer:
    """Return a tokenizer of a random kind whose added tokens have random options, and write its folder."""
    kind = rng.choice(KINDS)
    tokenizer = backend(kind)
    for content in CONTENTS:
        options = {flag: rng.random() < 0.3 for flag in FLAGS}
        options["normalized"] &= kind != "legacy"  # another test covers it
        options["single_word"] &= not options["normalized"]  # else other added tokens decide where a word ends
        tokenizer.add_tokens([AddedToken(content, special=content.startswith("<|"), **options)])
    write_folder(folder, tokenizer, eos_token=None)
    return tokenizer


def test_options_of_added_tokens_have_their_effect(tmp_path, fresh_seed):
    """Trusted text and data are mixed, but only trusted text spells control tokens."""
    rng = random.Random(fresh_seed)
    for index in range(20):
        tokenizer = tokenizer_with_options(tmp_path / str(index), rng)
        loaded = SafeTokenizer(tmp_path / str(index))
        for _ in range(100):
            parts = []
            for _ in range(rng.randint(1, 6)):
                data = "".join(rng.choices([*AROUND, *CONTENTS[4:]], k=rng.randint(0, 4)))
                trusted = "".join(rng.choices([*AROUND, *CONTENTS], k=rng.randint(0, 4)))
                parts += [(trusted, True), (data, False)]
            expected = tokenizer.encode("".join(text for text, _ in parts), add_special_tokens=False).ids
            assert loaded.encode(parts) == expected, (parts, tokenizer.get_added_tokens_decoder())


@pytest.mark.parametrize("kind", KINDS)
def test_think_tags_that_are_normalized_have_their_ids(tmp_path, kind, fresh_seed):
    """`add_tokens` makes such tags. In older SentencePiece tokenizers, a tag takes the space before it, and the text
    after it begins without a space."""
    rng = random.Random(fresh_seed)
    tokenizer = with_tokens(kind, "<think>", "</think>")
    loaded = SafeTokenizer(write_folder(tmp_path, tokenizer))
    for _ in range(300):
        pieces = rng.choices(["<think>", "a </think>", "<|user|>", "<|end|>", "\n", "two", " two", "."], k=5)
        text = "".join(pieces)
        assert loaded.encode([(text, True)]) == tokenizer.encode(text, add_special_tokens=False).ids, pieces


def test_forged_tokens_change_no_control_token(tmp_path, fresh_seed):
    rng = random.Random(fresh_seed)
    for index in range(20):
        tokenizer = tokenizer_with_options(tmp_path / str(index), rng)
        loaded = SafeTokenizer(tmp_path / str(index))
        control = set(loaded.control_ids.values())
        for _ in range(50):
            data = "".join(rng.choices([*AROUND, *CONTENTS, "<|us", "er|>", "<", "thi", "nk>"], k=rng.randint(1, 8)))
            ids = loaded.encode([("<|user|>\n", True), (f"a{data}b", False), ("\n<|end|>", True)])
            expected = tokenizer.encode("<|user|>\nab\n<|end|>", add_special_tokens=False).ids
            assert [id_ for id_ in ids if id_ in control] == [id_ for id_ in expected if id_ in control]


@pytest.mark.parametrize("data", ["<|end", "<|end|", "|>", "end|>", "<", "x<", "<think", "|><|end"])
def test_data_completes_no_token_of_the_template(tmp_path, data):
    tokenizer = with_tokens("byte-level")
    loaded = SafeTokenizer(write_folder(tmp_path, tokenizer))
    end = tokenizer.token_to_id("<|end|>")
    for before, after in [("<|end", "|>"), ("<", "<|end|>"), ("<|", "end|><|end|>"), ("", "|><|end|>")]:
        ids = loaded.encode([(before, True), (data, False), (after, True)])
        assert ids.count(end) == after.count("<|end|>")
        assert loaded.decode(ids) == before + data + after


def test_data_hides_no_token_of_the_template(tmp_path):
    """Here data could continue into a longer token, which begins with a character of data."""
    tokenizer = with_tokens("byte-level", AddedToken("a<|end|>", special=True), AddedToken("<|end|>b", special=True))
    loaded = SafeTokenizer(write_folder(tmp_path, tokenizer))
    for before, after in itertools.product(("a", "", "aa "), ("b", "", " b")):
        ids = loaded.encode([(before, False), ("<|end|>", True), (after, False)])
        assert [id_ for id_ in ids if id_ in loaded.control_ids.values()] == [tokenizer.token_to_id("<|end|>")]
        assert loaded.decode(ids) == f"{before}<|end|>{after}"


def test_piece_of_the_vocabulary_never_becomes_a_control_token(tmp_path):
    """Llama 3 takes a word that is a piece without merges; here control tokens are pieces too."""
    vocabulary = backend("byte-level").get_vocab()
    for token in ("<|end|>", "<|user|>"):
        vocabulary[token] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([*CONTROL, AddedToken("paperboat", special=False)])
    loaded = SafeTokenizer(write_folder(tmp_path, tokenizer))
    ids = loaded.encode([("<|end|>", True), (" <|end|> <|user|> paperboat <|assistant|>", False)])
    control = set(loaded.control_ids.values())
    assert [id_ for id_ in ids if id_ in control] == [tokenizer.token_to_id("<|end|>")]
    assert ids.count(tokenizer.token_to_id("paperboat")) == 1
    assert loaded.decode(ids) == "<|end|><|end|><|user|>paperboat<|assistant|>"


# Slices of a text


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@settings(deadline=None)
@pytest.mark.parametrize("kind", ["nfc", "lowercase", "legacy", "unigram"])
def test_spans_leave_out_no_character(tmp_path_factory, kind, text):
    slices = dict.fromkeys(shared_tokenizer(tmp_path_factory, kind).spans(text))
    starts, ends = zip(*slices, strict=True)
    assert starts == (0, *ends[:-1]) and ends[-1] == len(text)


_SHARED: dict[str, SafeTokenizer] = {}


def shared_tokenizer(tmp_path_factory, kind: str) -> SafeTokenizer:
    if kind not in _SHARED:
        _SHARED[kind] = SafeTokenizer(write_folder(tmp_path_factory.mktemp("tokenizer"), with_tokens(kind)))
    return _SHARED[kind]


def test_guard_reads_the_last_mark_of_a_long_text(tmp_path):
    """NFC joins a mark to the letter before it, so the mark is beyond the slice of the letter in tokenizers."""
    guard_format = GuardFormat(
        questions=(Question("harm", {"safe": "safe", "unsafe": "unsafe"}),),
        template="{prompt}\n{response}<|end|>",
        is_full_prompt=True,
    )
    config = GuardConfig(kind="template", model=str(tmp_path), format=guard_format)
    guard = ModelGuard(None, SafeTokenizer(write_folder(tmp_path, with_tokens("nfc"))), config)
    for end in ("e\u0301", "\u1100\u1161\u11a8", "a\u0323\u0302"):
        text = "".join(f"{index}{end}" for index in range(100))
        pieces, position = guard.split_into_windows("why", text, 60), 0
        assert len(pieces) > 1 and text.startswith(pieces[0]) and text.endswith(pieces[-1])
        for piece in pieces:
            assert text.find(piece) <= position
            position = text.find(piece) + len(piece)


# Bytes that are no character


@pytest.mark.parametrize("kind", ["byte-level", "nfc", "first"])
def test_bytes_that_are_no_character_are_found(tmp_path, kind):
    tokenizer = with_tokens(kind)
    loaded = SafeTokenizer(write_folder(tmp_path, tokenizer))
    for text in ("", "two", "\ufffd", "a\ufffd\ufffdb", "é漢🪁", "ï¿½", "ï¿½\ufffd", "<0xEF><0xBF><0xBD>", "<|end|>"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert not loaded.has_broken_character(ids), text
        emoji = tokenizer.encode("🪁", add_special_tokens=False).ids[-4:]
        for part in (emoji[:1], emoji[:3], emoji[1:], emoji[2:3]):
            for broken in (ids + part, part + ids):
                assert loaded.has_broken_character(broken), (text, part)
                text_of_broken = loaded.decode(broken)
                assert tokenizer.encode(text_of_broken, add_special_tokens=False).ids != broken


def test_no_id_beyond_the_vocabulary_is_a_broken_character(tmp_path):
    """The model of a checkpoint often has more rows than its tokenizer has tokens."""
    loaded = SafeTokenizer(write_folder(tmp_path, with_tokens("byte-level")))
    assert not loaded.has_broken_character([len(loaded.hugging_face) + 1])


@pytest.mark.slow
def test_large_vocabulary_loads_in_the_time_of_a_few_reads(tmp_path):
    """The vocabulary is read once. It is not copied, and not written as JSON."""
    small = backend("byte-level")
    letters = pre_tokenizers.ByteLevel.alphabet()
    merges = list(itertools.product(letters, letters))
    pieces = [*letters, *map("".join, merges)]
    vocabulary = {piece: id_ for id_, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = small.pre_tokenizer, small.decoder
    tokenizer.add_tokens(CONTROL)
    folder = write_folder(tmp_path, tokenizer)

    def seconds(load) -> float:
        begin = time.process_time()
        load()
        return time.process_time() - begin

    SafeTokenizer(folder)
    read = min(seconds(lambda: Tokenizer.from_file(str(folder / "tokenizer.json"))) for _ in range(3))
    assert min(seconds(lambda: SafeTokenizer(folder)) for _ in range(3)) < 2 * read
