// One message on the screen.

import { preview } from "./media.js";
import { render } from "./render.js";

function make(tag, className, text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

export function button(text, action, label = text) {
  const element = make("button", "quiet", text);
  element.type = "button";
  element.setAttribute("aria-label", label);
  element.addEventListener("click", action);
  return element;
}

// Whether a key sends what was written: Enter, but not for a new line, nor while an input method composes.
export function sends({ key, shiftKey, isComposing, keyCode }) {
  return key === "Enter" && !shiftKey && !isComposing && keyCode !== 229; // 229: it composed until this key, in Safari
}

function seconds(value) {
  return value < 10 ? `${value.toFixed(1)} s` : `${Math.round(value)} s`;
}

// What is told of a prompt that is not read yet.
export function reading({ read }) {
  if (read === null) return "Waiting for the model";
  return `Reading the prompt, ${Math.floor(100 * read)} %`;
}

// What an answer took: tokens, tokens per second by the page's clock, and how much of the prompt was not read again.
export function figures({ usage, decoding, wait }) {
  if (!usage) return "";
  const { prompt_tokens: prompt, completion_tokens: made } = usage;
  const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  const shown = [`${made} tokens`];
  const speed = (made - 1) / decoding; // the first token's time is the prompt's
  if (decoding > 0) shown.push(`${speed.toFixed(speed < 100 ? 1 : 0)} tokens/s`);
  shown.push(`first after ${seconds(wait)}`, `${cached} of ${prompt} prompt tokens reused`);
  return shown.join(" · ");
}

const ENDED = {
  stopped: () => "Stopped.",
  left: () => "The page was left before the answer was finished.",
  lost: ({ error }) => `${error} What came is kept.`,
  failed: ({ error }) => error,
};

// Why an answer is not whole, in words; empty where it is.
export function ending(message) {
  if (message.state !== "done") return ENDED[message.state]?.(message) ?? "";
  if (message.finish === "length") return "The answer was cut at the limit of tokens.";
  return message.text.trim() ? "" : "The model said nothing.";
}

export function userView(message, { edit }) {
  const element = make("article", "user");
  element.setAttribute("aria-label", "You");
  if (message.media.length) {
    const media = make("div", "media");
    media.append(...message.media.map(preview));
    element.append(media);
  }
  if (message.text) element.append(make("p", "text", message.text));
  const actions = make("footer", "actions");
  actions.append(button("Edit", () => element.replaceChildren(editor(message, element, edit)), "Edit the message"));
  element.append(actions);
  return { element, update: () => {} };
}

// The form in which a message is edited, instead of its text.
function editor(message, element, edit) {
  const before = [...element.childNodes];
  const form = make("form", "editor");
  const text = make("textarea", "");
  const cancel = () => {
    element.replaceChildren(...before);
    element.querySelector(".actions button").focus();
  };
  text.value = message.text;
  text.rows = Math.min(12, message.text.split("\n").length + 1);
  text.setAttribute("aria-label", "Edited message");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (text.value.trim() || message.media.length) edit(text.value);
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Escape") cancel();
    else if (event.target === text && sends(event)) form.requestSubmit();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  const send = make("button", "main", "Send again");
  const row = make("div", "row end");
  row.append(make("span", "hint", "What follows is replaced."), button("Cancel", cancel), send);
  form.append(text, row);
  requestAnimationFrame(() => text.focus());
  return form;
}

export class AnswerView {
  // actions: {regenerate, key}: answer again; open the settings at the key.
  constructor(actions) {
    this.actions = actions;
    this.element = make("article", "answer");
    this.element.setAttribute("aria-label", "Answer");
    this.thinking = make("details", "thinking");
    this.summary = make("summary", "");
    this.thoughts = make("div", "prose");
    this.thinking.append(this.summary, this.thoughts);
    this.text = make("div", "prose");
    this.reading = make("p", "reading");
    this.note = make("p", "note");
    this.footer = make("footer", "actions");
    this.element.append(this.reading, this.thinking, this.text, this.note, this.footer);
  }

  update(message) {
    const running = message.state === "running";
    const waiting = running && !message.text && !message.reasoning;
    this.reading.hidden = !waiting;
    this.reading.textContent = message.read === undefined ? "" : reading(message);
    this.element.setAttribute("aria-busy", running);
    this.thinking.hidden = !message.reasoning;
    if (message.reasoning) {
      this.summary.textContent = thinkingTitle(message);
      render(this.thoughts, message.reasoning.trim());
    }
    render(this.text, message.text);
    this.note.textContent = ending(message);
    this.note.hidden = !this.note.textContent;
    this.note.classList.toggle("fault", ["lost", "failed"].includes(message.state));
    this.footer.hidden = running;
    if (!running) this.finish(message);
  }

  finish(message) {
    const again = button("Regenerate", this.actions.regenerate, "Regenerate the answer");
    again.classList.add("again");
    this.footer.replaceChildren(make("span", "figures", figures(message)));
    if (message.text) {
      const copy = button("Copy", () => {}, "Copy the answer");
      copy.classList.add("copy");
      copy.dataset.text = message.text;
      this.footer.append(copy);
    }
    if (message.status === 401) this.footer.append(button("Enter the key", this.actions.key));
    this.footer.append(again);
  }
}

function thinkingTitle({ state, thought, text }) {
  if (thought !== undefined) return `Thought for ${seconds(thought)}`;
  return state === "running" && !text ? "Thinking…" : "Thought";
}
