// The page: which conversation is shown, and what keys and buttons do.

import { Lost, modelIds } from "./api.js";
import { Conversation } from "./chat.js";
import { Attachments, pastedFiles } from "./media.js";
import { AnswerView, ending, reading, sends, userView } from "./message.js";
import { showModels, startModels } from "./models.js";
import { editSettings, inForce, settings, startSettings } from "./settings.js";
import { showConversations } from "./sidebar.js";
import * as store from "./store.js";

const find = (id) => document.getElementById(id);
const prompt = find("prompt");
const scroll = find("scroll");
const attachments = new Attachments(find("attachments"), tell);
const running = new Map(); // conversations that are being answered, by id; one can look at another meanwhile
const views = new Map(); // message -> its view, of the conversation that is shown
const stale = new Set(); // messages that changed since they were painted
let current;
let asking; // the timer of showModel
let following = true; // whether the end of the messages stays in view as they grow
let scrolled = 0; // how far down they were

// Say something, on the screen and to a screen reader.
function tell(text) {
  if (find("notice").textContent === text) return;
  find("notice").textContent = text;
  if (text) announce(text);
}

function announce(text) {
  if (find("told").textContent !== text) find("told").textContent = text;
}

// --- the conversation that is shown ---

function changed(conversation, message) {
  if (conversation.running !== running.has(conversation.id)) {
    if (conversation.running) running.set(conversation.id, conversation);
    else running.delete(conversation.id);
    list();
  }
  if (conversation !== current) return;
  if (!message) show();
  else if (!stale.size) requestAnimationFrame(paint);
  if (message) stale.add(message);
  showRunning();
  if (!message) return;
  if (conversation.running) announceReading(message);
  else {
    paint();
    announce([ending(message), views.get(message).text.textContent].filter(Boolean).join(" "));
    if (message.state === "lost" || message.status === 404) showModel(); // it may serve another one now
  }
}

// Four times at most, however long a prompt is.
function announceReading({ read }) {
  if (read !== undefined) announce(reading({ read: read && Math.floor(4 * read) / 4 }));
}

function paint() {
  const messages = [...stale];
  stale.clear();
  for (const message of messages) views.get(message)?.update(message);
}

// Whoever scrolls up, or opens something in a message, stays there; at the end the messages are followed again.
function startFollowing() {
  scroll.addEventListener("scroll", () => {
    const { scrollTop, scrollHeight, clientHeight } = scroll;
    if (scrollHeight - scrollTop - clientHeight < 40) following = true;
    else if (scrollTop < scrolled) following = false;
    scrolled = scrollTop;
  });
  find("messages").addEventListener("click", ({ target }) => {
    if (target.closest("summary, .user .actions button")) following = false;
  });
  const observer = new ResizeObserver(() => {
    if (following) scroll.scrollTop = scroll.scrollHeight;
  });
  observer.observe(scroll);
  observer.observe(find("messages"));
}

function view(message, index) {
  const conversation = current;
  const again = () => prompt.focus(); // the button that was pressed goes
  return message.role === "user"
    ? userView(message, { edit: (text) => again(conversation.edit(index, text)) })
    : new AnswerView({ regenerate: () => again(conversation.regenerate(index)), key: () => editSettings("key") });
}

function show() {
  const before = new Map(views);
  views.clear();
  current.messages.forEach((message, index) => {
    views.set(message, before.get(message) ?? view(message, index));
    views.get(message).update(message);
  });
  find("messages").replaceChildren(...[...views.values()].map(({ element }) => element));
  find("empty").hidden = views.size > 0;
  showTitle();
  following = true;
  scroll.scrollTop = scroll.scrollHeight;
  showRunning();
}

function showTitle() {
  find("title").textContent = current.title;
  document.title = `${current.title} · mlx_qwen35`;
}

function showRunning() {
  const stop = find("stop");
  if (!current.running && document.activeElement === stop) prompt.focus();
  stop.hidden = !current.running;
  find("send").hidden = current.running;
  find("messages").classList.toggle("running", current.running);
}

// --- conversations ---

function newId() {
  return [...crypto.getRandomValues(new Uint32Array(4))].map((number) => number.toString(36)).join("");
}

async function open(id) {
  const record = id && (running.get(id) ?? (await store.loadConversation(id)));
  if (record instanceof Conversation) current = record;
  else if (record) current = new Conversation(record, await store.loadMessages(id), changed);
  else current = new Conversation({ id: newId(), title: "New conversation" }, [], changed);
  history.replaceState(null, "", record ? `#${current.id}` : location.pathname);
  show();
  await list();
  closeMenu();
  prompt.focus();
}

async function list() {
  showConversations(await store.listConversations(), current.id, running, { open, rename, remove });
}

async function rename(id, title) {
  const conversation = id === current.id ? current : running.get(id);
  if (conversation) await conversation.rename(title);
  else await store.saveConversation({ ...(await store.loadConversation(id)), title });
  showTitle();
  await list();
}

async function remove(id) {
  const conversation = id === current.id ? current : running.get(id);
  await conversation?.halt();
  await store.deleteConversation(id);
  await (id === current.id ? open() : list());
}

// --- the composer ---

async function send() {
  await attachments.reading;
  const text = prompt.value;
  if (current.running || !(text.trim() || attachments.items.length)) return;
  prompt.value = "";
  grow();
  tell("");
  current.send(text, attachments.take());
  history.replaceState(null, "", `#${current.id}`);
}

// The field is as high as its text.
function grow() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

function startComposer() {
  find("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  prompt.addEventListener("input", grow);
  prompt.addEventListener("keydown", (event) => {
    if (!sends(event)) return;
    event.preventDefault();
    send();
  });
  prompt.addEventListener("paste", (event) => {
    const files = pastedFiles(event.clipboardData);
    if (!files.length) return;
    event.preventDefault();
    attachments.add(files);
  });
  find("attach").addEventListener("click", () => find("files").click());
  find("files").addEventListener("change", async ({ target }) => {
    await attachments.add([...target.files]);
    target.value = "";
    prompt.focus();
  });
  find("stop").addEventListener("click", () => current.stop());
}

function startDrop() {
  const over = (event, is) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    document.body.classList.toggle("dropping", is);
  };
  addEventListener("dragover", (event) => over(event, true));
  addEventListener("dragleave", (event) => event.relatedTarget || over(event, false));
  addEventListener("drop", (event) => {
    over(event, false);
    attachments.add([...event.dataTransfer.files]);
    prompt.focus();
  });
}

// --- the rest ---

function closeMenu() {
  document.body.classList.remove("menu");
  find("menu").setAttribute("aria-expanded", "false");
}

function toggleMenu() {
  const is = document.body.classList.toggle("menu");
  find("menu").setAttribute("aria-expanded", is);
  if (is) find("new").focus();
}

function escape(event) {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (document.body.classList.contains("menu")) {
    closeMenu();
    find("menu").focus();
  } else current.stop();
}

function nameTheme() {
  find("theme").setAttribute("aria-label", `Theme: ${document.documentElement.dataset.theme}`);
  find("theme").title = `Theme: ${document.documentElement.dataset.theme}`;
}

async function copy({ target }) {
  if (!target.classList.contains("copy")) return;
  const text = target.dataset.text ?? target.closest(".code").querySelector("pre").textContent;
  try {
    await navigator.clipboard.writeText(text);
    target.textContent = "Copied";
    announce("Copied");
    setTimeout(() => (target.textContent = "Copy"), 2000);
  } catch {
    tell("The browser does not let this page copy.");
  }
}

// What is served, or why that is not known. A server that is gone, or still loads its model, is asked again.
async function showModel() {
  clearTimeout(asking);
  try {
    showModels(await modelIds(settings().key));
    tell("");
  } catch (error) {
    showModels([]);
    tell(error.message);
    if (error.status === 401) editSettings("key", error.message);
    if (error.status === 503 || error instanceof Lost) asking = setTimeout(showModel, 2000);
  }
}

function showSettings() {
  const words = inForce();
  const button = find("in-force");
  button.hidden = !words.length;
  button.textContent = button.title = words.join(", ");
  button.setAttribute("aria-label", `Settings: ${words.join(", ")}`);
}

function start() {
  startComposer();
  startDrop();
  startFollowing();
  showSettings();
  startModels();
  startSettings(() => {
    showSettings();
    showModel();
  });
  find("new").addEventListener("click", () => open());
  find("menu").addEventListener("click", toggleMenu);
  find("shade").addEventListener("click", closeMenu);
  for (const id of ["open-settings", "in-force"]) find(id).addEventListener("click", () => editSettings());
  find("theme").addEventListener("click", () => {
    nextTheme();
    nameTheme();
  });
  for (const close of document.querySelectorAll("[data-close]")) {
    close.addEventListener("click", () => close.closest("dialog").close("cancel"));
  }
  addEventListener("keydown", escape);
  addEventListener("click", copy);
  addEventListener("unkept", ({ detail }) => tell(`The browser's storage failed: this may be lost. ${detail}`));
  nameTheme();
  showModel();
  open(location.hash.slice(1));
}

start();
