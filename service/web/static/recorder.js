// A recording of a canvas as a video file.

import { save } from "./pictures.js";

const FPS = 30;

export class Recorder {
  #recorder = null;

  constructor(canvas) {
    this.canvas = canvas;
  }

  static get possible() {
    return "MediaRecorder" in window && "captureStream" in HTMLCanvasElement.prototype;
  }

  get on() {
    return this.#recorder !== null;
  }

  start() {
    const pieces = [];
    const recorder = (this.#recorder = new MediaRecorder(this.canvas.captureStream(FPS)));
    recorder.ondataavailable = (event) => pieces.push(event.data);
    recorder.onstop = () => {
      const suffix = recorder.mimeType.includes("mp4") ? "mp4" : "webm";
      save(new Blob(pieces, { type: recorder.mimeType }), `fourstep.${suffix}`);
    };
    recorder.start();
  }

  stop() {
    this.#recorder?.stop();
    this.#recorder = null;
  }
}
