// Clips: a job that is asked after until it is done, its file, and how that is played and saved.

import { ask } from "./api.js";
import { button, element } from "./dom.js";
import { about, add, finish, save } from "./pictures.js";

const FIRST_WAIT_MS = 150; // a small model's clip is done by then; each further wait is longer
const LONGER = 1.3;
const MAX_WAIT_MS = 1000;
const FORMATS = { mp4: ["MP4", "video/mp4"], webp: ["WebP", "image/webp"] };
const H264 = 'video/mp4; codecs="avc1.640028"';

/**
 * Draw a clip of these parameters; `tell` is given the percent that is done. The finished job and
 * its file; where the signal is aborted the job is deleted.
 */
export async function drawClip(parameters, signal, tell) {
  // A browser can pause an MP4; those without H.264 show an animated WebP.
  const output_format = element("video").canPlayType(H264) ? "mp4" : "webp";
  let job = await (await ask("videos", { body: { ...parameters, output_format } })).json();
  const path = `videos/${job.id}`;
  try {
    for (let wait = FIRST_WAIT_MS; job.status !== "completed"; wait = Math.min(wait * LONGER, MAX_WAIT_MS)) {
      if (job.status === "failed") throw new Error(job.error.message);
      tell(job.progress);
      await pause(wait, signal);
      job = await (await ask(path, { signal })).json();
    }
    const content = await ask(`${path}/content`, { signal });
    return { job, file: await fileOf(content, job.seed, output_format) };
  } finally {
    ask(path, { method: "DELETE" }).catch(() => {}); // the page has the clip, or wants it no more
  }
}

async function fileOf(answer, seed, format) {
  const [, type] = FORMATS[format];
  return new File([await answer.arrayBuffer()], `fourstep-${seed}.${format}`, { type });
}

/** A figure that waits for a clip, with a bar for its progress. */
export function awaitClip() {
  const bar = element("progress", { max: 100, value: 0, ariaLabel: "Percent drawn" });
  return add(element("div", { className: "awaited" }, bar), "drawing …");
}

/** Play a clip in its figure, over and over; `parameters` draw it again, `refused` hears of what fails. */
export function showClip(figure, { job, file }, parameters, refused) {
  figure.firstChild.replaceWith(player(file, parameters.prompt));
  const shown = `seed ${job.seed}, ${job.size}, ${job.num_frames} frames`;
  const saves = Object.entries(FORMATS).map(([format, [name, type]]) =>
    button(`Save ${name}`, async ({ target }) => {
      target.ariaDisabled = true;
      try {
        const wanted = type === file.type ? file : await drawAs(format, { ...parameters, seed: job.seed });
        save(wanted, wanted.name);
      } catch (error) {
        refused(error);
      }
      target.ariaDisabled = false;
    }),
  );
  finish(figure, saves, ...about(shown, job));
}

/** The same clip in another format: what has the same seed is the same clip. */
async function drawAs(format, parameters) {
  const headers = { Accept: FORMATS[format][1] };
  return fileOf(await ask("videos", { body: parameters, headers }), parameters.seed, format);
}

function player(file, prompt) {
  const src = URL.createObjectURL(file);
  if (file.type.startsWith("image/")) return element("img", { src, alt: prompt });
  const autoplay = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  const playing = { loop: true, muted: true, playsInline: true, controls: true, autoplay };
  return element("video", { ...playing, src, ariaLabel: prompt });
}

function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => reject(signal.reason);
    if (signal.aborted) stop();
    signal.addEventListener("abort", stop, { once: true });
    setTimeout(resolve, ms);
  });
}
