"""Secrets of addresses serve a run and are written nowhere; names that are weapons are shown harmless."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import RATE, sound, write_corpus
from hypothesis import given
from hypothesis import strategies as st
from serving import Faults, serve

from w2v2.checkpoint.card import _last_name
from w2v2.cli.main import main
from w2v2.errors import first_line, printable, public
from w2v2.inference.extract import Item, Wanted, extract_files
from w2v2.model.wav2vec2 import Wav2Vec2, Wav2Vec2Config

USER, SECRET = "reader", "hunter2"


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("https://me:pass@host/a/b.wav", "https://host/a/b.wav"),
        ("https://token@host:8443/a", "https://host:8443/a"),
        ("https://me:p@ss@host/a", "https://host/a"),
        ("s3://key:secret@bucket/a", "s3://bucket/a"),
        ("https://host/a.wav?X-Amz-Signature=ab/cd%2F&Expires=1", "https://host/a.wav"),
        ('{"a": "https://me:x@h/a?sig=1", "b": "HTTPS://u:y@h?z"}', '{"a": "https://h/a", "b": "HTTPS://h"}'),
        ("cannot read https://h/a?sig=1: gone", "cannot read https://h/a: gone"),
        ("mail me@home, is it a/b?", "mail me@home, is it a/b?"),
        ("https://host/a@b/c", "https://host/a@b/c"),
    ],
)
def test_addresses_lose_user_password_and_query_alone(text: str, rest: str) -> None:
    assert public(text) == rest == public(rest)


@pytest.mark.parametrize("before", range(170, 200, 5))
def test_the_first_line_of_an_error_tells_no_secret_wherever_it_is_cut(before: int) -> None:
    error = OSError(f"\n{'x' * before} https://user:secret@host/path?signature=secret\nhttps://a:secret@b")
    assert first_line(error) == f"{'x' * before} https://host/path"[:200]
    assert first_line(ValueError()) == "ValueError"


@given(st.text(max_size=40))
def test_what_is_shown_stays_in_its_line_and_moves_no_cursor(text: str) -> None:
    shown = printable(text)
    assert len(shown.splitlines()) <= 1
    assert not any(ord(sign) < 32 or 127 <= ord(sign) < 160 for sign in shown)
    assert printable(shown) == shown


def test_a_password_serves_a_run_and_is_written_nowhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_corpus(tmp_path / "source", {"train-clean": 2, "dev-clean": 1}, utterances=5)
    assert main(["prepare", str(source), str(tmp_path / "corpus"), "--jobs", "1"]) == 0
    out, tuned = tmp_path / "run", tmp_path / "tuned"
    small = ["--train.max-steps", "1", "--data.num-workers", "0", "--data.batch-seconds", "20"]
    with serve(tmp_path / "corpus", Faults(password=f"{USER}:{SECRET}")) as server:
        plain = server.url
        address = plain.replace("://", f"://{USER}:{SECRET}@")
        assert (
            main(["pretrain", "tiny", "--data", address, "--out", str(out), "--warm-start.updates", "1", *small]) == 0
        )
        start = ["--init-from", str(out), "--data", address, "--out", str(tuned)]
        assert main(["finetune", "tiny_ctc", *start, *small]) == 0
        assert main(["evaluate", str(tuned), "--data", address, "--split", "valid"]) == 0
        assert main(["report", str(tuned)]) == 0
        wrong = address.replace(SECRET, "hunter3")
        assert main(["evaluate", str(tuned), "--data", wrong, "--split", "valid"]) != 0
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login {USER} password {SECRET}\n")
        (tmp_path / "netrc").chmod(0o600)
        assert main(["evaluate", str(tuned), "--data", plain, "--split", "valid"]) == 0
    printed = capsys.readouterr()
    assert "hunter" not in printed.out + printed.err
    written = [path for folder in (out, tuned) for path in folder.rglob("*") if path.is_file()]
    assert {"config.json", "evaluation.json", "report.html"} <= {path.name for path in written}
    for path in written:
        assert b"hunter" not in path.read_bytes(), path
    assert json.loads((tuned / "config.json").read_text())["data"]["sources"] == [plain]


def test_signed_addresses_of_a_table_are_read_and_leave_no_trace_in_ids_and_audit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "audio").mkdir()
    for i in range(3):
        soundfile.write(tmp_path / "audio" / f"a{i}.wav", sound(2.0, i), RATE)
    with serve(tmp_path / "audio") as server:
        with (tmp_path / "table.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["path", "speaker"])
            rows.writerows([f"{server.url}/a{i % 4}.wav?X-Amz-Signature=hunter2", i] for i in range(4))
        argv = ["prepare", str(tmp_path / "table.csv"), str(tmp_path / "corpus"), "--jobs", "1"]
        main([*argv, "--shards", "wav"])
    printed = capsys.readouterr()
    assert "hunter2" not in printed.out + printed.err
    assert "hunter2" not in (tmp_path / "corpus" / "audit.jsonl").read_text()
    assert (tmp_path / "corpus" / "audit.jsonl").read_text().count("a3.wav") >= 1  # that there is none is told
    for path in (tmp_path / "corpus").rglob("*.json"):
        assert "hunter2" not in path.read_text()


def test_cards_tell_no_secrets_of_older_runs() -> None:
    assert _last_name("https://me:hunter2@host/corpus?sig=a/hunter2") == "corpus"


def test_two_names_of_one_file_are_never_one_in_extract(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Wav2Vec2(
        Wav2Vec2Config(n_layer=1, n_embd=16, n_head=2, ffn_dim=16, conv_channels=(32,) * 7, pos_conv_groups=2)
    )
    items = [Item(name, f"{name}.wav", torch.randn(8000)) for name in ("a/b", "a_b", "c")]
    rows = list(extract_files(model, items, tmp_path, Wanted(layers=(-1,), codes=False, pool=False, format="numpy")))
    by_id = {row["id"]: row for row in rows}
    assert {name: row.get("file") for name, row in by_id.items()} == {"a/b": "a_b.npz", "a_b": None, "c": "c.npz"}
    assert "another one goes to a_b" in by_id["a_b"]["error"]
    assert np.load(tmp_path / "a_b.npz")["layer_1"].shape[0] == by_id["a/b"]["frames"]


def test_names_with_escapes_reach_the_terminal_escaped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name = tmp_path / "x\x1b[2J\nw2v2: done\t.wav"
    name.write_bytes(b"no audio")
    assert main(["extract", str(tmp_path / "no\x1b[31m\nmodel"), str(name), "--out", str(tmp_path / "out")]) == 2
    err = capfd.readouterr().err
    assert "\x1b" not in err and err.count("\n") == 1 and r"no\x1b[31m\nmodel" in err
