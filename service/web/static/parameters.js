// The form and a request's values: bounds from the model, values out of the form and back into it.

import { $, choose, chosen, element } from "./dom.js";

const FIELDS = {
  prompt: "prompt",
  negative_prompt: "negative",
  num_inference_steps: "steps",
  guidance_scale: "guidance",
  size: "size",
  sampler: "sampler",
  decoder: "decoder",
  strength: "strength",
};
const CHOICES = { sampler: ["samplers", "default_sampler"], decoder: ["decoders", "default_decoder"] };
const MAX_RANDOM_SEED = 2 ** 32; // as the service draws them: what other tools can read back
const LIVE = { steps: 2, strength: 0.6 }; // at once, and near to what the hand draws

let model;
const memory = {}; // of each mode: what the other one has chosen otherwise

/** Fit the form to a model of `GET /v1/models`. */
export function fitTo(served) {
  model = served;
  const details = model.details;
  const steps = details.default_num_inference_steps;
  memory.pictures = { steps, strength: 0.8, lock: false, start: "words" };
  memory.clips = { ...memory.pictures };
  memory.live = { ...LIVE, steps: Math.min(LIVE.steps, steps), lock: true, start: "canvas" };
  $("steps").max = Math.min(details.max_num_inference_steps, 50);
  $("count").max = details.max_images;
  $("frames").max = details.max_num_frames;
  $("frames").value = details.default_num_frames;
  const clips = details.frames_per_second > 0;
  if (clips && $("clips").hidden) choose("mode", "clips");
  $("clips").hidden = !clips;
  $("start").hidden = clips; // they are drawn from words alone
  $("guidance").value = details.default_guidance_scale;
  $("size").placeholder = details.default_size;
  $("sizes").replaceChildren(...sizes(details).map((size) => new Option(size)));
  for (const [id, [names, usual]] of Object.entries(CHOICES)) {
    const options = details[names].map((name) => new Option(name, name, false, name === details[usual]));
    $(id).replaceChildren(...options);
    $(id).closest("label").hidden = options.length < 2;
  }
  $("loras").hidden = details.loras.length === 0;
  $("loras").replaceChildren($("loras").firstElementChild, ...details.loras.map(slider));
  recall(chosen("mode"));
}

/** Square, wide and tall ones, and twice those, as far as the model goes. */
function sizes(details) {
  const [side] = details.default_size.split("x").map(Number);
  const step = details.size_multiple_px;
  const shapes = [[1, 1], [1.5, 1], [1, 1.5], [2, 1], [1, 2], [2, 2]];
  return shapes
    .map((shape) => shape.map((share) => Math.round((side * share) / step) * step))
    .filter((pair) => Math.max(...pair) <= details.max_size_px)
    .map((pair) => pair.join("x"));
}

function slider(name) {
  const input = element("input", { type: "range", min: -1, max: 2, step: 0.05, id: `lora-${name}` });
  input.dataset.lora = name;
  input.value = model.details.default_loras[name] ?? 0;
  const output = element("output", { value: Number(input.value).toFixed(2) });
  output.htmlFor = input.id;
  return element("label", { className: "wide" }, element("span", {}, `${name} `, output), input);
}

/** Each mode has steps, a strength, a lock on the seed and a start of its own. */
export function changeMode(from, to) {
  const [steps, strength] = [$("steps").value, $("strength").value];
  memory[from] = { steps, strength, lock: $("lock").checked, start: chosen("start") };
  recall(to);
}

function recall(mode) {
  const { steps, strength, lock, start } = memory[mode];
  $("steps").value = steps;
  $("strength").value = strength;
  $("lock").checked = lock;
  choose("start", start);
  showNumbers();
}

/** What requests and live sessions have; those without a picture have no use for the strength. The seed is `nextSeed`'s. */
export function values() {
  const found = {
    prompt: $("prompt").value,
    negative_prompt: $("negative").value || null,
    num_inference_steps: Number($("steps").value),
    guidance_scale: $("guidance").value === "" ? null : Number($("guidance").value),
    size: $("size").value || $("size").placeholder,
    sampler: $("sampler").value,
    decoder: $("decoder").value,
    strength: Number($("strength").value),
  };
  const sliders = [...$("loras").querySelectorAll("input")];
  const weights = sliders.map(({ dataset, value }) => ({ name: dataset.lora, weight: Number(value) }));
  return weights.length ? { ...found, loras: weights } : found;
}

/** The seed to draw with: the locked one, else a new one, which the form shows. */
export function nextSeed() {
  if (!$("lock").checked || !$("seed").value) rollSeed();
  return Number($("seed").value);
}

export function rollSeed() {
  $("seed").value = Math.floor(Math.random() * MAX_RANDOM_SEED);
}

/** Width and height of the canvas, as the size field says or the model has it. */
export function canvasSize() {
  const { min_size_px: min, max_size_px: max, size_multiple_px: step } = model.details;
  const read = (text) => /^(\d+)x(\d+)$/.exec(text)?.slice(1).map(Number);
  const wanted = read($("size").value);
  const fits = wanted?.every((side) => side >= min && side <= max && side % step === 0);
  return fits ? wanted : read(model.details.default_size);
}

/** Put a request's values into the form; names those that this model does not have. */
export function restore(given) {
  const unknown = [];
  for (const [name, id] of Object.entries(FIELDS)) {
    if (!(name in given)) continue;
    const lacks = name in CHOICES && !model.details[CHOICES[name][0]].includes(given[name]);
    if (lacks) unknown.push(`${name} ${given[name]}`);
    else $(id).value = given[name] ?? "";
  }
  if ("seed" in given) {
    $("seed").value = given.seed;
    $("lock").checked = true;
  }
  if (given.loras) {
    for (const input of $("loras").querySelectorAll("input")) input.value = 0;
    for (const { name, weight } of given.loras) {
      const input = $(`lora-${name}`);
      if (input) input.value = weight;
      else unknown.push(`LoRA ${name}`);
    }
  }
  showNumbers();
  return unknown;
}

/** Beside each slider stands its number. */
export function showNumbers() {
  for (const output of document.querySelectorAll("#settings output")) {
    const input = $(output.htmlFor.value);
    output.value = input.step.includes(".") ? Number(input.value).toFixed(2) : input.value;
  }
}
