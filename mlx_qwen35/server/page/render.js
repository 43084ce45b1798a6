// Markdown to elements. Everything passes DOMPurify; HTML that the model writes is shown as the text it is, but for a
// few tags (PLAIN_TAG).

import { Marked } from "./vendor/marked.esm.js";
import "./vendor/purify.min.js"; // leaves its name on the window

const PLAIN_TAG = /^<\/?(br|sub|sup|kbd|mark)\s*\/?>$/i; // the tags that mean what Markdown cannot say

function escape(text) {
  return text.replace(/[&<>"]/g, (sign) => `&#${sign.charCodeAt(0)};`);
}

const marked = new Marked({
  breaks: true, // a line that the model ends is one
  renderer: {
    html: ({ text }) => (PLAIN_TAG.test(text.trim()) ? text : escape(text)),
    // An image would be fetched from elsewhere, and tell that place what was said here. It is a link.
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || href)}</a>`,
  },
});

const purify = globalThis.DOMPurify;
const ALLOWED = {
  USE_PROFILES: { html: true },
  FORBID_TAGS: ["style", "form", "button", "textarea", "select", "img", "video", "audio", "picture", "source"],
  FORBID_ATTR: ["style", "id", "name"],
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

purify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName !== "A") return;
  node.target = "_blank";
  node.rel = "noopener noreferrer";
});

// A code block with its language and a button that copies it.
function withCopy(pre) {
  const block = document.createElement("div");
  const head = document.createElement("div");
  const language = document.createElement("span");
  const copy = document.createElement("button");
  block.className = "code";
  language.textContent = /language-(\S+)/.exec(pre.firstElementChild?.className)?.[1] ?? "";
  copy.type = "button";
  copy.className = "copy";
  copy.textContent = "Copy";
  copy.setAttribute("aria-label", "Copy the code");
  pre.tabIndex = 0; // long lines are scrolled by keyboard
  head.append(language, copy);
  pre.replaceWith(block);
  block.append(head, pre);
}

function block(token) {
  const element = document.createElement("div");
  element.append(purify.sanitize(marked.parser([token]), ALLOWED));
  for (const pre of element.querySelectorAll("pre")) withCopy(pre);
  for (const table of element.querySelectorAll("table")) {
    const scroll = document.createElement("div");
    scroll.className = "table";
    scroll.tabIndex = 0;
    table.replaceWith(scroll);
    scroll.append(table);
  }
  return element;
}

const rendered = new WeakMap(); // element -> {text, sources}: what it shows, and the sources of its blocks

// Make an element show Markdown. Text that cannot be parsed, nested too deep, is shown as it is.
export function render(element, text) {
  const before = rendered.get(element);
  if (before?.text === text) return;
  let sources = [];
  try {
    sources = renderBlocks(element, text, before?.sources ?? []);
  } catch {
    element.textContent = text;
  }
  rendered.set(element, { text, sources });
}

// Of a text that grows, the whole is split into blocks each time, but only the blocks that changed are made anew, so
// that what is selected in it stays so. Gives the sources of the blocks.
function renderBlocks(element, text, before) {
  const tokens = marked.lexer(text);
  const links = JSON.stringify(tokens.links); // a block changes when a link that it names is defined further down
  const blocks = tokens.filter((token) => token.type !== "space" && token.type !== "def");
  const sources = blocks.map((token) => token.raw + links);
  let same = 0;
  while (same < sources.length && sources[same] === before[same]) same += 1;
  while (element.childNodes.length > same) element.lastChild.remove();
  element.append(...blocks.slice(same).map(block));
  return sources;
}
