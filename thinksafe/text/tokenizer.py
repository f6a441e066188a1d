"""A tokenizer in which text can never become a control token.

What a template wrote may hold control tokens; what a user, a data set or a model wrote is tokenised by a copy of the
tokenizer that has none, so `<|im_end|>` in a prompt is ten ordinary characters. Between two control tokens, trusted
text and data are tokenised together, as the original tokenizer does: harmless text gets exactly the ids it gets from
transformers. Tokenizers of sentencepiece's kind put a space before the first word of a text, and only there: what
follows a control token is no beginning.
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
    """The tokenizer of a checkpoint folder.

    Attributes:
        hugging_face: the transformers tokenizer, for its chat template and for decoding.
        control_ids: every control (added) token -> its id.
    """

    def __init__(self, folder: Path):
        """Read it.

        Raises:
            UserError: no fast tokenizer there.
        """
        from transformers import AutoTokenizer

        if not (folder / "tokenizer.json").is_file():
            raise UserError(f"{folder}: needs a fast tokenizer, and tokenizer.json is missing")

        try:
            self.hugging_face = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # transformers raises a dozen kinds for a broken folder
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{folder}: no usable tokenizer ({reason})") from None
        if not getattr(self.hugging_face, "is_fast", False):
            raise UserError(f"{folder}: needs a fast tokenizer (tokenizer.json)")
        self.folder = folder
        backend = self.hugging_face.backend_tokenizer
        self.control_ids = {token["content"]: token["id"] for token in json.loads(backend.to_str())["added_tokens"]}
        longest_first = sorted(self.control_ids, key=len, reverse=True)
        self._control = re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")
        self._plain = _without_control_tokens(backend)
        self._within = _without_leading_space(self._plain)
        # A guard asks several questions about one long text, and a template's own text is everybody's.
        self._plain_ids = lru_cache(1024)(self._plain_ids)

    def encode(self, parts: list[tuple[str, bool]]) -> list[int]:
        """Ids of (text, trusted) parts: control tokens in trusted text become ids, all else is plain text."""
        ids: list[int] = []
        pending = ""
        for text, trusted in parts:
            pieces = self._control.split(text) if trusted else [text]
            for index, piece in enumerate(pieces):
                if index % 2:  # re.split puts what matched at the odd places
                    ids += self._plain_ids(pending, not ids)
                    ids.append(self.control_ids[piece])
                    pending = ""
                else:
                    pending += piece
        return ids + self._plain_ids(pending, not ids)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """(start, end) in characters of every token of a plain text; bytes of one character share its span."""
        return self._within.encode(text, add_special_tokens=False).offsets

    def control_tokens_in(self, text: str) -> list[str]:
        """The control tokens that are spelled out in a text, in order."""
        return self._control.findall(text)

    def decode(self, ids: list[int] | tuple[int, ...]) -> str:
        """Text, with control tokens spelled out."""
        return self.hugging_face.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def save(self, folder: Path) -> None:
        """Copy the tokenizer's files into another checkpoint folder."""
        for name in _FILES:
            if (self.folder / name).exists():
                shutil.copy(self.folder / name, folder / name)

    def _plain_ids(self, text: str, begins: bool) -> list[int]:
        tokenizer = self._plain if begins else self._within
        return tokenizer.encode(text, add_special_tokens=False).ids if text else []


def _without_control_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that cannot produce a control token, whatever the text, and neither cuts nor pads it."""
    spec = json.loads(tokenizer.to_str())
    spec["truncation"] = spec["padding"] = None
    control = {token["content"] for token in spec["added_tokens"]}
    spec["added_tokens"] = []
    model = spec["model"]
    keep = {model.get("unk_token")}
    if isinstance(model["vocab"], dict):
        model["vocab"] = {piece: id_ for piece, id_ in model["vocab"].items() if piece not in control - keep}
    else:  # Unigram: a list of [piece, score], whose index is the id
        keep = {model["vocab"][model["unk_id"]][0]} if model.get("unk_id") is not None else set()
        model["vocab"] = [
            [f"\x00control {id_}\x00", -1e9] if piece in control - keep else [piece, score]
            for id_, (piece, score) in enumerate(model["vocab"])
        ]
    return Tokenizer.from_str(json.dumps(spec))


def _without_leading_space(tokenizer: Tokenizer) -> Tokenizer:
    """For text that does not begin where a text begins."""
    spec = json.loads(tokenizer.to_str())
    pre_tokenizer = spec["pre_tokenizer"] or {}
    for step in (pre_tokenizer, *pre_tokenizer.get("pretokenizers", ())):
        if step.get("prepend_scheme") == "first":
            step["prepend_scheme"] = "never"
    return Tokenizer.from_str(json.dumps(spec))
