// The service over HTTP: one question, one answer; refusals in its own words.

import { header } from "./key.js";

export const base = location.pathname.replace(/\/$/, ""); // the route prefix, where there is one

/** What the service, or the way to it, says no with. */
export class Refusal extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** A question to `/v1/…`, with a JSON body where there is one. Throws a `Refusal`. */
export async function ask(path, { body, headers, ...options } = {}) {
  options.headers = { ...header(), ...headers };
  if (body !== undefined) {
    options.method = "POST";
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  let answer;
  try {
    answer = await fetch(`${base}/v1/${path}`, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The service does not answer. Is it running, and this machine online?", 0);
  }
  if (!answer.ok) throw new Refusal(await reason(answer), answer.status);
  return answer;
}

async function reason(answer) {
  const told = await answer.json().then((body) => body.error.message, () => answer.statusText);
  const wait = answer.headers.get("Retry-After");
  return wait ? `${told} (again in ${wait} s)` : told;
}

/** The events of a streamed answer, parsed; an error among them is thrown. */
export async function* events(path, body, signal) {
  const answer = await ask(path, { body: { ...body, stream: true }, signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (let chunk; !(chunk = await reader.read()).done; ) {
    const whole = (text + chunk.value).split("\n\n");
    text = whole.pop();
    for (const event of whole) {
      const data = event.split("\n").find((line) => line.startsWith("data: ")).slice(6);
      if (data === "[DONE]") return;
      const parsed = JSON.parse(data);
      if (parsed.error) throw new Refusal(parsed.error.message, answer.status);
      yield parsed;
    }
  }
}
