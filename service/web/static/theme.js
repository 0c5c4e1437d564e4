// Light, dark, or as the system has it; the choice is kept in this browser.

import { $ } from "./dom.js";
import { keep, kept } from "./storage.js";

const NAME = "fourstep.theme";
const THEMES = ["auto", "light", "dark"];

function show(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = `Theme: ${theme}`;
}

export function startTheme() {
  show(kept(NAME) ?? "auto");
  $("theme").addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length];
    keep(NAME, next);
    show(next);
  });
}
