// The list of conversations, and the questions about one of them.

import { button } from "./message.js";

const list = document.querySelector("#conversations");
const dialog = document.querySelector("#ask");
const title = document.querySelector("#ask-title");
const field = document.querySelector("#ask-text");
const action = document.querySelector("#ask-do");

// Ask for a text (where one is given to begin with) or for a yes. Gives the text, true, or null for no.
function ask(question, doing, text) {
  title.textContent = question;
  action.textContent = doing;
  field.hidden = text === undefined;
  field.required = !field.hidden;
  field.value = text ?? "";
  dialog.returnValue = "";
  dialog.showModal();
  if (field.hidden) action.focus();
  else field.select();
  return new Promise((resolve) => {
    const answer = () => {
      if (dialog.returnValue !== "do") return null;
      return text === undefined ? true : field.value.trim() || null;
    };
    dialog.addEventListener("close", () => resolve(answer()), { once: true });
  });
}

function entry({ id, title: name }, current, running, actions) {
  const element = document.createElement("li");
  const open = document.createElement("button");
  open.type = "button";
  open.className = "open";
  open.textContent = name;
  if (id === current) open.setAttribute("aria-current", "true");
  if (running) {
    open.classList.add("answering");
    open.title = "Being answered";
  }
  open.addEventListener("click", () => actions.open(id));
  const rename = button("Rename", async () => {
    const chosen = await ask("Rename the conversation", "Rename", name);
    if (chosen) await actions.rename(id, chosen);
  }, `Rename ${name}`);
  const remove = button("Delete", async () => {
    if (await ask(`Delete “${name}”?`, "Delete")) await actions.remove(id);
  }, `Delete ${name}`);
  const tools = document.createElement("span");
  tools.className = "tools";
  tools.append(rename, remove);
  element.append(open, tools);
  return element;
}

// Show the conversations. running: those that are being answered, by id. actions: {open(id), rename(id, title), remove(id)}.
export function showConversations(conversations, current, running, actions) {
  list.replaceChildren(...conversations.map((one) => entry(one, current, running.has(one.id), actions)));
}
