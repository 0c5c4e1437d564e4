// Pictures that were drawn here, with their parameters, in this browser's IndexedDB.

import { $, button, element, say } from "./dom.js";

const STORE = "pictures";
const MAX_KEPT = 60;

const done = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

export class History {
  #database;
  #open;

  /** `show` is given the file and the parameters of a picture that is chosen. */
  constructor(show) {
    this.#open = show;
    $("forget").addEventListener("click", () => this.#forgetAll());
  }

  /** Where a browser keeps nothing (a private window), neither does this. */
  async start() {
    const request = indexedDB.open("fourstep", 1);
    const options = { keyPath: "id", autoIncrement: true };
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, options);
    try {
      this.#database = await done(request);
      for (const kept of await done(this.#store("readonly").getAll())) this.#show(kept);
    } catch {
      this.#database = undefined;
    }
  }

  async add(file, parameters) {
    if (!this.#database) return;
    const kept = { file, parameters, at: Date.now() };
    try {
      kept.id = await done(this.#store("readwrite").add(kept));
    } catch (error) {
      say(`The browser does not keep this picture: ${error.message}`, { failed: true });
      return;
    }
    this.#show(kept);
    for (const old of [...$("kept").children].slice(MAX_KEPT)) await this.#remove(old);
  }

  #store(mode) {
    return this.#database.transaction(STORE, mode).objectStore(STORE);
  }

  #show({ id, file, parameters, at }) {
    const source = URL.createObjectURL(file);
    const when = new Date(at).toLocaleString();
    const image = element("img", { src: source, alt: parameters.prompt, loading: "lazy" });
    const item = element("li");
    item.dataset.id = id;
    const title = `${parameters.prompt}\nseed ${parameters.seed}, ${when}`;
    const open = button("", () => this.#open(file, parameters), { title });
    open.append(image);
    item.append(
      open,
      button("×", () => this.#remove(item), { className: "remove", ariaLabel: `Forget: ${parameters.prompt}` }),
    );
    $("kept").prepend(item);
    $("history").hidden = false;
  }

  async #remove(item) {
    await done(this.#store("readwrite").delete(Number(item.dataset.id)));
    URL.revokeObjectURL(item.querySelector("img").src);
    item.remove();
    $("history").hidden = !$("kept").children.length;
  }

  async #forgetAll() {
    for (const item of [...$("kept").children]) await this.#remove(item);
  }
}
