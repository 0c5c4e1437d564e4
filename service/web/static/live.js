// A live session: one frame under way at a time, the newest next; lost connections come back.

import { Refusal, ask, base } from "./api.js";

const PROTOCOL = "fourstep.v1";
const SILENT = 1000, REFUSED = 1008, FULL = 1013; // close codes, as the protocol has them
const RETRY_MS = [250, 500, 1000, 2000, 4000];
const FULL_RETRY_MS = 5000;
const WINDOW_MS = 2000; // over which frames a second are counted

/**
 * Events: `picture` (detail: the message, with `latency_ms` and `fps`), `state` (detail: words for
 * the person) and `refused` (detail: a `Refusal`).
 */
export class LiveSession extends EventTarget {
  #values;
  #frame;
  #socket = null;
  #told = ""; // the values that the session has, as JSON
  #underWay = null; // {id, sentAt}
  #changed = false;
  #wanted = false;
  #returning = false; // on the way to a connection, or waiting to be
  #attempts = 0;
  #numFrames = 0;
  #arrivals = [];
  #timer;

  /** `values()` are the session's, `frame()` what one frame has besides: both plain objects. */
  constructor(values, frame) {
    super();
    this.#values = values;
    this.#frame = frame;
  }

  start() {
    this.#wanted = true;
    this.#attempts = 0;
    this.touch();
  }

  stop() {
    this.#wanted = this.#returning = false;
    clearTimeout(this.#timer);
    this.#socket?.close();
    this.#socket = null;
    this.#tell("not connected");
  }

  /** Something is to be drawn anew. */
  touch() {
    this.#changed = true;
    if (!this.#wanted) return;
    if (this.#socket) this.#send();
    else if (!this.#returning) this.#connect();
  }

  async #connect() {
    this.#returning = true;
    this.#tell("connecting …");
    try {
      const { token } = await (await ask("realtime/tokens", {})).json();
      if (this.#wanted && !this.#socket) this.#open(token);
    } catch (error) {
      if (error.status === 401) this.#refuse(error);
      else this.#retry(error.message);
    }
  }

  #open(token) {
    const address = new URL(`${base}/v1/realtime/images`, location.href);
    address.protocol = address.protocol.replace("http", "ws");
    if (token) address.searchParams.set("token", token);
    const socket = (this.#socket = new WebSocket(address, PROTOCOL));
    this.#returning = false;
    this.#told = "";
    this.#underWay = null;
    socket.onopen = () => {
      this.#tell("connected");
      this.#send();
    };
    socket.onmessage = (event) => socket === this.#socket && this.#hear(JSON.parse(event.data));
    socket.onclose = (event) => socket === this.#socket && this.#lost(event);
  }

  /** At most one frame is under way: what changes meanwhile is in the next one. */
  #send() {
    if (this.#socket.readyState !== WebSocket.OPEN || this.#underWay || !this.#changed) return;
    this.#changed = false;
    const values = this.#values();
    const told = JSON.stringify(values);
    if (told !== this.#told) this.#socket.send(JSON.stringify({ type: "session.update", ...values }));
    this.#told = told;
    this.#underWay = { id: ++this.#numFrames, sentAt: performance.now() };
    this.#socket.send(JSON.stringify({ type: "frame", id: this.#underWay.id, ...this.#frame() }));
  }

  #hear(message) {
    if (message.type === "frame") this.#take(message);
    else if (message.type === "error") this.#fail(message);
    else if (message.type === "skipped" && message.reason === "shed") {
      this.#changed = true; // the service is busy, and makes room by itself
      this.#tell("busy, waiting for room");
    }
    if ("id" in message && message.id === this.#underWay?.id) {
      this.#underWay = null;
      this.#send();
    }
  }

  #take(message) {
    const now = performance.now();
    this.#attempts = 0;
    this.#arrivals = [...this.#arrivals.filter((at) => now - at < WINDOW_MS), now];
    const [first] = this.#arrivals;
    const fps = this.#arrivals.length > 1 ? (1000 * (this.#arrivals.length - 1)) / (now - first) : 0;
    const detail = { ...message, fps, latency_ms: now - this.#underWay.sentAt };
    this.#tell("connected");
    this.dispatchEvent(new CustomEvent("picture", { detail }));
  }

  #fail({ error }) {
    this.dispatchEvent(new CustomEvent("refused", { detail: new Refusal(error.message, 400) }));
  }

  #lost({ code, reason }) {
    this.#socket = null;
    this.#changed = true; // the picture that was under way
    if (!this.#wanted) return;
    if (code === REFUSED) this.#refuse(new Refusal(reason, 401));
    else if (code === SILENT) this.#tell("resting; draw to go on");
    else if (code === FULL) this.#retry(reason, FULL_RETRY_MS);
    else this.#retry("The connection was lost: coming back.");
  }

  #retry(why, wait_ms = RETRY_MS[Math.min(this.#attempts++, RETRY_MS.length - 1)]) {
    this.#returning = true;
    this.#tell(why);
    this.#timer = setTimeout(() => this.#wanted && this.#connect(), wait_ms);
  }

  #refuse(refusal) {
    this.stop();
    this.dispatchEvent(new CustomEvent("refused", { detail: refusal }));
  }

  #tell(words) {
    this.dispatchEvent(new CustomEvent("state", { detail: words }));
  }
}
