// The theme, set before anything is painted: the system's, or the one that was chosen here.
// A plain script, not a module, because modules run after the first paint.

// What is kept by name: localStorage, or where the browser denies it, an object that lasts as long as the page.
let kept = {};
try {
  kept = localStorage;
} catch {}

const themes = ["system", "light", "dark"];

function theme() {
  return themes.includes(kept.theme) ? kept.theme : "system";
}

function applyTheme() {
  document.documentElement.dataset.theme = theme();
}

function nextTheme() {
  kept.theme = themes[(themes.indexOf(theme()) + 1) % themes.length];
  applyTheme();
}

applyTheme();
