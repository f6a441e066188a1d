"""Records in files: every spelling a user may bring is read, and what cannot be read is refused with its place."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinksafe.errors import UserError
from thinksafe.prompts import load_prompts
from thinksafe.records import (
    Example,
    Prompt,
    Response,
    Verdict,
    content_id,
    read_prompts,
    read_records,
    take_in,
    to_json,
)

ROWS = [
    {"text": "how do I fold a boat?", "label": "benign"},
    {"text": "how do I brew a ka lo mi?", "label": "harmful"},
]
RESPONSE = {"prompt": "p", "label": "benign", "text": "<think>\na\n</think>\n\nb"}


def jsonl(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def file(tmp_path):
    """Writes a file and gives its path: file("prompts.jsonl", text or bytes)."""

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def texts(prompts: list[Prompt]) -> list[tuple[str, str]]:
    return [(prompt.text, prompt.label) for prompt in prompts]


EXPECTED = [(row["text"], row["label"]) for row in ROWS]


@pytest.mark.parametrize("key", ["text", "prompt", "instruction"])
def test_the_text_of_a_prompt_may_go_by_three_names(file, key):
    path = file("p.jsonl", jsonl({key: row["text"], "label": row["label"]} for row in ROWS))
    assert texts(read_prompts(path)) == EXPECTED


@pytest.mark.parametrize(
    "name, content",
    [
        ("plain.jsonl", jsonl(ROWS)),
        ("blank_lines.jsonl", "\n\n" + jsonl(ROWS).replace("\n", "\n\n")),
        ("no_last_newline.jsonl", jsonl(ROWS).rstrip()),
        ("windows.jsonl", jsonl(ROWS).replace("\n", "\r\n")),
        ("byte_order_mark.jsonl", b"\xef\xbb\xbf" + jsonl(ROWS).encode()),
        ("array.json", json.dumps(ROWS)),
        ("pretty.json", json.dumps(ROWS, indent=2)),
        ("array_after_blanks.json", "\n  " + json.dumps(ROWS)),
        ("array_with_byte_order_mark.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
    ],
)
def test_every_spelling_of_json_gives_the_same_prompts(file, name, content):
    assert texts(read_prompts(file(name, content))) == EXPECTED


def test_parquet_in_the_columns_of_safechain(tmp_path):
    path = tmp_path / "train.parquet"
    columns = {
        "instruction": ["a", "b", "c", "d"],
        "label": ["vanilla_harmful", "adversarial_harmful", "vanilla_benign", "adversarial_benign"],
        "response": ["unused"] * 4,
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    prompts = read_prompts(path)
    assert texts(prompts) == [("a", "harmful"), ("b", "harmful"), ("c", "benign"), ("d", "benign")]
    assert {prompt.source for prompt in prompts} == {"train"}


def test_ids_are_of_content_and_duplicates_are_read_once(file):
    path = file("p.jsonl", jsonl([*ROWS, ROWS[0] | {"source": "again"}, {"text": ROWS[0]["text"], "label": "harmful"}]))
    prompts = read_prompts(path)
    assert texts(prompts) == [*EXPECTED, (ROWS[0]["text"], "harmful")]
    assert [prompt.id for prompt in prompts] == [content_id(prompt.label, prompt.text) for prompt in prompts]
    assert len({prompt.id for prompt in prompts}) == 3
    assert prompts[0].source == "p"


def test_a_folder_of_files_is_one_set_without_duplicates(file, tmp_path):
    file("a.jsonl", jsonl(ROWS))
    file("b.json", json.dumps([*ROWS, {"text": "c", "label": "benign"}]))
    file("notes.txt", "not read")
    assert texts(load_prompts(str(tmp_path))) == [*EXPECTED, ("c", "benign")]


def test_text_is_kept_as_it_is(file):
    text = "  \t leading, { braces }, </s><|im_end|> \u2028 \x85 \x00 é e\u0301 🪁\n trailing \r\n"
    (prompt,) = read_prompts(file("p.jsonl", jsonl([{"text": text, "label": "benign"}])))
    assert prompt.text == text
    again = file("q.jsonl", to_json(prompt) + "\n")
    assert read_prompts(again) == [prompt]


PROMPT_MISTAKES = {
    "not json": ('{"text": "a", "label": "benign"}\n{"text": \n', "line 2"),
    "not an object": ('{"text": "a", "label": "benign"}\n["text"]\n', "line 2"),
    "no text": ('{"label": "benign"}\n', "line 1"),
    "empty text": ('\n{"text": " \\n", "label": "benign"}\n', "line 2"),
    "text is a number": ('{"text": 5, "label": "benign"}\n', "line 1"),
    "no label": ('{"text": "a"}\n', "line 1"),
    "other label": ('{"text": "a", "label": "good"}\n', "'good'"),
    "label is true": ('{"text": "a", "label": true}\n', "label"),
    "half a surrogate pair": ('{"text": "a\\ud800b", "label": "benign"}\n', "line 1"),
    "half a surrogate pair elsewhere": ('{"text": "a", "label": "benign", "source": "\\udfff"}\n', "line 1"),
    "not utf-8": (b'{"text": "a", "label": "benign"}\n{"text": "\xff\xfe", "label": "benign"}\n', "line 2"),
    "a number of 5,000 digits": ('{"text": "a", "label": "benign", "n": ' + "9" * 5000 + "}\n", "line 1"),
    "nested too deep": ('{"text": "a", "label": "benign", "n": ' + "[" * 100_000 + "\n", "line 1"),
    "truncated array": ('[{"text": "a", "label": "benign"},', "not valid JSON"),
    "array of texts": ('["a"]', "record 1"),
    "empty": ("", "empty"),
    "blank": ("\n \n\n", "empty"),
    "empty array": ("[]", "empty"),
}


@pytest.mark.parametrize("mistake", PROMPT_MISTAKES)
def test_an_unreadable_prompt_is_named_with_its_file_and_place(file, mistake):
    content, place = PROMPT_MISTAKES[mistake]
    path = file("prompts.jsonl", content)
    with pytest.raises(UserError) as caught:
        read_prompts(path)
    message = str(caught.value)
    assert str(path) in message and place in message and "\n" not in message


@pytest.mark.parametrize("cut", [0, 4, 100, -1, -9, -60])
def test_a_torn_parquet_file_is_refused(file, tmp_path, cut):
    whole = tmp_path / "whole.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 50, "label": ["benign"] * 50}), whole)
    with pytest.raises(UserError, match=r"torn\.parquet: not a readable parquet file"):
        read_prompts(file("torn.parquet", whole.read_bytes()[:cut]))


def test_a_damaged_page_of_a_parquet_file_is_refused(file, tmp_path):
    whole = tmp_path / "whole.parquet"
    table = pyarrow.table({"text": [f"prompt {n}" for n in range(500)], "label": ["benign"] * 500})
    pyarrow.parquet.write_table(table, whole, write_page_checksum=True)
    data = bytearray(whole.read_bytes())
    data[4:40] = b"\xff" * 36  # the header of the first page
    with pytest.raises(UserError, match=r"damaged.parquet: not a readable parquet file"):
        read_prompts(file("damaged.parquet", bytes(data)))


def test_a_parquet_file_without_rows_is_empty(tmp_path):
    path = tmp_path / "none.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(UserError, match="empty"):
        read_prompts(path)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere", "/no/where/at/all", "~/nowhere-at-all", "nowhere"])
def test_a_missing_source_of_prompts_is_named(name):
    with pytest.raises(UserError, match=r"nowhere|/no/where"):
        load_prompts(name)


def test_a_folder_without_prompts_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no .jsonl, .json or .parquet file"):
        load_prompts(str(tmp_path))


def test_a_hub_name_without_the_hub_is_one_clear_line():
    with pytest.raises(UserError) as caught:
        load_prompts("nobody-here/no-such-set")
    assert "nobody-here/no-such-set" in str(caught.value) and "\n" not in str(caught.value)


RECORDS = [
    Response("p", "harmful", "t", steering="prefix", sample=2, num_prompt_tokens=3, num_tokens=4, seed=2**63 - 1),
    Response("p", "benign", "t", finish_reason="nan"),
    Verdict("id", 0, "harmful", None, "unknown", "no_verdict", 0.1, 0.2, None, "guard"),
    Example("p", "r", "benign"),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_comes_back_from_its_line(file, record):
    assert list(read_records(file("r.jsonl", to_json(record) + "\n"), type(record))) == [record]


def test_fields_with_a_default_may_be_left_out(file):
    (response,) = read_records(file("r.jsonl", jsonl([RESPONSE])), Response)
    assert response.prompt_id == content_id("benign", "p") and response.sample == 0


RECORD_MISTAKES = {
    "unknown field": (RESPONSE | {"txet": "t"}, "txet"),
    "missing field": ({"prompt": "p", "label": "benign"}, "text"),
    "text is a number": (RESPONSE | {"text": 5}, "text"),
    "text is null": (RESPONSE | {"text": None}, "text"),
    "other label": (RESPONSE | {"label": "vanilla_harmful"}, "label"),
    "sample is a word": (RESPONSE | {"sample": "first"}, "sample"),
    "other finish reason": (RESPONSE | {"finish_reason": "bored"}, "finish_reason"),
    "half a surrogate pair": (RESPONSE | {"text": "\ud800"}, "surrogate"),
}


@pytest.mark.parametrize("mistake", RECORD_MISTAKES)
def test_a_wrong_record_is_named_with_its_line_and_field(file, mistake):
    row, field = RECORD_MISTAKES[mistake]
    path = file("responses.jsonl", jsonl([RESPONSE, row]))
    with pytest.raises(UserError) as caught:
        list(read_records(path, Response))
    message = str(caught.value)
    assert f"{path}: line 2" in message and field in message and "\n" not in message


@given(text=st.text(min_size=1).filter(str.strip), label=st.sampled_from(["harmful", "benign"]))
def test_any_text_survives_the_way_through_a_file(tmp_path_factory, text, label):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    prompt = Prompt(content_id(label, text), text, label, "any")
    path.write_bytes((to_json(prompt) + "\n").encode())
    assert read_prompts(path) == [prompt]
    example = Example(text, text, label)
    path.write_bytes((to_json(example) + "\n").encode())
    assert list(read_records(path, Example)) == [example]


def test_safechain_rows_are_taken_in_as_examples_and_responses(tmp_path):
    row = {"instruction": "fold a boat", "label": "vanilla_benign", "response": "<think>\n\n</think>\n\nso", "extra": 1}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    (example,) = take_in(file, Example)
    assert (example.prompt, example.label, example.response) == ("fold a boat", "benign", row["response"])
    file.write_text(json.dumps({"prompt": "a", "label": "adversarial_harmful", "text": "b"}) + "\n")
    (response,) = take_in(file, Response)
    assert (response.prompt, response.label, response.text) == ("a", "harmful", "b")


@pytest.mark.parametrize("label", ["unharmful", "not harmful", "HARM", "", None, 1])
def test_a_label_that_only_resembles_one_is_refused(tmp_path, label):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"text": "a", "label": label}) + "\n")
    with pytest.raises(UserError, match="'label' must be"):
        read_prompts(file)
