// One request at a time: single pictures, their previews shown as they come, or a clip.

import { events } from "./api.js";
import { awaitClip, drawClip, showClip } from "./clips.js";
import { $, say } from "./dom.js";
import { Figures, abandon } from "./pictures.js";

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
    const path = image ? "images/edits" : "images/generations";
    const draw = async (signal) => {
      for await (const event of events(path, request, signal)) {
        const file = figures.show(event);
        if (file) this.finished(file, { ...made, seed: event.seed, size: event.size });
      }
    };
    await this.#run(draw, () => figures.abandon());
  }

  /** Draw a clip of so many frames, from words. */
  async startClip({ strength, ...parameters }, num_frames) {
    const request = { ...parameters, num_frames };
    const figure = awaitClip();
    const draw = async (signal) => {
      const clip = await drawClip(request, signal, (percent) => (figure.querySelector("progress").value = percent));
      showClip(figure, clip, request, this.refused);
    };
    await this.#run(draw, () => abandon(figure));
  }

  /** Do this, which is given the signal that stops it; where it does not end well, that. */
  async #run(draw, giveUp) {
    const begun = performance.now();
    this.#set(new AbortController());
    say("Drawing …");
    try {
      await draw(this.#controller.signal);
      say(`${Math.round(performance.now() - begun)} ms in all`);
    } catch (error) {
      giveUp();
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
