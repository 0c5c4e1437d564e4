// What there is to click at first: what the model knows, examples, colours that fit it.

import { $, button, choose } from "./dom.js";
import { examplesFor } from "./examples.js";

/** `draw` is given the prompt that was chosen. */
export function welcome(model, draw) {
  const { about, prompts, surprise, inks } = examplesFor(model);
  $("prompt").value ||= prompts[0];
  $("world").textContent = about;
  $("prompts").replaceChildren(...prompts.map((prompt) => button(prompt, () => draw(prompt))));
  if (surprise) $("prompts").prepend(button("Surprise me", () => draw(surprise())));
  $("swatches").replaceChildren(...inks.map(swatch));
}

function swatch(ink) {
  const made = button("", () => take(made, ink), { ariaLabel: ink, title: ink, ariaPressed: "false" });
  made.style.background = ink;
  return made;
}

function take(made, ink) {
  $("colour").value = ink;
  choose("tool", "brush");
  for (const each of $("swatches").children) each.ariaPressed = each === made;
}
