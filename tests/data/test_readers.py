"""Every kind of file gives the same rows; a damaged one is named by file and line."""

import csv
import gzip
import io
import json
import random
import shutil

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from rlhf_fast.data.readers import data_files
from rlhf_fast.data.rows import load_rows, load_unpaired, read_rows

ROWS = [
    {"prompt": "Name a colour, ünï.", "completion": " Blue."},
    {"prompt": "hi, you\nthere", "completion": 'yo "yo"'},
    {"prompt": "a", "completion": ""},
]
BOM = b"\xef\xbb\xbf"


def as_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_table(rows, delimiter=","):
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


FILES = {
    "rows.jsonl": as_lines(ROWS),
    "rows.ndjson": as_lines(ROWS),
    "rows.json": json.dumps(ROWS, indent=2),
    "lines.json": as_lines(ROWS),  # JSON lines under another name
    "rows.csv": as_table(ROWS),
    "rows.tsv": as_table(ROWS, "\t"),
}


@pytest.mark.parametrize("mark", [b"", BOM], ids=["", "byte order mark"])
@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_rows(name, ending, mark, tmp_path):
    content = mark + FILES[name].encode()
    path = tmp_path / (name + ending)
    path.write_bytes(gzip.compress(content) if ending else content)
    assert load_rows(path, "sft") == load_rows(str(path), "sft") == ROWS


def test_places_are_lines_where_there_are_lines(tmp_path):
    for name, expected in (("rows.csv", ["line 2", "line 3", "line 5"]), ("rows.json", ["row 1", "row 2", "row 3"])):
        (tmp_path / name).write_text(FILES[name])
        assert [place for place, _ in read_rows(tmp_path / name)] == [f"{tmp_path / name}, {n}" for n in expected]


def test_cells_that_hold_no_text_are_json(tmp_path):
    rows = [
        {"prompt": "1", "completion": "true", "label": "True", "n": "3"},
        {"prompt": "a", "completion": "b", "label": "0", "n": ""},
    ]
    (tmp_path / "rows.csv").write_text(as_table(rows))
    labels = [{**row, "label": label} for row, label in zip(rows, (True, False), strict=True)]
    assert load_rows(tmp_path / "rows.csv", "unpaired") == labels  # `n`, which nobody knows, stays text
    pairs = [
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "0.5"},
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": ""},
    ]
    (tmp_path / "pairs.csv").write_text(as_table(pairs))
    assert [row["margin"] for row in load_rows(tmp_path / "pairs.csv", "preference")] == [0.5, None]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "chat.csv").write_text(as_table([{"messages": json.dumps(messages)}]))
    assert load_rows(tmp_path / "chat.csv", "sft") == [{"messages": messages}]
    (tmp_path / "named.csv").write_text(as_table([{"prompt": "a", "completion": "b", "good": "1"}]))
    assert load_unpaired(tmp_path / "named.csv", {"label": "good"})[0]["label"] is True


@pytest.mark.parametrize("length", [10, 200_000])  # a cell may be longer than the csv module's usual limit
def test_long_cells(length, tmp_path):
    limit = csv.field_size_limit()
    (tmp_path / "rows.csv").write_text(as_table([{"prompt": "a" * length, "completion": "b"}]))
    assert len(load_rows(tmp_path / "rows.csv", "sft")[0]["prompt"]) == length
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("rows.json", b'[{"prompt": "a"},\n {"prompt": ]', "{path}, line 2: not JSON in UTF-8: Expecting value"),
        ("rows.json", b'[{"a": "b", "a": "c"}]', "{path}: not JSON in UTF-8: expected every key once, got 'a' twice"),
        (
            "rows.json",
            b'{"prompt": "a"}\n{"a": [{"b": 1, "b": 2}]}\n',
            "{path}, line 2: not JSON in UTF-8: expected every key once, got 'b' twice",
        ),
        ("rows.json", b'{"prompt": "a"}\n{"prompt"}\n', "{path}, line 2: not JSON in UTF-8: Expecting ':'"),
        ("rows.json", b"[]", "{path}: no rows"),
        ("rows.json", b'["a"]', "{path}, row 1: expected an object with named columns, got str"),
        ("rows.json.gz", b"[]", "{path}: damaged gzip file: Not a gzipped file"),
        ("rows.jsonl", b'{"prompt": "a"}\n' + BOM + b'{"prompt": "b"}\n', "{path}, line 2: not JSON in UTF-8"),
        ("rows.jsonl", '{"prompt": "a"}\n'.encode("utf-16"), "{path}, line 1: not JSON in UTF-8: 'utf-8' codec"),
        ("rows.csv", b"prompt\n\xff\n", "{path}, line 2: not text in UTF-8: 'utf-8' codec can't decode"),
        ("rows.csv", b"prompt,n\na,1\nb\n", "{path}, line 3: expected 2 cells, as in the first line, got 1"),
        ("rows.csv", b"prompt,n\na,1\nb,c,d\n", "{path}, line 3: expected 2 cells, as in the first line, got 3"),
        ("rows.csv", b'prompt\n"a" b\n', "{path}, line 2: not a table: "),
        ("rows.csv", b'prompt\na\n"b\n', "{path}, line 3: not a table: unexpected end of data"),
        ("rows.csv", b"prompt,prompt\na,b\n", "{path}, line 1: expected column names that differ, got prompt, prompt"),
        ("rows.csv", b"prompt\n", "{path}: no rows"),
        ("rows.csv", b"", "{path}: no rows"),
        ("rows.csv", b"prompt,tools\na,b c\n", "{path}, line 2: tools: expected JSON in this column, got 'b c'"),
    ],
)
def test_damaged_files_name_file_and_line(name, content, error, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as raised:
        load_rows(path, "prompt")
    assert str(raised.value).startswith(error.format(path=path))


# ------------------------------------------------------------------------------------------------ shards


def shards(folder, names, rows=ROWS):
    """One row a file."""
    folder.mkdir()
    for name, row in zip(names, rows, strict=True):
        if name.endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), folder / name)
        else:
            content = as_lines([row]).encode()
            (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder


@pytest.mark.parametrize(
    "names",
    [
        [f"train-{n:05}-of-00003.parquet" for n in range(3)],
        ["a.jsonl", "b.jsonl.gz", "c.jsonl"],
    ],
)
def test_shards_are_read_in_the_order_of_their_names(names, tmp_path):
    folder = shards(tmp_path / "data", names[::-1], ROWS[::-1])
    for other in ("README.md", ".hidden.jsonl", "_SUCCESS"):
        (folder / other).write_text("no rows\n")
    (folder / "raw").mkdir()
    assert load_rows(folder, "sft") == load_rows(str(folder), "sft") == ROWS
    assert load_rows(f"{folder}/*.[jp]*", "sft") == ROWS
    assert load_rows(f"{tmp_path}/**/*.[jp]*", "sft") == ROWS
    assert load_rows(f"{folder}/{names[1][:-4]}*", "sft") == [ROWS[1]]
    (tmp_path / "[odd] name.jsonl").write_text(as_lines(ROWS))
    assert load_rows(tmp_path / "[odd] name.jsonl", "sft") == ROWS  # a name that is there is no glob


def test_errors_in_shards_name_the_shard(tmp_path):
    folder = shards(tmp_path / "data", ["a.jsonl", "b.jsonl", "c.jsonl"], [*ROWS[:2], {"prompt": "a"}])
    with pytest.raises(ValueError, match=f"^{folder}/c.jsonl, line 1: missing completion"):
        load_rows(folder, "sft")
    with pytest.raises(FileNotFoundError, match=r"data/\*.csv: no such file or directory"):
        load_rows(f"{folder}/*.csv", "sft")


@pytest.mark.parametrize(
    ("names", "error"),
    [
        (["a.txt", "b.md", "c.bin"], "not a directory written by `datasets.Dataset.save_to_disk`, and it holds no "),
        (["a.jsonl", "b.parquet", "c.jsonl"], r"holds .jsonl and .parquet files; name one kind, such as .*/\*.parquet"),
        (
            ["test-00000-of-00001.parquet", "train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
            r"holds the splits test, train; name one, such as .*/test-\*",
        ),
        ([f"train-0000{n}-of-00004.parquet" for n in (0, 1, 3)], "expected 4 shards, as their names say, found 3"),
    ],
)
def test_folders_that_are_not_one_set_of_rows(names, error, tmp_path):
    folder = shards(tmp_path / "data", names)
    with pytest.raises(ValueError, match=f"^{folder}: {error}"):
        load_rows(folder, "sft")


def test_a_datasets_directory_is_one_file(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert data_files(tmp_path / "saved") == [tmp_path / "saved"]
    assert load_rows(tmp_path / "saved", "sft") == ROWS


@pytest.mark.parametrize("source", ["rows.parquet", "saved", "memory"])
def test_nulls_that_a_typed_table_adds_are_no_data(source, tmp_path):
    def call(**arguments):
        return {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
        }

    messages = [
        {"role": "user", "content": "a"},
        call(city="Bonn"),
        call(days=2),
        {"role": "assistant", "content": "b"},
    ]
    tools = [{"name": "f", "parameters": {"city": {"type": "string"}}}, {"name": "g", "parameters": {"n": {"min": 1}}}]
    rows, path = [{"messages": messages, "tools": tools, "note": None}], tmp_path / source
    if source == "rows.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif source == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    else:
        path = datasets.Dataset.from_list(rows)
    assert load_rows(path, "sft") == rows
    explicit = [{"messages": [messages[0], call(city=None)]}]  # said so in JSON, so the model is to say so
    (tmp_path / "rows.jsonl").write_text(as_lines(explicit))
    assert load_rows(tmp_path / "rows.jsonl", "sft") == explicit


# ------------------------------------------------------------------------------------------------ the hub


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("hub:user/rows:train", ("user/rows", None, "train")),
        ("hub:user/rows:main:test", ("user/rows", "main", "test")),
        ("hub:user/rows:train[:2]", ("user/rows", None, "train[:2]")),
        ("hub:user/rows:main:train[1:2]", ("user/rows", "main", "train[1:2]")),
    ],
)
def test_hub_names_go_to_datasets(source, asked, monkeypatch):
    calls = []

    def load(name, configuration, *, split):
        calls.append((name, configuration, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_rows(source, "sft") == ROWS
    assert calls == [asked]
    with pytest.raises(ValueError, match=f"^{source.replace('[', '.').replace(']', '.')}, row 1: missing chosen"):
        load_rows(source, "preference")


@pytest.mark.parametrize("failure", [ValueError("Unknown split\n'dev'"), ConnectionError("no way to the hub")])
def test_hub_names_that_cannot_be_loaded(failure, monkeypatch):
    def load(*name, split):
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", load)
    message = f"hub:user/rows:dev: `datasets` cannot load it: {' '.join(str(failure).split())}"
    with pytest.raises(ValueError, match=f"^{message}$"):
        load_rows("hub:user/rows:dev", "sft")
    with pytest.raises(
        ValueError, match="^hub:user/rows: expected hub:NAME:SPLIT, such as hub:openai/gsm8k:main:train"
    ):
        load_rows("hub:user/rows", "sft")


@pytest.mark.parametrize("value", ["[" * 100_000 + "]" * 100_000, "9" * 5000], ids=["nested", "digits"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_json_that_python_cannot_hold_names_the_file(name, value, tmp_path):
    row = '{"prompt": "a", "completion": ' + value + "}"
    (tmp_path / name).write_text(row if name == "rows.jsonl" else f"[{row}]")
    with pytest.raises(ValueError, match=f"{name}.*not JSON in UTF-8"):
        load_rows(tmp_path / name, "sft")


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Three flipped bits, or a file that is cut off."""
    content = bytearray(content)
    if draw.random() < 0.2:
        return bytes(content[: draw.randrange(len(content))])
    for _ in range(3):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(content)


def test_damaged_tables_name_their_file(tmp_path):
    """Whatever pyarrow and `datasets` make of the damage; a damaged offset would end the process."""
    draw, rows = random.Random(0), [{"prompt": f"a{n}", "completion": "b"} for n in range(50)]
    dataset, found = datasets.Dataset.from_list(rows), set()
    dataset.save_to_disk(str(tmp_path / "whole"))
    dataset.to_parquet(str(tmp_path / "whole.parquet"))
    arrow = next((tmp_path / "whole").glob("*.arrow")).name
    for n in range(30):
        shutil.copytree(tmp_path / "whole", tmp_path / f"d{n}")
        for path in (tmp_path / f"d{n}" / arrow, tmp_path / f"p{n}.parquet"):
            source = tmp_path / "whole" / arrow if path.suffix == ".arrow" else tmp_path / "whole.parquet"
            path.write_bytes(damaged(source.read_bytes(), draw))
            try:
                found.add(len(load_rows(path if path.suffix == ".parquet" else path.parent, "sft")))
            except ValueError as error:
                name = f"p{n}.parquet" if path.suffix == ".parquet" else f"d{n}"
                assert str(error).startswith(str(tmp_path / name))
                found.add("refused")
    assert found == {50, "refused"}
