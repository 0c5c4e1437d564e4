// A WebSocket that comes back: opened with a token, again after a loss, not after a refusal.

import { Refusal, ask, base } from "./api.js";

const PROTOCOL = "fourstep.v1";
const SILENT = 1000, REFUSED = 1008, FULL = 1013; // close codes, as the protocol has them
const RETRY_MS = [250, 500, 1000, 2000, 4000];
const FULL_RETRY_MS = 5000;

/**
 * Events: `open`; `message` (detail: the object that came); `state` (detail: words for the person);
 * `refused` (detail: a `Refusal`).
 */
export class Connection extends EventTarget {
  #socket = null;
  #wanted = false;
  #returning = false; // on the way to a connection, or waiting to be
  #attempts = 0;
  #timer;

  /** Connect, if there is no connection and none is on its way. */
  start() {
    this.#wanted = true;
    if (!this.#socket && !this.#returning) this.#connect();
  }

  stop() {
    this.#wanted = this.#returning = false;
    clearTimeout(this.#timer);
    this.#socket?.close();
    this.#socket = null;
    this.#tell("not connected");
  }

  get isOpen() {
    return this.#socket?.readyState === WebSocket.OPEN;
  }

  send(message) {
    this.#socket.send(JSON.stringify(message));
  }

  async #connect() {
    this.#returning = true;
    this.#tell("connecting …");
    try {
      const { token } = await (await ask("realtime/tokens", { body: {} })).json();
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
    const unlessReplaced = (handle) => (event) => socket === this.#socket && handle(event);
    this.#returning = false;
    socket.onopen = unlessReplaced(() => {
      this.#tell("connected");
      this.dispatchEvent(new Event("open"));
    });
    socket.onmessage = unlessReplaced(({ data }) => {
      this.#attempts = 0;
      this.#emit("message", JSON.parse(data));
    });
    socket.onclose = unlessReplaced((event) => this.#lost(event));
  }

  #lost({ code, reason }) {
    this.#socket = null;
    if (code === REFUSED) this.#refuse(new Refusal(reason, 401));
    else if (code === SILENT) this.#tell("resting; draw to go on");
    else if (code === FULL) this.#retry(reason, FULL_RETRY_MS);
    else this.#retry("connection lost, coming back");
  }

  #retry(why, wait_ms = RETRY_MS[Math.min(this.#attempts++, RETRY_MS.length - 1)]) {
    if (!this.#wanted) return;
    this.#returning = true;
    this.#tell(why);
    this.#timer = setTimeout(() => this.#connect(), wait_ms);
  }

  #refuse(refusal) {
    this.stop();
    this.#emit("refused", refusal);
  }

  #tell(words) {
    this.#emit("state", words);
  }

  #emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}
