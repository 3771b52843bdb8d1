// Page of `w2v2 serve`: speak or open a recording, see its words come, hear them, take them along. No build, no library.
// The audio thread runs this file too: there it only turns what the microphone gives into 16-bit PCM.

if (typeof registerProcessor === "function") {
  registerProcessor("pcm", class extends AudioWorkletProcessor {
    constructor() {
      super();
      this.samples = new Int16Array(Math.round(sampleRate / 20));
      this.count = 0;
    }

    process([channels]) {
      for (const value of channels[0] ?? []) {
        this.samples[this.count++] = Math.max(-1, Math.min(1, value)) * 32767;
        if (this.count === this.samples.length) {
          this.port.postMessage(this.samples);
          this.samples = new Int16Array(this.count);
          this.count = 0;
        }
      }
      return true;
    }
  });
} else {
  start();
}

function start() {
  const MOST_DECODED = 64e6;  // bytes of a file that the browser decodes whole, to draw and to play it
  const at = id => document.getElementById(id);
  const [text, partial, status, error, wave, speak] = ["text", "partial", "status", "error", "wave", "speak"].map(at);
  let token = new URLSearchParams(location.hash.slice(1)).get("token") ?? "";
  let server = {};
  let words, paragraph, seconds, sound, name;  // what is on the page
  let stream = null;  // what listens to the microphone
  let player = null;
  let job = 0;  // number of what was started last: answers to what was before it are not shown

  // --- Sound: 16-bit samples in pieces, and its outline at 50 points a second

  function newSound(rate) {
    return {rate, pieces: [], length: 0, peaks: [], rest: 0, peak: 0};
  }

  function addSamples(sound, samples) {
    const step = sound.rate / 50;
    for (const value of samples) {
      sound.peak = Math.max(sound.peak, Math.abs(value));
      if (++sound.rest >= step) {
        sound.peaks.push(sound.peak / 32768);
        sound.rest -= step;
        sound.peak = 0;
      }
    }
    sound.pieces.push(samples);
    sound.length += samples.length;
  }

  function cut(sound, from, to) {
    const first = Math.max(0, Math.floor(from * sound.rate)), last = Math.min(sound.length, Math.ceil(to * sound.rate));
    const samples = new Float32Array(Math.max(1, last - first));
    let offset = 0;
    for (const piece of sound.pieces) {
      for (let i = Math.max(0, first - offset); i < piece.length && offset + i < last; i++) {
        samples[offset + i - first] = piece[i] / 32768;
      }
      offset += piece.length;
      if (offset >= last) break;
    }
    return samples;
  }

  function draw() {
    const width = wave.width = wave.clientWidth * devicePixelRatio, height = wave.height = 96 * devicePixelRatio;
    const pen = wave.getContext("2d");
    const peaks = sound?.peaks ?? [], columns = Math.min(peaks.length, Math.floor(width / 2));
    const total = Math.max(peaks.length, 500);  // the first ten seconds fill it from the left
    pen.fillStyle = getComputedStyle(wave).color;
    const wide = width * peaks.length / total / Math.max(columns, 1);
    for (let x = 0; x < columns; x++) {
      const part = peaks.slice(Math.floor(x * peaks.length / columns), Math.ceil((x + 1) * peaks.length / columns));
      const high = Math.max(Math.max(...part) * height * 0.95, devicePixelRatio);
      pen.fillRect(Math.round(x * wide), (height - high) / 2, Math.max(Math.round(wide) - 1, 1), high);
    }
    wave.setAttribute("aria-label", peaks.length ? `Waveform of ${(peaks.length / 50).toFixed(1)} seconds` : "Waveform, empty");
  }

  // --- Words

  function clear(title) {
    words = [];
    paragraph = null;
    seconds = 0;
    sound = null;
    name = title;
    text.replaceChildren();
    partial.textContent = error.textContent = "";
    at("hint").hidden = false;
    document.querySelectorAll("[data-format]").forEach(button => { button.disabled = true; });
    player?.stop();
    draw();
  }

  function line() {
    if (!paragraph) {
      paragraph = document.createElement("p");
      text.append(paragraph);
    }
    return paragraph;
  }

  function addWords(more) {
    for (const word of more) {
      const button = document.createElement("button");
      button.className = "word";
      button.textContent = word.word;
      button.style.setProperty("--p", word.probability ?? 1);
      button.tabIndex = words.length ? -1 : 0;
      const sure = word.probability === undefined ? "" : `, ${Math.round(100 * word.probability)} % sure`;
      button.title = `${word.start.toFixed(2)} to ${word.end.toFixed(2)} s${sure}`;
      button.addEventListener("click", () => play(word, button));
      button.addEventListener("dblclick", () => correct(word, button));
      line().append(button, " ");
      words.push(word);
    }
    at("hint").hidden = words.length > 0;
    document.querySelectorAll("[data-format]").forEach(button => { button.disabled = !words.length; });
  }

  async function play(word, button) {
    player?.stop();
    if (!sound) return fail("This browser cannot play this recording; its words have times all the same.");
    const context = new AudioContext();
    const samples = cut(sound, word.start - 0.05, word.end + 0.05);
    const buffer = context.createBuffer(1, samples.length, sound.rate);
    buffer.copyToChannel(samples, 0);
    player = new AudioBufferSourceNode(context, {buffer});
    player.connect(context.destination);
    player.onended = () => {
      button.classList.remove("playing");
      context.close();
    };
    button.classList.add("playing");
    player.start();
  }

  function correct(word, button) {
    const field = document.createElement("input");
    field.className = "correction";
    field.value = word.word;
    field.size = Math.max(word.word.length, 4);
    field.ariaLabel = `Instead of ${word.word}`;
    let done = false;
    const finish = keep => {
      if (done) return;
      done = true;
      const better = field.value.trim();
      if (keep && better) {
        word.word = button.textContent = better;
        delete word.probability;
        button.style.setProperty("--p", 1);
        button.title = `${word.start.toFixed(2)} to ${word.end.toFixed(2)} s, corrected`;
      }
      const focused = document.activeElement === field;
      field.replaceWith(button);
      if (keep && !better) {
        words.splice(words.indexOf(word), 1);
        button.remove();
      } else if (focused) button.focus();
    };
    field.addEventListener("blur", () => finish(true));
    field.addEventListener("keydown", event => {
      if (event.key === "Enter" || event.key === "Escape") finish(event.key === "Enter");
      event.stopPropagation();
    });
    button.replaceWith(field);
    field.select();
  }

  text.addEventListener("keydown", event => {
    if (event.key === "F2" && document.activeElement.matches(".word")) {
      const place = [...text.querySelectorAll(".word")].indexOf(document.activeElement);
      correct(words[place], document.activeElement);
      return event.preventDefault();
    }
    const buttons = [...text.querySelectorAll(".word")], place = buttons.indexOf(document.activeElement);
    const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
    const next = buttons[{Home: 0, End: buttons.length - 1}[event.key] ?? place + (step ?? NaN)];
    if (place < 0 || !next) return;
    buttons[place].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
    event.preventDefault();
  });

  wave.addEventListener("click", event => {
    const second = event.offsetX / wave.clientWidth * Math.max(sound?.peaks.length ?? 0, 500) / 50;
    const place = words.findIndex(word => word.end >= second);
    if (place >= 0) text.querySelectorAll(".word")[place].click();
  });

  function fail(message) {
    error.textContent = message;
    status.textContent = "";
  }

  // --- A recording

  function headers() {
    return token ? {Authorization: `Bearer ${token}`} : {};
  }

  async function ask(path, options) {
    const response = await fetch(path, {...options, headers: {...headers(), ...options?.headers}});
    if (response.ok) return response;
    if (response.status === 401) at("access").hidden = false;
    const answer = await response.json().catch(() => null);
    throw new Error(answer?.error?.message ?? `the server answered ${response.status}`);
  }

  async function open(file) {
    stop();
    clear(file.name.replace(/\.[^.]*$/, "") || "audio");
    const mine = ++job;
    status.textContent = `${file.name}: being recognised…`;
    decode(file).then(found => {
      if (mine !== job) return;
      sound = found;
      draw();
    }, () => {});
    const form = new FormData();
    form.append("file", file);
    form.append("response_format", "verbose_json");
    form.append("timestamp_granularities[]", "word");
    try {
      const answer = await (await ask("v1/audio/transcriptions", {method: "POST", body: form})).json();
      if (mine !== job) return;
      seconds = answer.duration;
      addWords(answer.words);
      status.textContent = `${file.name}: ${answer.words.length} words in ${seconds.toFixed(1)} s of audio`;
    } catch (problem) {
      if (mine === job) fail(problem.message);
    }
  }

  async function decode(file) {
    if (file.size > MOST_DECODED) return null;
    const buffer = await new OfflineAudioContext(1, 1, 16000).decodeAudioData(await file.arrayBuffer());
    const found = newSound(16000), channels = [];
    for (let i = 0; i < buffer.numberOfChannels; i++) channels.push(buffer.getChannelData(i));
    const samples = new Int16Array(buffer.length);
    for (let i = 0; i < samples.length; i++) {
      samples[i] = 32767 * Math.max(-1, Math.min(1, channels.reduce((sum, c) => sum + c[i], 0) / channels.length));
    }
    addSamples(found, samples);
    return found;
  }

  at("file").addEventListener("change", event => {
    if (event.target.files[0]) open(event.target.files[0]);
    event.target.value = "";
  });
  addEventListener("dragover", event => {
    event.preventDefault();
    document.body.classList.add("over");
  });
  addEventListener("dragleave", () => document.body.classList.remove("over"));
  addEventListener("drop", event => {
    event.preventDefault();
    document.body.classList.remove("over");
    if (event.dataTransfer.files[0]) open(event.dataTransfer.files[0]);
  });

  // --- The microphone

  async function listen() {
    clear("speech");
    const mine = ++job;
    let media, context;
    try {
      media = await navigator.mediaDevices.getUserMedia({audio: true});
    } catch (problem) {
      return fail(`No microphone: the browser has none, or may not use it (${problem.name}). Open a recording instead.`);
    }
    if (mine !== job) return media.getTracks().forEach(track => track.stop());
    let source;
    try {
      context = new AudioContext({sampleRate: 16000});
      source = context.createMediaStreamSource(media);
    } catch {  // Firefox resamples no microphone; the server does
      context = new AudioContext();
      source = context.createMediaStreamSource(media);
    }
    const close = () => {
      media.getTracks().forEach(track => track.stop());
      if (context.state !== "closed") context.close();
    };
    try {
      await context.audioWorklet.addModule("page.js");
    } catch (problem) {
      close();
      return fail(`The browser could not start to listen (${problem.name}). Open a recording instead.`);
    }
    if (mine !== job) return close();
    const query = new URLSearchParams({rate: context.sampleRate, vad: server.vad ? 1 : 0});
    if (token) query.set("token", token);
    const socket = new WebSocket(`${location.href.split(/[?#]/)[0].replace(/^http/, "ws")}v1/audio/live?${query}`);
    const node = new AudioWorkletNode(context, "pcm");
    const mySound = sound = newSound(context.sampleRate);
    let waiting = [], ended = false, done = false;
    stream = {
      end() {
        close();
        ended = true;
        status.textContent = "The rest is being recognised…";
        if (socket.readyState === WebSocket.OPEN) socket.send("end");
      },
    };
    node.port.onmessage = ({data}) => {
      if (ended) return;
      addSamples(mySound, data);
      if (mine === job) draw();
      if (socket.readyState === WebSocket.OPEN) socket.send(data);
      else waiting.push(data);
      if (socket.bufferedAmount > 1e6) status.textContent = "The server is slower than you speak; it will catch up.";
    };
    socket.onopen = () => {
      waiting.forEach(data => socket.send(data));
      waiting = [];
      if (ended) socket.send("end");
      else status.textContent = "Listening…";
    };
    socket.onmessage = ({data}) => {
      const update = JSON.parse(data);
      done ||= update.done;
      if (mine === job) take(update);
    };
    socket.onclose = () => {
      close();
      if (mine !== job) return;
      stream = null;
      button(false);
      if (!done && !error.textContent) fail("The server closed the connection.");
    };
    source.connect(node);
    button(true);
    status.textContent = "Connecting…";
  }

  function take(update) {
    if (update.error) {
      if (update.error.includes("token")) at("access").hidden = false;
      return fail(update.error);
    }
    seconds = update.seconds;
    if (update.done) {
      status.textContent = `Done: ${words.length} words in ${seconds.toFixed(1)} s of audio`;
      return;
    }
    addWords(update.words);
    partial.textContent = update.partial;
    if (update.partial) line().append(partial);
    if (update.ended) paragraph = null;
  }

  function button(listening) {
    speak.setAttribute("aria-pressed", listening);
    speak.textContent = listening ? "Stop" : "Speak";
  }

  function stop() {
    stream?.end();
    stream = null;
    button(false);
  }

  speak.addEventListener("click", () => stream ? stop() : listen());

  // --- Downloads, access, beginning

  document.querySelectorAll("[data-format]").forEach(one => one.addEventListener("click", async () => {
    const body = JSON.stringify({words, seconds, format: one.dataset.format});
    try {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(await (await ask("v1/audio/format", {method: "POST", body})).blob());
      link.download = `${name}.${one.dataset.ending}`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    } catch (problem) {
      fail(problem.message);
    }
  }));
  at("access").addEventListener("submit", event => {
    event.preventDefault();
    token = at("token").value;
    at("access").hidden = true;
    error.textContent = "";
  });
  addEventListener("resize", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  clear("audio");
  fetch("health").then(response => response.json()).then(answer => {
    server = answer;
    at("model").textContent = `by ${answer.model}, on this server alone`;
    at("access").hidden = !answer.token || Boolean(token);
  }, () => fail("The server does not answer."));
}
