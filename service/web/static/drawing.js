// Single pictures: one request at a time, its previews shown as they come.

import { events } from "./api.js";
import { $, say } from "./dom.js";
import { Figures } from "./pictures.js";

const NUM_PREVIEWS = 3;

export class Drawing {
  #controller = null;

  /** Given every finished picture's file and parameters; a file to draw on; a `Refusal`. */
  constructor({ finished, use, refused }) {
    Object.assign(this, { finished, use, refused });
  }

  get busy() {
    return this.#controller !== null;
  }

  stop() {
    this.#controller?.abort();
  }

  /**
   * Draw `n` pictures with these parameters: from words, or from `{image, mask}`, which are `data:`
   * URLs, at the parameters' strength.
   */
  async start({ strength, ...parameters }, { image, mask }, n) {
    const made = image ? { ...parameters, strength } : parameters;
    const request = { ...made, n, partial_images: NUM_PREVIEWS, image, mask: mask && { image_url: mask } };
    const figures = new Figures(parameters.prompt, this.use);
    const begun = performance.now();
    this.#set(new AbortController());
    say("Drawing …");
    try {
      const path = image ? "images/edits" : "images/generations";
      for await (const event of events(path, request, this.#controller.signal)) {
        const file = figures.show(event);
        if (file) this.finished(file, { ...made, seed: event.seed, size: event.size });
      }
      say(`${Math.round(performance.now() - begun)} ms in all`);
    } catch (error) {
      figures.abandon();
      if (error.name === "AbortError") say("Stopped.");
      else this.refused(error);
    }
    this.#set(null);
  }

  #set(controller) {
    this.#controller = controller;
    $("draw").ariaDisabled = this.busy; // a disabled button would lose the focus
    $("stop").hidden = !this.busy;
    document.body.classList.toggle("busy", this.busy);
  }
}
