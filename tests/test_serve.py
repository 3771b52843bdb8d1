"""A server in a process of its own, asked by the official client, by many at once, by a real browser, and badly."""

import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from chromium import BINARY, Page, chromium
from conftest import sound
from test_live import MODEL, PCM, RATE, VOCABULARY, narrow, voice

from w2v2.checkpoint.native import save_weights
from w2v2.cli.main import main
from w2v2.decoding.greedy import Greedy
from w2v2.inference.live import Live, LiveLayout, listen
from w2v2.inference.recordings import source_of
from w2v2.inference.transcribe import transcribe
from w2v2.inference.transcripts import FORMATS, Transcript
from w2v2.serial import save_config
from w2v2.serve.engine import Engine
from w2v2.training.config import FinetuneConfig

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "listener"
    folder.mkdir()
    save_config(FinetuneConfig(recipe="tiny_ctc", model=narrow(n_layer=1, n_head=4)), folder / "config.json")
    VOCABULARY.save(folder / "vocab.json")
    save_weights(MODEL.model, folder)
    return folder


class Server:
    """``w2v2 serve`` at a free port."""

    def __init__(self, model: Path, *options: str, **env: str) -> None:
        command = [sys.executable, "-m", "w2v2.cli.main", "serve", str(model), "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | env)
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        found = re.fullmatch(r"listener is at http://127\.0\.0\.1:(\d+)\n", line)
        assert found, line + self.process.stderr.read()
        self.port = int(found[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, http.client.HTTPMessage]:
        """Status, body (JSON or text) and headers of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # answered before all was sent
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        text = answer.read().decode()
        return answer.status, json.loads(text) if "json" in answer.headers["content-type"] else text, answer.headers

    def send(self, data: bytes, name: str = "a.wav", **fields: str) -> tuple[int, Any, http.client.HTTPMessage]:
        """Post a file."""
        parts = [
            f'--x\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'.encode() for k, v in fields.items()
        ]
        head = f'--x\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'.encode()
        body = b"".join([*parts, head, data, b"\r\n--x--\r\n"])
        return self.ask("POST", "/v1/audio/transcriptions", body, Content_Type="multipart/form-data; boundary=x")

    def live(self, query: str = "") -> Any:
        """An open WebSocket."""
        from websockets.sync.client import connect

        return connect(f"ws://127.0.0.1:{self.port}/v1/audio/live?{query}", max_size=None)

    def well(self) -> bool:
        """Whether it still gives the right text."""
        return self.send(wav(AUDIO[0]))[1] == {"text": texts([AUDIO[0]])[0]}

    def memory(self) -> int:
        """Bytes that it has had at most."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(re.findall(r"VmHWM:\s+(\d+)", status)[0])

    def children(self) -> list[int]:
        """Processes that it has started."""
        listing = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False)
        return [int(line) for line in listing.stdout.split()]

    def end(self) -> None:
        """End it as a user does."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    server = Server(model, "--upload-mb", "5", "--upload-minutes", "1", "--stall-seconds", "3")
    yield server
    assert server.process.poll() is None
    server.end()


AUDIO = [sound(10.0, seed) for seed in range(64)]


def wav(audio: np.ndarray, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, audio, rate, format="WAV")
    return file.getvalue()


def transcripts(audio: list[np.ndarray]) -> list[Transcript]:
    """What ``w2v2 transcribe`` makes of them."""
    with tempfile.TemporaryDirectory() as scratch:
        paths = [Path(scratch) / f"{i}.wav" for i in range(len(audio))]
        for path, samples in zip(paths, audio, strict=True):
            path.write_bytes(wav(samples))
        found = transcribe(MODEL, [source_of(str(path)) for path in paths], Greedy(VOCABULARY))
        return [transcript for transcript in found if isinstance(transcript, Transcript)]


def texts(audio: list[np.ndarray]) -> list[str]:
    return [transcript.text for transcript in transcripts(audio)]


# --- Files ------------------------------------------------------------------------------------------------------------


def test_64_at_once_each_get_their_own_text_in_bounded_memory(server: Server) -> None:
    expected = texts(AUDIO)
    assert len({*expected}) == 64
    assert server.well()
    before = server.memory()
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda audio: server.send(wav(audio)), AUDIO))
    assert [status for status, _, _ in answers] == [200] * 64
    assert [answer["text"] for _, answer, _ in answers] == expected
    assert server.memory() - before < 400 << 20
    assert server.ask("GET", "/health")[1]["requests"] == 0


@pytest.mark.parametrize("kind", ["text", "srt", "vtt", "textgrid", "ctm"])
def test_formats_are_those_of_transcribe(server: Server, kind: str) -> None:
    (transcript,) = transcripts([AUDIO[1]])
    write = FORMATS[{"text": "txt", "textgrid": "TextGrid"}.get(kind, kind)]
    expected = write(transcript, "none" if kind == "text" else "word")
    status, text, _ = server.send(wav(AUDIO[1]), "0.wav", response_format=kind)
    assert (status, text) == (200, expected)
    if kind != "ctm":  # the page has no names and scores to give back
        words = [{"word": word.text, "start": word.start, "end": word.end} for word in transcript.words]
        body = json.dumps({"words": words, "seconds": transcript.seconds, "format": kind})
        assert server.ask("POST", "/v1/audio/format", body)[1] == expected


def test_the_official_client_gets_text_words_and_segments(server: Server) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    (transcript,) = transcripts([AUDIO[2]])
    upload = ("speech.wav", wav(AUDIO[2]))
    assert client.audio.transcriptions.create(file=upload, model="any").text == transcript.text
    assert client.audio.transcriptions.create(file=upload, model="any", response_format="srt").startswith("1\n00:00:")
    verbose = client.audio.transcriptions.create(
        file=upload, model="any", response_format="verbose_json", timestamp_granularities=["word", "segment"]
    )
    assert verbose.text == transcript.text and verbose.duration == 10.0
    assert [(w.word, w.start, w.end) for w in verbose.words] == [
        (w.text, round(w.start, 3), round(w.end, 3)) for w in transcript.words
    ]
    assert " ".join(segment.text for segment in verbose.segments) == transcript.text
    assert [each.id for each in client.models.list()] == ["listener"]
    with pytest.raises(openai.BadRequestError, match="it is no audio but text"):
        client.audio.transcriptions.create(file=("a.wav", b"hello"), model="any")


def test_what_has_no_use_is_named(server: Server) -> None:
    assert server.send(wav(AUDIO[0]), language="en", prompt="Names", model="m")[2]["X-Ignored-Fields"] == (
        "language, prompt"
    )


def header(rate: int) -> bytes:
    """A WAV file that announces a rate."""
    data = bytearray(wav(AUDIO[0]))
    data[24:28] = rate.to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "fields", "status", "message"),
    [
        (b"", {}, 400, "a.wav: "),
        (wav(AUDIO[0])[:20], {}, 400, "a.wav: "),
        (wav(AUDIO[0])[:-50_000], {}, 400, "it breaks off"),
        (os.urandom(100_000), {}, 400, "no kind of audio that is known"),
        (header(2_000_000_000), {}, 400, "2000000000 Hz, expected 1000 to 768000"),
        (header(3_000_000_000), {}, 400, "its header announces a rate or a number of channels that cannot be"),
        (wav(np.zeros(16_000 * 61, np.float32)), {}, 400, "it is longer than 1 minutes; send it in parts"),
        (bytes(6_000_000), {}, 413, "an upload may have 5 MB"),
        (wav(AUDIO[0]), {"response_format": "doc"}, 400, "response_format must be one of json, verbose_json, text"),
        (wav(AUDIO[0]), {"timestamp_granularities[]": "letter"}, 400, "must be word or segment, got letter"),
        (wav(AUDIO[0]), {"stream": "true"}, 400, "stream is not here"),
    ],
    ids=range(11),
)
def test_a_bad_upload_is_one_message_and_the_server_goes_on(
    server: Server, data: bytes, fields: dict[str, str], status: int, message: str
) -> None:
    answer = server.send(data, **fields)
    assert answer[0] == status and message in answer[1]["error"]["message"]
    assert answer[1]["error"]["message"].count("\n") == 0
    assert server.well()


def zeros(count: int) -> Iterator[bytes]:
    for _ in range(count >> 20):
        yield bytes(1 << 20)


@pytest.mark.parametrize("announced", [True, False])
def test_two_gigabytes_of_zeros_are_not_taken_in(server: Server, announced: bool) -> None:
    assert server.well()
    before = server.memory()
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="zeros.wav"\r\n\r\n'
    body = (part for parts in ([head], zeros(2 << 30)) for part in parts)
    headers = {"Content_Length": str(2 << 30)} if announced else {}
    status, answer, _ = server.ask(
        "POST", "/v1/audio/transcriptions", body, Content_Type="multipart/form-data; boundary=x", **headers
    )
    assert (status, "an upload may have 5 MB" in answer["error"]["message"]) == (413, True)
    assert server.memory() - before < 50 << 20
    assert server.well()


@pytest.mark.parametrize("body", [b"", b"abc", b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\na\r\n--x--'])
def test_a_form_without_a_file_is_refused(server: Server, body: bytes) -> None:
    status, answer, _ = server.ask(
        "POST", "/v1/audio/transcriptions", body, Content_Type="multipart/form-data; boundary=x"
    )
    assert status == 400 and answer["error"]["message"]
    assert server.ask("POST", "/v1/audio/format", b'{"words": 3}')[0] == 400
    assert server.ask("POST", "/v1/audio/format", b"[" * 100_000)[0] == 400
    silent = b'{"words": [{"word": " ", "start": 0, "end": 1}], "seconds": 1, "format": "srt"}'
    assert server.ask("POST", "/v1/audio/format", silent)[:2] == (200, "")
    for kind in ("srt", "vtt", "textgrid", "ctm"):
        for where in (
            '"words": [], "seconds": Infinity',
            '"words": [{"word": "A", "start": 0, "end": 1e999}], "seconds": 1',
        ):
            assert server.ask("POST", "/v1/audio/format", f'{{{where}, "format": "{kind}"}}'.encode())[0] in (200, 400)


def test_a_decoder_that_dies_takes_one_file_with_it_at_most(server: Server) -> None:
    assert server.well()
    for child in server.children():
        os.kill(child, signal.SIGKILL)
    assert server.well()
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(server.send, wav(audio)) for audio in AUDIO[:8]]
        for child in server.children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        for answer in answers:
            status, content, _ = answer.result()
            assert status == 200 or (status == 400 and "decoder crashed" in content["error"]["message"])
    assert server.well()


def stalled(server: Server) -> socket.socket:
    """An upload that does not go on."""
    connection = socket.create_connection(("127.0.0.1", server.port))
    head = "POST /v1/audio/transcriptions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n"
    connection.sendall(f"{head}Content-Type: multipart/form-data; boundary=x\r\n\r\n--x".encode())
    return connection


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 300
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_an_upload_that_stalls_is_let_go(server: Server) -> None:
    with stalled(server) as connection:
        answer = b""
        while b"the upload stalled for 3 s" not in answer:
            part = connection.recv(1 << 16)
            assert part, answer
            answer += part
    until(lambda: server.ask("GET", "/health")[1]["requests"] == 0)


def test_above_the_queue_clients_are_told_when_to_come_again(model: Path) -> None:
    server = Server(model, "--queue", "2", "--streams", "1")
    with stalled(server), stalled(server):
        until(lambda: server.ask("GET", "/health")[1]["requests"] == 2)
        status, answer, headers = server.send(wav(AUDIO[0]))
        assert status == 503 and int(headers["Retry-After"]) >= 1
        assert "2 requests are waiting, which is the limit" in answer["error"]["message"]
    until(lambda: server.ask("GET", "/health")[1]["requests"] == 0)
    assert server.well()
    with server.live() as one, server.live() as two:
        assert "which is the limit" in json.loads(two.recv())["error"]
        one.send("end")
    server.end()
    assert server.process.returncode in (0, 130)


def messages_of(client: Any) -> list[Any]:
    """What comes until the server closes."""
    from websockets.exceptions import ConnectionClosed

    found = []
    with contextlib.suppress(ConnectionClosed):
        while True:
            found.append(json.loads(client.recv()))
    return found


# --- Live -------------------------------------------------------------------------------------------------------------


def test_the_websocket_gives_what_the_pipe_gives(server: Server) -> None:
    layout = LiveLayout(look_ahead=0.32)
    expected = [update.fields() for update in listen(Live(MODEL, layout), MODEL, [PCM], RATE)]
    with server.live("rate=16000&look_ahead=0.32") as client:
        for start in range(0, len(PCM), 3000):
            client.send(PCM[start : start + 3000])
        client.send("end")
        updates = messages_of(client)
    assert updates.pop() == {"done": True, "seconds": 6.0}
    assert [update["partial"] for update in updates] == [update["partial"] for update in expected]
    words = [(word["word"], word["start"], word["end"]) for update in updates for word in update["words"]]
    assert words == [(w["text"], w["start"], w["end"]) for update in expected for w in update["words"]]


@pytest.mark.parametrize(
    ("query", "messages", "error"),
    [
        ("", [b"a", b"bc", "end"], "PCM ends with half a sample"),
        ("", ["hello"], "expected 16-bit PCM in binary messages, or the text \"end\", got 'hello'"),
        ("rate=3000000000", [], "must be 1000 to 768000 Hz, got 3000000000"),
        ("rate=fast", [], "`rate` must be a number, got 'fast'"),
        ("look_ahead=-1", [], "`look_ahead` must be more than 0, at most 10, got -1"),
        ("look_ahead=1e305", [], "`look_ahead` must be more than 0, at most 10, got 1e+305"),
        ("", [], "nothing came, or nothing was read, for 3 s"),
    ],
)
def test_a_bad_stream_is_told_why_and_the_server_goes_on(
    server: Server, query: str, messages: list[Any], error: str
) -> None:
    with server.live(query) as client:
        for message in messages:
            client.send(message)
        (answer,) = messages_of(client)
    assert error in answer["error"]
    assert server.ask("GET", "/health")[1]["streams"] == 0
    assert server.well()


def test_a_stream_that_breaks_off_is_forgotten(server: Server) -> None:
    with contextlib.suppress(OSError), server.live() as client:
        client.send(PCM[:20_000])
        client.socket.close()
    until(lambda: server.ask("GET", "/health")[1]["streams"] == 0)


def test_clients_that_leave_are_nothing_to_log(model: Path) -> None:
    server = Server(model)
    with contextlib.suppress(OSError), server.live() as client:
        client.send(PCM[:20_000])
        client.socket.close()
    head = "Host: 127.0.0.1\r\nContent-Length: 9999\r\nContent-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
    for path in ("transcriptions", "format"):
        with socket.create_connection(("127.0.0.1", server.port)) as upload:
            upload.sendall(f"POST /v1/audio/{path} HTTP/1.1\r\n{head}".encode())
            until(lambda path=path: path == "format" or server.ask("GET", "/health")[1]["requests"] == 1)
    until(lambda: server.ask("GET", "/health")[1]["requests"] == server.ask("GET", "/health")[1]["streams"] == 0)
    assert server.well()
    server.end()
    assert server.process.stderr is not None and "Traceback" not in server.process.stderr.read()


def test_a_request_that_is_given_up_does_not_end_the_model() -> None:
    engine, audio = Engine(MODEL, batch_size=1), torch.from_numpy(AUDIO[0])
    first, second = [engine.submit(row) for row in (torch.zeros(300 * RATE), audio)]
    assert second.cancel()
    assert torch.equal(engine.submit(audio).result(60), MODEL.emissions([audio])[0])
    assert first.done()


# --- Who may ask ------------------------------------------------------------------------------------------------------


def test_pages_of_others_and_names_bent_to_this_address_are_refused(server: Server) -> None:
    from websockets.sync.client import connect

    assert server.ask("GET", "/health", Host="evil.example")[0] == 403
    assert server.ask("GET", "/health", Origin="https://evil.example")[0] == 403
    assert server.ask("GET", "/health", Origin=server.url)[0] == 200
    with connect(f"ws://127.0.0.1:{server.port}/v1/audio/live", origin="https://evil.example") as client:
        assert "may not ask this server" in json.loads(client.recv())["error"]


def test_a_token_is_asked_for(model: Path) -> None:
    server = Server(model, W2V2_TOKEN="secret")
    assert server.ask("GET", "/health")[1]["token"] is True
    assert server.ask("GET", "/")[0] == 200
    assert server.ask("GET", "/v1/models")[0] == 401
    assert server.ask("GET", "/v1/models", Authorization="Bearer wrong")[0] == 401
    assert server.ask("GET", "/v1/models", Authorization="Bearer secret")[0] == 200
    with server.live() as client:
        assert "expected the server's token" in json.loads(client.recv())["error"]
    with server.live("token=secret") as client:
        client.send("end")
        assert json.loads(client.recv())["ended"] or json.loads(client.recv())["done"]
    server.end()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 can be reached by others: name a --token that they must know"),
        (["--port", "70000"], "--port must be 0 to 65535, got 70000"),
        (["--token", " "], "--token must be ASCII without blanks"),
        (["--token", "Schlüssel"], "--token must be ASCII without blanks"),
        (["--queue", "0"], "--queue must be 1 or more, got 0"),
        (["--host", "203.0.113.1", "--token", "t"], "cannot be used"),
    ],
)
def test_an_address_that_cannot_be_is_one_line(
    model: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["serve", str(model), *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


# --- The page ---------------------------------------------------------------------------------------------------------

browser = pytest.mark.skipif(BINARY is None, reason="no Chromium here (Debian: apt install chromium)")


def shown(page: Page) -> list[str]:
    words: list[str] = page.run("[...document.querySelectorAll('.word')].map(word => word.textContent)")
    return words


def check_quiet(page: Page, server: Server) -> None:
    """No errors, and no requests to elsewhere."""
    assert page.problems == []
    allowed = (server.url, f"ws://127.0.0.1:{server.port}/", "about:", "data:", f"blob:{server.url}")
    assert [address for address in page.addresses if not address.startswith(allowed)] == []


def status(page: Page, text: str) -> None:
    page.until(f"document.getElementById('status').textContent.includes({json.dumps(text)})")


@browser
def test_speak_see_hear_download(server: Server, tmp_path: Path) -> None:
    speech = np.concatenate([voice(), np.zeros(RATE, np.float32)] * 2)
    soundfile.write(tmp_path / "voice.wav", speech, RATE)
    with chromium(tmp_path / "profile", tmp_path / "voice.wav") as page:
        page.go(server.url)
        page.run("document.getElementById('speak').click()")
        page.until("document.querySelector('.word')")
        assert page.run("document.getElementById('speak').textContent") == "Stop"
        page.until("document.querySelectorAll('#text p').length >= 2")  # the pause has ended a line
        time.sleep(1)
        page.run("document.getElementById('speak').click()")
        status(page, "Done: ")
        words = shown(page)
        assert len(words) > 3
        assert page.run("document.querySelector('.word').title").endswith("% sure")
        assert page.run("document.getElementById('wave').ariaLabel").startswith("Waveform of ")
        page.run("document.querySelector('.word').click()")
        page.until("document.querySelector('.word.playing')")
        page.until("!document.querySelector('.word.playing')")
        for ending in ("txt", "srt", "vtt", "TextGrid"):
            page.run(f"document.querySelector('[data-ending={ending}]').click()")
            file = tmp_path / "profile" / "downloads" / f"speech.{ending}"
            until(lambda file=file: file.exists() and file.stat().st_size > 0)  # type: ignore[misc]
        assert (tmp_path / "profile" / "downloads" / "speech.txt").read_text().split() == words
        check_quiet(page, server)


@browser
def test_open_a_recording_and_walk_it_by_keys(server: Server, tmp_path: Path) -> None:
    (tmp_path / "talk.wav").write_bytes(wav(AUDIO[3]))
    (tmp_path / "notes.wav").write_text("no audio at all")
    with chromium(tmp_path / "profile") as page:
        page.go(server.url)
        page.files("#file", tmp_path / "talk.wav")
        status(page, "words in 10.0 s")
        assert shown(page) == texts([AUDIO[3]])[0].split()
        for _ in range(3):
            page.key("Tab")
        assert page.run("document.activeElement.className") == "word"
        page.key("ArrowRight")
        page.key("Enter")
        assert page.run("[...document.querySelectorAll('.word')].indexOf(document.activeElement)") == 1
        page.until("document.querySelectorAll('.word')[1].matches('.playing')")
        page.key("F2")
        page.run("document.activeElement.value = 'better'")
        page.key("Enter")
        assert shown(page)[1] == "better"
        page.run("document.querySelector('[data-ending=txt]').click()")
        file = tmp_path / "profile" / "downloads" / "talk.txt"
        until(lambda: file.exists() and " better " in file.read_text())
        controls = "[...document.querySelectorAll('button, input, canvas')]"
        assert page.run(f"{controls}.every(e => e.ariaLabel || e.textContent || e.labels.length)")
        for width, dark in ((390, False), (390, True), (1200, True)):
            page.look(width, 800, dark)
            assert page.run("document.documentElement.scrollWidth") <= width
        page.files("#file", tmp_path / "notes.wav")
        page.until("document.getElementById('error').textContent.includes('it is no audio but text')")
        page.problems = [problem for problem in page.problems if "400 (Bad Request)" not in problem]
        check_quiet(page, server)


@browser
def test_a_browser_without_a_microphone_is_told_so(server: Server, tmp_path: Path) -> None:
    with chromium(tmp_path / "profile") as page:
        page.go(server.url)
        page.run("document.getElementById('speak').click()")
        page.until("document.getElementById('error').textContent.startsWith('No microphone: ')")
        assert page.run("document.getElementById('speak').textContent") == "Speak"
        check_quiet(page, server)
