"""What each corpus reads, and what it says when it cannot."""

import gzip
import json
import logging
import lzma
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raygrow.config import build
from raygrow.data.corpus import DataConfig, DatasetCorpus, FilesCorpus, PythonCorpus, list_parts, read_documents

TEXTS = ["one\r\ntwo\n", "\u00fcber \U0001f33f", "three"]


def read(config: DataConfig) -> list[str]:
    return list(read_documents(config, list_parts(config)))


def files(*patterns: object, **settings: object) -> FilesCorpus:
    return FilesCorpus(path="unused", files=tuple(map(str, patterns)), **settings)


@pytest.mark.parametrize("ending", ["", ".gz", ".xz", ".zst"])
def test_text_and_jsonl_read_the_same_in_every_compression(ending: str, tmp_path: Path) -> None:
    rows = "".join(json.dumps({"body": text, "id": 1}) + "\n\n" for text in TEXTS)
    for name, content in {"a.txt": TEXTS[0], "b.jsonl": rows}.items():
        write(tmp_path / (name + ending), content.encode())
    assert read(files(tmp_path / "*.txt*")) == TEXTS[:1]
    assert read(files(tmp_path / "b.jsonl*", text_key="body")) == TEXTS


def write(path: Path, content: bytes) -> None:
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".xz":
        content = lzma.compress(content)
    elif path.suffix == ".zst":
        content = pa.compress(content, codec="zstd", asbytes=True)
    path.write_bytes(content)


def test_parquet_column_is_read_and_nulls_are_not_documents(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [*TEXTS, None, "  \n"]}), tmp_path / "a.parquet")
    assert read(files(tmp_path / "a.parquet")) == TEXTS
    with pytest.raises(ValueError, match=r"a\.parquet.*'body'.*text"):
        read(files(tmp_path / "a.parquet", text_key="body"))


def test_a_column_that_holds_no_text_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: data\.text_key=text holds int values"):
        read(files(tmp_path / "a.parquet"))
    datasets.Dataset.from_dict({"text": [["a"], ["b"]]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"saved:0/2: data\.text_key=text holds list values"):
        read(DatasetCorpus(path="unused", dataset=str(tmp_path / "saved")))


def test_endings_are_read_in_any_case_and_json_as_lines(tmp_path: Path) -> None:
    for name in ("a.JSONL", "b.json", "c.Json.GZ"):
        row = json.dumps({"text": name}) + "\n"
        (tmp_path / name).write_bytes(gzip.compress(row.encode()) if name.endswith("GZ") else row.encode())
    pq.write_table(pa.table({"text": ["d.PARQUET"]}), tmp_path / "d.PARQUET")
    assert read(files(tmp_path)) == ["a.JSONL", "b.json", "c.Json.GZ", "d.PARQUET"]
    (tmp_path / "e.json").write_text('[\n{"text": "one"}\n]\n')
    with pytest.raises(ValueError, match=r"e\.json:1: is not JSON .*each line has to hold one document"):
        read(files(tmp_path / "e.json"))


def test_files_come_from_globs_folders_and_lists_once_each(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("a.txt", "deep/b.txt"):
        (tmp_path / name).write_text(name)
    assert read(files(tmp_path)) == ["a.txt", "deep/b.txt"]
    assert read(files(tmp_path / "**/*.txt", tmp_path / "a.txt")) == ["a.txt", "deep/b.txt"]


def test_a_name_that_looks_like_a_pattern_is_that_name(tmp_path: Path) -> None:
    (tmp_path / "deep [2020]").mkdir()
    for name in ("a [1].txt", "a 1.txt", "deep [2020]/b.txt"):
        (tmp_path / name).write_text(name)
    assert read(files(tmp_path / "a [1].txt")) == ["a [1].txt"]
    assert read(files(tmp_path / "deep [2020]")) == ["deep [2020]/b.txt"]
    assert read(files(tmp_path / "a [12].txt")) == ["a 1.txt"]


def test_text_is_cut_at_line_ends_without_losing_any(tmp_path: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(1000)) + "no end"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    pieces = read(files(tmp_path / "a.txt", passage=100))
    assert "".join(pieces) == text
    assert all(100 <= len(piece) < 110 and piece.endswith("\n") for piece in pieces[:-1])
    assert read(files(tmp_path / "a.txt", passage=0)) == [text]


def test_python_source_is_the_standard_library_without_packages() -> None:
    stdlib = list_parts(PythonCorpus(path="unused"))
    everything = list_parts(PythonCorpus(path="unused", roots="site-packages"))
    assert any(part.endswith("/json/decoder.py") for part in stdlib)
    assert not any("site-packages" in part for part in stdlib)
    assert set(stdlib) < set(everything)
    assert any(part.endswith("/torch/__init__.py") for part in everything)


def test_python_file_that_is_not_utf8_is_skipped_and_counted_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere.py")
    for name in ("bad.py", "worse.py"):
        (tmp_path / name).write_bytes(b"# caf\xe9\n")
    with caplog.at_level(logging.WARNING):
        assert read(PythonCorpus(path="unused", roots=(str(tmp_path),))) == ["x = 1\n"]
    assert [record.getMessage() for record in caplog.records] == ["skipped 2 Python files that are not UTF-8"]


@pytest.mark.parametrize("as_dict", [False, True])
def test_datasets_saved_on_disk(as_dict: bool, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": [f"row {number}" for number in range(70)]})
    saved = datasets.DatasetDict(train=rows) if as_dict else rows
    saved.save_to_disk(tmp_path / "saved")
    config = DatasetCorpus(path="unused", dataset=str(tmp_path / "saved"))
    assert read(config) == rows["text"][:]
    with pytest.raises(ValueError, match=r"text_key=body.*only text"):
        read(DatasetCorpus(path="unused", dataset=str(tmp_path / "saved"), text_key="body"))


def test_datasets_loaded_by_path(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert read(DatasetCorpus(path="unused", dataset=str(tmp_path))) == ["one", "two"]
    with pytest.raises(ValueError, match="split test cannot be loaded"):
        read(DatasetCorpus(path="unused", dataset=str(tmp_path), split="test"))


def test_jsonl_errors_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"body": "x", "id": 3}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: has no text under 'text' \(it has body, id\)"):
        read(files(path))
    path.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: is not JSON"):
        read(files(path))
    for line in ('{"id": 1' + "0" * 5000 + "}", "[" * 200_000):
        path.write_text(line)
        with pytest.raises(ValueError, match=r"a\.jsonl:1: is not JSON"):
            read(files(path))
    path.write_text('[{"text": "one"}, {"text": "two"}]')
    with pytest.raises(ValueError, match=r"a\.jsonl:1: is a list, not an object; each line has to hold one document"):
        read(files(path))
    path.write_text('{"text": "half a pair: \\ud800"}\n')
    assert read(files(path)) == ["half a pair: ?"]


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
def test_file_cut_short_is_named(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.txt{ending}"
    write(path, "".join(f"line {number}\n" for number in range(1000)).encode())
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=rf"a\.txt\{ending}: .*cut short or damaged"):
        read(files(path))


def test_parquet_cut_short_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS}), path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"a\.parquet: .*cut short or damaged"):
        read(files(path))


def test_what_is_not_there_or_not_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file matches .*\.md"):
        read(files(tmp_path / "*.md"))
    with pytest.raises(FileNotFoundError, match="no folder nowhere"):
        read(PythonCorpus(path="unused", roots="nowhere"))
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"a\.txt: is not UTF-8"):
        read(files(tmp_path / "a.txt"))


def test_config_tree_is_built_strictly() -> None:
    tree = {"kind": "files", "path": "out", "files": ["a.txt", "b.txt"], "tokenizer": {"vocab_size": 300}}
    config = build(DataConfig, tree, "data")
    assert isinstance(config, FilesCorpus)
    assert config.files == ("a.txt", "b.txt")
    for wrong, message in {
        "kind=web": r"data\.kind='web': must be one of python_source, files, dataset",
        "roots=stdlib": r"data\.roots: there is no such key",
        "engine=spark": r"data\.engine='spark'",
        "validation_share=1.5": r"data\.validation_share=1\.5",
        "shard_tokens=0": r"data\.shard_tokens=0",
        "passage=-1": r"data\.passage=-1: must be at least 1, or 0",
    }.items():
        key, value = wrong.split("=")
        with pytest.raises(ValueError, match=message):
            build(DataConfig, tree | {key: value}, "data")
    for key, value in {"vocab_size": 256, "train_bytes": 0}.items():
        with pytest.raises(ValueError, match=rf"data\.tokenizer\.{key}={value}: must be at least"):
            build(DataConfig, tree | {"tokenizer": {key: value}}, "data")
