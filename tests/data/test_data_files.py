"""Data files as people have them: compressed, in other encodings, as documents, tables, shards and folders."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from jax_backtrack.data import sources
from jax_backtrack.data.reading.files import split_paths
from jax_backtrack.errors import InputError

ROWS = [
    {"prompt": "How?", "chosen": "So – é.", "rejected": 'Not\nso, "you"; see'},
    {"prompt": "Why?\nTell.", "chosen": "\u2028Because.", "rejected": "Why not?"},
]
TEXTS = [("How?", "So – é.", 'Not\nso, "you"; see'), ("Why?\nTell.", "\u2028Because.", "Why not?")]


def lines(rows=ROWS, end: str = "\n", **settings) -> bytes:
    return "".join(json.dumps(row, **settings) + end for row in rows).encode()


def texts(preferences) -> list[tuple[str, str, str]]:
    return [(one.prompt[0]["content"], one.chosen, one.rejected) for one in preferences]


def check(path: Path, expected=TEXTS, **settings):
    preferences, report = sources.read(str(path), **settings)
    assert texts(preferences) == expected
    assert (report.read_as, report.used, report.dropped.total()) == ("preference", len(expected), 0)
    return report


def zstd(data: bytes) -> bytes:
    stream = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(stream, "zstd") as out:
        out.write(data)
    return stream.getvalue().to_pybytes()


def table(delimiter: str) -> bytes:
    import csv
    import io

    text = io.StringIO()
    writer = csv.DictWriter(text, list(ROWS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


LATIN = lines(ensure_ascii=False)
CONTENTS = {
    "rows.jsonl": lines(),
    "ROWS.JSONL": lines(),
    "rows.ndjson": lines(),
    "rows.txt": lines(),
    "rows": lines(),
    "rows.jsonl.gz": gzip.compress(lines()),
    "rows.jsonl.bz2": bz2.compress(lines()),
    "rows.jsonl.xz": lzma.compress(lines()),
    "rows.jsonl.zst": zstd(lines()),
    "packed.jsonl": gzip.compress(lines()),
    "plain.jsonl.gz": lines(),
    "rows.JSON.XZ": lzma.compress(json.dumps(ROWS).encode()),
    "marked.jsonl": b"\xef\xbb\xbf" + LATIN,
    "utf16.jsonl": LATIN.decode().encode("utf-16"),
    "utf16be.jsonl": LATIN.decode().encode("utf-16-be"),
    "utf32.jsonl": LATIN.decode().encode("utf-32"),
    "utf16.json": json.dumps(ROWS, ensure_ascii=False).encode("utf-16"),
    "crlf.jsonl": lines(end="\r\n"),
    "cr.jsonl": lines(end="\r"),
    "list.json": b" \n" + json.dumps(ROWS).encode(),
    "marked.json": b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2).encode(),
    "list.jsonl": json.dumps(ROWS).encode(),
    "pretty_list.jsonl": json.dumps(ROWS, indent=2).encode(),
    "lines.json": lines(),
    "one_by_one.json": "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
    "data.json": json.dumps({"data": ROWS}).encode(),
    "version.json": json.dumps({"version": 1, "data": ROWS}, indent=1).encode(),
    "splits.json": json.dumps({"test": [], "train": ROWS}).encode(),
    "named.json": json.dumps({"my pairs": ROWS}).encode(),
    "columns.json": json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}).encode(),
    "rows.csv": table(","),
    "semicolons.csv": table(";"),
    "bars.csv": table("|"),
    "rows.tsv": table("\t"),
    "rows.csv.gz": gzip.compress(table(",")),
    "marked.csv": b"\xef\xbb\xbf" + table(","),
    "utf16.csv": table(",").decode().encode("utf-16"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_text_files(tmp_path, name):
    (tmp_path / name).write_bytes(CONTENTS[name])
    report = check(tmp_path / name)
    if name in ("version.json", "splits.json"):
        left = "test" if name == "splits.json" else "version"
        assert any(f"{left} beside it are not read" in note for note in report.notes)


def test_one_record_in_a_document_is_a_record(tmp_path):
    """Its lists of messages are no list of rows."""
    row = {"prompt": [{"role": "user", "content": "How?"}]}
    row |= {key: [{"role": "assistant", "content": key}] for key in ("chosen", "rejected")}
    for name, text in (("one.json", json.dumps(row)), ("pretty.json", json.dumps(row, indent=2))):
        (tmp_path / name).write_text(text)
        check(tmp_path / name, [("How?", "chosen", "rejected")])


REFUSED = [
    ("orient.json", json.dumps({"prompt": {"0": "a"}, "chosen": {"0": "b"}}), "orient='records'"),
    ("two.json", json.dumps({"a": ROWS, "b": ROWS}), "holds several lists, a, b: name one of them as data.split"),
    ("other.json", json.dumps({"test": ROWS}), r"has no split 'train' \(data.split\)"),
    ("twice.csv", "prompt,prompt\na,b\n", "the column 'prompt' stands twice"),
    ("open.csv", 'prompt,completion\n"a,b\n', "open.csv cannot be read: unexpected end of data"),
    ("cut.json", '[{"prompt": "a"', "cut.json cannot be read"),
    ("cut.jsonl.gz", gzip.compress(lines(ROWS * 50))[:60], "cut.jsonl.gz cannot be read"),
    ("cut.jsonl.xz", lzma.compress(lines(ROWS * 50))[:60], "cut.jsonl.xz cannot be read"),
    ("cut.jsonl.zst", zstd(lines(ROWS * 50))[:60], "cut.jsonl.zst"),
    ("odd.jsonl", lines().decode().encode("utf-16")[:-1], "odd.jsonl cannot be read"),
    ("rows.parquet", b"PAR1 and no more", "rows.parquet cannot be read"),
    ("rows.arrow", b"ARROW1 and no more", "rows.arrow cannot be read"),
    ("latin.csv", "prompt,completion\na,caf\u00e9\n".encode("latin-1"), "latin.csv cannot be read"),
]


@pytest.mark.parametrize(("name", "content", "problem"), REFUSED, ids=[case[0] for case in REFUSED])
def test_files_that_cannot_be_meant_are_refused_whole(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=problem):
        sources.read(str(tmp_path / name))


def test_a_row_of_too_many_fields_is_counted(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,completion\na,b\nc,d, e\nf\n")
    _, report = sources.read(str(tmp_path / "rows.csv"))
    assert report.dropped == {"a row of 3 fields under 2 column names": 1, "the field 'completion' is missing": 1}
    assert report.first["a row of 3 fields under 2 column names"] == "rows.csv, line 3"


# ------------------------------------------------------------------------------------------------------ tables


@pytest.mark.parametrize("name", ["rows.parquet", "ROWS.PARQUET", "file.arrow", "stream.arrow", "spark.parquet"])
def test_typed_tables(tmp_path, name):
    rows, path = pyarrow.Table.from_pylist(ROWS), tmp_path / name
    if name == "spark.parquet":  # texts that are declared as bytes
        rows = rows.cast(pyarrow.schema([(column, pyarrow.binary()) for column in rows.column_names]))
    if name.endswith(".arrow"):
        new = pyarrow.ipc.new_file if name == "file.arrow" else pyarrow.ipc.new_stream
        with new(str(path), rows.schema) as out:
            out.write_table(rows)
    else:
        parquet.write_table(rows, path)
    check(path)


# ----------------------------------------------------------------------------------------------------- folders


def write_shards(folder: Path, names=("part-0.jsonl", "part-1.jsonl")) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, row in zip(names, ROWS, strict=True):
        (folder / name).write_bytes(lines([row]))
    return folder


def test_a_folder_of_shards(tmp_path):
    folder = write_shards(tmp_path / "shards")
    (folder / "notes.bin").write_bytes(b"x")
    report = check(folder)
    assert report.notes == [
        "2 files of split 'train': part-0.jsonl, part-1.jsonl",
        "1 files in the folder are not read: notes.bin",
    ]


def test_a_folder_of_splits(tmp_path):
    folder = write_shards(tmp_path / "hub" / "data", ("train-0.jsonl", "test-0.jsonl")).parent
    check(folder, TEXTS[:1])
    check(folder, TEXTS[1:], split="test")
    with pytest.raises(InputError, match=r"has no split 'tset' \(data.split\): did you mean 'test'"):
        sources.read(str(folder), split="tset")


def test_a_clone_with_configurations(tmp_path):
    folder = write_shards(tmp_path / "clone", ("a.jsonl", "b.jsonl"))
    configs = [{"config_name": name, "data_files": f"{file}.jsonl"} for name, file in (("one", "a"), ("two", "b"))]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    check(folder, TEXTS[1:], config_name="two")
    with pytest.raises(InputError, match=r"has several configurations: choose data\.config_name: one, two"):
        sources.read(str(folder))
    with pytest.raises(InputError, match=r"has no configuration 'thre' \(data.config_name\): one, two"):
        sources.read(str(folder), config_name="thre")


def test_a_folder_without_data_is_refused(tmp_path):
    with pytest.raises(InputError, match="no data files are found in this folder"):
        sources.read(str(tmp_path))


def test_a_pattern_names_all_files_that_fit(tmp_path):
    folder = write_shards(tmp_path / "shards")
    assert check(folder / "part-*.jsonl").notes == ["2 files: part-0.jsonl, part-1.jsonl"]
    check(folder / "part-[1-9].jsonl", TEXTS[1:])
    with pytest.raises(InputError, match="no file has such a name"):
        sources.read(str(folder / "*.parquet"))


def test_several_paths_are_parted_by_commas(tmp_path):
    assert split_paths("a.jsonl, owner/name:folder ,c/*.json") == ["a.jsonl", "owner/name:folder", "c/*.json"]
    (tmp_path / "a,b.jsonl").write_bytes(lines())
    assert split_paths(str(tmp_path / "a,b.jsonl")) == [str(tmp_path / "a,b.jsonl")]


@pytest.mark.parametrize("name", ["saved", "splits"])
def test_what_datasets_saves(tmp_path, name):
    rows = datasets.Dataset.from_list(ROWS)
    (datasets.DatasetDict(train=rows) if name == "splits" else rows).save_to_disk(tmp_path / name)
    check(tmp_path / name)


def test_what_spreadsheets_and_concatenations_leave(tmp_path):
    header, *rows = table(",").decode().split("\r\n", 1)
    (tmp_path / "rows.csv").write_bytes(f"\ufeff{header},,\r\n{rows[0]}{header}\r\n".encode())
    preferences, report = sources.read(str(tmp_path / "rows.csv"))
    assert texts(preferences) == TEXTS and report.dropped == {"a row that repeats the column names": 1}


def test_a_delimiter_within_names_is_none(tmp_path):
    (tmp_path / "rows.csv").write_text('"prompt",completion,tags;a;b;c\nHow?,So.,x\nWhy?,"a;b",y\n')
    preferences, _ = sources.read(str(tmp_path / "rows.csv"))
    assert [one.chosen for one in preferences] == ["So.", "a;b"]


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    (tmp_path / "rows.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    with pytest.raises(InputError, match="is a pointer of Git LFS"):
        sources.read(str(tmp_path / "rows.parquet"))


@pytest.mark.parametrize("column", ["latin", "late", "twice"])
def test_tables_that_python_cannot_hold_are_refused(tmp_path, column):
    values = {
        "latin": pyarrow.array([b"caf\xe9"]).cast(pyarrow.string(), safe=False) if column == "late" else None,
        "late": pyarrow.array([2**62], pyarrow.timestamp("s")),
        "twice": pyarrow.array(["a"]),
    }
    if column == "latin":
        buffers = pyarrow.array([b"caf\xe9"]).buffers()
        values["latin"] = pyarrow.Array.from_buffers(pyarrow.string(), 1, buffers)
    names = ["prompt", "prompt"] if column == "twice" else ["prompt", column]
    made = pyarrow.Table.from_arrays([pyarrow.array(["a"]), values[column]], names=names)
    with pyarrow.ipc.new_file(str(tmp_path / "rows.arrow"), made.schema) as out:
        out.write_table(made)
    with pytest.raises(InputError, match=r"rows\.arrow cannot be read"):
        sources.read(str(tmp_path / "rows.arrow"))


def test_a_path_with_brackets_can_be_printed(tmp_path, capsys):
    """Brackets are markup to what prints."""
    from jax_backtrack.utils.console import bold, console

    console.print(bold(tmp_path / "[/x]"))
    assert "[/x]" in capsys.readouterr().out
