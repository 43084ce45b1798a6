// The server's API: OpenAI's chat completions, streamed.

// What the API refused or failed with, in its words.
export class ApiError extends Error {
  constructor(status, error = {}) {
    super(error.message || `the server answered with status ${status}`);
    this.status = status;
    this.param = error.param;
  }
}

// A server that cannot be reached, or that left before the end.
export class Lost extends Error {}

async function ask(path, key, { headers, ...options } = {}) {
  let response;
  try {
    const authorization = key ? { Authorization: `Bearer ${key}` } : {};
    response = await fetch(path, { headers: { ...headers, ...authorization }, ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Lost("The server cannot be reached.");
  }
  if (response.ok) return response;
  if (response.status === 401) {
    throw new ApiError(401, { message: key ? "The server does not take this key." : "The server asks for a key." });
  }
  const told = await response.json().catch(() => ({}));
  throw new ApiError(response.status, told.error);
}

// The ids of what is served: the model, and where it has adapters, each of them with it.
export async function modelIds(key) {
  const response = await ask("v1/models", key);
  return (await response.json()).data.map(({ id }) => id);
}

// Each server-sent event of a response: {data} of it, or {comment}.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    let read;
    try {
      read = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Lost("The server was lost before the answer was finished.");
    }
    if (read.done) return;
    const whole = (text + read.value).split(/\r?\n\r?\n/);
    text = whole.pop();
    for (const event of whole) {
      const lines = event.split(/\r?\n/);
      const of = (name) => lines.filter((line) => line.startsWith(name)).map((line) => line.slice(name.length).trim());
      const [data, comment] = [of("data:"), of(":")];
      if (data.length) yield { data: data.join("\n") };
      else if (comment.length) yield { comment: comment[0] };
    }
  }
}

// How much of the prompt a comment says is read, from 0 to 1; null where the request waits for the model.
function readOf(comment) {
  const [, read, total] = /^reading (\d+) of (\d+)$/.exec(comment) ?? [];
  return total ? read / total : null;
}

// An answer as it comes: {read}, {reasoning}, {content}, {finish}, {usage}, each in an object of its own.
// Throws ApiError, Lost, or AbortError once the signal says stop.
export async function* complete(body, key, signal) {
  const request = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await ask("v1/chat/completions", key, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(request),
    signal,
  });
  let finished = false;
  for await (const { data, comment } of events(response)) {
    if (comment) yield { read: readOf(comment) };
    if (!data) continue;
    if (data === "[DONE]") break;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(response.status, chunk.error);
    if (chunk.usage) yield { usage: chunk.usage };
    for (const { delta = {}, finish_reason: finish } of chunk.choices ?? []) {
      const reasoning = delta.reasoning_content || delta.reasoning;
      if (reasoning) yield { reasoning };
      if (delta.content) yield { content: delta.content };
      if (finish) yield { finish };
      finished ||= Boolean(finish);
    }
  }
  if (!finished) throw new Lost("The server was lost before the answer was finished.");
}
