// What is asked of the server, and how its answers are read. No part of the page is touched here.

const KEY = "infopt-api-key";

/** A fault of a request, told in words. */
class Fault extends Error {
  constructor(message, status = 0, code = "") {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** fetch with the key, if there is one; throws a Fault for whatever is no success. */
async function ask(path, { body, signal } = {}) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.authorization = `Bearer ${key}`;
  if (body) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Fault("The server cannot be reached.");
  }
  if (!response.ok) throw await faultOf(response, Boolean(key));
  return response;
}

async function faultOf(response, keyGiven) {
  const told = await response.json().catch(() => ({}));
  const error = told.error ?? {};
  const said = sentence(error.message || `The server answered with status ${response.status}`);
  const after = Number(response.headers.get("retry-after"));
  const again = after > 0 ? ` Try again in ${after} s.` : "";
  if (response.status === 401) {
    const why = keyGiven ? "does not know this API key" : "asks for an API key";
    return new Fault(`The server ${why}.`, 401, error.code);
  }
  if (error.code === "no_chat_template") {
    const other = "its /v1/completions continues plain text";
    return new Fault(`This model has no chat template, so it cannot chat; ${other}.`, 400, error.code);
  }
  if (response.status === 429) return new Fault(`Too many requests: ${said}${again}`, 429, error.code);
  return new Fault(said + again, response.status, error.code);
}

/** With a capital and a full stop. */
function sentence(text) {
  const whole = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(whole) ? whole : `${whole}.`;
}

/** The data of server-sent events, whatever the pieces in which their bytes come. */
async function* eventsOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value;
      const lines = rest.split(/\r\n|\n|\r(?!$)/); // a last CR may be half of a CRLF
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line.startsWith("data: ") ? 6 : 5));
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** The chunks of a streamed chat; throws a Fault where it ends before its end. */
async function* chunksOf(body, signal) {
  const response = await ask("v1/chat/completions", { body, signal });
  for await (const data of eventsOf(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Fault(sentence(chunk.error.message), 0, chunk.error.code);
    yield chunk;
  }
  throw new Fault("The answer broke off: the connection was lost.");
}
