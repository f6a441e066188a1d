"""A tokenizer in which data can never become a control token.

Text of a template is trusted and may contain control tokens. Text of a user, a data set or a model is data: a copy of
the tokenizer without control tokens encodes it, so `<|im_end|>` in a prompt is ten ordinary characters. Between two
control tokens, trusted text and data are tokenized together, as the original tokenizer does, so harmless text gets
exactly the ids of transformers. SentencePiece tokenizers put a space before the first word of a text only; text after
a control token is not the beginning of a text.
"""

import json
import re
import shutil
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer

from thinksafe.errors import UserError

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


class SafeTokenizer:
    """The tokenizer of a checkpoint folder, in which only trusted text can contain control tokens.

    Attributes:
        hugging_face: the transformers tokenizer, for its chat template and for decoding.
        control_ids: text -> id of each control token, which is any added token of tokenizer.json, `<think>` included.
    """

    def __init__(self, folder: Path):
        """Load the tokenizer from files only, without code of the checkpoint.

        Raises:
            UserError: the folder has no tokenizer.json, or transformers cannot load a fast tokenizer from it.
        """
        from transformers import AutoTokenizer

        if not (folder / "tokenizer.json").is_file():
            raise UserError(f"{folder}: tokenizer.json is missing; add a fast tokenizer to the folder")
        try:
            self.hugging_face = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # transformers raises many types of errors for a broken folder
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{folder}: no usable tokenizer ({reason})") from None
        if not getattr(self.hugging_face, "is_fast", False):
            raise UserError(f"{folder}: the tokenizer is not a fast one; add a valid tokenizer.json to the folder")
        self.folder = folder
        backend = self.hugging_face.backend_tokenizer
        self.control_ids = {token["content"]: token["id"] for token in json.loads(backend.to_str())["added_tokens"]}
        tokens_longest_first = sorted(self.control_ids, key=len, reverse=True)
        self._control_pattern = re.compile("(" + ("|".join(map(re.escape, tokens_longest_first)) or "(?!)") + ")")
        self._text_tokenizer = _without_control_tokens(backend)
        self._continuation_tokenizer = _without_leading_space(self._text_tokenizer)
        # A guard asks several questions about one long text, and all prompts share the template's text.
        self._text_ids = lru_cache(1024)(self._text_ids)

    def encode(self, parts: list[tuple[str, bool]]) -> list[int]:
        """Return the token ids of the (text, trusted) parts in order, as one text, without adding BOS or EOS.

        A control token becomes its id within a trusted part, and is encoded as ordinary characters anywhere else.
        """
        ids, pending = [], ""
        for text, trusted in parts:
            pieces = self._control_pattern.split(text) if trusted else [text]
            for index, piece in enumerate(pieces):
                if index % 2:  # re.split returns the matches at odd indices
                    ids += self._text_ids(pending, not ids)
                    ids.append(self.control_ids[piece])
                    pending = ""
                else:
                    pending += piece
        return ids + self._text_ids(pending, not ids)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Return the slice (start, end) of `text` of every token, for an untrusted text that continues another one.
        Several tokens that make up one character have the same slice."""
        return self._continuation_tokenizer.encode(text, add_special_tokens=False).offsets

    def control_tokens_in(self, text: str) -> list[str]:
        """Return the control tokens that a text spells out, in order, with repetitions."""
        return self._control_pattern.findall(text)

    def decode(self, ids: list[int] | tuple[int, ...]) -> str:
        """Return the text of token ids, with control tokens spelled out."""
        return self.hugging_face.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def save(self, folder: Path) -> None:
        """Copy the tokenizer's files, chat template and generation_config.json, if present, into an existing folder."""
        for name in _FILES:
            if (self.folder / name).exists():
                shutil.copy(self.folder / name, folder / name)

    def _text_ids(self, text: str, at_start: bool) -> list[int]:
        """Return the ids of a text without control tokens; `at_start` says whether no token precedes it."""
        tokenizer = self._text_tokenizer if at_start else self._continuation_tokenizer
        return tokenizer.encode(text, add_special_tokens=False).ids if text else []


def _without_control_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """Return a copy that encodes no text as a control token, except as the unknown token, and never truncates or pads.
    All other ids are unchanged."""
    spec = json.loads(tokenizer.to_str())
    control = {token["content"] for token in spec["added_tokens"]}
    spec |= {"truncation": None, "padding": None, "added_tokens": []}
    model = spec["model"]
    if isinstance(model["vocab"], dict):
        control.discard(model.get("unk_token"))
        model["vocab"] = {piece: id_ for piece, id_ in model["vocab"].items() if piece not in control}
    else:  # Unigram: a list of [piece, score]; the index is the id
        if model.get("unk_id") is not None:
            control.discard(model["vocab"][model["unk_id"]][0])
        model["vocab"] = [
            [f"\x00control {id_}\x00", -1e9] if piece in control else [piece, score]
            for id_, (piece, score) in enumerate(model["vocab"])
        ]
    return Tokenizer.from_str(json.dumps(spec))


def _without_leading_space(tokenizer: Tokenizer) -> Tokenizer:
    """Return a copy for text that continues another text: where the pre-tokenizer puts a space before the first word of
    a text, the copy puts none."""
    spec = json.loads(tokenizer.to_str())
    pre_tokenizer = spec["pre_tokenizer"] or {}
    for step in (pre_tokenizer, *pre_tokenizer.get("pretokenizers", ())):
        if step.get("prepend_scheme") == "first":
            step["prepend_scheme"] = "never"
    return Tokenizer.from_str(json.dumps(spec))
