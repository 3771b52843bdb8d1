"""Tables, transcripts and names as users have them: read as they are meant, or refused; nothing cut or made up."""

import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import RATE, sound

from w2v2.data.audio import load_audio
from w2v2.data.corpora import read_corpus
from w2v2.data.layouts import layout_rows
from w2v2.data.sources import folder_rows
from w2v2.data.tables import listed_splits, table_rows
from w2v2.errors import JobError, UsageError
from w2v2.inference.align import find_texts
from w2v2.preparation.config import PrepareConfig
from w2v2.preparation.run import prepare
from w2v2.preparation.summary import summary_table

NFC, NFD = unicodedata.normalize("NFC", "Élise"), unicodedata.normalize("NFD", "Élise")


def rows(path: Path, text: str, columns: dict[str, str] | None = None) -> list[tuple[Any, ...]]:
    path.write_text(text, encoding="utf-8")
    return [(row.path, row.text, row.speaker) for row in table_rows(path, columns)]


def save(path: Path, seed: int = 0, seconds: float = 1.2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, sound(seconds, seed), RATE)
    return path


REFUSED = {
    "empty.csv": ("", "empty.csv is empty: expected a line"),
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
    "zero.jsonl": ('{"path": "a\\u0000.wav"}\n', "row 1: expected a path"),
    "channel.csv": ("path,channel\na.wav," + "9" * 5000 + "\n", "row 1: expected a channel from 1"),
    "large.jsonl": ('{"path": "a.wav", "end": 1' + "0" * 400 + "}\n", "row 1: expected seconds"),
    "number.jsonl": ('{"path": 12}\n', "row 1: expected a path"),
    "deep.jsonl": ('{"path": ' + "[" * 100_000 + "\n", "row 1: expected a JSON object"),
    "infinite.jsonl": ('{"path": "a.wav", "end": Infinity}\n', "row 1: expected"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_table_that_would_lose_or_invent_something_is_refused(tmp_path: Path, name: str) -> None:
    text, message = REFUSED[name]
    with pytest.raises(UsageError, match=message):
        rows(tmp_path / name, text)


TWICE = {
    "x.trans.txt": "a OH\nb NO\na OH\na WELL\n",
    "transcripts.txt": "a\tOH\na\tWELL\n",
    "metadata.csv": "a|OH|OH\na|WELL|WELL\n",
    "metadata.jsonl": '{"file_name": "a.wav", "text": "OH"}\n{"file_name": "a.wav", "text": "WELL"}\n',
    "wav.scp": "a a.wav\na b.wav\n",
    "text": "a OH\na WELL\n",
    "utt2spk": "a ann\na bob\n",
    "segments": "a a 0 0.5\na a 0.5 1\n",
    "splits.tsv": "utt\trole\na\ttrain\na.wav\ttest\n",
}


@pytest.mark.parametrize("name", TWICE)
def test_one_name_of_which_two_things_are_said_is_refused_and_said_twice_it_is_read_once(
    tmp_path: Path, name: str
) -> None:
    save(tmp_path / "a.wav")
    if name in ("text", "utt2spk", "segments"):
        (tmp_path / "wav.scp").write_text("a a.wav\n")
    (tmp_path / name).write_text(TWICE[name])
    with pytest.raises(UsageError, match=rf"{name}: a(\.wav)? stands twice, as '.+' and as '.+'; keep one of them"):
        prepare(tmp_path, tmp_path / "out", PrepareConfig(valid_share=0.0))
    *lines, _ = TWICE[name].splitlines()
    (tmp_path / name).write_text("\n".join([*lines, lines[-1]]) + "\n")
    assert prepare(tmp_path, tmp_path / "out", PrepareConfig(valid_share=0.0))["audit"]["ok"] == 1


WHOLE = {
    "t.csv": b'path,text,speaker,start,end\na.wav,"OH, WELL",1,0,1\nb.wav,NO,2.0,,\n',
    "t.tsv": b"path\ttext\tspeaker\na.wav\tOH\t1\n",
    "t.jsonl": b'{"path": "a.wav", "text": "OH", "speaker": 1, "start": 0.5, "end": 1e3}\n',
    "wav.scp": b"talk talk.wav\n",
    "segments": b"t1 talk 0.5 1.5\n",
    "a.stm": b"a 1 ann 0 1 <o,f0> oh\n",
    "metadata.csv": b"a|OH|OH\n",
    "metadata.jsonl": b'{"file_name": "a.wav", "text": "OH"}\n',
    "x.trans.txt": b"a OH\n",
    "splits.tsv": b"utt\trole\na\ttrain\n",
}
PIECES = [b'"', b",", b"\n", b"\r", b"\0", b"\xff", b"\t", b"[" * 9999, b"9" * 5000, b"e999", b"-", b"NaN", b"\\ud800"]


@pytest.mark.parametrize("seed", range(20))
def test_damaged_tables_are_read_or_refused_in_one_line(tmp_path: Path, seed: int) -> None:
    random = Random(seed)
    (tmp_path / "a.wav").touch()
    for name, content in WHOLE.items():
        damaged = content
        for _ in range(random.randint(1, 4)):
            place = random.randrange(len(damaged) + 1)
            damaged = damaged[:place] + random.choice(PIECES) + damaged[place + random.randrange(9) :]
        folder = tmp_path / name
        folder.mkdir()
        for other in ("a.wav", "wav.scp") if name == "segments" else ("a.wav",):
            (folder / other).write_bytes(WHOLE.get(other, b""))
        (folder / name).write_bytes(damaged)
        refusal = ""
        try:
            if name.startswith("t."):
                list(table_rows(folder / name))
            elif name == "splits.tsv":
                listed_splits(folder / name)
            else:
                list(layout_rows(folder) or folder_rows(folder))
        except UsageError as error:
            refusal = str(error)
        assert "\n" not in refusal


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
    with pytest.raises(UsageError, match=r"`columns` transcript=\.\.\.: expected one of path, start"):
        rows(tmp_path / "t.csv", text, {"transcript": "sentence"})
    with pytest.raises(UsageError, match="`columns` names text twice"):
        PrepareConfig(columns=("text=a", "text=b")).check()
    with pytest.raises(UsageError, match="`labelled` names 10m twice"):
        PrepareConfig(labelled=(f"10m={tmp_path / 't.csv'}", "10m")).check()


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
    assert listed_splits(tmp_path / "splits.tsv") == {NFC: "test"}


# --- Layouts ----------------------------------------------------------------------------------------------------------


def told(root: Path) -> dict[str, tuple[str | UsageError | None, str | None, str | None]]:
    return {row.path: (row.text, row.speaker, row.split) for row in folder_rows(root)}


@pytest.mark.parametrize(
    ("audio", "name", "content", "expected"),
    [
        ("wavs/LJ001-0001.wav", "metadata.csv", 'LJ001-0001|In 1455, "so"|In fourteen', ("In fourteen", None, None)),
        ("wavs/LJ001-0001.wav", "metadata.csv", "LJ001-0001|In 1455|\n", ("In 1455", None, None)),
        ("train/a.wav", "metadata.csv", 'file_name,transcription\ntrain/a.wav,"OH, WELL"', ("OH, WELL", None, "train")),
        ("train/a.wav", "train/metadata.jsonl", '{"file_name": "a.wav", "text": "OH"}', ("OH", None, "train")),
        ("dev/audio/10/20/10_20_000003.wav", "dev/transcripts.txt", "10_20_000003\tOUI", ("OUI", "10", "valid")),
        ("dev-clean/84/12/84_12_000001_000002.wav", "dev-clean/84/12/84_12_000001_000002.normalized.txt", "Oh!",
         ("Oh!", "84", "valid")),
        ("2009/20090112-0900-PLENARY-8-en_1.wav", "2009/x.trans.txt", "b OH", (None, None, None)),
        ("en/2009/20090112-0900-PLENARY-8-en.wav", "README", "", (None, None, None)),
        ("2007/2007-12-0001.wav", "2007/2007-12.trans.txt", "2007-12-0001 OH", ("OH", "2007", None)),
    ],
)  # fmt: skip
def test_layouts_that_corpora_have_are_read(
    tmp_path: Path, audio: str, name: str, content: str, expected: tuple[Any, ...], caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / audio)
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert told(tmp_path) == {audio: expected} and not caplog.messages


def test_participants_are_no_splits_unless_all_folders_are(tmp_path: Path) -> None:
    for folder in ("test01", "test02", "control01"):
        save(tmp_path / "some" / folder / "a.wav")
        if folder != "control01":
            save(tmp_path / "all" / folder / "a.wav")
    assert {(who, split) for _, who, split in told(tmp_path / "some").values()} == {
        ("test01", None), ("test02", None), ("control01", None),
    }  # fmt: skip
    assert {(who, split) for _, who, split in told(tmp_path / "all").values()} == {(None, "test")}


def test_what_is_beside_the_audio_and_not_read_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(3):
        save(tmp_path / "in" / "x" / f"{i}.wav", i)
        (tmp_path / "in" / "x" / f"{i}.TextGrid").write_text("")
    (tmp_path / "in" / "x" / "x.trans.txt").write_text("0 OH\n1 WELL\n\n5 NO\n")
    (tmp_path / "in" / "transcripts.txt").write_text("9\tNO\n")
    (tmp_path / "in" / "video.xyz").write_text("")
    summary = prepare(tmp_path / "in", tmp_path / "out")
    assert summary["audit"]["passed_over"] == {".TextGrid": 3, "transcripts without audio": 2, ".xyz": 1}
    (message,) = [message for message in caplog.messages if "transcripts" in message]
    assert message.startswith(f"3 files look like transcripts and are not read, such as {tmp_path / 'in/x/0.TextGrid'}")
    assert "passed over: 3 .TextGrid, 2 transcripts without audio, 1 .xyz" in " ".join(summary_table(summary))
    caplog.clear()
    (tmp_path / "in" / "transcripts.txt").write_text("2\tYES\n9\tNO\n")  # where none is missing, none is looked for
    assert prepare(tmp_path / "in", tmp_path / "all")["audit"]["passed_over"][".TextGrid"] == 3
    assert not [message for message in caplog.messages if "transcripts" in message]


def test_common_voice_keeps_its_clips_in_a_folder(tmp_path: Path) -> None:
    save(tmp_path / "cv" / "clips" / "a.wav")
    save(tmp_path / "cv" / "clips" / "b.wav", 1)
    (tmp_path / "cv" / "train.tsv").write_text('client_id\tpath\tsentence\n1\ta.wav\tSO "HE\n2\tb.wav\tOH\n')
    config = PrepareConfig(columns=("text=sentence", "speaker=client_id"), audio_folder=str(tmp_path / "cv" / "clips"))
    assert prepare(tmp_path / "cv" / "train.tsv", tmp_path / "out", config)["audit"]["rejected"] == 0
    told = {(u.text, u.speaker) for split in read_corpus(tmp_path / "out").values() for u in split.utterances()}
    assert told == {('SO "HE', "1"), ("OH", "2")}


def kaldi(root: Path, **files: str) -> Path:
    for name, content in files.items():
        (root / name.replace("_scp", ".scp")).write_text(content, encoding="utf-8")
    return root


def test_a_kaldi_folder_is_read(tmp_path: Path) -> None:
    save(tmp_path / "talk.wav", 0, 3.0)
    save(tmp_path / "other.wav", 1)
    kaldi(
        tmp_path,
        wav_scp=f"other {tmp_path / 'other.wav'}\ntalk talk.wav\n",
        segments="talk-1 talk 0.5 1.5\ntalk-2 talk 1.5 -1\nother-1 other 0 1.2\n",
        text="talk-1 OH WELL\ntalk-2\u2028 YES\nother-1\tNO\n",
        utt2spk="talk-1 ann\ntalk-2\tbob\nother-1 cid\n",
    )
    told = [(Path(r.path).name, r.start, r.end, r.text, r.speaker) for r in layout_rows(tmp_path) or ()]
    assert told == [
        ("talk.wav", 0.5, 1.5, "OH WELL", "ann"),
        ("talk.wav", 1.5, None, "YES", "bob"),
        ("other.wav", 0.0, 1.2, "NO", "cid"),
    ]
    (tmp_path / "segments").unlink()
    kaldi(tmp_path, text="talk OH\nother NO\n", utt2spk="talk ann\nother cid\n")
    told = [(Path(r.path).name, r.start, r.end, r.text, r.speaker) for r in layout_rows(tmp_path) or ()]
    assert told == [("other.wav", None, None, "NO", "cid"), ("talk.wav", None, None, "OH", "ann")]
    kaldi(tmp_path, wav_scp="talk sph2pipe -f wav talk.sph |\n")
    with pytest.raises(UsageError, match=r"wav.scp, talk: a command, which is not run"):
        list(layout_rows(tmp_path) or ())


def test_ted_lium_is_read_by_its_stm(tmp_path: Path) -> None:
    save(tmp_path / "train" / "sph" / "Talk_2010.wav", 0, 4.0)
    save(tmp_path / "test" / "sph" / "Other.wav", 1, 2.0)
    for split in ("train", "test"):
        (tmp_path / split / "stm").mkdir()
    (tmp_path / "train" / "stm" / "Talk_2010.stm").write_text(
        ";; a comment\n"
        "Talk_2010 1 Talk_2010 0.5 1.5 <NA> oh well\n"
        "Talk_2010 1 inter_segment_gap 1.5 2 <o,,unknown> ignore_time_segment_in_scoring\n"
        "Talk_2010 1 Talk_2010 2.0 3.75 <o,f0,male> yes (2) <unk>\n"
    )
    (tmp_path / "test" / "stm" / "Other.stm").write_text("Other A ann 0 2 no\n")
    told = [(r.path, r.start, r.end, r.text, r.speaker, r.split) for r in layout_rows(tmp_path) or ()]
    assert told == [
        ("test/sph/Other.wav", 0.0, 2.0, "no", "ann", "test"),
        ("train/sph/Talk_2010.wav", 0.5, 1.5, "oh well", "Talk_2010", "train"),
        ("train/sph/Talk_2010.wav", 2.0, 3.75, "yes (2) <unk>", "Talk_2010", "train"),
    ]
    assert prepare(tmp_path, tmp_path / "out")["audit"]["rejected"] == 0
    (tmp_path / "test" / "sph" / "Other.wav").unlink()
    with pytest.raises(UsageError, match=r"Other\.stm: no audio of that name"):
        list(layout_rows(tmp_path) or ())


def test_lines_of_several_stm_are_all_read_each_on_its_channel_and_what_none_names_is_counted(tmp_path: Path) -> None:
    sides = np.stack([sound(8.0, 1), sound(8.0, 2)], 1)
    soundfile.write(tmp_path / "call.wav", sides, RATE, subtype="FLOAT")
    save(tmp_path / "other.wav")
    (tmp_path / "A.stm").write_text("call 1 alice 0 3 HELLO THERE\n")
    (tmp_path / "B.stm").write_text("call B bob 4 7 GOOD MORNING\n")
    audit = prepare(tmp_path, tmp_path / "out", PrepareConfig(valid_share=0.0))["audit"]
    assert audit["passed_over"]["recordings without a line"] == 1 and audit["ok"] == 2
    heard = {cut.supervisions[0].text: cut for cut in read_corpus(str(tmp_path / "out"))["train"]}
    for text, channel, start in (("HELLO THERE", 0, 0), ("GOOD MORNING", 1, 4)):
        part = sides[start * RATE : (start + 3) * RATE, channel]
        assert np.allclose(load_audio(heard[text]), part.astype(np.float32))
    (tmp_path / "B.stm").write_text("call X bob 4 7 GOOD MORNING\n")
    with pytest.raises(UsageError, match=r"B.stm, row 1: expected 1, 2, A or B as one of several channels, got X"):
        list(layout_rows(tmp_path) or ())


def test_kaldi_texts_without_audio_are_counted(tmp_path: Path) -> None:
    save(tmp_path / "a.wav")
    kaldi(tmp_path, wav_scp="a a.wav\n", text="a OH\nb NO\n")
    assert prepare(tmp_path, tmp_path / "out")["audit"]["passed_over"] == {"transcripts without audio": 1}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("table", {"speaker": "(.)"}), ("folder", {"columns": ("text=x",)}), ("kaldi", {"speaker": "(.)"})],
)
def test_settings_of_another_kind_of_source_are_refused(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    save(tmp_path / "in" / "a.wav")
    (tmp_path / "in" / "t.csv").write_text("path\na.wav\n")
    if kind == "kaldi":
        kaldi(tmp_path / "in", wav_scp="a a.wav\n")
    source = tmp_path / "in" / ("t.csv" if kind == "table" else "")
    with pytest.raises(UsageError, match=f"`{next(iter(settings))}` is not for a .*; leave it out"):
        prepare(source, tmp_path / "out", PrepareConfig(**settings))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("by", ["column", "list", "folder"])
def test_what_is_to_test_on_is_never_trained_on(tmp_path: Path, by: str, caplog: pytest.LogCaptureFixture) -> None:
    lines = []
    for i in range(6):
        folder = "test/" if by == "folder" else ""
        save(tmp_path / "in" / f"{folder}{i}.wav", i)
        lines.append(f"{folder}{i}.wav,test\n")
    (tmp_path / "in" / "t.csv").write_text("path,split\n" + "".join(lines))
    (tmp_path / "list.tsv").write_text("utt\trole\n" + "".join(f"{i}\ttest\n" for i in range(6)))
    source = tmp_path / "in" / ("t.csv" if by == "column" else "")
    splits = str(tmp_path / "list.tsv") if by == "list" else ""
    made = prepare(source, tmp_path / "out", PrepareConfig(splits=splits, shards="wav"))["splits"]
    told = "no folder is called train: the others are taken for it, and divided" in caplog.messages
    expected = {"train": 5, "valid": 1} if by == "folder" else {"test": 6}
    assert {name: split["utterances"] for name, split in made.items()} == expected and told == (by == "folder")


def test_a_train_split_of_nothing_usable_is_no_reason_to_train_on_the_others(tmp_path: Path) -> None:
    for i in range(4):
        save(tmp_path / f"{i}.wav", i)
    rows = [f"{i}.wav,{('test', 'valid')[i % 2]}\n" for i in range(4)]
    (tmp_path / "t.csv").write_text("path,split\ngone.wav,train\n" + "".join(rows))
    with pytest.raises(JobError, match=r"nothing of train can be used; .*audit.jsonl says why"):
        prepare(tmp_path / "t.csv", tmp_path / "out")
    assert [line["status"] for line in findings(tmp_path / "out")].count("rejected") == 1


def test_what_could_not_be_read_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av")
    save(tmp_path / "in" / "a.wav")
    encode_m4a(tmp_path / "in" / "b.m4a")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "av", None)
        assert again(tmp_path / "in", tmp_path / "out")["audit"]["rejected"] == 1
    assert again(tmp_path / "in", tmp_path / "out")["audit"]["rejected"] == 0


def encode_m4a(path: Path) -> None:
    import av

    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(sound(2.0, 1)[None].astype(np.float32), format="fltp", layout="mono")
        frame.sample_rate = RATE
        for part in (frame, None):
            file.mux(stream.encode(part))


METADATA = [
    ("metadata.csv", "audio_file|text|speaker_name\na|OH WELL|anna\nb|NO|bob\n", {"a": "OH WELL", "b": "NO"}),
    ("metadata.csv", "a|Mr. 5|mister five\nb|NO|\n", {"a": "mister five", "b": "NO"}),
    ("metadata.jsonl", '{"file_name": "a.wav", "text": NaN}\n{"file_name": "b.wav", "text": 12.0}\n', {"b": "12"}),
]


@pytest.mark.parametrize(("name", "content", "texts"), METADATA)
def test_metadata_gives_the_text_and_nothing_else(tmp_path: Path, name: str, content: str, texts: Any) -> None:
    for stem in "ab":
        save(tmp_path / f"{stem}.wav")
    (tmp_path / name).write_text(content)
    assert {Path(row.path).stem: row.text for row in folder_rows(tmp_path) if row.text} == texts


@pytest.mark.parametrize("text", ['["x", "y"]', "true", r'"\ud83d"'])
def test_metadata_that_is_no_text_is_one_line(tmp_path: Path, text: str) -> None:
    save(tmp_path / "a.wav")
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "a.wav", "text": {text}}}\n')
    with pytest.raises(UsageError, match=r"metadata.jsonl, row 1: "):
        prepare(tmp_path, tmp_path / "out")


@pytest.mark.skipif(shutil.which("localedef") is None, reason="needs another locale")
def test_a_corpus_made_in_another_locale_is_one_for_all(tmp_path: Path) -> None:
    locale = "de_DE.ISO-8859-1"
    done = subprocess.run(["localedef", "-i", "de_DE", "-f", "ISO-8859-1", tmp_path / locale], capture_output=True)
    if done.returncode:
        pytest.skip("no sources of locales")
    for i, name in enumerate(("Jürgen", "Élise")):
        save(tmp_path / "in" / name / f"{name}.wav", i).with_suffix(".txt").write_text("ÜBEL", encoding="utf-8")
    command = [sys.executable, "-m", "w2v2.cli.main", "prepare", tmp_path / "in", tmp_path / "out", "--jobs", "2"]
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONUTF8", "LC_ALL")}
    subprocess.run(command, env=variables | {"LOCPATH": str(tmp_path), "LC_ALL": locale}, check=True)
    told = {(u.id, u.text, u.speaker) for split in read_corpus(tmp_path / "out").values() for u in split.utterances()}
    assert told == {("Jürgen", "ÜBEL", "Jürgen"), ("Élise", "ÜBEL", "Élise")}


def test_a_folder_of_hugging_face_is_prepared_as_a_folder(tmp_path: Path) -> None:
    save(tmp_path / "in" / "train" / "a.wav")
    with pytest.raises(UsageError, match="is a folder of audio: prepare it as such, without hf:"):
        prepare(f"hf:{tmp_path / 'in'}", tmp_path / "out")


def test_one_recording_is_told_to_be_too_few_and_a_long_transcript_too_long(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "a.wav", 0, 61).with_suffix(".txt").write_text("OH WELL " * 60)
    os.mkfifo(save(tmp_path / "x" / "b.wav", 1).with_suffix(".txt"))
    with pytest.raises(UsageError, match=r"b\.txt: not a regular file"):
        prepare(tmp_path, tmp_path / "out")
    (tmp_path / "x" / "b.txt").unlink()
    (tmp_path / "x" / "b.wav").unlink()
    prepare(tmp_path, tmp_path / "out")
    (line,) = findings(tmp_path / "out")
    assert line["reasons"] == ["too_long"] and "w2v2 align" in line["detail"]
    assert "there is no split valid: it takes two recordings, to hold one out" in caplog.messages


# --- Once more --------------------------------------------------------------------------------------------------------


def again(source: Path, out: Path, **options: Any) -> dict[str, Any]:
    return prepare(source, out, PrepareConfig(**options))


def decoded(caplog: pytest.LogCaptureFixture) -> tuple[str, str]:
    """What the last preparation said: how many were checked already, and what has changed."""
    lines = "\n".join(caplog.messages)
    caplog.clear()
    known, changes = re.search(r"(\d+) of \d+ checked already", lines), re.search(r"changed are (.*); doing", lines)
    return known[1] if known else "", changes[1] if changes else ""


def test_what_is_new_since_is_done_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    root, out = tmp_path / "in", tmp_path / "out"
    for i in range(3):
        save(root / "ann" / f"{i}.wav", i).with_suffix(".txt").write_text("OH")
    first = again(root, out, valid_share=0.0)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert again(root, out, valid_share=0.0) == json.loads(json.dumps(first))
    (root / "notes.pdf").write_text("no part of it")
    again(root, out, valid_share=0.0)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    caplog.clear()

    (root / "ann" / "0.txt").write_text("WELL")
    again(root, out, valid_share=0.0)
    assert decoded(caplog) == ("2", "some of its recordings and transcripts")
    assert "WELL" in {cut.supervisions[0].text for split in read_corpus(str(out)).values() for cut in split}
    save(root / "ann" / "3.wav", 3)
    (root / "ann" / "1.wav").unlink()
    again(root, out, valid_share=0.0)
    assert decoded(caplog) == ("2", "1 new and 1 gone of its recordings and transcripts")
    assert [line["path"] for line in findings(out)] == ["ann/0.wav", "ann/2.wav", "ann/3.wav"]
    save(root / "ann" / "3.wav", 7)  # other audio under the same name
    again(root, out, valid_share=0.0)
    assert decoded(caplog) == ("2", "some of its recordings and transcripts")
    fresh = again(root, tmp_path / "other", valid_share=0.0)
    assert json.loads((out / "corpus.json").read_text())["content_hash"] == fresh["content_hash"]
    (root / "splits.tsv").write_text("utt\trole\nann_0\ttrain\n")
    assert again(root, out, valid_share=0.0)["splits"]["train"]["utterances"] == 1
    assert "splits.tsv" in decoded(caplog)[1]


def test_a_table_that_has_changed_since_is_read_again(tmp_path: Path) -> None:
    for i in range(2):
        save(tmp_path / f"{i}.wav", i)
    table = tmp_path / "t.csv"
    table.write_text("path,text,speaker\n0.wav,OH,a\n1.wav,OH,b\n")
    again(table, tmp_path / "out")
    table.write_text("path,text,speaker\n0.wav,OH,a\n1.wav,OH,a\n")
    assert sum(split["speakers"] for split in again(table, tmp_path / "out")["splits"].values()) == 2  # one, in both
    table.unlink()
    assert again(table, tmp_path / "out")["audit"]["ok"] == 0  # nothing to compare with


def test_who_is_held_out_stays_so_when_others_come(tmp_path: Path) -> None:
    def held() -> set[str]:
        corpus = read_corpus(str(tmp_path / "out"))
        return {str(cut.supervisions[0].speaker) for cut in corpus["valid"]}

    for i in range(8):
        save(tmp_path / "in" / f"s{i}" / "a.wav", i)
    again(tmp_path / "in", tmp_path / "out", valid_share=0.25)
    first = held()
    for i in range(8, 40):
        save(tmp_path / "in" / f"s{i}" / "a.wav", i)
    again(tmp_path / "in", tmp_path / "out", valid_share=0.25)
    assert len(first) == 2 and len(held()) == 10 and first < held()


def test_rows_of_less_confidence_are_left_out_and_counted(tmp_path: Path) -> None:
    for i in range(4):
        save(tmp_path / f"{i}.wav", i)
    rows = ["path,Confidence", "0.wav,0.9", "1.wav,0.1", "2.wav,", "3.wav,1"]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    corpus = again(tmp_path / "t.csv", tmp_path / "out", min_confidence=0.5)
    assert [line["path"] for line in findings(tmp_path / "out")] == ["0.wav", "2.wav", "3.wav"]
    assert corpus["audit"]["passed_over"] == {"rows of less confidence than 0.5": 1}
    for wrong in ("1.5", "nan", "sure"):
        (tmp_path / "w.csv").write_text(f"path,confidence\n0.wav,{wrong}\n")
        with pytest.raises(UsageError, match="row 1: expected a confidence of 0 to 1"):
            again(tmp_path / "w.csv", tmp_path / f"out-{wrong}")


# --- Lists of splits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [["ann_0", "ann_1", "ann_2"], ["ann/0.wav", "ann/1.wav", "ann/2.wav"]])
def test_a_list_of_splits_is_read_whole_or_refused(tmp_path: Path, ids: list[str]) -> None:
    for i in range(4):
        save(tmp_path / "in" / "ann" / f"{i}.wav", i)
    listed = tmp_path / "in" / "splits.tsv"
    rows = zip(ids, ("training", "Validation", " test "), strict=True)
    listed.write_text("Utt \trole\n" + "".join(f"{name}\t{role}\n" for name, role in rows))
    summary = prepare(tmp_path / "in", tmp_path / "out")
    assert {name: len(split) for name, split in read_corpus(tmp_path / "out").items()} == {
        "train": 1, "valid": 1, "test": 1,
    }  # fmt: skip
    assert summary["audit"]["unlisted"] == 1 and "1 of these are in no split" in " ".join(summary_table(summary))
    listed.write_text(f"utt\trole\n{ids[0]}\ttrain\n{ids[1]}\tpretrain\n")
    with pytest.raises(UsageError, match=r"row 2: role: expected train, dev, valid, test or nothing, got 'pretrain'"):
        prepare(tmp_path / "in", tmp_path / "other")


def test_what_a_list_of_splits_names_in_vain_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(2):
        save(tmp_path / f"{i}.wav", i)
    (tmp_path / "splits.tsv").write_text("utt\trole\n0\ttrain\n1\tdev\n2\tdev\n7\ttrain\n")
    prepare(tmp_path, tmp_path / "out")
    assert [m for m in caplog.messages if "in vain" in m] == [
        "the list of splits names 2 of 4 utterances in vain, such as 2: there is no such recording"
    ]


def test_a_layout_that_only_prepare_reads_is_refused_elsewhere(tmp_path: Path) -> None:
    save(tmp_path / "k" / "a.wav", 1)
    (tmp_path / "k" / "wav.scp").write_text("a a.wav\n")
    (tmp_path / "k" / "text").write_text("a OH WELL\n")
    for read in (lambda: read_corpus(tmp_path / "k", training=False), lambda: find_texts(str(tmp_path / "k"), None)):
        with pytest.raises(UsageError, match=r"wav\.scp .* only 'w2v2 prepare' reads"):
            read()
    assert prepare(tmp_path / "k", tmp_path / "out")["splits"]["train"]["transcribed"] == 1
