// Pictures that come from outside: chosen, dropped or pasted files, and the webcam.

import { $, element } from "./dom.js";

/** `open` is given a file that was chosen for the canvas, `receive` one that was dropped or pasted. */
export function startFiles(open, receive) {
  $("open").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", () => {
    const [file] = $("file").files;
    if (file) open(file);
    $("file").value = ""; // so that the same one can be chosen again
  });
  const taking = (event) => event.dataTransfer.types.includes("Files") && event.preventDefault();
  document.addEventListener("dragover", taking);
  document.addEventListener("drop", (event) => {
    taking(event);
    const [file] = event.dataTransfer.files;
    if (file) receive(file);
  });
  document.addEventListener("paste", (event) => {
    const [file] = event.clipboardData.files;
    if (file) receive(file);
  });
}

/** The webcam as the sketch's ground, until it is stopped. */
export class Webcam {
  #video = null;

  constructor(sketch) {
    this.sketch = sketch;
  }

  get on() {
    return this.#video !== null;
  }

  /** Throws where there is none, or it may not be used. */
  async start() {
    const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "user" } });
    const video = element("video", { srcObject: stream, muted: true, playsInline: true });
    await video.play();
    this.#video = video;
    this.#follow();
  }

  stop() {
    for (const track of this.#video?.srcObject.getTracks() ?? []) track.stop();
    this.#video = null;
  }

  #follow() {
    if (!this.#video) return;
    this.sketch.lay(this.#video, { undoable: false });
    requestAnimationFrame(() => this.#follow());
  }
}
