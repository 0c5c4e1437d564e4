// The API key: in memory alone, unless its owner asks the browser to remember it.

import { $ } from "./dom.js";

const NAME = "fourstep.key";
let key = localStorage.getItem(NAME) ?? "";

export const header = () => (key ? { Authorization: `Bearer ${key}` } : {});

/** Ask for a key; true once there is a new one to try. */
export function askForKey() {
  const dialog = $("key-dialog");
  if (dialog.open) return Promise.resolve(false);
  $("key").value = key;
  $("remember").checked = localStorage.getItem(NAME) !== null;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(take(dialog.returnValue === "use")), { once: true });
  });
}

function take(wanted) {
  if (!wanted) return false;
  key = $("key").value.trim();
  if ($("remember").checked && key) localStorage.setItem(NAME, key);
  else localStorage.removeItem(NAME);
  return true;
}
