"""Reading text: formats, domains, blank and damaged input."""

import json

import polars as pl
import pytest

from moecollab.errors import DataError, SchemaError
from moecollab.record.corpus import Corpus, Document, read_corpus


def test_list_of_strings_and_mappings():
    corpus = read_corpus(["one", {"text": "two", "domain": "d", "id": "x"}, Document("three")])
    assert [d.text for d in corpus.documents] == ["one", "two", "three"]
    assert corpus.domains == ("d", "text")
    assert [d.id for d in corpus.documents] == ["1", "x", "3"]


def test_text_file_is_one_document(tmp_path):
    (tmp_path / "law.txt").write_text("first\n\nsecond")
    corpus = read_corpus(tmp_path / "law.txt")
    assert corpus.documents == (Document("first\n\nsecond", "law", "law.txt"),)


def test_jsonl_and_parquet_agree(tmp_path, texts):
    lines = "\n\n".join(json.dumps(text) for text in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    pl.DataFrame(texts).write_parquet(tmp_path / "a.parquet")
    one, other = read_corpus(str(tmp_path / "a.jsonl")), read_corpus(tmp_path / "a.parquet")
    assert one.digest == other.digest == read_corpus(texts).digest
    assert one.domains == ("animals", "law")


def test_folder_takes_domains_from_subfolders_and_files(tmp_path):
    (tmp_path / "law").mkdir()
    (tmp_path / "law" / "a.txt").write_text("a writ")
    (tmp_path / "maths.jsonl").write_text('{"text": "a sum"}\n')
    (tmp_path / "notes.md").write_text("not read")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "a.txt").write_text("not read")
    corpus = read_corpus(tmp_path)
    assert {d.text: d.domain for d in corpus.documents} == {"a writ": "law", "a sum": "maths"}


def test_dataset(texts):
    datasets = pytest.importorskip("datasets")
    assert read_corpus(datasets.Dataset.from_list(texts)).digest == read_corpus(texts).digest
    split = datasets.DatasetDict(train=datasets.Dataset.from_list(texts))
    with pytest.raises(DataError, match=r"mapping with keys.*pass one split"):
        read_corpus(split)


def test_blank_documents_are_skipped():
    assert len(read_corpus([" \n", "text", ""])) == 1


@pytest.mark.parametrize("source", [[], ["  ", "\n\t"], iter(())])
def test_empty_corpus(source):
    with pytest.raises(DataError, match="holds no text; give at least one document"):
        read_corpus(source)


def test_empty_file(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no text"):
        read_corpus(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "b', "line 2 is not valid JSON; repair or remove the line"),
        ("[1]", "line 2 is not an object"),
        ('{"body": "b"}', r"line 2 has no string 'text' \(got only \['body'\]\)"),
        ('{"text": 3}', r"line 2 has no string 'text' \(got int\)"),
        ('{"text": "b", "domain": 3}', "line 2 has domain 3; a domain is a string"),
        ('{"text": "b\\ud800"}', "line 2 holds an unpaired surrogate at character 1"),
    ],
)
def test_damaged_line_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        read_corpus(tmp_path / "a.jsonl")


def test_line_that_is_not_utf8(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match="line 2 is not valid JSON"):
        read_corpus(tmp_path / "a.jsonl")


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="not UTF-8 text at byte 3; convert it"):
        read_corpus(tmp_path / "a.txt")


def test_damaged_parquet(tmp_path, texts):
    path = tmp_path / "a.parquet"
    pl.DataFrame(texts).write_parquet(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.parquet is not a readable Parquet file"):
        read_corpus(path)


def test_parquet_without_text(tmp_path):
    pl.DataFrame({"body": ["a"]}).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(SchemaError, match="no column 'text'; it has body"):
        read_corpus(tmp_path / "a.parquet")


def test_missing_path():
    with pytest.raises(DataError, match="does not exist; to pass text itself, give a list"):
        read_corpus("no such file.txt")


def test_unknown_suffix(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"is not text we read; give one of \.txt"):
        read_corpus(tmp_path / "a.csv")


def test_wrong_item():
    with pytest.raises(DataError, match="document 2 is a int; give strings or mappings"):
        read_corpus(["a", 3])


def test_digest_sees_texts_domains_and_borders():
    made = [
        read_corpus(texts).digest
        for texts in (["ab", "c"], ["a", "bc"], [{"text": "ab", "domain": "c"}, "c"])
    ]
    assert len(set(made)) == 3


def test_repeated_ids_are_told_apart():
    corpus = read_corpus([{"text": text, "id": "same"} for text in "abc"])
    assert [d.id for d in corpus.documents] == ["same", "same#2", "same#3"]


def test_corpus_is_returned_as_it_is():
    corpus = Corpus((Document("a"),))
    assert read_corpus(corpus) is corpus
    assert repr(corpus) == "Corpus(1 documents: text 1)"
