"""Tables, transcripts and names as users have them: read as they are meant, or refused; nothing cut or made up."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import soundfile
from conftest import RATE, sound

from w2v2.data.corpora import read_corpus
from w2v2.data.sources import folder_rows
from w2v2.data.tables import listed_splits, table_rows
from w2v2.errors import UsageError
from w2v2.preparation.config import PrepareConfig
from w2v2.preparation.run import prepare

NFC, NFD = unicodedata.normalize("NFC", "Élise"), unicodedata.normalize("NFD", "Élise")


def rows(path: Path, text: str, columns: dict[str, str] | None = None) -> list[tuple[Any, ...]]:
    path.write_text(text, encoding="utf-8")
    return [(row.path, row.text, row.speaker) for row in table_rows(path, columns)]


def save(path: Path, seed: int = 0, seconds: float = 1.2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, sound(seconds, seed), RATE)
    return path


REFUSED = {
    "comma.csv": ("path,text,speaker\na.wav,OH,x\nb.wav,WELL, I NEVER,x\n", "row 2: 4 fields for 3 columns"),
    "tab.tsv": ("path\ttext\na.wav\tWELL\tI NEVER\n", "row 1: 3 fields for 2 columns"),
    "unnamed.csv": ("path,text,\na.wav,WELL, I NEVER\n", "'I NEVER' is in none"),
    "open.csv": ('path,text\na.wav,OH\nb.wav,"SO HE SAID\nc.wav,YES\n', "row 2: cannot be read: .*quotation mark"),
    "reopened.csv": ('path,text\nb.wav,"SO HE SAID\nc.wav,YES\nd.wav,"OH"\n', "row 1: cannot be read: .*quotation"),
    "closed_late.csv": ('path,text,who\nb.wav,"SO,x\nc.wav,YES",x\n', "row 1: a quotation mark opens and closes"),
    "double.csv": ("path,text,Text \na.wav,OH,WELL\n", "two columns 'Text'"),
    "double.jsonl": ('{"path": "a.wav", "text": "A", "text": "B"}\n', "row 1: .*two columns 'text'"),
    "list.jsonl": ('{"path": "a.wav", "text": ["A", "B"]}\n', r"row 1: expected text in 'text', got \['A', 'B'\]"),
    "object.jsonl": ('{"path": "a.wav", "text": {"raw": "A"}}\n', "row 1: expected text in 'text'"),
    "true.jsonl": ('{"path": "a.wav", "speaker": true}\n', "row 1: expected text in 'speaker', got True"),
    "number.jsonl": ('{"path": 12}\n', "row 1: expected a path"),
    "deep.jsonl": ('{"path": ' + "[" * 100_000 + "\n", "row 1: expected a JSON object"),
    "infinite.jsonl": ('{"path": "a.wav", "end": Infinity}\n', "row 1: expected"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_table_that_would_lose_or_invent_something_is_refused(tmp_path: Path, name: str) -> None:
    text, message = REFUSED[name]
    with pytest.raises(UsageError, match=message):
        rows(tmp_path / name, text)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("blanks.csv", " Path, speaker , TEXT\na.wav, x , OH WELL\n", [("a.wav", "OH WELL", "x")]),
        ("quoted.csv", 'path, text\na.wav, "OH, WELL"\n', [("a.wav", "OH, WELL", None)]),
        ("inside.csv", 'path,text\na.wav,SO "HE" SAID\n', [("a.wav", 'SO "HE" SAID', None)]),
        ("lines.csv", 'path,text\na.wav,"OH\nWELL"\n', [("a.wav", "OH\nWELL", None)]),
        ("mark.csv", "\ufeffpath,text\na.wav,OH\n", [("a.wav", "OH", None)]),
        ("mark.jsonl", '\ufeff{"path": "a.wav", "text": "OH"}\n', [("a.wav", "OH", None)]),
        ("surplus.csv", "path,text,,\na.wav,OH,,\n,,,\n", [("a.wav", "OH", None)]),
        ("nan.jsonl", '{"path": "a.wav", "text": NaN, "speaker": 1, "end": NaN}\n', [("a.wav", None, "1")]),
        ("number.jsonl", '{"path": "a.wav", "text": 12, "speaker": 1.0}\n', [("a.wav", "12", "1")]),
        ("speakers.csv", "path,speaker\na.wav,1\nb.wav,1.0\n", [("a.wav", None, "1"), ("b.wav", None, "1")]),
        ("forms.csv", f"path,speaker\na,{NFC}\nb,{NFD}\n", [("a", None, NFC), ("b", None, NFC)]),
    ],
)
def test_a_table_is_read_as_it_is_meant(tmp_path: Path, name: str, text: str, expected: list[tuple[Any, ...]]) -> None:
    assert rows(tmp_path / name, text) == expected


def test_a_mapping_names_columns_that_there_are(tmp_path: Path) -> None:
    text = "path,Sentence\na.wav,OH\n"
    assert rows(tmp_path / "t.csv", text, {"text": "sentence "}) == [("a.wav", "OH", None)]
    with pytest.raises(UsageError, match="`columns` transcript=...: expected one of path, start"):
        rows(tmp_path / "t.csv", text, {"transcript": "sentence"})
    with pytest.raises(UsageError, match="`columns` names text twice"):
        PrepareConfig(columns=("text=a", "text=b")).check()


def findings(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "audit.jsonl").read_text(encoding="utf-8").split("\n") if line]


def test_a_segment_that_cannot_be_costs_its_row_alone(tmp_path: Path) -> None:
    for i in range(2):
        save(tmp_path / f"{i}.wav", i)
    parts = ["0.wav,0.1,0.9", "0.wav,0.9,0.1", "0.wav,-1,1", "0.wav,-2,-1", "1.wav,0,1.2"]
    (tmp_path / "t.csv").write_text("path,start,end\n" + "\n".join(parts) + "\n")
    prepare(tmp_path / "t.csv", tmp_path / "out")
    assert [line["reasons"] for line in findings(tmp_path / "out")] == [[], ["empty"], ["empty"], ["empty"], []]
    assert sum(len(split) for split in read_corpus(tmp_path / "out").values()) == 2


# --- Transcripts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("character", "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e")
def test_a_transcript_ends_with_its_line_alone(tmp_path: Path, character: str) -> None:
    save(tmp_path / "a.wav")
    (tmp_path / "x.trans.txt").write_text(f"a THE CAPTAIN{character}CAME BACK\nb OH\n", encoding="utf-8")
    assert [row.text for row in folder_rows(tmp_path)] == [f"THE CAPTAIN{character}CAME BACK"]


@pytest.mark.parametrize("line", ["a\tTHE CAPTAIN", "a  THE CAPTAIN\r", "\ufeffa THE CAPTAIN", " a \t THE CAPTAIN "])
def test_blanks_and_marks_around_an_id_are_none_of_it(tmp_path: Path, line: str) -> None:
    save(tmp_path / "a.wav")
    (tmp_path / "x.trans.txt").write_text(f"{line}\n", encoding="utf-8", newline="")
    assert [row.text for row in folder_rows(tmp_path)] == ["THE CAPTAIN"]


@pytest.mark.parametrize(("audio", "other"), [(NFC, NFD), (NFD, NFC)])
def test_names_meet_in_either_unicode_form(tmp_path: Path, audio: str, other: str) -> None:
    path = save(tmp_path / audio / f"{audio}.wav")
    beside = path.with_name(f"{other}.txt")
    beside.write_text("BON")
    assert [(row.text, row.speaker) for row in folder_rows(tmp_path)] == [("BON", NFC)]
    beside.unlink()
    path.with_name("x.trans.txt").write_text(f"{other} JOUR", encoding="utf-8")
    assert [row.text for row in folder_rows(tmp_path)] == ["JOUR"]
    (tmp_path / "t.csv").write_text(f"path\n{other}/{other}.wav\n", encoding="utf-8")
    assert [row.path for row in table_rows(tmp_path / "t.csv")] == [f"{audio}/{audio}.wav"]
    (tmp_path / "splits.tsv").write_text(f"utt\trole\n{other}/{other}.wav\ttest\n", encoding="utf-8")
    assert dict(listed_splits(tmp_path / "splits.tsv")) == {NFC: "test"}
