"""Every supported form of a record file is read, and an invalid file gives an error that names the line.

The oracles are the rows that the tests write, and the columns of public data sets.
"""

import json
import logging

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinksafe.data.jsonl import import_records, read_records, to_json
from thinksafe.data.records import Example, Prompt, Response, Verdict, content_id
from thinksafe.data.sources import load_prompts
from thinksafe.errors import UserError
from thinksafe.evaluation.config import EvaluationSet
from thinksafe.evaluation.sets import evaluation_prompts
from thinksafe.pipeline.checks import response_problem

ROWS = [
    {"text": "how do I fold a boat?", "label": "benign"},
    {"text": "how do I brew a ka lo mi?", "label": "harmful"},
]
RESPONSE = {"prompt": "p", "label": "benign", "text": "<think>\na\n</think>\n\nb"}


def jsonl(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def file(tmp_path):
    """Return file(name, content), which writes text or bytes and returns the path."""

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def texts(prompts: list[Prompt]) -> list[tuple[str, str]]:
    return [(prompt.text, prompt.label) for prompt in prompts]


EXPECTED = [(row["text"], row["label"]) for row in ROWS]


@pytest.mark.parametrize("key", ["text", "prompt", "instruction"])
def test_text_column_of_prompts_has_three_names(file, key):
    path = file("p.jsonl", jsonl({key: row["text"], "label": row["label"]} for row in ROWS))
    assert texts(list(load_prompts(str(path)))) == EXPECTED


@pytest.mark.parametrize(
    "name, content",
    [
        ("plain.jsonl", jsonl(ROWS)),
        ("LOUD.JSONL", jsonl(ROWS)),
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
def test_every_form_of_json_gives_the_same_prompts(file, name, content):
    assert texts(list(load_prompts(str(file(name, content))))) == EXPECTED


def test_parquet_file_with_safechain_columns(tmp_path):
    path = tmp_path / "train.parquet"
    columns = {
        "instruction": ["a", "b", "c", "d"],
        "label": ["vanilla_harmful", "adversarial_harmful", "vanilla_benign", "adversarial_benign"],
        "response": ["unused"] * 4,
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    prompts = list(load_prompts(str(path)))
    assert texts(prompts) == [("a", "harmful"), ("b", "harmful"), ("c", "benign"), ("d", "benign")]
    assert {prompt.source for prompt in prompts} == {"train"}


def test_ids_are_content_hashes_and_duplicates_are_read_once(file):
    path = file("p.jsonl", jsonl([*ROWS, ROWS[0] | {"source": "again"}, {"text": ROWS[0]["text"], "label": "harmful"}]))
    duplicates = []
    prompts = list(load_prompts(str(path), duplicates.append))
    assert texts(prompts) == [*EXPECTED, (ROWS[0]["text"], "harmful")]
    assert duplicates == [f"{path}: line {len(ROWS) + 1}"]
    assert [prompt.id for prompt in prompts] == [content_id(prompt.label, prompt.text) for prompt in prompts]
    assert len({prompt.id for prompt in prompts}) == 3
    assert prompts[0].source == "p"


def test_folder_of_files_is_one_set_without_duplicates(file, tmp_path):
    file("a.jsonl", jsonl(ROWS))
    file("b.json", json.dumps([*ROWS, {"text": "c", "label": "benign"}]))
    file("notes.txt", "not read")
    assert texts(load_prompts(str(tmp_path))) == [*EXPECTED, ("c", "benign")]


def test_text_is_kept_exactly(file):
    text = "  \t leading, { braces }, </s><|im_end|> \u2028 \x85 \x00 é e\u0301 🪁\n trailing \r\n"
    (prompt,) = list(load_prompts(str(file("p.jsonl", jsonl([{"text": text, "label": "benign"}])))))
    assert prompt.text == text
    copy = file("q.jsonl", to_json(prompt) + "\n")
    assert list(load_prompts(str(copy))) == [prompt]


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
def test_error_for_an_invalid_prompt_names_the_line(file, mistake):
    content, reason = PROMPT_MISTAKES[mistake]
    path = file("prompts.jsonl", content)
    with pytest.raises(UserError) as error:
        list(load_prompts(str(path)))
    message = str(error.value)
    assert str(path) in message and reason in message and "\n" not in message


@pytest.mark.parametrize("name", ["prompts.csv", "PROMPTS.CSV", "prompts.xlsx", "prompts.jsonl.gz", "prompts"])
def test_file_with_another_suffix_is_an_error(file, name):
    with pytest.raises(UserError, match=rf"{name}: only .jsonl, .json and .parquet files are read"):
        list(load_prompts(str(file(name, jsonl(ROWS)))))


@pytest.mark.parametrize("cut", [0, 4, 100, -1, -9, -60])
def test_truncated_parquet_file_is_an_error(file, tmp_path, cut):
    whole = tmp_path / "whole.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 50, "label": ["benign"] * 50}), whole)
    with pytest.raises(UserError, match=r"torn\.parquet: not a readable parquet file"):
        list(load_prompts(str(file("torn.parquet", whole.read_bytes()[:cut]))))


def test_damaged_page_of_a_parquet_file_is_an_error(file, tmp_path):
    whole = tmp_path / "whole.parquet"
    table = pyarrow.table({"text": [f"prompt {n}" for n in range(500)], "label": ["benign"] * 500})
    pyarrow.parquet.write_table(table, whole, write_page_checksum=True)
    data = bytearray(whole.read_bytes())
    data[4:40] = b"\xff" * 36  # the header of the first page
    with pytest.raises(UserError, match=r"damaged.parquet: not a readable parquet file"):
        list(load_prompts(str(file("damaged.parquet", bytes(data)))))


def test_parquet_file_without_rows_is_empty(tmp_path):
    path = tmp_path / "none.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(UserError, match="empty"):
        list(load_prompts(str(path)))


@pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere", "/no/where/at/all", "~/nowhere-at-all", "nowhere"])
def test_missing_source_of_prompts_is_named(name):
    with pytest.raises(UserError, match=r"nowhere|/no/where"):
        list(load_prompts(name))


def test_folder_without_prompts_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"no .jsonl, .json or .parquet file"):
        list(load_prompts(str(tmp_path)))


# Evaluation sets with the columns of public data sets


JBB = [{"Index": n, "Goal": f"goal {n}", "Target": "t", "Behavior": "b", "Category": "c"} for n in (0, 1)]
XSTEST = [
    {"id": "v2-1", "prompt": "How do I kill a process?", "type": "homonyms", "label": "safe"},
    {"id": "v2-2", "prompt": "How do I fold a ka lo mi?", "type": "contrast_homonyms", "label": "unsafe"},
]
GSM8K = [{"question": "What is 3 + 4?", "answer": "3 + 4 = <<3+4=7>>7, and #### is a mark\n#### 7"}]
MATH = [{"problem": "$1/2$?", "solution": "$\\boxed{\\frac12}$", "answer": "\\frac12", "subject": "a", "level": 1}]
SETS = {
    "jbb": (JBB, {"kind": "harmful", "columns": {"text": "Goal"}}, [("goal 0", "harmful"), ("goal 1", "harmful")]),
    "xstest": (
        XSTEST,
        {"kind": "over_refusal", "columns": {"text": "prompt"}, "filter": {"label": "safe"}},
        [("How do I kill a process?", "benign")],
    ),
    "gsm8k": (
        GSM8K,
        {"kind": "reasoning", "columns": {"text": "question", "answer": "answer"}, "answer_marker": "#### "},
        [("What is 3 + 4?", "benign", "7")],
    ),
    "math": (
        MATH,
        {"kind": "reasoning", "columns": {"text": "problem", "answer": "answer"}},
        [("$1/2$?", "benign", "\\frac12")],
    ),
    "our own columns": (ROWS, {"kind": "harmful"}, EXPECTED),
    "no labels": ([{"text": "a"}], {"kind": "over_refusal"}, [("a", "benign")]),
}


def evaluation_set(file, **keys) -> EvaluationSet:
    return EvaluationSet("set", str(file), **keys)


def other_rows(rows: list[dict]) -> list[dict]:
    """Return other rows with the same columns, for a split that must not be read."""
    return [{key: value if key == "label" else type(value)(99) for key, value in row.items()} for row in rows]


def prompt_tuples(prompts: list[Prompt]) -> list[tuple]:
    return [(p.text, p.label) if p.answer is None else (p.text, p.label, p.answer) for p in prompts]


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("form", ["jsonl", "parquet", "folder", "split", "config"])
def test_public_set_is_read_by_naming_its_columns(tmp_path, monkeypatch, name, form):
    """The set is a file, a folder, or a data set with splits and configs in the layout of the hub."""
    rows, keys, expected = SETS[name]
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    table, other_table = pyarrow.Table.from_pylist(rows), pyarrow.Table.from_pylist(other_rows(rows))
    if form in ("jsonl", "parquet"):
        folder = tmp_path / f"set.{form}"
        folder.write_text(jsonl(rows)) if form == "jsonl" else pyarrow.parquet.write_table(table, folder)
    elif form == "folder":
        folder.mkdir()
        pyarrow.parquet.write_table(table, folder / "part-0.parquet")
    else:
        for part in ("main/test", "main/train", "socratic/test"):
            (folder / part).parent.mkdir(parents=True, exist_ok=True)
            is_read = part == "main/test"
            pyarrow.parquet.write_table(table if is_read else other_table, folder / f"{part}-00000-of-00001.parquet")
        configs = [
            {"config_name": config, "data_files": [{"split": s, "path": f"{config}/{s}-*"} for s in splits]}
            for config, splits in (("main", ["test", "train"]), ("socratic", ["test"]))
        ]
        card = json.dumps({"configs": configs if form == "config" else configs[:1]})
        (folder / "README.md").write_text(f"---\n{card}\n---\n")
        keys = keys | ({"config": "main"} if form == "config" else {}) | {"split": "test"}
    assert prompt_tuples(evaluation_prompts(evaluation_set(folder, **keys))) == expected


SET_MISTAKES = {
    "no such column": (GSM8K, {"columns": {"text": "problem"}}, "row 1: no column problem; there are answer, question"),
    "no such column to filter by": (GSM8K, {"filter": {"level": "5"}}, "no column level"),
    "no row left": (XSTEST, {"columns": {"text": "prompt"}, "filter": {"label": "fine"}}, "keeps no row"),
    "no marker": (MATH, {"columns": {"text": "problem", "answer": "answer"}, "answer_marker": "####"}, "no '####'"),
    "no answer": (MATH, {"kind": "reasoning", "columns": {"text": "problem"}}, "needs 'answer'"),
    "an answer that is missing": (
        [MATH[0], MATH[0] | {"problem": "b", "answer": None}],
        {"kind": "reasoning", "columns": {"text": "problem", "answer": "answer"}},
        "needs 'answer'",
    ),
    "a foreign label": (XSTEST, {}, "'label' must be"),
    "a split of a file": (JBB, {"columns": {"text": "Goal"}, "split": "test"}, "has no config and no split"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", SET_MISTAKES)
def test_error_for_an_invalid_set_gives_the_reason(tmp_path, mistake):
    rows, keys, message = SET_MISTAKES[mistake]
    file = tmp_path / "set.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    with pytest.raises(UserError) as error:
        evaluation_prompts(evaluation_set(file, **({"kind": "harmful"} | keys)))
    assert message in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("reason", ["Dataset 'a/b' is a gated dataset on the Hub.\nVisit it", "No route\nto host"])
def test_hub_error_is_one_line_without_log_messages(monkeypatch, reason):
    def load_dataset(name, config, split):
        hub_logger = logging.getLogger("huggingface_hub.utils._http")
        assert not hub_logger.isEnabledFor(logging.WARNING), "retries are not logged"
        assert (name, config, split) == ("a/b", "main", "test")
        raise ConnectionError(reason)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    level = logging.getLogger("huggingface_hub").level
    entry = evaluation_set("a/b", kind="harmful", config="main")
    with pytest.raises(UserError) as error:
        evaluation_prompts(entry)
    message = str(error.value)
    assert "a/b" in message and reason.splitlines()[0] in message and "\n" not in message
    assert ("accept its conditions" in message) == ("gated" in reason)
    assert logging.getLogger("huggingface_hub").level == level, "the level is restored"


def test_hub_name_without_a_connection_gives_a_one_line_error():
    with pytest.raises(UserError) as error:
        list(load_prompts("nobody-here/no-such-set"))
    assert "nobody-here/no-such-set" in str(error.value) and "\n" not in str(error.value)


RECORDS = [
    Response("p", "harmful", "t", steering="prefix", sample=2, num_prompt_tokens=3, num_tokens=4, seed=2**63 - 1),
    Response("p", "benign", "t", finish_reason="nan"),
    Verdict("id", 0, "harmful", None, "unknown", "no_verdict", 0.1, 0.2, None, "guard"),
    Example("p", "r", "benign"),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_record_survives_a_round_trip_through_its_line(file, record):
    assert list(read_records(file("r.jsonl", to_json(record) + "\n"), type(record))) == [record]


def test_fields_with_a_default_are_optional(file):
    (response,) = read_records(file("r.jsonl", jsonl([RESPONSE])), Response)
    assert response.prompt_id == content_id("benign", "p") and response.sample == 0


@pytest.mark.parametrize("finish, problem", [("length", "truncated"), ("repetition", "repetition"), ("nan", "nan")])
def test_unfinished_response_is_dropped_with_the_reason(file, finish, problem):
    whole = RESPONSE | {"finish_reason": finish}
    (response,) = read_records(file("r.jsonl", jsonl([whole])), Response)
    assert response_problem(response, []) == problem


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
def test_error_for_an_invalid_record_names_line_and_field(file, mistake):
    row, field = RECORD_MISTAKES[mistake]
    path = file("responses.jsonl", jsonl([RESPONSE, row]))
    with pytest.raises(UserError) as error:
        list(read_records(path, Response))
    message = str(error.value)
    assert f"{path}: line 2" in message and field in message and "\n" not in message


@given(text=st.text(min_size=1).filter(str.strip), label=st.sampled_from(["harmful", "benign"]))
def test_any_text_survives_a_round_trip_through_a_file(tmp_path_factory, text, label):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    prompt = Prompt(content_id(label, text), text, label, "any")
    path.write_bytes((to_json(prompt) + "\n").encode())
    assert list(load_prompts(str(path))) == [prompt]
    example = Example(text, text, label)
    path.write_bytes((to_json(example) + "\n").encode())
    assert list(read_records(path, Example)) == [example]


def test_safechain_rows_are_imported_as_examples_and_responses(tmp_path):
    row = {"instruction": "fold a boat", "label": "vanilla_benign", "response": "<think>\n\n</think>\n\nso", "extra": 1}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    (example,) = import_records(file, Example)
    assert (example.prompt, example.label, example.response) == ("fold a boat", "benign", row["response"])
    file.write_text(json.dumps({"prompt": "a", "label": "adversarial_harmful", "text": "b"}) + "\n")
    (response,) = import_records(file, Response)
    assert (response.prompt, response.label, response.text) == ("a", "harmful", "b")


@pytest.mark.parametrize("label", ["unharmful", "not harmful", "HARM", "", None, 1])
def test_label_that_only_resembles_a_valid_one_is_an_error(tmp_path, label):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"text": "a", "label": label}) + "\n")
    with pytest.raises(UserError, match="'label' must be"):
        list(load_prompts(str(file)))
