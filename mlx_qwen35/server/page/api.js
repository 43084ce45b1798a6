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

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Lost("The server cannot be reached.");
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => ({}));
  throw new ApiError(response.status, told.error);
}

// The name of the model that is served.
export async function modelName(key) {
  const response = await ask("v1/models", { headers: headers(key) });
  return (await response.json()).data[0].id;
}

// The data of each server-sent event of a response.
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
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim());
      if (data.length) yield data.join("\n");
    }
  }
}

// An answer as it comes: {reasoning}, {content}, {finish}, {usage}, each in an object of its own.
// Throws ApiError, Lost, or AbortError once the signal says stop.
export async function* complete(body, key, signal) {
  const request = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers(key) },
    body: JSON.stringify(request),
    signal,
  });
  let finished = false;
  for await (const data of events(response)) {
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
