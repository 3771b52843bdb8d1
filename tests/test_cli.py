import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import write_corpus

from w2v2.cli.main import main

NANO = [
    "--train.max-steps", "2", "--train.log-every", "1", "--train.val-every", "2", "--train.checkpoint-every", "2",
    "--model.n-layer", "1", "--model.n-embd", "48", "--model.ffn-dim", "48", "--warm-start.updates", "1",
]  # fmt: skip


def test_prepare_pretrain_finetune_evaluate_report_one_after_the_other(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, run, ctc = (str(tmp_path / name) for name in ("manifest", "run", "ctc"))
    assert main(["prepare", str(corpus), manifest]) == 0
    assert main(["pretrain", "tiny", "--data", manifest, "--out", run, *NANO]) == 0
    assert "<html" in (tmp_path / "run" / "report.html").read_text()
    assert main(["evaluate", run, "--data", manifest, "--split", "test"]) == 0
    assert json.loads(capsys.readouterr().out).keys() >= {"contrastive", "accuracy", "accuracy_all_masked"}
    tune = ["finetune", "tiny_ctc", "--data", manifest, "--init-from", run, "--out", ctc, "--minutes", "0.3"]
    assert main([*tune, *NANO[:8]]) == 0
    assert main(["evaluate", ctc, "--data", manifest, "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() >= {"wer", "cer"}
    (tmp_path / "run" / "report.html").unlink()
    assert main(["report", run]) == 0
    assert (tmp_path / "run" / "report.html").exists()


def test_resume_goes_on_where_the_run_stopped(corpus: Path, tmp_path: Path) -> None:
    call = ["pretrain", "tiny", "--data", str(corpus), "--out", str(tmp_path / "run"), *NANO]
    assert main(call) == 0
    assert main([*call, "--resume", "--train.max-steps", "4"]) == 0
    steps = [line.split(",")[0] for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()]
    assert steps == ["step", "1", "2", "3", "4"]


def refuse(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Exit code 2 and exactly one line on standard error, which is returned."""
    assert main(list(argv)) == 2
    said = capsys.readouterr().err.strip().splitlines()
    said = [line for line in said if not line.startswith(("train:", "valid:"))]
    assert len(said) == 1, said
    assert said[0].startswith("w2v2: error: ")
    return said[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nano"], "unknown recipe 'nano': expected one of base, paper_base"),
        (["./none.py:f"], "no recipe file ./none.py"),
        (
            ["tiny", "--train.max-step", "2"],
            "Unrecognized options: --train.max-step, 2; did you mean --train.max-steps",
        ),
        (["--train.max-steps", "-5", "tiny"], "--train.max-steps must be 1 or more, got -5"),
        (["--train.max-steps=two", "tiny"], "Error parsing --train.max-steps"),
        (["tiny", "--train.max-steps", "5", "--train.max-steps", "-1"], "--train.max-steps must be 1 or more, got -1"),
        (["tiny", "--train.max-steps", "two"], "Error parsing --train.max-steps"),
        (["tiny", "--train.max-steps", "-1"], "--train.max-steps must be 1 or more, got -1"),
        (["tiny", "--train.precision", "fp8"], "--train.precision must be one of"),
        (["tiny", "--train.accelerator", "gpu"], "--train.accelerator must be one of auto, cpu here, got 'gpu'"),
        (["tiny", "--train.accelerator", "cuda0"], "--train.accelerator must be one of auto, cpu here, got 'cuda0'"),
        (["tiny", "--model.gumbel-decay", "1.01"], "--model.gumbel-decay must be more than 0, at most 1, got 1.01"),
        (["tiny", "--recipe", "base"], "the recipe is named without --recipe, as the first word after the verb"),
        (["tiny", "--optim.betas", "0.9", "1"], "--optim.betas must be 0 or more, less than 1, got"),
        (["tiny", "--data.max-seconds", "25", "--data.batch-seconds", "25"], "gives crops of 1250 frames, more than"),
        (["tiny", "--data.batch-seconds", "1"], "must hold at least one crop"),
        (["tiny", "--data.min-seconds", "0.01"], "must leave a few frames to mask"),
        (["tiny", "--data.min-seconds", "3.9", "--data.max-seconds", "3.9"], "no utterance of the"),
        (["tiny", "--model.n-head", "5"], "must be a multiple of --model.n-head (5), got 192"),
        (["tiny", "--model.conv-norm", "batch"], "must be 'layer' or 'group:N'"),
        (["tiny", "--model.conv-norm", "group:7"], "needs groups that divide"),
        (["tiny", "--model.conv-strides", "5", "2"], "one number for each of the 7 --model.conv-channels"),
        (["tiny", "--loss-weights.diversity", "much"], "--loss-weights.diversity"),
        (["tiny", "--init-from", "nowhere"], "no nowhere/config.json"),
        (["tiny", "--resume"], "nothing to resume"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_leaves_nothing_behind(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    out = tmp_path / "run"
    line = refuse(capsys, "pretrain", *options, "--data", str(corpus), "--out", str(out))
    assert message in line
    assert not out.exists()


@pytest.mark.parametrize("fault", ["missing", "empty", "unreadable", "short", "full"])
def test_a_fault_in_the_data_or_the_folder_is_one_line_and_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    said = {
        "missing": "no folder",
        "empty": "no audio in",
        "unreadable": "cannot read",
        "short": "no utterance of the train split is as long as --data.min-seconds 2",
        "full": "is not empty; choose another --out",
    }[fault]
    if fault != "missing":
        data.mkdir()
    if fault in ("unreadable", "full"):
        write_corpus(data, {"train": 1, "dev": 1}, utterances=2)
    if fault == "unreadable":
        (data / "train" / "101" / "1" / "101-1-0000.flac").write_bytes(b"nothing")
    if fault == "short":  # shorter than the receptive field of one frame, 400 samples
        for speaker in (1, 2):
            folder = data / "train" / str(speaker)
            folder.mkdir(parents=True)
            soundfile.write(folder / f"{speaker}-1.flac", np.zeros(300), 16_000)
    if fault == "full":
        out.mkdir()
        (out / "thesis.tex").write_text("all of it")
    line = refuse(capsys, "pretrain", "tiny", "--data", str(data), "--out", str(out))
    assert said in line
    if fault == "full":
        assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    else:
        assert not out.exists()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_file_that_turns_bad_during_training_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    data = write_corpus(tmp_path / "data", {"train": 2, "dev": 1}, utterances=3)
    bad = data / "train" / "101" / "1" / "101-1-0001.flac"
    whole = bad.read_bytes()
    bad.write_bytes(whole[: len(whole) // 8])  # the header is whole, the audio is not
    argv = ["pretrain", "tiny", "--data", str(data), "--out", str(tmp_path / "run"), *NANO]
    argv += ["--train.max-steps", "20", "--data.num-workers", workers]
    assert main(argv) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("w2v2: failed: 1 utterances cannot be read, more than --data.max-bad 0.1% of 6 allows: ")
    assert "101-1-0001.flac" in last


def test_within_the_budget_a_bad_file_is_left_out_and_named_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_corpus(tmp_path / "data", {"train": 2, "dev": 1}, utterances=3)
    for name in ("101-1-0001", "102-1-0002"):
        bad = data / "train" / name[:3] / "1" / f"{name}.flac"
        bad.write_bytes(bad.read_bytes()[:2000])
    argv = ["pretrain", "tiny", "--data", str(data), "--out", str(tmp_path / "run"), *NANO, "--train.max-steps", "6"]
    # one utterance to a batch, so that whole batches are lost
    argv += ["--data.max-bad", "50%", "--data.batch-seconds", "4", "--data.max-seconds", "4"]
    assert main(argv) == 0
    said = [record.getMessage() for record in caplog.records if "left out, " in record.getMessage()]
    for name in ("101-1-0001.flac", "102-1-0002.flac"):  # by training and by the look before it, however many passes
        assert sum(name in line for line in said) == 2
    assert len(said) == 4
    steps = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert len(steps) == 7
    # The other micro-batches of a step would be lost with it, or the step be of fewer targets than it is divided by.
    assert main([*argv, "--out", str(tmp_path / "other"), "--train.accumulate", "2"]) == 1
    assert "no utterance of a whole batch can be read" in caplog.text + capsys.readouterr().err


def test_other_verbs_refuse_in_one_line_too(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no " in refuse(capsys, "evaluate", str(empty), "--data", str(corpus))
    assert "--split must be one of" in refuse(capsys, "evaluate", str(empty), "--data", str(corpus), "--split", "dev")
    assert "no folder" in refuse(capsys, "prepare", str(tmp_path / "none"), str(tmp_path / "out"))
    assert "not of an earlier demo" in refuse(capsys, "demo", "--out", str(corpus))
    assert "Unrecognized options: --fast" in refuse(capsys, "prepare", str(corpus), str(tmp_path / "out"), "--fast")
    assert "metrics.csv" in refuse(capsys, "report", str(empty))
    for minutes in ("0", "-1", "nan"):
        line = refuse(capsys, "finetune", "tiny_ctc", "--data", str(corpus), "--minutes", minutes)
        assert f"--minutes must be more than 0, got {minutes}" in line
    line = refuse(capsys, "finetune", "tiny_ctc", "--data", str(corpus), "--preflight", "--resume")
    assert "leave --resume out" in line
    probe = ["evaluate", str(empty), "--data", str(corpus), "--probe", "--minutes"]
    for argv, option in ((["demo", "--out", str(empty), "--shrink"], "--shrink"), (probe, "--minutes")):
        for number in ("0", "-1", "nan"):
            assert f"{option} must be more than 0, got {number}" in refuse(capsys, *argv, number)
    assert not (tmp_path / "out").exists() and not list(empty.iterdir())


def test_a_reader_that_goes_away_ends_a_verb_quietly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "w2v2.cli.main"]
    for words in (["--help"], ["pretrain", "small", "--help"]):
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run([*command, *words], stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
        os.close(writing)
        assert (done.returncode, done.stderr) == (141, "")
    with open("/dev/full", "w") as full:
        done = subprocess.run([*command, "--version"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "w2v2: failed: [Errno 28] No space left on device\n")


def test_the_version_and_a_missing_or_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"w2v2 {version('w2v2')}\n"
    assert "expected a verb, one of demo, prepare" in refuse(capsys)
    assert "no verb 'trian': expected one of demo" in refuse(capsys, "trian")
    assert "name the audio: files" in refuse(capsys, "transcribe", "model")
    assert "name the file to write" in refuse(capsys, "lm")


def test_bash_completes_verbs_and_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tyro-print-completion", "bash"]) == 0
    script = tmp_path / "w2v2"
    script.write_text(capsys.readouterr().out)
    for words, expected in (
        ("w2v2 pre", "pretrain"),
        ("w2v2 pretrain --train.max-steps-l", "--train.max-steps-left-out"),
    ):
        ask = f"source {script}; COMP_WORDS=({words}); COMP_CWORD={len(words.split()) - 1}; COMP_LINE='{words}'; "
        ask += "COMP_POINT=${#COMP_LINE}; $(complete -p w2v2 | sed 's/.* -F \\([^ ]*\\).*/\\1/'); echo ${COMPREPLY[@]}"
        done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
        assert expected in done.stdout.split(), done


def test_help_answers_without_torch_and_lists_recipes_and_settings() -> None:
    code = "import sys; from w2v2.cli.main import main\ntry: main(['--help'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pretrain" in done.stdout
    assert done.stdout.strip().endswith("False")
    command = shutil.which("w2v2") or str(Path(sys.executable).parent / "w2v2")
    said = subprocess.run([command, "pretrain", "--help"], capture_output=True, text=True, check=True).stdout
    assert "paper_base" in said
    said = subprocess.run([command, "pretrain", "tiny", "--help"], capture_output=True, text=True, check=True).stdout
    assert "--data DIR" in said or "--data DATA" in said
    assert "--train.max-steps" in said
    assert "fairseq" in said
