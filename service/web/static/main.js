// The studio: what each control does. Everything else is in the module that is named for it.

import { ask, events } from "./api.js";
import { $, button, choose, chosen, element, say } from "./dom.js";
import { examplesFor } from "./examples.js";
import { Glide } from "./glide.js";
import { startHand } from "./hand.js";
import { History } from "./history.js";
import { askForKey } from "./key.js";
import { LiveSession } from "./live.js";
import { canvasSize, changeMode, fitTo, nextSeed, restore, rollSeed, showNumbers, values } from "./parameters.js";
import { Figures, save, showFile } from "./pictures.js";
import { parametersText, parseParameters } from "./png.js";
import { Recorder } from "./recorder.js";
import { Sketch, cover, setSize } from "./sketch.js";
import { Webcam, startFiles } from "./sources.js";
import { startTheme } from "./theme.js";

const NUM_PREVIEWS = 3;
const RECONNECT_MS = 3000;

const sketch = new Sketch($("paper"));
const webcam = new Webcam(sketch);
const recorder = new Recorder($("screen"));
const glide = new Glide(() => live.touch());
const history = new History((file, parameters) => bringBack(file, parameters));
const live = new LiveSession(
  () => ({
    ...values(),
    ...glide.values(),
    seed: $("lock").checked ? nextSeed() : null,
    strength: Number($("strength").value),
  }),
  () => pictures("image/jpeg"),
);
let drawing = null; // the AbortController of what is being drawn

const isLive = () => document.body.dataset.mode === "live";

/** What the canvas gives to a frame or an edit. One that nobody has touched has nothing to say. */
function pictures(type) {
  if (chosen("start") !== "canvas" || !sketch.touched) return {};
  const mask = sketch.mask();
  return { image: sketch.image(type), ...(mask && { mask }) };
}

// -- the service -------------------------------------------------------------------------------

async function connect() {
  try {
    const [model] = (await (await ask("models")).json()).data;
    fitTo(model);
    $("model").textContent = `${model.id} on ${model.details.engine}, ${model.details.precision}`;
    offer(examplesFor(model));
    showMode();
    for (const waiting of document.querySelectorAll("[inert]")) waiting.inert = false;
    say("");
  } catch (error) {
    say(error.message, { failed: true });
    if (error.status === 401) {
      if (await askForKey()) await connect();
    } else setTimeout(connect, RECONNECT_MS);
  }
}

/** Say what the model knows, and let one click draw it. */
function offer({ about, prompts, surprise, inks }) {
  const draw = (prompt) => {
    $("prompt").value = prompt;
    $("prompt").dispatchEvent(new Event("input"));
    if (!isLive()) $("form").requestSubmit();
  };
  $("prompt").value ||= prompts[0];
  $("world").textContent = about;
  $("prompts").replaceChildren(...prompts.map((prompt) => button(prompt, () => draw(prompt))));
  if (surprise) $("prompts").prepend(button("Surprise me", () => draw(surprise())));
  $("swatches").replaceChildren(...inks.map((ink) => swatch(ink)));
}

function swatch(ink) {
  const made = button("", () => {
    $("colour").value = ink;
    choose("tool", "brush");
    for (const each of $("swatches").children) each.ariaPressed = each === made;
  }, { ariaLabel: ink, title: ink, ariaPressed: "false" });
  made.style.background = ink;
  return made;
}

async function refused(error) {
  say(error.message, { failed: true });
  if (error.status !== 401 || !(await askForKey())) return;
  say("");
  if (isLive()) live.start();
}

// -- single pictures ---------------------------------------------------------------------------

async function draw() {
  const from = pictures("image/png");
  const request = { ...values(), n: Number($("count").value), seed: nextSeed(), partial_images: NUM_PREVIEWS };
  if (from.image) Object.assign(request, { image: from.image, strength: Number($("strength").value) });
  if (from.mask) request.mask = { image_url: from.mask };
  const { image, mask, n, partial_images, ...parameters } = request;
  const figures = new Figures(request.prompt, use);
  const begun = performance.now();
  setBusy(new AbortController());
  say("Drawing …");
  try {
    for await (const event of events(from.image ? "images/edits" : "images/generations", request, drawing.signal)) {
      const file = figures.show(event);
      if (file) history.add(file, { ...parameters, seed: event.seed, size: event.size });
    }
    say(`${Math.round(performance.now() - begun)} ms in all`);
  } catch (error) {
    figures.abandon();
    if (error.name === "AbortError") say("Stopped.");
    else await refused(error);
  }
  setBusy(null);
}

function setBusy(controller) {
  drawing = controller;
  $("draw").ariaDisabled = controller !== null; // a disabled button would lose the focus
  $("stop").hidden = controller === null;
  document.body.classList.toggle("busy", controller !== null);
}

/** A picture becomes the canvas. */
async function use(file) {
  let picture;
  try {
    picture = await createImageBitmap(file);
  } catch {
    say(`${file.name} cannot be read as a picture; save it as PNG, JPEG or WebP.`, { failed: true });
    return;
  }
  stopWebcam();
  setStart("canvas");
  sketch.lay(picture);
  $("paper").focus();
}

/** A picture and what it was drawn with. */
function bringBack(file, parameters) {
  const unknown = restore(parameters);
  fitCanvas();
  if (!isLive()) showFile(file, parameters, use);
  live.touch();
  const but = unknown.length ? `, but for what this model lacks: ${unknown.join(", ")}` : "";
  say(`Its settings are back${but}.`);
}

/** A file that was dropped or pasted: one that was drawn here brings its settings. */
async function receive(file) {
  const text = parametersText(new Uint8Array(await file.arrayBuffer()));
  if (text === null) await use(file);
  else bringBack(file, parseParameters(text));
}

// -- live --------------------------------------------------------------------------------------

async function showPicture({ detail }) {
  const image = new Image();
  image.src = `data:image/jpeg;base64,${detail.image}`;
  await image.decode();
  const { width, height, fps, latency_ms } = detail;
  const screen = $("screen");
  if (screen.width !== width || screen.height !== height) setSize(screen, width, height);
  cover(screen.getContext("2d"), image);
  screen.ariaLabel = `Live picture: ${glide.values().prompt}`;
  screen.dataset.frames = Number(screen.dataset.frames ?? 0) + 1;
  $("fps").value = fps ? fps.toFixed(1) : "–";
  $("latency").value = Math.round(latency_ms);
  $("seed").value = detail.seed;
  say(detail.warnings.join("; "));
  if (glide.advance()) live.touch();
}

function saveLive() {
  $("screen").toBlob((blob) => {
    const file = new File([blob], `fourstep-${$("seed").value}.png`, { type: "image/png" });
    save(file, file.name);
    const { width, height } = $("screen");
    const { prompt } = glide.values();
    history.add(file, { ...values(), prompt, seed: Number($("seed").value), size: `${width}x${height}` });
  });
}

function toggleRecorder() {
  if (recorder.on) recorder.stop();
  else recorder.start();
  $("record").ariaPressed = recorder.on;
}

async function toggleWebcam() {
  if (webcam.on) return stopWebcam();
  try {
    await webcam.start();
    $("webcam").ariaPressed = "true";
  } catch (error) {
    const why = error.name === "NotAllowedError" ? "the browser was told not to allow it" : "none was found";
    say(`No webcam: ${why}. It also needs a page over https, or of this machine.`, { failed: true });
  }
}

function stopWebcam() {
  webcam.stop();
  $("webcam").ariaPressed = "false";
}

// -- modes -------------------------------------------------------------------------------------

function setMode() {
  const before = document.body.dataset.mode;
  drawing?.abort();
  changeMode(before, chosen("mode"));
  showMode();
}

function showMode() {
  document.body.dataset.mode = chosen("mode");
  showStart();
  if (isLive()) live.start();
  else {
    live.stop();
    recorder.stop();
  }
}

function setStart(start) {
  choose("start", start);
  showStart();
}

function showStart() {
  document.body.dataset.start = chosen("start");
  if (chosen("start") === "words") stopWebcam();
  fitCanvas();
}

const fitCanvas = () => sketch.resize(...canvasSize());

// -- controls ----------------------------------------------------------------------------------

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!drawing && !isLive()) draw();
});
$("stop").addEventListener("click", () => drawing?.abort());
document.addEventListener("keydown", (event) => {
  const control = event.ctrlKey || event.metaKey;
  const writing = event.target.matches("textarea, input:not([type=range], [type=radio], [type=checkbox])");
  const prompting = event.target === $("prompt") && !event.shiftKey && !event.isComposing;
  if (event.key === "Enter" && (control || prompting)) $("form").requestSubmit();
  else if (event.key === "Escape") drawing?.abort();
  else if (control && event.key.toLowerCase() === "z" && !writing) event.shiftKey ? sketch.redo() : sketch.undo();
  else return;
  if (event.key !== "Escape") event.preventDefault();
});

document.querySelector("#mode").addEventListener("change", setMode);
document.querySelector("#start").addEventListener("change", () => {
  showStart();
  live.touch();
});
$("settings").addEventListener("input", (event) => {
  if (event.target === $("seed")) $("lock").checked = $("seed").value !== "";
  if (event.target === $("size")) return; // half a size is none
  showNumbers();
  live.touch();
});
$("size").addEventListener("change", () => {
  fitCanvas();
  live.touch();
});
document.querySelector("#tool").addEventListener("change", () => {
  if (chosen("tool") !== "mask" || $("strength").dataset.moved) return;
  $("strength").value = 1; // as the service has it with a mask: all that is marked is new
  showNumbers();
});
$("strength").addEventListener("input", () => ($("strength").dataset.moved = "yes"));
$("dice").addEventListener("click", () => {
  rollSeed();
  $("lock").checked = true;
  live.touch();
});
$("undo").addEventListener("click", () => sketch.undo());
$("redo").addEventListener("click", () => sketch.redo());
$("clear").addEventListener("click", () => sketch.clear());
$("fill").addEventListener("click", () => sketch.fill($("colour").value));
$("webcam").addEventListener("click", toggleWebcam);
$("use").addEventListener("click", () => $("screen").toBlob(use));
$("save").addEventListener("click", saveLive);
$("record").addEventListener("click", toggleRecorder);
$("record").hidden = !Recorder.possible;
$("open-key").addEventListener("click", async () => (await askForKey()) && connect());
$("open-help").addEventListener("click", () => $("help").showModal());
sketch.addEventListener("change", () => live.touch());
sketch.addEventListener("undoable", () => {
  $("invite").classList.toggle("gone", sketch.touched);
  $("undo").disabled = !sketch.steps.undo;
  $("redo").disabled = !sketch.steps.redo;
});
live.addEventListener("picture", showPicture);
live.addEventListener("refused", ({ detail }) => refused(detail));
live.addEventListener("state", ({ detail }) => ($("connection").textContent = detail));

startTheme();
startHand(sketch);
if (matchMedia("(max-width: 44rem)").matches) $("settings").open = false;
await history.start();
await connect();
startFiles(use, receive);
