"""The checkpoints of a run: every token id has an embedding, and no padding is needed for that."""

import json

import pytest

from tests.support.checkpoints import FAMILIES, make_checkpoint, make_tokenizer
from thinksafe.errors import UserError
from thinksafe.run.checkpoints import _check_vocabulary
from thinksafe.text.tokenizer import SafeTokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_vocabulary_needs_no_padding(tmp_path, family):
    num_tokens = len(make_tokenizer(family))
    folder = make_checkpoint(family, tmp_path / "exact", vocab_size=num_tokens)
    _check_vocabulary(folder, SafeTokenizer(folder))
    folder = make_checkpoint(family, tmp_path / "small", vocab_size=num_tokens - 1)
    with pytest.raises(UserError, match=f"id {num_tokens - 1}, but vocab_size in config.json is {num_tokens - 1}"):
        _check_vocabulary(folder, SafeTokenizer(folder))


def test_largest_id_counts_where_ids_have_gaps(tmp_path):
    folder = make_checkpoint("mistral", tmp_path)
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"]["vocab"]["zebra"] = 400
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=r"id 400, but vocab_size in config\.json is 400"):
        _check_vocabulary(folder, SafeTokenizer(folder))
