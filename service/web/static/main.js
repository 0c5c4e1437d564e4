// The studio: what each control does. All else is in the module that is named for it.

import { ask } from "./api.js";
import { $, choose, chosen, say } from "./dom.js";
import { Drawing } from "./drawing.js";
import { startHand } from "./hand.js";
import { History } from "./history.js";
import { askForKey } from "./key.js";
import { LiveSession } from "./live.js";
import { canvasSize, changeMode, fitTo, nextSeed, restore, rollSeed, showNumbers, values } from "./parameters.js";
import { showFile } from "./pictures.js";
import { parametersText, parseParameters } from "./png.js";
import { Screen } from "./screen.js";
import { Sketch } from "./sketch.js";
import { Webcam, startFiles } from "./sources.js";
import { startTheme } from "./theme.js";
import { welcome } from "./welcome.js";

const RECONNECT_MS = 3000;

const sketch = new Sketch($("paper"));
const webcam = new Webcam(sketch);
const screen = new Screen();
const history = new History(bringBack);
const drawing = new Drawing({ finished: (file, made) => history.add(file, made), use, refused });
const live = new LiveSession(
  () => ({ ...values(), ...towards(), seed: $("lock").checked ? nextSeed() : null }),
  () => pictures("image/jpeg"),
);

const isLive = () => document.body.dataset.mode === "live";

/** Where the slider stands between prompt A and prompt B. */
function towards() {
  const prompt_b = $("prompt-b").value.trim();
  return prompt_b ? { prompt_b, prompt_b_share: Number($("share").value) } : { prompt_b: null };
}

/** The prompt that says most of the picture. */
const nearer = () => (towards().prompt_b_share > 0.5 ? towards().prompt_b : $("prompt").value);

/** What the canvas gives to a frame or an edit. One that nobody has touched has nothing to say. */
function pictures(type) {
  if (chosen("start") !== "canvas" || !sketch.touched) return {};
  const mask = sketch.mask();
  return { image: sketch.image(type), ...(mask && { mask }) };
}

function draw() {
  const parameters = { ...values(), seed: nextSeed() };
  if (chosen("mode") === "clips") drawing.startClip(parameters, Number($("frames").value));
  else drawing.start(parameters, pictures("image/png"), Number($("count").value));
}

// -- the service -------------------------------------------------------------------------------

async function connect() {
  try {
    const [model] = (await (await ask("models")).json()).data;
    fitTo(model);
    $("model").textContent = `${model.id} on ${model.details.engine}, ${model.details.precision}`;
    welcome(model, drawExample);
    showMode();
    for (const waiting of document.querySelectorAll("[inert]")) waiting.inert = false;
    say("");
  } catch (error) {
    say(error.message, { failed: true });
    if (error.status !== 401) setTimeout(connect, RECONNECT_MS);
    else if (await askForKey()) await connect();
  }
}

function drawExample(prompt) {
  $("prompt").value = prompt;
  $("prompt").dispatchEvent(new Event("input"));
  if (!isLive()) $("form").requestSubmit();
}

async function refused(error) {
  say(error.message, { failed: true });
  if (error.status !== 401 || !(await askForKey())) return;
  say("");
  if (isLive()) live.start();
}

// -- files -------------------------------------------------------------------------------------

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
  choose("start", "canvas");
  showStart();
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

function showMode() {
  document.body.dataset.mode = chosen("mode");
  showStart();
  if (isLive()) live.start();
  else {
    live.stop();
    screen.stopRecording();
  }
}

function showStart() {
  document.body.dataset.start = chosen("start");
  if (chosen("start") === "words") stopWebcam();
  fitCanvas();
}

function fitCanvas() {
  sketch.resize(...canvasSize());
}

// -- controls ----------------------------------------------------------------------------------

const on = (id, type, handle) => $(id).addEventListener(type, handle);

on("form", "submit", (event) => {
  event.preventDefault();
  if (!drawing.busy && !isLive()) draw();
});
on("stop", "click", () => drawing.stop());
on("mode", "change", () => {
  drawing.stop();
  changeMode(document.body.dataset.mode, chosen("mode"));
  showMode();
});
on("start", "change", () => {
  showStart();
  live.touch();
});
on("settings", "input", (event) => {
  if (event.target === $("size")) return; // half a size is none
  if (event.target === $("seed")) $("lock").checked = $("seed").value !== "";
  showNumbers();
  live.touch();
});
on("size", "change", () => {
  fitCanvas();
  live.touch();
});
on("dice", "click", () => {
  rollSeed();
  $("lock").checked = true;
  live.touch();
});
for (const id of ["prompt", "prompt-b", "share"])
  on(id, "input", () => {
    $("share").disabled = !$("prompt-b").value.trim();
    live.touch();
  });
on("strength", "input", () => ($("strength").dataset.moved = "yes"));
on("tool", "change", () => {
  if (chosen("tool") !== "mask" || $("strength").dataset.moved) return;
  $("strength").value = 1; // as the service has it with a mask: all that is marked is new
  showNumbers();
});
on("undo", "click", () => sketch.undo());
on("redo", "click", () => sketch.redo());
on("clear", "click", () => sketch.clear());
on("fill", "click", () => sketch.fill($("colour").value));
on("webcam", "click", toggleWebcam);
on("use", "click", async () => use((await screen.file()).file));
on("save", "click", async () => {
  const { file, seed, size } = await screen.save();
  history.add(file, { ...values(), prompt: nearer(), seed, size });
});
on("open-key", "click", async () => (await askForKey()) && connect());
on("open-help", "click", () => $("help").showModal());

document.addEventListener("keydown", (event) => {
  const control = event.ctrlKey || event.metaKey;
  const prompting = event.target === $("prompt") && !event.shiftKey && !event.isComposing;
  const writing = event.target.matches("textarea, #seed, #size, #negative"); // they undo their own
  const undoing = control && !writing && event.key.toLowerCase() === "z";
  if (event.key === "Escape") drawing.stop();
  else if (event.key === "Enter" && (control || prompting)) $("form").requestSubmit();
  else if (undoing && event.shiftKey) sketch.redo();
  else if (undoing) sketch.undo();
  else return;
  if (event.key !== "Escape") event.preventDefault();
});

sketch.addEventListener("change", () => live.touch());
sketch.addEventListener("undoable", () => {
  $("invite").classList.toggle("gone", sketch.touched);
  $("undo").disabled = !sketch.steps.undo;
  $("redo").disabled = !sketch.steps.redo;
});
const showBusy = () => ($("screen").dataset.busy = live.busy || screen.behind);
live.addEventListener("touched", showBusy);
live.addEventListener("picture", async ({ detail }) => {
  if (!(await screen.show(detail, nearer()))) return;
  $("seed").value = detail.seed;
  say(detail.warnings.join("; "));
  showBusy();
});
live.addEventListener("refused", ({ detail }) => {
  refused(detail);
  showBusy();
});
live.addEventListener("state", ({ detail }) => ($("connection").textContent = detail));

startTheme();
startHand(sketch);
if (matchMedia("(max-width: 44rem)").matches) $("settings").open = false;
await history.start();
await connect();
startFiles(use, receive);
