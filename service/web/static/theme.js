// Light, dark, or as the system has it; the choice is kept in this browser.

import { $ } from "./dom.js";

const NAME = "fourstep.theme";
const THEMES = ["auto", "light", "dark"];

function show(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = `Theme: ${theme}`;
}

export function startTheme() {
  show(localStorage.getItem(NAME) ?? "auto");
  $("theme").addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length];
    localStorage.setItem(NAME, next);
    show(next);
  });
}
