// The page at /: a conversation with a served model, and a form for each of its tasks. Talks to the public API alone.
import { WORDS } from "/page/words.js";
import { edit, make, show } from "/page/answers.js";

const at = (id) => document.getElementById(id);
let language = (localStorage.getItem("language") ?? navigator.language).startsWith("zh") ? "zh" : "en";
let words = WORDS[language];
let tasks = [];
let takesFeedback = false;
let task = null;
let answered = null;
let editor = null;
let turns = [];
let running = null;

async function call(path, body, signal) {
  const key = at("key").value;
  const headers = { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, body === undefined ? { headers, signal } : { method: "POST", headers, body: JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(words.offline + error.message);
  }
  if (response.ok) return response;
  const text = await response.text();
  let said = text;
  try { said = JSON.parse(text).error.message; } catch { /* not from this server: told as it is */ }
  throw new Error(`${response.status}: ${said}`);
}

function tell(error) {
  at("error").hidden = !error;
  at("error").textContent = error ? error.message : "";
}

function translate() {
  words = WORDS[language];
  document.documentElement.lang = language;
  for (const node of document.querySelectorAll("[data-say]")) node.textContent = words[node.dataset.say];
  at("language").textContent = words.other;
  at("message").placeholder = words.message;
  at("text").placeholder = words.text;
  drawTabs();
  drawTurns();
  if (answered) drawAnswer();
}

async function load() {
  try {
    const models = (await (await call("/v1/models")).json()).data;
    const chosen = at("model").value;
    at("model").replaceChildren(...models.map((one) => make("option", { value: one.id, selected: one.id === chosen }, one.id)));
    await loadTasks();
    tell(null);
  } catch (error) {
    tell(error);
  }
}

async function loadTasks() {
  const found = await (await call(`/v1/tasks?model=${encodeURIComponent(at("model").value)}`)).json();
  tasks = found.data;
  takesFeedback = found.feedback;
  task = tasks.find((one) => one.id === task?.id) ?? null;
  drawTabs();
}

function drawTabs() {
  const tab = (name, title) => {
    const button = make("button", { type: "button", role: "tab" }, title);
    button.setAttribute("aria-selected", String((task?.id ?? null) === name));
    button.onclick = () => choose(name);
    return button;
  };
  at("tabs").replaceChildren(tab(null, words.chat), ...tasks.map((one) => tab(one.id, one.id)));
  at("chat").hidden = task !== null;
  at("task").hidden = task === null;
}

function choose(name) {
  task = tasks.find((one) => one.id === name) ?? null;
  answered = null;
  at("result").hidden = true;
  at("task-figures").textContent = "";
  if (task) {
    at("task-about").textContent = task.description;
    at("schema").textContent = JSON.stringify(task.schema, null, 2);
  }
  drawTabs();
}

// ---- conversation ----

function drawTurns() {
  at("turns").replaceChildren(...turns.map((turn) => {
    const note = turn.refusal ? `${words.refused} ${turn.refusal}` : turn.end === "stopped" ? ` ${words.stopped}` : turn.end === "length" ? ` ${words.cut}` : "";
    return make("li", { className: turn.refusal ? `${turn.role} refused` : turn.role }, turn.content + note);
  }));
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

async function send(event) {
  event.preventDefault();
  if (running) return;
  tell(null);
  const asked = { role: "user", content: at("message").value };
  const messages = [...turns.filter((turn) => turn.content), asked].map(({ role, content }) => ({ role, content }));
  if (at("system").value.trim()) messages.unshift({ role: "system", content: at("system").value });
  const reply = { role: "assistant", content: "" };
  turns.push(asked, reply);
  at("message").value = "";
  drawTurns();
  running = new AbortController();
  at("send").disabled = true;
  at("stop").disabled = false;
  const started = performance.now();
  let first = null;
  let tokens = 0;
  try {
    const body = { model: at("model").value, messages, stream: true, stream_options: { include_usage: true } };
    if (at("temperature").value !== "") body.temperature = Number(at("temperature").value);
    for await (const chunk of events(await call("/v1/chat/completions", body, running.signal))) {
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.usage) tokens = chunk.usage.completion_tokens;
      for (const choice of chunk.choices) {
        if (choice.delta.content) {
          first ??= performance.now() - started;
          reply.content += choice.delta.content;
        }
        if (choice.delta.refusal) reply.refusal = (reply.refusal ?? "") + choice.delta.refusal;
        if (choice.finish_reason) reply.end = choice.finish_reason;
      }
      drawTurns();
    }
  } catch (error) {
    if (error.name === "AbortError") reply.end = "stopped";
    else {
      tell(error);
      if (!reply.content) {  // nothing came: the question can be sent again
        turns = turns.slice(0, -2);
        at("message").value = asked.content;
      }
    }
  }
  running = null;
  at("send").disabled = false;
  at("stop").disabled = true;
  const all = performance.now() - started;
  at("chat-figures").textContent = words.figures(Math.round(first ?? all), Math.round(all), tokens);
  drawTurns();
}

// ---- tasks ----

function drawAnswer() {
  at("result").hidden = false;
  at("verdict").className = answered.valid ? "valid" : "invalid";
  at("verdict").textContent = answered.valid
    ? words.valid + (answered.confidence === null ? "" : ` · ${words.sure} ${answered.confidence.toFixed(2)}`)
    : words.invalid + answered.reason;
  at("answer").replaceChildren(answered.valid ? show(answered.answer, task.schema, answered.fields, words) : "");
  at("raw").textContent = answered.text;
  at("feedback").hidden = !takesFeedback;
  at("save").hidden = true;
  editor = null;
}

async function run(event) {
  event.preventDefault();
  tell(null);
  at("run").disabled = true;
  const started = performance.now();
  try {
    answered = await (await call(`/v1/tasks/${encodeURIComponent(task.id)}`, { model: at("model").value, text: at("text").value })).json();
    at("thanks").textContent = "";
    drawAnswer();
  } catch (error) {
    answered = null;
    at("result").hidden = true;
    tell(error);
  }
  at("task-figures").textContent = words.ms(Math.round(performance.now() - started));
  at("run").disabled = false;
}

async function rate(thumb, extra = {}) {
  tell(null);
  try {
    await call("/v1/feedback", { id: answered.id, thumb, ...extra });
    at("thanks").textContent = words.thanks;
  } catch (error) {
    tell(error);
  }
}

function correct() {
  editor = edit(answered.answer, task.schema, words);
  at("answer").replaceChildren(editor.node);
  at("save").hidden = false;
}

async function save() {
  try {
    await rate("down", { correction: editor.read() });
  } catch (error) {
    tell(error);  // what was typed is no JSON
  }
}

at("language").onclick = () => { language = language === "zh" ? "en" : "zh"; localStorage.setItem("language", language); translate(); };
at("model").onchange = () => loadTasks().catch(tell);
at("key").onchange = load;
at("ask").onsubmit = send;
at("message").onkeydown = (event) => { if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); at("ask").requestSubmit(); } };
at("stop").onclick = () => running?.abort();
at("clear").onclick = () => { turns = []; drawTurns(); };
at("task-form").onsubmit = run;
at("up").onclick = () => rate("up");
at("down").onclick = () => rate("down");
at("correct").onclick = correct;
at("save").onclick = save;
translate();
load();
