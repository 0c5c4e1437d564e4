// The document: how its elements are found, made and listened to.

export const $ = (id) => document.getElementById(id);

/** An element with these properties; `ariaLabel` and its like are properties too. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export const button = (text, onclick, properties = {}) =>
  element("button", { type: "button", textContent: text, onclick, ...properties });

/** The chosen value of a group of radio buttons, and how to choose another. */
export const chosen = (name) => document.querySelector(`input[name=${name}]:checked`).value;
export const choose = (name, value) => {
  document.querySelector(`input[name=${name}][value=${value}]`).checked = true;
};

/** Tell the person what happened, or went wrong. */
export function say(text, { failed = false } = {}) {
  $("message").textContent = text;
  $("message").className = failed ? "error" : "";
}
