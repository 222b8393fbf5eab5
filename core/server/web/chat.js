// The chat: what was said, the answer that comes, and what it is asked with.

const $ = (id) => document.getElementById(id);
const list = $("messages");
const prompt = $("prompt");
const said = [];
let model = "";
let answering = null; // what stops the answer that comes

/** An element with a class and a text; never HTML. */
function element(name, kind, text = "") {
  const made = document.createElement(name);
  made.className = kind;
  made.textContent = text;
  return made;
}

function atEnd() {
  return list.scrollHeight - list.scrollTop - list.clientHeight < 60;
}

function toEnd() {
  list.scrollTop = list.scrollHeight;
}

/** What goes with every message; a Fault names the field that holds no such value. */
function parameters() {
  const found = {};
  for (const field of $("parameters").querySelectorAll("input")) {
    if (!field.checkValidity()) {
      const name = document.querySelector(`label[for="${field.id}"]`).textContent;
      throw new Fault(`${name}: ${field.validationMessage}`);
    }
    if (field.value !== "") found[field.id] = Number(field.value);
  }
  return found;
}

function request() {
  const system = $("system").value.trim();
  const messages = system ? [{ role: "system", content: system }, ...said] : [...said];
  return {
    ...parameters(),
    model: model || undefined,
    messages,
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
}

/** One answer on the page, and what was measured of it. */
class Answer {
  constructor() {
    this.box = element("article", "message answer");
    this.body = element("p", "text");
    this.told = element("p", "figures");
    this.box.append(element("span", "who", model || "model"), this.body, this.told);
    this.box.setAttribute("aria-busy", "true"); // read out once, when it is whole
    this.text = "";
    this.tokens = 0;
    this.began = performance.now();
    this.first = this.last = 0;
    this.reason = "";
  }

  take(chunk) {
    const tokens = chunk.usage?.completion_tokens ?? this.tokens;
    if (tokens > this.tokens) {
      this.last = performance.now();
      this.first ||= this.last;
      this.tokens = tokens;
    }
    for (const { delta, finish_reason } of chunk.choices) {
      if (delta.content) {
        this.text += delta.content;
        this.body.append(delta.content);
      }
      this.reason = finish_reason ?? this.reason;
    }
    this.figures();
  }

  figures(ending = "") {
    const parts = [`${this.tokens} ${this.tokens === 1 ? "token" : "tokens"}`];
    if (this.tokens > 1 && this.last > this.first) {
      parts.push(`${rate((this.tokens - 1) / ((this.last - this.first) / 1000))} tokens/s`);
    }
    if (this.first) parts.push(`first after ${seconds((this.first - this.began) / 1000)}`);
    if (ending) parts.push(ending);
    this.told.replaceChildren(...parts.map((part) => element("span", "", part)));
  }

  end(stopped, broken) {
    this.box.setAttribute("aria-busy", "false");
    const why = { length: "cut off at max tokens" }[this.reason] ?? "";
    this.figures(stopped ? "stopped" : broken ? "broken off" : why);
  }
}

async function send() {
  const text = prompt.value.trim();
  if (!text || answering) return;
  tell("");
  said.push({ role: "user", content: text });
  let body;
  try {
    body = request();
  } catch (fault) {
    said.pop();
    tell(fault.message);
    return;
  }
  const mine = element("div", "message mine");
  mine.append(element("p", "", text));
  const answer = new Answer();
  $("welcome").hidden = true;
  list.append(mine, answer.box);
  prompt.value = "";
  grow();
  toEnd();
  const control = new AbortController();
  become(control);
  const fault = await stream(body, control.signal, answer);
  if (answering === control) become(null);
  if (!mine.isConnected) return; // it was cleared meanwhile
  answer.end(control.signal.aborted, Boolean(fault));
  if (fault) mourn(fault);
  if (answer.text || !(fault || control.signal.aborted)) {
    said.push({ role: "assistant", content: answer.text });
    return;
  }
  said.pop(); // nothing came: the message is given back
  mine.remove();
  answer.box.remove();
  $("welcome").hidden = said.length > 0;
  prompt.value ||= text;
  grow();
  become(null);
}

/** Read an answer to its end; what went wrong, if anything did. */
async function stream(body, signal, answer) {
  try {
    for await (const chunk of chunksOf(body, signal)) {
      const follow = atEnd();
      answer.take(chunk);
      if (follow) toEnd();
    }
  } catch (error) {
    if (signal.aborted) return null;
    return error instanceof Fault ? error : new Fault("The answer cannot be read.");
  }
  return null;
}

/** Show whether an answer comes; whoever had the button that goes away has the message then. */
function become(control) {
  const focused = document.activeElement;
  answering = control;
  $("send").hidden = Boolean(control);
  $("stop").hidden = !control;
  $("clear").disabled = !said.length;
  if (focused && (focused.hidden || focused.disabled)) prompt.focus();
}

/** Say what went wrong; a key that is wanted is asked for where it is entered. */
function mourn(fault) {
  if (fault.status !== 401) {
    tell(fault.message);
    return;
  }
  tell(fault.message, "key-fault");
  view("settings");
  $("key").focus();
}

function tell(message, place = "fault") {
  $(place).textContent = message;
  $(place).hidden = !message;
}

function clear() {
  answering?.abort();
  said.length = 0;
  list.querySelectorAll(".message").forEach((message) => message.remove());
  $("welcome").hidden = false;
  tell("");
  become(null);
  prompt.focus();
}

/** As high as what is in it, where the style sheet cannot say so. */
function grow() {
  if (CSS.supports("field-sizing", "content")) return;
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

/** Which model it is; a key that is wanted is asked for. */
async function greet() {
  try {
    const card = (await (await ask("v1/models")).json()).data[0];
    model = card.id;
    $("model").textContent = model;
    $("context").textContent = `Context of ${card.max_model_len.toLocaleString("en")} tokens.`;
    $("max_tokens").max = card.max_model_len - 1;
    $("max_tokens").value = Math.min($("max_tokens").value, Math.floor(card.max_model_len / 2));
    document.title = `${model} · infopt`;
    tell("");
    tell("", "key-fault");
    return true;
  } catch (error) {
    mourn(error);
    return false;
  }
}

function view(name) {
  document.body.dataset.view = name;
  for (const button of document.querySelectorAll("nav button")) {
    button.setAttribute("aria-pressed", String(button.dataset.show === name));
  }
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
prompt.addEventListener("input", grow);
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") answering?.abort();
});
$("stop").addEventListener("click", () => answering?.abort());
$("clear").addEventListener("click", clear);
for (const example of document.querySelectorAll(".example")) {
  example.addEventListener("click", () => {
    prompt.value = example.textContent;
    prompt.focus();
    send();
  });
}
for (const button of document.querySelectorAll("nav button")) {
  button.addEventListener("click", () => view(button.dataset.show));
}
$("parameters").addEventListener("submit", (event) => event.preventDefault());
$("access").addEventListener("submit", async (event) => {
  event.preventDefault();
  const key = $("key").value.trim();
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
  if (!(await greet())) return;
  view("chat");
  prompt.focus();
});
$("key").value = sessionStorage.getItem(KEY) ?? "";

greet();
whileSeen(drawState);
whileSeen(drawFigures);
