// The way from prompt A to prompt B: which of them is wanted, and how far the pictures are.

import { $ } from "./dom.js";

export class Glide {
  #from = 0; // an end
  #frames = 0; // of the way
  #done = 0;

  /** `changed` is called when another end, or another text, is wanted. */
  constructor(changed) {
    $("end").addEventListener("input", () => {
      this.#begin(Number($("glide-frames").value));
      changed();
    });
    for (const id of ["prompt", "prompt-b"])
      $(id).addEventListener("input", () => {
        this.#begin(0); // a text that is being written is drawn at once
        changed();
      });
  }

  /** What a live session is told. Without a prompt B there is no other end. */
  values() {
    const ends = [$("prompt").value, $("prompt-b").value.trim() || $("prompt").value];
    return { prompt: ends[$("end").value], prompt_blend: this.#frames };
  }

  /** One more picture has come; true while there are more on the way. */
  advance() {
    this.#done = Math.min(this.#done + 1, this.#frames);
    this.#show();
    return this.#done < this.#frames;
  }

  #begin(frames) {
    this.#from = $("glide").value;
    this.#frames = frames;
    this.#done = 0;
    this.#show();
  }

  #show() {
    const share = this.#frames ? this.#done / this.#frames : 1;
    $("glide").value = this.#from + share * (Number($("end").value) - this.#from);
  }
}
