// The theme, set before anything is painted: the system's, or the one that was chosen here.
// A plain script, not a module, because modules run after the first paint.

const themes = ["system", "light", "dark"];

function theme() {
  const chosen = localStorage.getItem("theme");
  return themes.includes(chosen) ? chosen : "system";
}

function applyTheme() {
  document.documentElement.dataset.theme = theme();
}

function nextTheme() {
  localStorage.setItem("theme", themes[(themes.indexOf(theme()) + 1) % themes.length]);
  applyTheme();
}

applyTheme();
