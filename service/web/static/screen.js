// The live picture: shown, measured, saved and recorded.

import { $ } from "./dom.js";
import { save } from "./pictures.js";
import { Recorder } from "./recorder.js";
import { cover, setSize } from "./sketch.js";

export class Screen {
  #canvas = $("screen");
  #recorder = new Recorder(this.#canvas);
  #numTold = 0; // frames that the service sent
  #shown = 0; // the number of the one that is seen
  #seed;

  constructor() {
    $("record").hidden = !Recorder.possible;
    $("record").addEventListener("click", () => (this.#recorder.on ? this.stopRecording() : this.#record()));
  }

  /** Whether a newer frame than the one that is seen is being decoded. */
  get behind() {
    return this.#shown < this.#numTold;
  }

  /** A `frame` of the service, as a live session tells of it; whether it is seen now. */
  async show({ image, media_type, width, height, seed, fps, latency_ms }, prompt) {
    const number = ++this.#numTold;
    const picture = new Image();
    picture.src = `data:${media_type};base64,${image}`;
    await picture.decode();
    if (number < this.#shown) return false; // a newer one was decoded sooner
    this.#shown = number;
    const canvas = this.#canvas;
    if (canvas.width !== width || canvas.height !== height) setSize(canvas, width, height);
    cover(canvas.getContext("2d"), picture);
    canvas.ariaLabel = `Live picture: ${prompt}`;
    canvas.dataset.frames = number;
    for (const id of ["use", "save", "record"]) $(id).disabled = false;
    $("fps").value = fps ? fps.toFixed(1) : "–";
    $("latency").value = Math.round(latency_ms);
    this.#seed = seed;
    return true;
  }

  /** What is seen, as a PNG, with its seed and size. */
  async file() {
    const blob = await new Promise((resolve) => this.#canvas.toBlob(resolve));
    const file = new File([blob], `fourstep-${this.#seed}.png`, { type: blob.type });
    return { file, seed: this.#seed, size: `${this.#canvas.width}x${this.#canvas.height}` };
  }

  /** Hand it to the person. */
  async save() {
    const taken = await this.file();
    save(taken.file, taken.file.name);
    return taken;
  }

  stopRecording() {
    this.#recorder.stop();
    $("record").ariaPressed = "false";
  }

  #record() {
    this.#recorder.start();
    $("record").ariaPressed = "true";
  }
}
