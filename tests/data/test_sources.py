"""Prompts come from the right column, file and split, and every file that would be passed over is named.

The oracle for values is `datasets.load_dataset`, which reads the same files.
"""

import datetime
import decimal
import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from thinksafe.data.jsonl import Row, prompts_from_rows, read_rows
from thinksafe.data.sources import load_prompts, rows_of
from thinksafe.errors import UserError
from thinksafe.evaluation.config import EvaluationSet
from thinksafe.evaluation.sets import evaluation_prompts


@pytest.fixture(autouse=True)
def no_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def tree(tmp_path):
    """Return a function that writes files from their contents by name, into one folder, and returns the folder."""

    def write(files):
        for name, content in files.items():
            file = tmp_path / "set" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, pyarrow.Table):
                pyarrow.parquet.write_table(content, file)
            else:
                file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / "set"

    return write


def rows(*texts: str) -> str:
    return "".join(json.dumps({"text": text, "label": "benign"}) + "\n" for text in texts)


def texts(source) -> list[str]:
    return [prompt.text for prompt in load_prompts(str(source))]


def error_of(call) -> str:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


# Columns


OUR_RESPONSE = {"prompt": "fold?", "text": "<think>\na\n</think>\n\nb", "label": "benign", "sample": 0}


@pytest.mark.parametrize(
    "row, columns",
    [
        (OUR_RESPONSE, ["text", "prompt"]),
        ({"prompt": "p", "instruction": "q", "label": "benign"}, ["prompt", "instruction"]),
        ({"text": "p", "prompt": "p", "instruction": "q", "label": "benign"}, ["text", "instruction"]),
        ({"instruction": "Translate.", "input": "boat", "output": "o", "label": "benign"}, ["instruction", "input"]),
        ({"text": "p", "prompt": 5, "label": "benign"}, ["text", "prompt"]),
    ],
)
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_two_different_prompts_in_a_row_are_an_error(tree, row, columns, form):
    content = pyarrow.Table.from_pylist([row]) if form == "parquet" else json.dumps(row)
    message = error_of(lambda: texts(tree({f"a.{form}": content}) / f"a.{form}"))
    assert all(repr(column) in message for column in columns)
    assert ("row 1" if form == "parquet" else "line 1") in message


@pytest.mark.parametrize(
    "row",
    [
        {"text": "p", "prompt": "p"},
        {"text": None, "prompt": "p"},
        {"text": None, "prompt": None, "instruction": "p"},
        {"text": float("nan"), "prompt": "p"},
        {"instruction": "p", "input": ""},
        {"prompt": "p", "response": "other", "completion": "other", "question": "other"},
    ],
)
def test_one_prompt_in_one_or_more_columns_is_read(tree, row):
    assert texts(tree({"a.jsonl": json.dumps(row | {"label": "benign"})})) == ["p"]


def test_error_for_missing_text_lists_the_columns(tree):
    table = pyarrow.table({"question": ["q"], "label": ["benign"]})
    assert "there are label, question" in error_of(lambda: texts(tree({"a.parquet": table})))


@pytest.mark.parametrize("value", [{"a": 1}, float("inf"), -float("inf")])
@pytest.mark.parametrize("column", ["answer", "source"])
def test_value_without_a_spelling_is_an_error(tree, column, value):
    row = {"text": "p", "label": "benign", column: value}
    assert repr(column) in error_of(lambda: texts(tree({"a.jsonl": json.dumps(row)})))


def test_missing_value_of_pandas_is_no_answer(tree):
    (prompt,) = load_prompts(str(tree({"a.jsonl": '{"text": "p", "label": "benign", "answer": NaN, "source": NaN}'})))
    assert prompt.answer is None and prompt.source == "a"


# Values of parquet files


def strings(content: bytes, kind: pyarrow.DataType) -> pyarrow.Array:
    """Return an array of one value with these bytes, which need not be UTF-8."""
    offset = pyarrow.int64() if pyarrow.types.is_large_string(kind) else pyarrow.int32()
    offsets = pyarrow.array([0, len(content)], offset).buffers()[1]
    return pyarrow.Array.from_buffers(kind, 1, [None, offsets, pyarrow.py_buffer(content)])


def extension(kind, value, storage) -> pyarrow.Array:
    return pyarrow.ExtensionArray.from_storage(kind, pyarrow.array([value], storage))


READABLE = {
    "text": pyarrow.array(["x = 5"]),
    "large text": pyarrow.array(["x"], pyarrow.large_string()),
    "text view": pyarrow.array(["x"], pyarrow.string_view()),
    "dictionary": pyarrow.array(["x"]).dictionary_encode(),
    "null": pyarrow.nulls(1),
    "decimal": pyarrow.array([decimal.Decimal("5.00")]),
    "unsigned": pyarrow.array([2**64 - 1], pyarrow.uint64()),
    "half": pyarrow.array([1.5], pyarrow.float16()),
    "true": pyarrow.array([True]),
    "date": pyarrow.array([datetime.date(2024, 2, 29)]),
    "date64": pyarrow.array([datetime.date(2024, 2, 29)], pyarrow.date64()),
    "timestamp": pyarrow.array([1], pyarrow.timestamp("us")),
    "nanoseconds": pyarrow.array([1_704_067_200_000_000_001], pyarrow.timestamp("ns")),
    "time zone": pyarrow.array([0], pyarrow.timestamp("s", tz="Europe/Berlin")),
    "duration": pyarrow.array([1], pyarrow.duration("ns")),
    "JSON text": extension(pyarrow.json_(), '"x = 5"', pyarrow.string()),
    "JSON number": extension(pyarrow.json_(), "5", pyarrow.string()),
}
UNREADABLE = {
    "Latin-1": strings(b"caf\xe9", pyarrow.string()),
    "large Latin-1": strings(b"caf\xe9", pyarrow.large_string()),
    "far date": pyarrow.array([10**7], pyarrow.int32()).cast(pyarrow.date32()),
    "early date": pyarrow.array([-(10**7)], pyarrow.int32()).cast(pyarrow.date32()),
    "far timestamp": pyarrow.array([9 * 10**14], pyarrow.timestamp("s")),
    "unknown time zone": pyarrow.array([0], pyarrow.timestamp("us", tz="Nowhere/Land")),
    "binary": pyarrow.array([b"5"]),
    "fixed binary": pyarrow.array([b"5"], pyarrow.binary(1)),
    "struct": pyarrow.array([{"a": 1}]),
    "damaged JSON": extension(pyarrow.json_(), "{x", pyarrow.string()),
}
UNUSED = {
    "messages": pyarrow.array([[{"role": "user", "content": "hi"}]]),
    "map": pyarrow.array([[("a", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
    "uuid": extension(pyarrow.uuid(), b"a" * 16, pyarrow.binary(16)),
}


@pytest.mark.parametrize("name", READABLE)
def test_parquet_value_is_the_same_with_and_without_a_split(tree, name):
    table = pyarrow.table({"text": ["p"], "label": ["benign"], "answer": READABLE[name]})
    folder = tree({"data/train-00000-of-00001.parquet": table})
    (file,) = folder.rglob("*.parquet")
    (from_file,), (from_split,) = rows_of(str(file), "prompts"), rows_of(str(folder), "prompts", split="train")
    assert from_file.values == from_split.values == datasets.load_dataset(str(folder), split="train")[0]
    (prompt,) = load_prompts(str(folder))
    assert prompt.answer == (None if from_file.values["answer"] is None else str(from_file.values["answer"]))


@pytest.mark.parametrize("name", UNREADABLE)
@pytest.mark.parametrize("with_split", [False, True])
def test_parquet_value_that_is_no_text_is_named(tree, name, with_split):
    table = pyarrow.table({"question": ["p"], "gold": UNREADABLE[name]})
    folder = tree({"data/test-00000-of-00001.parquet": table, "README.md": "A set."})
    source = rows_of(str(folder), "prompts", split="test" if with_split else None, columns={"question", "gold"})
    renamed = (Row(w, {"text": v["question"], "answer": v["gold"], "label": "benign"}) for w, v, _ in source)
    assert "row 1: " in error_of(lambda: list(prompts_from_rows(renamed)))


@pytest.mark.parametrize("name", [*READABLE, *UNREADABLE, *UNUSED])
def test_unused_parquet_column_does_no_harm(tree, name):
    column = (READABLE | UNREADABLE | UNUSED)[name]
    table = pyarrow.table({"__index_level_0__": [7], "extra": column, "text": ["p"], "label": ["benign"]})
    assert texts(tree({"a.parquet": table})) == ["p"]


def test_evaluation_set_reads_only_the_columns_that_its_keys_name(tree):
    table = pyarrow.table({"question": ["p"], "level": ["1"], "text": UNREADABLE["Latin-1"], "answer": [None]})
    keys = {"columns": {"text": "question"}, "filter": {"level": "1"}, "kind": "harmful"}
    (prompt,) = evaluation_prompts(EvaluationSet("set", str(tree({"a.parquet": table}) / "a.parquet"), **keys))
    assert prompt.text == "p"


def test_damaged_unused_column_is_not_read(tree):
    table = pyarrow.table({"extra": [f"x {n}" for n in range(500)], "text": ["p"] * 500, "label": ["benign"] * 500})
    folder = tree({"a.parquet": table})
    data = bytearray((folder / "a.parquet").read_bytes())
    data[4:40] = b"\xff" * 36  # the first page of the column `extra`
    (folder / "a.parquet").write_bytes(data)
    assert texts(folder) == ["p"]
    assert "not a readable parquet file" in error_of(lambda: list(read_rows(folder / "a.parquet")))


def test_two_columns_with_one_name_are_an_error(tree):
    table = pyarrow.Table.from_arrays([pyarrow.array([value]) for value in "abc"], names=["text", "label", "text"])
    assert "two columns 'text'" in error_of(lambda: texts(tree({"a.parquet": table})))


def test_column_of_mixed_types_survives_datasets(tree):
    """`datasets` stores it as JSON text in parquet."""
    answers = [5, "x = 5", None, 2.5]
    folder = tree(
        {"a.jsonl": "".join(json.dumps({"text": f"p{n}", "answer": a}) + "\n" for n, a in enumerate(answers))}
    )
    datasets.load_dataset(str(folder), split="train").to_parquet(folder / "copy" / "a.parquet")
    schema = pyarrow.parquet.read_schema(folder / "copy" / "a.parquet")
    assert schema.field("answer").type == pyarrow.json_()
    for source, split in ((folder / "a.jsonl", None), (folder / "copy", None), (folder / "copy", "train")):
        assert [row.values["answer"] for row in rows_of(str(source), "prompts", split=split)] == answers


@pytest.mark.parametrize(
    "answers", [["2024-01-01", "2024-05-01"], [1, 2.5], ["2024-01-01T10:00:00Z", "none"], [1, "a"]]
)
def test_json_value_is_the_same_with_and_without_a_split(tree, answers):
    """`datasets` itself would turn texts into dates, and 1 into 1.0."""
    lines = "".join(json.dumps({"text": "p", "answer": answer}) + "\n" for answer in answers)
    folder = tree({"train.jsonl": lines, "test.jsonl": rows("other")})
    for source, split in ((folder / "train.jsonl", None), (folder, "train")):
        read = [row.values["answer"] for row in rows_of(str(source), "prompts", split=split)]
        assert read == answers and list(map(type, read)) == list(map(type, answers))


def test_texts_that_datasets_turns_into_dates_are_an_error(tree):
    folder = tree({"a.jsonl": '{"text": "p", "label": "benign", "answer": "2024-01-01"}\n'})
    message = error_of(lambda: list(rows_of(str(folder), "prompts", split="train[:1]")))
    assert "column answer into dates" in message
    (row,) = rows_of(str(folder), "prompts", split="train[:1]", columns={"text", "label"})
    assert row.values == {"text": "p", "label": "benign", "answer": None}


# Folders


BESIDE = {
    "hidden folders": {".cache/a.jsonl": "?", ".git/b.json": "?", ".ipynb_checkpoints/a-checkpoint.jsonl": rows("old")},
    "hidden files": {"._a.jsonl": b"\0\5", ".a.parquet": "?", "sub/._b.json": "?", ".c.csv": "?"},
    "folders of tools": {"_temporary/0/a.parquet": "?", "__MACOSX/._a.jsonl": "?", "__pycache__/a.json": "?"},
    "documents": {"README.md": "# Set", "notes.txt": "?", "LICENSE": "?", "build.py": "?"},
    "metadata": {"dataset_infos.json": "{}", "dataset_info.json": "{}"},
}


@pytest.mark.parametrize("kind", BESIDE)
def test_file_without_rows_is_skipped(tree, kind):
    assert texts(tree({"a.jsonl": rows("a"), "sub/b.json": f"[{rows('b')}]", **BESIDE[kind]})) == ["a", "b"]


OTHER_FORMATS = "csv TSV arrow feather ndjson xlsx orc jsonl.gz json.zst jsonl.xz zip tar parquet.incomplete"


@pytest.mark.parametrize("name", [*(f"b.{suffix}" for suffix in OTHER_FORMATS.split()), "sub/b.jsonl.bz2"])
def test_file_that_cannot_be_read_is_named(tree, name):
    folder = tree({"a.jsonl": rows("a"), name: "?"})
    assert f"are read, not {name};" in error_of(lambda: texts(folder))


def test_link_to_a_folder_is_named(tree, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    folder = tree({"a.jsonl": rows("a")})
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    assert "not link;" in error_of(lambda: texts(folder))


def card(*configs) -> str:
    return f"---\n{json.dumps({'configs': configs})}\n---\n# A set\n"


FEATURES = [{"name": name, "dtype": "string"} for name in ("text", "label")]
COPIES = {
    "shards": {
        "data/train-00000-of-00002.jsonl": rows("a"),
        "data/train-00001-of-00002.jsonl": rows("b"),
        "data/test-00000-of-00001.jsonl": rows("t"),
    },
    "files": {"train.jsonl": rows("a", "b"), "test.jsonl": rows("t"), "README.md": "# A set"},
    "folders": {"train/x.json": f"[{rows('a')}]", "train/y.jsonl": rows("b"), "test/x.jsonl": rows("t")},
    "configs": {
        "README.md": card({"config_name": "default", "data_files": [
            {"split": "train", "path": ["x.jsonl", "y.jsonl"]}, {"split": "test", "path": "z.jsonl"}]}),
        "x.jsonl": rows("a"), "y.jsonl": rows("b"), "z.jsonl": rows("t"), "raw.csv": "?", "w.jsonl": rows("w"),
    },
    "default config": {
        "README.md": card({"config_name": "o", "data_files": "z.jsonl"},
                          {"config_name": "m", "data_files": "x.jsonl", "default": True}),
        "x.jsonl": rows("a", "b"), "z.jsonl": rows("t"),
    },
    "an infos header": {
        "README.md": f"---\n{json.dumps({'dataset_info': {'features': FEATURES}})}\n---\n",
        "data/train-00000-of-00001.jsonl": rows("a", "b"), "data/validation-00000-of-00001.jsonl": rows("t"),
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", COPIES)
def test_folder_of_a_data_set_gives_the_split_of_its_hub_name(tree, layout):
    folder = tree(COPIES[layout])
    expected = datasets.load_dataset(str(folder), split="train")["text"]
    assert texts(folder) == list(expected) == ["a", "b"]
    assert [row.values["text"] for row in rows_of(str(folder), "prompts", split="train")] == ["a", "b"]


def test_evaluation_reads_the_test_split_of_a_folder(tree):
    assert [row.values["text"] for row in rows_of(str(tree(COPIES["shards"])), "evaluation.sets")] == ["t"]


def test_slice_of_a_split_is_read(tree):
    folder = str(tree(COPIES["files"]))
    assert [row.values["text"] for row in rows_of(folder, "evaluation.sets", split="train[1:]")] == ["b"]


@pytest.mark.parametrize(
    "files",
    [
        {"train.csv": "text,label\na,benign\n", "test.csv": "text,label\nt,benign\n"},
        {"a.jsonl.gz": gzip.compress(rows("a").encode())},
        {"README.md": card({"config_name": "c", "data_files": "x.csv"}), "x.csv": "text,label\na,benign\n"},
        {
            "README.md": card({"config_name": "c", "data_files": "x.json", "field": "data"}),
            "x.json": f'{{"data": [{rows("a")}]}}',
        },
    ],
)
def test_split_that_only_datasets_can_read_is_read_by_it(tree, files):
    (row,) = rows_of(str(tree(files)), "evaluation.sets", split="train")
    assert row.values == {"text": "a", "label": "benign"}


@pytest.mark.parametrize(
    "files, messages",
    [
        ({"validation.jsonl": rows("v"), "test.jsonl": rows("t")}, ["no split 'train'", "validation, test"]),
        (COPIES["files"] | {"boats.jsonl": rows("x")}, ["splits train, test", "boats.jsonl in none"]),
        (COPIES["files"] | {"boats.parquet": pyarrow.table({"text": ["x"]})}, ["boats.parquet in none"]),
        (COPIES["files"] | {"train.csv": "?"}, ["not train.csv"]),
        (COPIES["files"] | {"README.md": "---\nconfigs: [\n---\n"}, ["README.md: its YAML header cannot be read"]),
        (
            {"README.md": card(*({"config_name": n, "data_files": f"{n}.jsonl"} for n in "ab")), "a.jsonl": rows("a")},
            ["'a', 'b'"],
        ),
    ],
)
def test_folder_whose_split_is_not_clear_is_an_error(tree, files, messages):
    message = error_of(lambda: texts(tree(files)))
    assert all(part in message for part in messages)


@pytest.mark.parametrize(
    "files",
    [
        {"a.jsonl": rows("a"), "test.jsonl": rows("b")},
        {"a.jsonl": rows("a"), "b.parquet": pyarrow.table({"text": ["b"], "label": ["benign"]})},
        {"A.JSONL": rows("a"), "b.json": rows("b")},
        {"out.parquet/part-0.jsonl": rows("a", "b"), "out.parquet/_SUCCESS": ""},
    ],
)
def test_folder_without_several_splits_is_read_as_a_whole(tree, files):
    assert texts(tree(files)) == ["a", "b"]


# JSON


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("form", ["{}", "[{}]"])
def test_other_encoding_than_utf_8_is_named(tree, encoding, form):
    content = form.replace("{}", rows("a").strip()).encode(encoding)
    assert "save it in UTF-8" in error_of(lambda: texts(tree({"a.json": content})))


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"text": "a", "label": "benign", "text": "b"}', "the key 'text' is given twice"),
        ('[{"text": "a", "label": "benign", "x": [{"y": 1, "y": 1}]}]', "the key 'y' is given twice"),
        (json.dumps({"data": [1]}, indent=1), "line 1 is not valid JSON"),
        (json.dumps({"data": [json.loads(rows("a"))]}), "there are data"),
        (rows("a").replace("\n", "\r") * 2, "line 1 is not valid JSON"),
    ],
)
def test_json_that_is_no_list_of_rows_is_an_error(tree, content, message):
    assert message in error_of(lambda: texts(tree({"a.json": content})))


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + rows("a").encode() + b"\xef\xbb\xbf" + rows("b").encode(),
        rows("a", "b").replace("\n", "\r\n\r\n"),
        rows("a", "b").replace('"label"', '"x": NaN, "y": 1e400, "z": ' + "9" * 400 + ', "label"'),
    ],
)
def test_odd_but_valid_json_is_read(tree, content):
    assert texts(tree({"a.json": content})) == ["a", "b"]


@pytest.mark.parametrize("name", ["Latin-1", "far date"])
def test_unreadable_value_of_a_hub_data_set_matters_only_if_used(monkeypatch, name):
    table = pyarrow.table({"text": ["p"], "label": ["benign"], "extra": UNREADABLE[name]})
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: datasets.Dataset(table))
    assert texts("owner/name") == ["p"]
    assert "owner/name: row 1 cannot be read" in error_of(lambda: list(rows_of("owner/name", "evaluation.sets")))
