// Pictures as they come: previews, then the finished ones with their times and what to do with them.

import { $, button, element } from "./dom.js";

const MAX_SHOWN = 30; // the history has the others
const STAGES = {
  queue: "queue_ms",
  text: "encode_text_ms",
  denoise: "denoise_ms",
  decode: "decode_ms",
  image: "image_encode_ms",
};

/** The figures of one request, before all earlier ones; `use` takes a file to the canvas. */
export class Figures {
  #figures = [];

  constructor(prompt, use) {
    this.prompt = prompt;
    this.use = use;
  }

  /** One event of the stream. The finished picture's file, if it is one; else null. */
  show(event) {
    const figure = (this.#figures[event.image_index] ??= add(picture(this.prompt), "drawing …"));
    const data = bytesOf(event.b64_json);
    const type = `image/${event.output_format}`;
    figure.firstChild.src = `data:${type};base64,${event.b64_json}`;
    if (!event.type.endsWith("completed")) return null;
    const file = new File([data], `fourstep-${event.seed}.${event.output_format}`, { type });
    finish(figure, buttons(file, this.use), ...about(`seed ${event.seed}, ${event.size}`, event));
    return file;
  }

  /** Of a request that did not end well: what was not finished goes. */
  abandon() {
    for (const figure of this.#figures) if (figure) abandon(figure);
  }
}

/** A picture that was finished long ago. */
export function showFile(file, { prompt, seed, size }, use) {
  const figure = add(picture(prompt), "");
  figure.firstChild.src = URL.createObjectURL(file);
  finish(figure, buttons(file, use), `seed ${seed}, ${size}`);
}

/** A new figure of what is on its way, before all earlier ones. */
export function add(shown, caption) {
  const figure = element("figure", { className: "preview" });
  figure.append(shown, element("figcaption", { textContent: caption }));
  $("images").prepend(figure);
  for (const old of [...$("images").children].slice(MAX_SHOWN)) old.remove();
  return figure;
}

/** A figure that did not get finished goes. */
export function abandon(figure) {
  if (figure.className === "preview") figure.remove();
}

/** What a figure shows is done. */
export function finish(figure, buttons, ...caption) {
  figure.className = "";
  figure.lastChild.replaceChildren(...caption, element("span", { className: "row" }, ...buttons));
}

/** A caption: what is shown, where its time went, and what the service has to say of it. */
export function about(shown, { timings, warnings }) {
  return [shown, timeline(timings), ...warnings.map((textContent) => element("p", { textContent }))];
}

const picture = (alt) => element("img", { alt });
const buttons = (file, use) => [
  button("Draw on it", () => use(file)),
  button("Save", () => save(file, file.name)),
];

/** Where a request's time went, as a bar. */
function timeline(timings) {
  const parts = Object.entries(STAGES).map(([name, key]) => [name, timings[key]]);
  const total = parts.reduce((sum, [, ms]) => sum + ms, 0) || 1;
  const bar = element("div", { className: "bar" });
  for (const [name, ms] of parts) {
    const piece = element("div", { className: name, title: `${name} ${ms.toFixed(1)} ms` });
    piece.style.width = `${(100 * ms) / total}%`;
    bar.append(piece);
  }
  return bar;
}

const bytesOf = (base64) => Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));

/** Hand a file to the person, as a download. */
export function save(file, name) {
  const link = element("a", { href: URL.createObjectURL(file), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
