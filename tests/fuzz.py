"""Damaged and hostile files of every kind, seeded: no traceback, no crash, no hang, nothing written or run beside.

    python tests/fuzz.py --seed 1 --audio 1000 --files 800 --jobs 2

Every case is a call of the command in a forked process, in a folder of its own. Faults are printed, with how to have
each again: --only NAME. A part of it runs in CI (test_fuzz.py).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import faulthandler
import gzip
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from conftest import NANO, RATE, WORDS, sound, write_corpus

SECONDS = 30.0
"""That a call may take, of its own and its children's CPU; the clock has four times as much."""
MEMORY = 12 << 30
"""Address space of a call."""
CANARY = "executed"

# --- Bases: what is to be damaged -------------------------------------------------------------------------------------

SNDFILE = {
    "wav": ("WAV", "PCM_16"), "float.wav": ("WAV", "FLOAT"), "gsm.wav": ("WAV", "GSM610"),
    "adpcm.wav": ("WAV", "IMA_ADPCM"),
    "flac": ("FLAC", "PCM_16"), "ogg": ("OGG", "VORBIS"), "opus": ("OGG", "OPUS"), "mp3": ("MP3", "MPEG_LAYER_III"),
    "aiff": ("AIFF", "PCM_16"), "au": ("AU", "PCM_16"), "w64": ("W64", "PCM_16"), "rf64.wav": ("RF64", "PCM_16"),
    "caf": ("CAF", "ALAC_16"), "sph": ("NIST", "PCM_16"),
}  # fmt: skip
PYAV = {"m4a": ("ipod", "aac"), "mkv": ("matroska", "aac"), "webm": ("webm", "libopus"), "ts": ("mpegts", "aac"),
        "avi": ("avi", "mp3"), "wma": ("asf", "wmav2"), "aac": ("adts", "aac"), "mp4": ("mp4", "aac")}  # fmt: skip


def make_audio(folder: Path) -> None:
    """A file of each format that there is here."""
    folder.mkdir()
    samples = sound(1.5, 7)
    for name, (form, subtype) in SNDFILE.items():
        rate = 8000 if subtype == "GSM610" else RATE
        with contextlib.suppress(soundfile.LibsndfileError):
            soundfile.write(folder / f"x.{name}", samples[: rate * 3 // 2], rate, format=form, subtype=subtype)
    with contextlib.suppress(ImportError):
        import av

        for name, (form, codec) in PYAV.items():
            with (
                contextlib.suppress(av.error.FFmpegError, ValueError),
                av.open(str(folder / f"x.{name}"), "w", form) as file,
            ):
                rate = 48_000 if codec == "libopus" else 44_100
                stream = file.add_stream(codec, rate=rate, layout="mono")
                frame = av.AudioFrame.from_ndarray((sound(1.5, 7, rate) * 32767).astype(np.int16)[None], "s16", "mono")
                frame.sample_rate = rate
                for packet in [*stream.encode(frame), *stream.encode(None)]:
                    file.mux(packet)
    for path in folder.iterdir():
        if not path.stat().st_size:
            path.unlink()


def make_models(folder: Path) -> None:
    """CTC and pretraining models in three formats."""
    from w2v2.checkpoint.contents import Checkpoint
    from w2v2.checkpoint.fairseq import write_fairseq
    from w2v2.checkpoint.huggingface import write_huggingface
    from w2v2.checkpoint.native import write_native
    from w2v2.model.ctc import Wav2Vec2ForCTC
    from w2v2.model.pretraining import ContrastiveConfig
    from w2v2.text.vocabulary import Vocabulary

    config = ContrastiveConfig(
        n_layer=2, n_head=2, n_embd=24, ffn_dim=32, conv_channels=(16,) * 7, conv_norm="group:16",
        conv_paddings=(0,) * 7, n_entries=8, codebook_dim=4, similarity_dim=16, target_features="encoder",
        pos_conv_kernel=8, pos_conv_groups=2,
    )  # fmt: skip
    torch.manual_seed(0)
    labels = ("<pad>", "<s>", "</s>", "<unk>", "|", *sorted({c for word in WORDS for c in word}))
    vocabulary = Vocabulary(labels=labels, blank=0, unknown=3, boundary=4, silent=(1, 2))
    for name, model in (("pretraining", config.build()), ("ctc", Wav2Vec2ForCTC(config, len(labels)))):
        checkpoint = Checkpoint(source=folder, config=config, state=model.state_dict())
        checkpoint.vocabulary = vocabulary if name == "ctc" else None
        for form, write in (("ours", write_native), ("hf", write_huggingface), ("fairseq", write_fairseq)):
            (folder / form / name).mkdir(parents=True)
            write(checkpoint, folder / form / name)
        hf, binary = folder / "hf" / name, folder / "bin" / name
        shutil.copytree(hf, binary)
        from safetensors.torch import load_file

        torch.save(load_file(binary / "model.safetensors"), binary / "pytorch_model.bin")
        (binary / "model.safetensors").unlink()


ARPA = """\\data\\
ngram 1=6
ngram 2=4

\\1-grams:
-1.2\t<unk>
-99\t<s>\t-0.3
-1\t</s>
-1\tSUN\t-0.2
-1.1\tMOON\t-0.1
-1.3\tSTAR

\\2-grams:
-0.5\t<s> SUN
-0.4\tSUN MOON
-0.3\tMOON </s>
-0.7\tSUN </s>

\\end\\
"""


def make_bases(root: Path) -> None:
    """All of them."""
    make_audio(root / "audio")
    make_models(root / "models")
    corpus = write_corpus(root / "corpus", {"train-clean": 2, "dev-clean": 1, "test-clean": 1}, utterances=2)
    (root / "nano").mkdir()
    (root / "nano" / "nano.py").write_text(NANO)
    for name, options in (("prepared", []), ("sharded", ["--shards", "flac"])):
        call(["prepare", str(corpus), str(root / name), "--jobs", "1", *options])
    (root / "text").mkdir()
    (root / "text" / "lm.arpa").write_text(ARPA)
    (root / "text" / "lexicon.txt").write_text("SUN S U N |\nMOON\nSTAR S T A R |\n")
    (root / "text" / "words.txt").write_text("SUN MOON\nSTAR SUN\n")
    soundfile.write(root / "text" / "good.wav", sound(1.5, 1), RATE)
    tables = root / "tables"
    tables.mkdir()
    rows = [
        ("a.wav", "SUN MOON", "ann", "train"),
        ("b.wav", "STAR", "bob", "train"),
        ("c.wav", "RAIN SKY", "cy", "dev"),
    ]
    for i, (path, *_) in enumerate(rows):
        soundfile.write(tables / path, sound(1.5, i), RATE)
    head = ("path", "text", "speaker", "split")
    (tables / "t.csv").write_text("".join(",".join(row) + "\n" for row in (head, *rows)))
    (tables / "t.tsv").write_text("".join("\t".join(row) + "\n" for row in (head, *rows)))
    (tables / "t.jsonl").write_text("".join(json.dumps(dict(zip(head, row, strict=True))) + "\n" for row in rows))
    beside = root / "beside"
    shutil.copytree(tables, beside, ignore=shutil.ignore_patterns("t.*"))
    for path, text, *_ in rows:
        (beside / path).with_suffix(".txt").write_text(text)
    kaldi = root / "kaldi"
    shutil.copytree(tables, kaldi, ignore=shutil.ignore_patterns("t.*"))
    (kaldi / "wav.scp").write_text("".join(f"{path[0]} {path}\n" for path, *_ in rows))
    (kaldi / "text").write_text("".join(f"{path[0]}-1 {text}\n" for path, text, *_ in rows))
    (kaldi / "utt2spk").write_text("".join(f"{path[0]}-1 {speaker}\n" for path, _, speaker, _ in rows))
    (kaldi / "segments").write_text("".join(f"{path[0]}-1 {path[0]} 0.1 1.2\n" for path, *_ in rows))
    data = ["--data", str(corpus), "--data.num-workers", "0", "--train.val-every", "2", "--train.checkpoint-every", "1"]
    call(["pretrain", f"{root}/nano/nano.py:nano", *data, "--out", str(root / "run"), "--train.max-steps", "2"])
    shutil.copytree(root / "models" / "ours" / "ctc", root / "evaluated")
    call(["evaluate", str(root / "evaluated"), "--data", str(corpus), "--workers", "0"])
    tuning = ["--lexicon", str(root / "text" / "lexicon.txt"), "--tune", "valid", "--trials", "1", "--beam-size", "5"]
    call(["evaluate", str(root / "evaluated"), "--data", str(corpus), "--workers", "0", *tuning])
    demo = root / "demo"
    for name in ("pretrain", "finetuned", "scratch"):
        shutil.copytree(root / "run", demo / name, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    figures = {"wer": 0.5, "cer": 0.25, "cer_interval": [0.2, 0.3]}
    summary = {
        "finetuned": figures,
        "scratch": figures,
        "pretrain": {"accuracy": 0.2},
        "seconds": {"total": 3.0, "a": 3.0},
    }
    (demo / "summary.json").write_text(json.dumps(summary))
    (demo / "codebook.json").write_text(json.dumps({"counts": [[3, 2, 0], [1, 1, 1]]}))
    items = [{"reference": "SUN MOON", "finetuned": "SUN", "scratch": ""}]
    (demo / "hypotheses.json").write_text(json.dumps(items))
    np.savez(demo / "example.npz", audio=sound(1.5, 1), mask=np.arange(75) % 5 == 0, hop=320, id="u")


def call(argv: list[str]) -> None:
    """A command that must work."""
    outcome = forked(argv, Path.cwd())
    assert outcome.code == 0, (argv, outcome.text)


# --- Mutations --------------------------------------------------------------------------------------------------------

Mutate = Callable[[random.Random, Path], None]


def mutate_bytes(rng: random.Random, path: Path) -> None:
    """One to four faults as of disks, copies, and people with a hex editor."""
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 2, 4])):
        size = len(data)
        at, kind = rng.randrange(min(size, rng.choice([64, 1024, size or 1])) or 1), rng.randrange(8)
        span = rng.choice([1, 4, 16, 512, 8192])
        if kind == 0:
            data[at : at + 1] = bytes([data[at] ^ (1 << rng.randrange(8))]) if size else b""
        elif kind == 1:
            data[at : at + span] = rng.randbytes(len(data[at : at + span]))
        elif kind == 2:
            data[at : at + 4] = rng.choice(
                [b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80"]
            )
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            del data[at : at + span]
        elif kind == 5:
            data[at:at] = rng.randbytes(span)
        elif kind == 6:
            data[at:at] = data[: rng.choice([span, size])]
        else:
            data[at : at + span] = bytes([rng.choice([0, 255, 127])]) * len(data[at : at + span])
    path.write_bytes(data)


def value(rng: random.Random) -> Any:
    """What a field is not expected to be."""
    deep: Any = 1
    for _ in range(80):
        deep = [deep]
    return rng.choice([
        "x", "", [], {}, None, True, False, -1, 0, 1, 2, 0.5, -0.1, 1e308, -1e308, 1e-308, float("nan"), float("inf"),
        10**12, 10**30, 10**400, -(10**12), [1] * 1000, [-1] * 7, [[]], ["a", 1, None], deep, "\ud800", "\0",
        "a\nb\x1b[2J",
        "x" * 300_000, "../../x", "/dev/zero", "/etc/passwd", "http://127.0.0.1:9/x", {"_type": "os:system"},
        {"_type": "Wav2Vec2Config"}, {"_type": ["x"]}, {"a": {"b": {}}}, [0] * 7, "1", "nan", "group:0", "group:²",
    ])  # fmt: skip


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value in dictionaries and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, inside in list(items):
        yield tree, key
        yield from places(inside)


def mutate_tree(rng: random.Random, tree: Any) -> Any:
    """One or two values replaced, removed, renamed, doubled."""
    for _ in range(rng.choice([1, 1, 2])):
        spots = list(places(tree))
        if not spots or rng.random() < 0.03:
            return value(rng)
        container, key = rng.choice(spots)
        kind = rng.randrange(8)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[rng.choice(["", "x", "_type", 5, None, "\ud800"])] = container.pop(key)
        elif kind == 2:
            container[key] = copy.deepcopy(rng.choice([c[k] for c, k in spots]))  # a tree stays one
        else:
            container[key] = value(rng)
    return tree


def whole(rng: random.Random) -> bytes:
    """A file that is nothing of what it should be."""
    return rng.choice([
        b"", b"\0" * 100, b"[" * 100_000, b'{"a":' * 50_000, b'{"a": "\xff\xfe"}', b"[]", b"null", b"1", b'"x"', b"{}",
        b"\xff\xfe{\0}\0", b'{"a": ' + b"9" * 6000 + b"}", b"x" * 500_000, b"a,b\n" * 3, b"PK\x03\x04", b"\x80\x02.",
    ])  # fmt: skip


def mutate_json(rng: random.Random, path: Path) -> None:
    """A document of JSON."""
    if rng.random() < 0.15:
        return path.write_bytes(whole(rng)) and None
    if rng.random() < 0.1:
        return mutate_bytes(rng, path)
    path.write_bytes(json.dumps(mutate_tree(rng, json.loads(path.read_bytes()))).encode("utf-8", "surrogatepass"))


def mutate_lines(rng: random.Random, path: Path) -> None:
    """Text, a table, a language model: its lines, fields and bytes."""
    if rng.random() < 0.1:
        return path.write_bytes(whole(rng)) and None
    if rng.random() < 0.2:
        return mutate_bytes(rng, path)
    lines = path.read_text().split("\n")
    for _ in range(rng.choice([1, 2, 3])):
        at = rng.randrange(len(lines))
        words = lines[at].replace("\t", " \t ").replace("=", " = ").replace(",", " , ").split(" ")
        kind = rng.randrange(7)
        if kind == 0:
            del lines[at]
            lines = lines or [""]
        elif kind == 1:
            lines.insert(at, rng.choice(lines))
        elif kind == 2:
            other = rng.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        elif kind == 3:
            lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)]
        else:
            words[rng.randrange(len(words))] = rng.choice([
                "nan", "inf", "-inf", "1e308", "-1", "0", "99999999999999999999", "x" * 200_000, '"', "\0", "", "\t",
                "\x1b[2J",
                "\u2028", "\ud800", "<s>", "</s>", "<unk>", "/dev/zero", "../x", "|", "é" * 50, "\\end\\", "4", "²",
            ])  # fmt: skip
            lines[at] = " ".join(words)
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))


def mutate_gzip(rng: random.Random, path: Path) -> None:
    """A manifest: its lines of JSON, or the compressed bytes."""
    if rng.random() < 0.15:
        return mutate_bytes(rng, path)
    lines = gzip.decompress(path.read_bytes()).splitlines()
    at = rng.randrange(len(lines))
    inside = path.with_name("line")
    inside.write_bytes(lines[at])
    mutate_json(rng, inside)
    lines[at] = inside.read_bytes()
    inside.unlink()
    path.write_bytes(gzip.compress(b"\n".join(lines)))


class Runs:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {CANARY}",)


def odd(rng: random.Random) -> Any:
    """What settings in a pickle may hold."""
    loop: list[Any] = []
    loop.append(loop)
    laughs: Any = ["ha"] * 10
    for _ in range(15):
        laughs = [laughs] * 10
    circle: dict[str, Any] = {}
    circle["x"] = circle
    tensors = [
        torch.zeros(1).expand(10**9),
        torch.zeros(3, dtype=torch.int64),
        torch.eye(3).to_sparse(),
        torch.zeros(0),
    ]
    return rng.choice([loop, laughs, circle, Runs(), {1: 2}, *tensors, argparse.Namespace(a=1), value(rng), value(rng)])


def mutate_torch(rng: random.Random, path: Path) -> None:
    """A pickle of torch: its values, or its bytes."""
    if rng.random() < 0.2:
        return mutate_bytes(rng, path)
    saved = torch.load(path, weights_only=False)
    spots = list(places(saved))
    for _ in range(rng.choice([1, 1, 2])):
        container, key = rng.choice(spots)
        if rng.random() < 0.15 and isinstance(container, dict) and key in container:
            container[rng.choice([0, 5, "x", None, (1, 2)])] = container.pop(key)
        else:
            container[key] = rng.choice([odd, value])(rng)
    if rng.random() < 0.1:
        saved = odd(rng)
    file = io.BytesIO()
    try:
        torch.save(saved, file, _use_new_zipfile_serialization=rng.random() < 0.8)
    except (RecursionError, ValueError, pickle.PicklingError):
        file.write(rng.randbytes(300))
    path.write_bytes(file.getvalue())


def mutate_safetensors(rng: random.Random, path: Path) -> None:
    """Its header, or its bytes."""
    if rng.random() < 0.4:
        return mutate_bytes(rng, path)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    head = json.dumps(mutate_tree(rng, json.loads(data[8 : 8 + size]))).encode("utf-8", "surrogatepass")
    length = len(head) if rng.random() < 0.9 else rng.choice([0, 10**12, 2**63])
    path.write_bytes(length.to_bytes(8, "little") + head + data[8 + size :])


def special(rng: random.Random, path: Path) -> None:
    """Something that is no regular file, in its place."""
    path.unlink()
    kind = rng.randrange(6)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to("/dev/zero")
    elif kind == 3:
        path.symlink_to(path.name)
    elif kind == 4:
        folder = os.open(path.parent, os.O_RDONLY)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{folder}/{path.name}")  # since the name of a socket has to be short
        os.close(folder)


MUTATIONS: dict[str, Mutate] = {
    ".json": mutate_json, ".jsonl": mutate_lines, ".gz": mutate_gzip, ".pt": mutate_torch, ".bin": mutate_torch,
    ".ckpt": mutate_torch, ".safetensors": mutate_safetensors, ".npz": mutate_bytes, ".tar": mutate_bytes,
}  # fmt: skip

# --- Targets ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A file, in a base, and the command that reads it; IN is the copied base, BASES where all are."""

    base: str
    file: str
    argv: str


def targets(root: Path) -> list[Target]:
    """All kinds of files but audio."""
    transcribe = "transcribe IN BASES/text/good.wav --out out"
    beam = (
        "transcribe BASES/models/ours/ctc IN/good.wav --out out --lm IN/lm.arpa --lexicon IN/lexicon.txt --beam-size 5"
    )
    evaluate = "evaluate BASES/models/ours/ctc --data IN --workers 0 --out out"
    resume = "pretrain BASES/nano/nano.py:nano --data BASES/corpus --out IN --resume --train.max-steps 3"
    resume += " --data.num-workers 0 --train.val-every 2 --train.checkpoint-every 1"
    tune = (
        "evaluate IN --data BASES/corpus --workers 0 --out out --lexicon BASES/text/lexicon.txt --tune valid --trials 1"
    )
    folders, fairseq = ("hf/ctc", "hf/pretraining", "bin/ctc", "bin/pretraining"), "convert IN/model.pt out --to ours"
    against = evaluate.replace("IN", "BASES/corpus") + " --against IN/evaluation/test"
    plan = [
        *[Target("models/ours/ctc", file, transcribe) for file in ("config.json", "vocab.json", "model.safetensors")],
        *[Target(f"models/{kind}", "*", "convert IN out --to ours") for kind in folders],
        *[Target("models/fairseq/ctc", file, fairseq) for file in ("model.pt", "dict.ltr.txt")],
        Target("models/fairseq/pretraining", "model.pt", fairseq),
        *[Target("run", file, "report IN") for file in ("config.json", "environment.json", "metrics.csv")],
        *[Target("demo", f"{name}*", "report IN") for name in ("summary", "hypotheses", "codebook", "example")],
        *[Target("run", file, resume) for file in ("checkpoints/*", "*.json", "metrics.csv", "best/best.json")],
        *[Target("prepared", file, "lm out.arpa --data IN") for file in ("corpus.json", "train/*.gz")],
        *[Target("sharded", file, evaluate) for file in ("corpus.json", "test/*.gz", "test/*.tar")],
        Target("prepared", "*.json", "prepare BASES/corpus IN --jobs 1"),
        Target("text", "lm.arpa", beam), Target("text", "lm.arpa", beam), Target("text", "lexicon.txt", beam),
        Target("text", "words.txt", "lm IN/words.txt out.arpa"),
        Target("text", "words.txt", "align BASES/models/ours/ctc IN/good.wav IN/words.txt --out out"),
        *[Target("tables", f"t.{kind}", f"prepare IN/t.{kind} out --jobs 1") for kind in ("csv", "tsv", "jsonl")],
        Target("beside", "*.txt", "prepare IN out --jobs 1"),
        *[Target("kaldi", file, "prepare IN out --jobs 1") for file in ("wav.scp", "segments", "text")],
        Target("corpus", "train-clean/101/1/101-1.trans.txt", "prepare IN out --jobs 1"),
        Target("evaluated", "emissions/*/*", tune),
        Target("evaluated", "evaluation/test/hypotheses.jsonl", against),
    ]  # fmt: skip
    assert all(list((root / target.base).glob(target.file)) for target in plan)
    return plan


# --- Calls ------------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """How a call ended."""

    code: int
    text: str
    seconds: float
    hung: bool = False


def forked(argv: list[str], cwd: Path) -> Outcome:
    """The command in a fork of this process."""
    log = cwd / ".log"
    started = time.monotonic()
    pid = os.fork()
    if not pid:
        _child(argv, cwd, log)
    hung = False
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        elapsed = time.monotonic() - started
        if elapsed > 4 * SECONDS:
            hung = True
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.02)
    text = log.read_text(errors="replace")
    log.unlink()
    seconds = usage.ru_utime + usage.ru_stime
    return Outcome(os.waitstatus_to_exitcode(status), text, seconds, hung or seconds > SECONDS)


def _child(argv: list[str], cwd: Path, log: Path) -> None:
    code = 70
    try:
        os.setpgid(0, 0)
        os.chdir(cwd)
        number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(number, 1)
        os.dup2(number, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        faulthandler.enable(2)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        (cwd / ".tmp").mkdir(exist_ok=True)
        os.environ |= {
            "TMPDIR": str(cwd / ".tmp"),
            "HOME": str(cwd / ".tmp"),
            "HF_HUB_OFFLINE": "1",
            "MPLCONFIGDIR": "/tmp",
        }
        tempfile.tempdir = None
        from w2v2.cli.main import main

        code = main(argv)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder, with its size and time."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if not path.is_dir() or path.is_symlink()
    }


def faults_of(outcome: Outcome, cwd: Path, before: dict[str, tuple[int, int]], may_write: tuple[str, ...]) -> list[str]:
    """What a call must never do, and did."""
    faults = []
    if outcome.hung:
        faults.append(f"took {outcome.seconds:.0f} s")
    elif outcome.code < 0:
        faults.append(f"ended by signal {-outcome.code}")
    if "Traceback (most recent call last)" in outcome.text or outcome.code not in (0, 1, 2, -9):
        faults.append(f"exit code {outcome.code}, a traceback" if outcome.code == 70 else f"exit code {outcome.code}")
    last = outcome.text.strip().splitlines()[-1:] or [""]
    if (
        outcome.code in (1, 2)
        and not last[0].startswith(("w2v2: ", "  ", "rejected", "failed"))
        and "w2v2:" not in outcome.text
    ):
        faults.append("fails without a word")
    if any(len(line) > 5000 for line in outcome.text.splitlines()):
        faults.append(f"a line of {max(map(len, outcome.text.splitlines()))} characters")
    after = tree(cwd)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    beside = [name for name in changed if not name.startswith(may_write)]
    if beside:
        faults.append(f"wrote {' '.join(beside[:5])}")
    if (cwd / CANARY).exists():
        faults.append("executed what it read")
    return faults


@dataclass(frozen=True)
class Fault:
    """A case that went wrong."""

    name: str
    faults: list[str]
    argv: list[str]
    text: str


def file_case(root: Path, work: Path, plan: list[Target], seed: int, number: int) -> Fault | None:
    """Damage a file, and call what reads it."""
    rng = random.Random(f"{seed} file {number}")
    target = plan[number % len(plan)]
    cwd = work / f"file{number}"
    cwd.mkdir()
    shutil.copytree(root / target.base, cwd / "IN")
    victim = rng.choice(sorted(path for path in (cwd / "IN").glob(target.file) if path.is_file()))
    if rng.random() < 0.06:
        special(rng, victim)
    else:
        MUTATIONS.get(victim.suffix, mutate_lines)(rng, victim)
    argv = [word.replace("BASES", str(root)) for word in target.argv.split()]
    writes = ("out", ".tmp", *(("IN",) if {"IN", "--resume"} <= {*argv} or argv[0] in ("report", "prepare") else ()))
    writes += ("IN/emissions",) if "--tune" in argv else ()
    before = tree(cwd)
    outcome = forked(argv, cwd)
    faults = faults_of(outcome, cwd, before, writes)
    fault = Fault(f"file{number}", faults, [*argv, f"# {target.base}/{victim.name}"], outcome.text) if faults else None
    _remove(cwd, keep=fault is not None)
    return fault


def audio_case(root: Path, work: Path, seed: int, number: int, count: int = 8) -> Fault | None:
    """Damage some recordings, and have them transcribed or prepared with a good one at each end."""
    rng = random.Random(f"{seed} audio {number}")
    cwd = work / f"audio{number}"
    (cwd / "IN").mkdir(parents=True)
    kinds = sorted((root / "audio").iterdir())
    names = []
    for i in range(count):
        source = kinds[(number * count + i) % len(kinds)]
        victim = cwd / "IN" / f"b{i}{source.name[1:]}"
        shutil.copy(source, victim)
        special(rng, victim) if rng.random() < 0.02 else mutate_bytes(rng, victim)
        names.append(victim.name)
    for name in ("a", "z"):
        soundfile.write(cwd / "IN" / f"{name}.wav", sound(1.0, ord(name)), RATE)
    prepare = number % 2
    argv = ["transcribe", str(root / "models" / "ours" / "ctc"), "IN", "--out", "out"]
    argv = ["prepare", "IN", "out", "--jobs", "1"] if prepare else argv
    before = tree(cwd)
    outcome = forked(argv, cwd)
    faults = faults_of(outcome, cwd, before, ("out", ".tmp"))
    if prepare:
        audit = cwd / "out" / "audit.jsonl"
        rows = [json.loads(line) for line in audit.read_text().splitlines()] if audit.exists() else []
        done = {Path(row["path"]).stem: row["status"] for row in rows}
        faults += [f"{name} is {done.get(name)}" for name in ("a", "z") if done.get(name) not in ("ok", "warned")]
    else:
        faults += [f"no {name}.txt" for name in ("a", "z") if not (cwd / "out" / f"{name}.txt").exists()]
    fault = Fault(f"audio{number}", faults, argv, outcome.text) if faults else None
    _remove(cwd, keep=fault is not None)
    return fault


def _remove(cwd: Path, *, keep: bool) -> None:
    if not keep:
        shutil.rmtree(cwd)


def fuzz(
    root: Path, work: Path, seed: int, audio: int, files: int, jobs: int = 1, only: str | None = None
) -> list[Fault]:
    """Run so many cases of either kind; eight recordings are one call."""
    plan = targets(root)
    cases: dict[str, Callable[[], Fault | None]] = {}
    for number in range(files):
        cases[f"file{number}"] = lambda number=number: file_case(root, work, plan, seed, number)
    for number in range(audio // 8):
        cases[f"audio{number}"] = lambda number=number: audio_case(root, work, seed, number)
    chosen = [case for name, case in cases.items() if only in (None, name)]
    with ThreadPoolExecutor(jobs) as pool:
        return [fault for fault in pool.map(lambda case: case(), chosen) if fault]


def prepare_to_fork() -> None:
    """Import what calls need, once."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    import w2v2.checkpoint.formats
    import w2v2.cli.convert
    import w2v2.cli.evaluate
    import w2v2.cli.lm
    import w2v2.cli.prepare
    import w2v2.cli.train
    import w2v2.cli.transcribe
    import w2v2.preparation.run
    import w2v2.report
    import w2v2.training.pretrain  # noqa: F401


def main() -> int:
    """All of it by hand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--audio", type=int, default=1000)
    parser.add_argument("--files", type=int, default=800)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", help="a case by its name")
    parser.add_argument("--work", type=Path, default=None, help="a folder to keep bases and faulty cases in")
    options = parser.parse_args()
    prepare_to_fork()
    work = (options.work or Path(tempfile.mkdtemp(prefix="fuzz-"))).absolute()
    work.mkdir(exist_ok=True)
    if not (work / "made").exists():
        shutil.rmtree(work / "bases", ignore_errors=True)
        (work / "bases").mkdir()
        make_bases(work / "bases")
        (work / "made").touch()
    for left in work.glob("*[0-9]"):
        shutil.rmtree(left)
    started = time.monotonic()
    faults = fuzz(work / "bases", work, options.seed, options.audio, options.files, options.jobs, options.only)
    for fault in faults:
        tail = "\n    ".join(fault.text[-1500:].splitlines()[-14:])
        sys.stdout.write(f"{fault.name}: {'; '.join(fault.faults)}\n  w2v2 {' '.join(fault.argv)}\n    {tail}\n")
    sys.stdout.write(f"seed {options.seed}: {len(faults)} faults in {time.monotonic() - started:.0f} s; {work}\n")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
