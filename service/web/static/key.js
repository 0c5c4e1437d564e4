// The API key: in memory alone, unless its owner asks the browser to remember it.

import { $ } from "./dom.js";
import { keep, kept } from "./storage.js";

const NAME = "fourstep.key";
let key = kept(NAME) ?? "";

export const header = () => (key ? { Authorization: `Bearer ${key}` } : {});

/** Ask for a key; true once there is a new one to try. */
export function askForKey() {
  const dialog = $("key-dialog");
  if (dialog.open) return Promise.resolve(false);
  $("key").value = key;
  $("remember").checked = kept(NAME) !== null;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(take(dialog.returnValue === "use")), { once: true });
  });
}

function take(wanted) {
  if (!wanted) return false;
  key = $("key").value.trim();
  keep(NAME, $("remember").checked && key ? key : null);
  return true;
}
