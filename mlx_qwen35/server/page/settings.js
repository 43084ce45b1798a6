// The settings: kept as the theme is, edited in a dialog, and put into the body of each request.

const dialog = document.querySelector("#settings");
const form = dialog.querySelector("form");
const problem = document.querySelector("#settings-error");

// The settings as text, by the names of the form's fields. What is empty is left to the model.
export function settings() {
  return JSON.parse(kept.settings ?? "{}");
}

// The settings that are not left to the model, in words.
export function inForce() {
  const { thinking, budget, temperature, max_tokens: most, system, schema } = settings();
  const words = [
    [thinking, `thinking ${thinking}`],
    [budget && thinking !== "off", "thinking budget"],
    [temperature, `temperature ${temperature}`],
    [most, `at most ${most} tokens`],
    [system, "system prompt"],
    [schema, "schema"],
  ];
  return words.filter(([given]) => given).map(([, word]) => word);
}

// What the settings add to the body of a request.
export function requestOptions({ thinking, budget, temperature, max_tokens: most, schema }) {
  const options = {};
  if (thinking) options.chat_template_kwargs = { enable_thinking: thinking === "on" };
  if (budget && thinking !== "off") options.thinking_token_budget = Number(budget);
  if (temperature) options.temperature = Number(temperature);
  if (most) options.max_tokens = Number(most);
  if (schema) {
    const json_schema = { name: "answer", strict: true, schema: JSON.parse(schema) };
    options.response_format = { type: "json_schema", json_schema };
  }
  return options;
}

// Why a form cannot be saved, and the field that it is about; nothing where it can.
function fault() {
  for (const field of form.elements) {
    if (!field.checkValidity()) {
      const label = field.labels[0].firstChild.textContent.trim();
      return { field, message: `${label}: ${field.validationMessage}` };
    }
  }
  const field = form.elements.schema;
  try {
    const schema = field.value.trim() ? JSON.parse(field.value) : {};
    if (typeof schema === "object" && schema !== null && !Array.isArray(schema)) return null;
    return { field, message: "JSON schema: it must be an object." };
  } catch (error) {
    return { field, message: `JSON schema: it is no JSON. ${error.message}` };
  }
}

function save(event) {
  const found = fault();
  problem.textContent = found?.message ?? "";
  if (found) {
    event.preventDefault();
    found.field.focus();
    return;
  }
  const entries = [...new FormData(form)].map(([name, value]) => [name, value.trim()]);
  kept.settings = JSON.stringify(Object.fromEntries(entries));
  dialog.dispatchEvent(new Event("saved"));
}

// Open the dialog, at one of its fields where named, with what is wrong with it.
export function editSettings(name, wrong = "") {
  const now = settings();
  for (const field of form.elements) if (field.name) field.value = now[field.name] ?? "";
  problem.textContent = wrong;
  dialog.showModal();
  if (name) form.elements[name].focus();
}

export function startSettings(saved) {
  form.addEventListener("submit", save);
  dialog.addEventListener("saved", saved);
}
