// Which of the served models answers: the model alone, or with one of its adapters. The choice is kept as the theme is.

const name = document.querySelector("#model");
const choice = document.querySelector("#models");

// Show what is served: its name, or a choice where there are several; nothing where that is not known. What was chosen
// before stays chosen, if it is there.
export function showModels(ids) {
  name.textContent = ids.length === 1 ? ids[0] : "";
  choice.hidden = ids.length < 2;
  if (ids.length) choice.replaceChildren(...ids.map((id) => new Option(id, id, false, id === kept.model)));
}

// What says in the body of a request which one answers. A server that has not been asked yet answers by the first.
export function modelOption() {
  return choice.value ? { model: choice.value } : {};
}

export function startModels() {
  choice.addEventListener("change", () => {
    kept.model = choice.value;
  });
}
