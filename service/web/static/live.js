// Live drawing: one question to the service at a time, always with the newest of what is drawn.

import { Connection } from "./connection.js";
import { Refusal } from "./api.js";

const WINDOW_MS = 2000; // over which frames a second are counted

/**
 * Events: `touched`; `picture` (detail: the message, with `latency_ms` and `fps`), `state` (detail: words for
 * the person) and `refused` (detail: a `Refusal`).
 */
export class LiveSession extends EventTarget {
  #connection = new Connection();
  #on = false;
  #values;
  #frame;
  #changed = false; // since the last question
  #told = ""; // the values that the session has, as JSON
  #askedAt = null; // of the question that is not answered yet
  #numFrames = 0;
  #arrivals = [];

  /** `values()` are the session's, `frame()` what one frame has besides: both plain objects. */
  constructor(values, frame) {
    super();
    this.#values = values;
    this.#frame = frame;
    this.#connection.addEventListener("open", () => this.#begin());
    this.#connection.addEventListener("message", ({ detail }) => this.#hear(detail));
    for (const type of ["state", "refused"])
      this.#connection.addEventListener(type, ({ detail }) => this.#emit(type, detail));
  }

  start() {
    this.#on = true;
    this.touch();
  }

  stop() {
    this.#on = false;
    this.#connection.stop();
  }

  /** Whether a picture is still to come of what is drawn. */
  get busy() {
    return this.#on && (this.#changed || this.#askedAt !== null);
  }

  /** Something is to be drawn anew. */
  touch() {
    this.#changed = true;
    if (!this.#on) return;
    this.#emit("touched");
    if (this.#connection.isOpen) this.#ask();
    else this.#connection.start();
  }

  /** A new session knows nothing yet; it goes on with the picture that the last one was at. */
  #begin() {
    this.#told = "";
    this.#askedAt = null;
    this.#changed = true;
    this.#emit("touched");
    this.#ask();
  }

  /** Values go before the first frame that is drawn with them. */
  #ask() {
    if (this.#askedAt !== null || !this.#changed) return;
    this.#changed = false;
    this.#askedAt = performance.now();
    const values = this.#values();
    const told = JSON.stringify(values);
    if (told === this.#told) {
      this.#connection.send({ type: "frame", id: ++this.#numFrames, ...this.#frame() });
    } else {
      this.#told = told;
      this.#connection.send({ type: "session.update", ...values });
    }
  }

  #hear(message) {
    const latency_ms = performance.now() - this.#askedAt;
    this.#askedAt = null;
    if (message.type === "session") this.#changed = true; // now the frame
    else if (message.type === "frame") this.#emit("picture", { ...message, latency_ms, fps: this.#count() });
    else if (message.type === "skipped") this.#changed = true; // it had no room; the service waits itself
    else if (message.type === "error") {
      this.#told = "";
      this.#emit("refused", new Refusal(message.error.message, 400));
    }
    this.#ask();
  }

  /** Frames a second, with the one that has just come. */
  #count() {
    const now = performance.now();
    this.#arrivals = [...this.#arrivals.filter((at) => now - at < WINDOW_MS), now];
    const seconds = (now - this.#arrivals[0]) / 1000;
    return seconds ? (this.#arrivals.length - 1) / seconds : 0;
  }

  #emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}
