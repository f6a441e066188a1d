"""A tokenizer in which data can never become a control token.

Text of a template is trusted and may contain control tokens. Text of a user, a data set or a model is data: it is
encoded without control tokens, so `<|im_end|>` in a prompt is ten ordinary characters. Between two control tokens,
trusted text and data are tokenized together, as the original tokenizer does, so harmless text gets exactly the ids of
transformers.

A control token is an added token that is special, a think tag, or written by the chat template or a guard's format.
Other added tokens are text. So is a word, such as `apple`, or a sign, such as `!`, even if it is special: some
checkpoints have such a padding token, and data must be able to hold it.
"""

import copy
import json
import re
import secrets
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import lru_cache
from itertools import accumulate, groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from tokenizers import AddedToken, Encoding, Tokenizer
from tokenizers.decoders import Decoder
from tokenizers.models import Model, WordLevel
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from thinksafe.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "tekken.json",
    "chat_template.jinja",
    "additional_chat_templates",
    "generation_config.json",
)
"""Files of a checkpoint, and one folder, that make its tokenizer, also for programs that do not read tokenizer.json."""

_COMPARED_TEXTS = (
    "Hello world, two\n words and  three\n\n\n\tlines.  ",
    " It's 2024; they'll pay 1234567.89 for x_1 = f(a[0])!!!",
    "def f(x):\r\n    return x ** 2  # a\u0301 é ½ ﬁ\u00a0\u3000",
    "ÜNÏCÖDÉ Straße 漢字かな кот עברית हिन्दी 🪁👩\u200d🚀\ufffd",
)
"""Texts that show other rules than those of tokenizer.json: spaces, lines, digits, signs, accents, scripts."""

_MASK = "\uffff"
"""A character that is in no vocabulary and in no control token."""

_Step = TypeVar("_Step", Normalizer, PreTokenizer)

Previous = Literal["nothing", "token", "normalized token"]
"""What precedes a text: SentencePiece tokenizers put a space before the first word of a text, and some of them before
the first word after each token that they find in text before they normalize it."""


class SafeTokenizer:
    """The tokenizer of a checkpoint folder, in which only trusted text can contain control tokens.

    Attributes:
        hugging_face: the transformers tokenizer, for its chat template and for decoding.
        control_ids: text -> id of each control token.
        date: date and time that the chat template writes, so that a prompt of a run has the same ids on every day.
    """

    def __init__(self, folder: Path, date: datetime | None = None):
        """Load the tokenizer from files only, without code of the checkpoint.

        Args:
            date: value of the attribute; None for the present.

        Raises:
            UserError: the folder has no tokenizer.json, transformers cannot load it or gives other ids, or the token
                that begins or ends a text is an ordinary word.
        """
        self.folder, self.date, self.hugging_face = folder, date or datetime.now(), _load(folder)
        self._backend = self.hugging_face.backend_tokenizer
        self._added: dict[int, AddedToken] = dict(sorted(self._backend.get_added_tokens_decoder().items()))
        self.control_ids: dict[str, int] = {}
        # What stands for an unknown character is not a control token.
        steps = self._backend.normalizer, self._backend.pre_tokenizer
        self._unknown_ids = set(_tokenizer(self._backend.model, *steps).encode(_MASK).ids)
        ends = {self.hugging_face.bos_token_id, self.hugging_face.eos_token_id}
        template = json.dumps(self.hugging_face.chat_template or "", ensure_ascii=False)  # there may be several
        self._make_control(
            id_
            for id_, token in self._added.items()
            if id_ in ends
            or token.content in (THINK_OPEN, THINK_CLOSE)
            or ((token.special or token.content in template) and not _is_ordinary(token.content))
        )

    def reserving(self, *trusted_texts: str) -> "SafeTokenizer":
        """Return a copy in which the added tokens that these texts write are control tokens, except words and signs.

        Raises:
            UserError: a text writes a word or sign that is a special token, other than for padding or unknown text.
        """
        tokenizer, find = copy.copy(self), self._finder(self._added)
        tokenizer._make_control(id_ for text in trusted_texts for id_, _, _ in find(text))
        return tokenizer

    def encode(self, parts: list[tuple[str, bool]]) -> list[int]:
        """Return the token ids of the (text, trusted) parts in order, as one text, without adding BOS or EOS.

        A control token becomes its id within a trusted part, and is encoded as ordinary characters anywhere else.
        """
        ids = []
        for text, previous, control_id in self._pieces(parts):
            ids += self._text_ids(text, previous)
            ids += [] if control_id is None else [control_id]
        return ids

    def encode_ahead(self, batch: Iterable[list[tuple[str, bool]]]) -> None:
        """Encode the texts of later calls of `encode` on all cores. Their ids are kept until the next call of this
        method."""
        texts: dict[Previous, dict[str, None]] = {previous: {} for previous in self._data_tokenizers}
        for parts in batch:
            for text, previous, _ in self._pieces(parts):
                texts[previous][text] = None
        forbidden = self._forbidden_ids
        self._ids_ahead = {
            (text, previous): encoding.ids
            for previous, tokenizer in self._data_tokenizers.items()
            for text, encoding in zip(
                texts[previous],
                tokenizer.encode_batch_fast(list(texts[previous]), add_special_tokens=False),
                strict=True,
            )
            if forbidden.isdisjoint(encoding.ids)
        }

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Return the slice (start, end) of `text` of every token, for an untrusted text that continues another one.

        The slices cover the text: what normalization joins or removes belongs to the token before it. Several tokens
        that make up one character have the same slice.
        """
        starts = [start for start, _ in self._encoding(text, "token").offsets]
        slices, end, following = [], len(text), len(text)
        for start in reversed([0, *accumulate(starts[1:], max)]):
            if start < following:
                end, following = following, start
            slices.append((start, end))
        return slices[::-1]

    def control_tokens_in(self, text: str) -> list[str]:
        """Return the control tokens that a text spells out, in order, with repetitions."""
        return self._control_pattern.findall(text)

    def decode(self, ids: list[int] | tuple[int, ...]) -> str:
        """Return the text of token ids, with control tokens spelled out."""
        return self.hugging_face.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def has_broken_character(self, ids: list[int] | tuple[int, ...]) -> bool:
        """Return whether token ids hold bytes that are not UTF-8. Their text shows U+FFFD instead, which has other ids.
        A U+FFFD that the ids spell is a character like any other."""
        if not (num_shown := self.decode(ids).count("\ufffd")):
            return False
        pieces = [self._backend.id_to_token(id_) or "" for id_ in ids]
        if self._backend.decoder is not None and b"ByteLevel" in self._backend.decoder.__getstate__():
            num_spelled = "".join(pieces).count("ï¿½")  # its bytes EF BF BD in the alphabet of these tokenizers
        else:
            num_spelled = sum(map("\0".join(["", *pieces]).count, ("\ufffd", "\0<0xEF>\0<0xBF>\0<0xBD>")))
        return num_shown > num_spelled

    def save(self, folder: Path) -> None:
        """Copy the tokenizer's files, chat template and generation_config.json, if present, into an existing folder."""
        for path in (self.folder / name for name in _FILES):
            if path.is_dir():
                shutil.copytree(path, folder / path.name)
            elif path.exists():
                shutil.copy(path, folder / path.name)

    def _make_control(self, ids: Iterable[int]) -> None:
        """Make added tokens control tokens, except words and signs. Raise a UserError if one of these is special, other
        than for padding or unknown text."""
        ids = set(ids)
        ordinary = {id_ for id_ in ids if _is_ordinary(self._added[id_].content)}
        named = self.hugging_face
        fillers = {named.pad_token_id, named.unk_token_id} - {named.bos_token_id, named.eos_token_id}
        if undecidable := [self._added[id_].content for id_ in sorted(ordinary - fillers) if self._added[id_].special]:
            tokens = ", ".join(map(repr, undecidable))
            raise UserError(
                f"{self.folder}: {tokens}: special, but ordinary text, so data could become a control token; use a "
                "token such as <|end|>, or set special to false"
            )
        self.control_ids = self.control_ids | {self._added[id_].content: id_ for id_ in sorted(ids - ordinary)}
        longest_first = sorted(self.control_ids, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._find_control = self._finder(self.control_ids.values())
        self._data_tokenizers = self._tokenizers_of_data(self._backend.model, {})
        self._strict_data_tokenizers: dict[Previous, Tokenizer] | None = None
        # A guard asks several questions about one long text, and all prompts share the template's text.
        self._text_ids = lru_cache(1024)(self._encode_text)
        self._ids_ahead: dict[tuple[str, Previous], list[int]] = {}
        self._cached_control_tokens = lru_cache(1024)(self._find_control_tokens)

    def _finder(self, ids: Iterable[int]) -> Callable[[str], list[tuple[int, int, int]]]:
        """Return a function that finds some added tokens in a text: (id, start, end) of each one, in order, with the
        white space that belongs to it."""
        ids = list(ids)
        # Without a vocabulary, all other text is one unknown token with id 0.
        added = [self._added[id_] for id_ in ids]
        tokenizer = _tokenizer(WordLevel({"": 0}, ""), self._backend.normalizer, None, added)

        def find(text: str) -> list[tuple[int, int, int]]:
            encoding = tokenizer.encode(text)
            return [
                (ids[index - 1], *span) for index, span in zip(encoding.ids, encoding.offsets, strict=True) if index
            ]

        return find

    def _trusted_control_tokens(self, text: str, parts: list[tuple[str, bool]]) -> list[tuple[int, int, int]]:
        """Return (id, start, end) of each control token that trusted text spells, with the white space around it that
        belongs to it."""
        tokens, end = [], 0
        for trusted, run in groupby(filter(itemgetter(0), parts), key=itemgetter(1)):
            begin, end = end, end + sum(len(part) for part, _ in run)
            if trusted:
                before, after = text[:begin], text[end:]
                before = before[max(len(before.rstrip()) - 1, 0) :]
                after = after[: len(after) - len(after.lstrip()) + 1]
                tokens += [
                    (id_, begin + start, begin + stop)
                    for id_, start, stop in self._cached_control_tokens(before, text[begin:end], after)
                ]
        return tokens

    def _find_control_tokens(self, before: str, trusted_text: str, after: str) -> list[tuple[int, int, int]]:
        """Return (id, start, end) of each control token that a trusted text spells, with the white space around it that
        belongs to it.

        Args:
            before, after: what surrounds the text: white space and one more character, which decides whether a token
                that is a single word begins and ends here.
        """
        text, first, last = before + trusted_text + after, len(before), len(before + trusted_text)
        tokens = []
        for id_, start, end in self._find_control(text):
            spelled = text[start:end]
            if first <= end - len(spelled.lstrip()) and start + len(spelled.rstrip()) <= last:
                tokens.append((id_, start - first, end - first))
            elif (masked := (_masked(before), _masked(after))) != (before, after):
                # Data completes this token, and must not hide what the trusted text spells.
                return self._find_control_tokens(masked[0], trusted_text, masked[1])
        return tokens

    def _pieces(self, parts: list[tuple[str, bool]]) -> Iterator[tuple[str, Previous, int | None]]:
        """Yield (text, what precedes it, id of the control token that follows it or None at the end) in order."""
        text, position, previous = "".join(part for part, _ in parts), 0, "nothing"
        for id_, start, end in self._trusted_control_tokens(text, parts):
            yield text[position:start], previous, id_
            position, previous = end, "normalized token" if self._added[id_].normalized else "token"
        yield text[position:], previous, None

    def _encode_text(self, text: str, previous: Previous) -> list[int]:
        """Return the ids of a text without control tokens."""
        ids = self._ids_ahead.get((text, previous))
        return ids if ids is not None else self._encoding(text, previous).ids if text else []

    @property
    def _forbidden_ids(self) -> set[int]:
        return set(self.control_ids.values()) - self._unknown_ids

    def _encoding(self, text: str, previous: Previous) -> Encoding:
        """Return the tokens of a text without control tokens."""
        forbidden = self._forbidden_ids
        encoding = self._data_tokenizers[previous].encode(text, add_special_tokens=False)
        if forbidden.isdisjoint(encoding.ids):
            return encoding
        # The vocabulary has a control token as an ordinary piece. Making a strict copy takes a second, so only now.
        if self._strict_data_tokenizers is None:
            self._strict_data_tokenizers = self._tokenizers_of_data(*_without_pieces(self._backend.model, forbidden))
        return self._strict_data_tokenizers[previous].encode(text, add_special_tokens=False)

    def _tokenizers_of_data(self, model: Model, new_names: Mapping[int, str]) -> dict[Previous, Tokenizer]:
        """Return tokenizers that find no control token.

        Args:
            model: model of the tokenizer, or `_without_pieces`.
            new_names: id -> name of each piece of the model that has another name than the added token with this id.
        """
        added = []
        for id_, token in self._added.items():
            options = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
            content = new_names.get(id_, token.content)
            # All are added, because tokenizers numbers them; what is special is not found in text.
            added.append(AddedToken(content, special=token.content in self.control_ids, **options))
        normalizer, pre_tokenizer = self._backend.normalizer, self._backend.pre_tokenizer
        steps: dict[Previous, tuple[Normalizer | None, PreTokenizer | None]] = {
            "nothing": (normalizer, pre_tokenizer),
            "token": (normalizer, _continuing(pre_tokenizer)),
            "normalized token": (_continuing(normalizer), _continuing(pre_tokenizer)),
        }
        tokenizers = {previous: _tokenizer(model, *steps[previous], added) for previous in steps}
        for tokenizer in tokenizers.values():
            tokenizer.encode_special_tokens = True
        return tokenizers


def _tokenizer(
    model: Model,
    normalizer: Normalizer | None,
    pre_tokenizer: PreTokenizer | None,
    added_tokens: Iterable[AddedToken] = (),
    decoder: Decoder | None = None,
) -> Tokenizer:
    """Return a tokenizer that never truncates or pads, and shares the model."""
    tokenizer = Tokenizer(model)
    for name, step in (("normalizer", normalizer), ("pre_tokenizer", pre_tokenizer), ("decoder", decoder)):
        if step is not None:
            setattr(tokenizer, name, step)
    tokenizer.add_tokens(list(added_tokens))
    return tokenizer


def _load(folder: Path) -> "PreTrainedTokenizerFast":
    """Return the transformers tokenizer of a folder, whose rules are those of tokenizer.json.

    Raises:
        UserError: the folder has no tokenizer.json, transformers cannot load it, or gives other ids than the files say.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{folder}: tokenizer.json is missing; add a fast tokenizer to the folder")
    try:
        tokenizer = _from_tokenizer_json(folder)
        backend, text = tokenizer.backend_tokenizer, file.read_text(encoding="utf-8")
        declared_ids = list(_declared_ids(folder, _entry(text, "added_tokens")))
        loaded, expected = (
            _tokenizer(backend.model, steps.normalizer, steps.pre_tokenizer, decoder=steps.decoder)
            for steps in (backend, _steps_of(text))
        )
        ids = [(text, loaded.encode(text).ids, expected.encode(text).ids) for text in _COMPARED_TEXTS]
    except Exception as error:  # transformers raises many types of errors for a broken folder
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: no usable tokenizer ({reason})") from None
    for text, loaded_ids, expected_ids in ids:
        if loaded_ids != expected_ids or loaded.decode(loaded_ids) != expected.decode(loaded_ids):
            raise UserError(
                f"{folder}: transformers reads {text!r} otherwise than tokenizer.json; remove what changes it from "
                "tokenizer_config.json, or save the tokenizer anew with save_pretrained"
            )
    for source, content, id_ in declared_ids:
        if (actual := backend.token_to_id(content)) != id_:
            raise UserError(
                f"{source}: token {content!r} has id {id_}, but transformers loads it with "
                f"{'no id' if actual is None else f'id {actual}'}; save the tokenizer anew with save_pretrained"
            )
    return tokenizer


def _from_tokenizer_json(folder: Path) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    class FileTokenizer(PreTrainedTokenizerFast):
        @classmethod
        def convert_to_native_format(cls, **options):
            """Leave tokenizer.json as it is. Transformers would build some tokenizers anew from its vocabulary, by the
            rules of the class that tokenizer_config.json names, or read the file and copy what it has read."""
            return options

    return FileTokenizer.from_pretrained(folder)


def _steps_of(tokenizer_json: str) -> Tokenizer:
    """Return a tokenizer with the normalizer, pre-tokenizer and decoder of a tokenizer.json, without its vocabulary."""
    spec = json.loads(Tokenizer(WordLevel({"": 0}, "")).to_str())
    return Tokenizer.from_str(
        json.dumps(spec | {name: _entry(tokenizer_json, name) for name in ("normalizer", "pre_tokenizer", "decoder")})
    )


def _entry(tokenizer_json: str, name: str) -> Any:
    """Return the value of a top-level entry of a tokenizer.json, null if it is missing. Its vocabulary, which may have
    entries of the same name, has numbers; reading it takes a second."""
    found = re.search(rf'"{name}"\s*:\s*(?=[\[{{])', tokenizer_json)
    return json.JSONDecoder().raw_decode(tokenizer_json, found.end())[0] if found else None


def _declared_ids(folder: Path, added_tokens: list[dict] | None) -> Iterator[tuple[Path, str, int]]:
    """Yield (file, text, id) of each added token in each file of a folder that names added tokens.

    Args:
        added_tokens: those of tokenizer.json.
    """
    for token in added_tokens or ():
        yield folder / "tokenizer.json", token["content"], token["id"]
    if (file := folder / "tokenizer_config.json").exists():
        for id_, token in json.loads(file.read_text(encoding="utf-8")).get("added_tokens_decoder", {}).items():
            yield file, token["content"], int(id_)
    if (file := folder / "added_tokens.json").exists():
        for content, id_ in json.loads(file.read_text(encoding="utf-8")).items():
            yield file, content, id_


def _masked(text: str) -> str:
    """Return a text with a character that is in no token instead of each one other than white space."""
    return re.sub(r"\S", _MASK, text)


def _is_ordinary(content: str) -> bool:
    """Return whether a token is a word or signs: it does not have both letters or digits, and signs, as markup has."""
    is_letter = {unicodedata.category(character)[0] in "LMN" for character in content if not character.isspace()}
    return len(is_letter) < 2


def _continuing(step: _Step | None) -> _Step | None:
    """Return a copy of a step of tokenization that puts no space before its text, even if that is how a text, or a text
    that is normalized at once, begins."""
    if step is None:
        return None
    spec = json.loads(step.__getstate__())
    for part in (spec, *spec.get("pretokenizers", ()), *spec.get("normalizers", ())):
        if part.get("prepend_scheme") == "first":
            part["prepend_scheme"] = "never"
        if part["type"] == "Prepend":
            part["prepend"] = ""
    copied = copy.deepcopy(step)
    copied.__setstate__(json.dumps(spec).encode())
    return copied


def _without_pieces(model: Model, ids: set[int]) -> tuple[Model, dict[int, str]]:
    """Return a copy of a model that gives none of these ids, and the names under which they are still in its
    vocabulary. No text spells these names, since they are random."""
    spec = json.loads(model.__getstate__())
    vocabulary = spec["vocab"]  # of Unigram a list of [piece, score], whose index is the id
    pieces = (
        vocabulary.items()
        if isinstance(vocabulary, dict)
        else ((piece, id_) for id_, (piece, _) in enumerate(vocabulary))
    )
    forbidden = {piece: id_ for piece, id_ in pieces if id_ in ids}
    names = {piece: f"{secrets.token_hex(16)}{id_}" for piece, id_ in forbidden.items()}
    if isinstance(vocabulary, dict):
        spec["vocab"] = {names.get(piece, piece): id_ for piece, id_ in vocabulary.items()}
        spec["unk_token"] = None if spec.get("unk_token") in names else spec.get("unk_token")
    else:
        spec["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if "merges" in spec:
        spec["merges"] = [pair for pair in spec["merges"] if names.keys().isdisjoint((*pair, "".join(pair)))]
    strict = type(model)()
    strict.__setstate__(json.dumps(spec).encode())
    return strict, {id_: names[piece] for piece, id_ in forbidden.items()}
