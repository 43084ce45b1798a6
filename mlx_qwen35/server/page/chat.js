// A conversation: its messages, and the answer that is under way. It draws nothing; `changed` is told what did.
//
// A message is {role: "user", text, media} or {role: "assistant", text, reasoning, state, ...}, state being "running",
// "done", "stopped", "lost" (the server went away) or "failed" (it refused, or said that it failed). read: how much of the
// prompt is, from 0 to 1, null while it waits, undefined where that is not to be told.

import { ApiError, Lost, complete } from "./api.js";
import { mediaPart } from "./media.js";
import { modelOption } from "./models.js";
import { requestOptions, settings } from "./settings.js";
import * as store from "./store.js";

const SAVED_EVERY = 2000; // ms, while an answer comes
const AT_ONCE = 1000; // ms; of a prompt that is read within these nothing is told

// The messages as the API takes them. The whole history is sent each time; the server knows what it has read of it.
export function history(messages, system) {
  const sent = system ? [{ role: "system", content: system }] : [];
  for (const { role, text, media = [] } of messages) {
    const parts = [...media.map(mediaPart), ...(text ? [{ type: "text", text }] : [])];
    if (role === "user") sent.push({ role, content: media.length ? parts : text });
    else if (text) sent.push({ role, content: text });
  }
  return sent;
}

// Times of an answer by the page's own clock, in ms.
class Clock {
  constructor() {
    this.start = performance.now();
  }

  // Put what is known so far into the message.
  tick(message, part) {
    const now = performance.now();
    if (part.reasoning || part.content) {
      this.first ??= now;
      this.last = now;
    }
    if ((part.content || part.finish) && message.reasoning) message.thought ??= (now - this.first) / 1000;
    if (part.usage) {
      message.usage = part.usage;
      message.wait = ((this.first ?? now) - this.start) / 1000;
      message.decoding = (this.last - this.first) / 1000;
    }
  }
}

export class Conversation {
  constructor(record, messages, changed) {
    Object.assign(this, record); // id, title, updated
    this.messages = messages;
    this.changed = changed; // (conversation, message), without message where the list of them changed
    this.controller = null;
    for (const message of messages) if (message.state === "running") message.state = "left";
  }

  get running() {
    return this.controller !== null;
  }

  stop() {
    this.controller?.abort();
  }

  // Stop, and wait until nothing more is written.
  async halt() {
    this.stop();
    await this.answering;
  }

  // Each of these begins to answer at once: the store is written in the order of the calls, and nothing waits for it.

  send(text, media) {
    if (!this.messages.length) this.title = (text.trim() || media[0].name).split("\n")[0].slice(0, 80);
    this.messages.push({ role: "user", text, media });
    this.touch();
    this.save(this.messages.length - 1);
    return this.answer();
  }

  // Give a user's message another text, and answer it. What followed is gone.
  async edit(index, text) {
    await this.halt();
    this.messages[index] = { ...this.messages[index], text };
    this.cut(index + 1);
    this.save(index);
    return this.answer();
  }

  // Answer again what the message at this index answered.
  async regenerate(index) {
    await this.halt();
    this.cut(index);
    return this.answer();
  }

  rename(title) {
    this.title = title;
    return store.saveConversation(this);
  }

  touch() {
    this.updated = Date.now();
    return store.saveConversation(this);
  }

  save(index) {
    return store.saveMessage(this.id, index, this.messages[index]);
  }

  cut(from) {
    this.messages.length = from;
    return store.dropMessages(this.id, from);
  }

  answer() {
    this.answering = this.run();
    return this.answering;
  }

  async run() {
    const { system, key, ...options } = settings();
    const body = { ...modelOption(), messages: history(this.messages, system), ...requestOptions(options) };
    const message = { role: "assistant", text: "", reasoning: "", state: "running" };
    const index = this.messages.push(message) - 1;
    this.controller = new AbortController();
    this.changed(this);
    try {
      await this.receive(message, index, complete(body, key, this.controller.signal));
      message.state = "done";
    } catch (error) {
      Object.assign(message, failure(error));
      if (message.state === "failed") message.error = named(error, body.messages, this.messages);
    }
    this.controller = null;
    const kept = [this.save(index), this.touch()];
    this.changed(this, message);
    await Promise.all(kept);
  }

  async receive(message, index, parts) {
    const clock = new Clock();
    let saved = performance.now();
    for await (const part of parts) {
      clock.tick(message, part);
      message.read = performance.now() - clock.start < AT_ONCE ? undefined : part.read;
      message.reasoning += part.reasoning ?? "";
      message.text += part.content ?? "";
      message.finish = part.finish ?? message.finish;
      this.changed(this, message);
      if (performance.now() - saved < SAVED_EVERY) continue;
      saved = performance.now();
      this.save(index);
    }
  }
}

// What a refusal says, with the name of the file it is about, which its param tells ("messages.1.content.0.image_url").
function named({ message, param }, sent, messages) {
  const [, at, part] = /^messages\.(\d+)\.content\.(\d+)/.exec(param) ?? [];
  const { image_url: image, video_url: video } = sent[at]?.content[part] ?? {};
  const file = messages.flatMap(({ media = [] }) => media).find(({ url }) => url === (image ?? video)?.url);
  if (!file) return message;
  const said = message.replace(/a data: URI of [\d,]+ characters( \([^)]*\))?/, () => file.name);
  return said === message ? `${file.name}: ${message}` : said;
}

// How an answer ended that was not finished.
function failure(error) {
  if (error.name === "AbortError") return { state: "stopped" };
  if (error instanceof Lost) return { state: "lost", error: error.message };
  if (!(error instanceof ApiError)) console.error(error);
  return { state: "failed", error: error.message, status: error.status, param: error.param };
}
