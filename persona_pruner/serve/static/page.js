"use strict";
// One question, two answers: each side is a conversation of its own with the model that is chosen there.

const $ = (id) => document.getElementById(id);
const sides = [];
let models = new Map();
let base = "";

class Side {
  constructor(section) {
    section.append($("side").content.cloneNode(true));
    this.select = section.querySelector("select");
    this.log = section.querySelector(".talk");
    this.facts = Object.fromEntries([...section.querySelectorAll("[data-is]")].map((e) => [e.dataset.is, e]));
    this.abort = null;
    this.select.addEventListener("change", () => this.reset());
  }

  get model() { return models.get(this.select.value); }

  get other() { return sides.find((side) => side !== this); }

  // The character that the dense model plays here by its prompt: that of the other side.
  get lender() {
    const other = this.other?.model;
    return $("borrow").checked && this.model?.dense && other && !other.dense ? other : null;
  }

  fill(wanted) {
    const before = this.select.value || wanted;
    this.select.replaceChildren(...[...models.values()].map((m) => new Option(label(m), m.id)));
    this.select.value = models.has(before) ? before : base;
    if (this.select.value !== this.shown) this.reset();
  }

  reset() {
    this.stop();
    this.shown = this.select.value;
    this.messages = [];
    this.log.replaceChildren();
    for (const name of ["first", "speed"]) this.facts[name].textContent = "–";
    const model = this.model;
    if (!model) return;
    this.facts.share.textContent = `${Math.round(100 * model.ratio)} %`;
    this.facts.bytes.textContent = size(model.bytes);
    const greeting = (this.lender ?? model).greeting;
    if (this.lender) this.show("note", `The whole base model with the prompt of ${this.lender.persona}`);
    else if (model.dense) this.show("note", "The whole base model without a character's prompt");
    if (greeting) {
      this.messages.push({ role: "assistant", content: greeting });
      this.show("assistant", greeting);
    }
    this.log.scrollTop = 0;
    if (!model.dense && this.other?.model?.dense) this.other.reset();
  }

  show(kind, text) {
    const item = document.createElement("li");
    item.className = kind;
    speak(item, text);
    this.log.append(item);
    this.log.scrollTop = this.log.scrollHeight;
    return item;
  }

  stop() { this.abort?.abort(); }

  async ask(text) {
    if (!this.model) return;
    this.messages.push({ role: "user", content: text });
    this.show("user", text);
    const item = this.show("assistant writing", "");
    const talk = this.messages;
    const abort = (this.abort = new AbortController());
    const begun = performance.now();
    let said = "", first = 0, last = 0, usage = null, problem = null;
    try {
      const prompt = this.lender ? await promptOf(this.lender) : "";
      const body = {
        model: this.model.id, messages: prompt ? [{ role: "system", content: prompt }, ...talk] : talk,
        temperature: Number($("temperature").value), max_tokens: Number($("tokens").value) || 160,
        stream: true, stream_options: { include_usage: true },
      };
      if ($("seed").value !== "") body.seed = Number($("seed").value);
      for await (const piece of stream("v1/chat/completions", body, abort.signal)) {
        if (piece.error) throw new Error(piece.error.message);
        if (piece.usage) usage = piece.usage;
        if (!piece.choices.length) continue;
        last = performance.now();
        if (!first) this.facts.first.textContent = `${((first = last) - begun).toFixed(0)} ms`;
        said += piece.choices[0].delta.content ?? "";
        const near = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 60;
        speak(item, said);
        if (near) this.log.scrollTop = this.log.scrollHeight;
      }
    } catch (error) {
      if (error.name !== "AbortError") problem = error.message;
    }
    item.classList.remove("writing");
    if (usage && usage.completion_tokens > 1) {
      this.facts.speed.textContent = ((usage.completion_tokens - 1) / ((last - first) / 1000)).toFixed(1);
    }
    if (said) {
      talk.push({ role: "assistant", content: said });
    } else {
      item.remove();
      talk.pop(); // the question can be asked again
    }
    if (problem && talk === this.messages) this.show("problem", problem);
    if (this.abort === abort) this.abort = null;
  }
}

// Text, in which *what one does* stands apart from what one says.
function speak(item, text) {
  item.replaceChildren(...text.split(/(\*[^*\n]+\*)/).map((part, i) => {
    if (i % 2 === 0) return part;
    const act = document.createElement("em");
    act.textContent = part;
    return act;
  }));
}

function label(model) {
  return model.dense ? `${model.id} (dense base)` : model.persona === model.id ? model.id : `${model.persona} (${model.id})`;
}

function size(bytes) {
  for (const [unit, one] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (bytes >= one) return `${(bytes / one).toPrecision(3)} ${unit}`;
  }
  return `${bytes} B`;
}

function headers() {
  const token = $("token").value.trim();
  return { "Content-Type": "application/json", ...(token ? { Authorization: `Bearer ${token}` } : {}) };
}

async function failure(response) {
  try { return (await response.json()).error.message; } catch { return `the server answered ${response.status}`; }
}

const prompts = new Map();

async function promptOf(model) {
  const key = `${model.id} ${model.created}`;
  if (!prompts.has(key)) {
    const response = await fetch(`v1/models/${encodeURIComponent(model.id)}`, { headers: headers() });
    if (!response.ok) throw new Error(await failure(response));
    prompts.set(key, (await response.json()).system);
  }
  return prompts.get(key);
}

async function* stream(path, body, signal) {
  const response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (!response.ok) throw new Error(await failure(response));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

async function refresh() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (response.status === 401) $("settings").open = true;
    if (!response.ok) throw new Error(await failure(response));
    const list = (await response.json()).data;
    const news = list.map((m) => `${m.id} ${m.created}`).join("\n") !== [...models.values()].map((m) => `${m.id} ${m.created}`).join("\n");
    if (!news) return;
    models = new Map(list.map((m) => [m.id, m]));
    base = list.find((m) => m.dense)?.id ?? "";
    const own = list.filter((m) => !m.dense);
    sides[0].fill(own[0]?.id ?? base);
    sides[1].fill(base);
    const bytes = own.reduce((sum, m) => sum + m.bytes, 0);
    const each = own.length ? `, ${size(bytes / own.length)} each` : "";
    $("summary").textContent = `${own.length} character${own.length === 1 ? "" : "s"} on ${base}${each}; the base once: ${size(models.get(base)?.bytes ?? 0)}`;
  } catch (error) {
    $("summary").textContent = error.message;
  }
}

async function send(event) {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text || $("send").hidden) return;
  $("text").value = "";
  grow();
  $("send").hidden = true;
  $("stop").hidden = false;
  await Promise.all(sides.map((side) => side.ask(text)));
  $("send").hidden = false;
  $("stop").hidden = true;
  $("text").focus();
}

function grow() {
  const box = $("text");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`;
}

for (const section of document.querySelectorAll(".side")) sides.push(new Side(section));
$("ask").addEventListener("submit", send);
$("text").addEventListener("input", grow);
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
$("stop").addEventListener("click", () => sides.forEach((side) => side.stop()));
$("clear").addEventListener("click", () => sides.forEach((side) => side.reset()));
$("borrow").addEventListener("change", () => sides.forEach((side) => side.model?.dense && side.reset()));
$("temperature").addEventListener("input", () => { document.querySelector("output").textContent = $("temperature").value; });
$("token").addEventListener("change", () => { models = new Map(); refresh(); });
refresh();
setInterval(refresh, 3000);
