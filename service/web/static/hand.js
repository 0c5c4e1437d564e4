// The hand on the canvas: mouse, finger, pen and keyboard become strokes of a sketch.

import { $, choose, chosen } from "./dom.js";

const STEP = 1 / 40; // of the canvas, by an arrow key; four times that with Shift
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const TOOLS = { b: "brush", e: "eraser", m: "mask" };

export function startHand(sketch) {
  const paper = $("paper");
  const pen = { x: 0.5, y: 0.5 }; // where the keyboard's is, as shares of the canvas
  let pointer = null;

  const width = () => (Number($("width").value) / 256) * Math.max(paper.width, paper.height);
  const begin = (point) => sketch.begin(chosen("tool"), $("colour").value, width(), point);

  const pointOf = (event) => {
    const box = paper.getBoundingClientRect();
    return {
      x: ((event.clientX - box.left) / box.width) * paper.width,
      y: ((event.clientY - box.top) / box.height) * paper.height,
      pressure: event.pointerType === "pen" ? 0.3 + 0.7 * event.pressure : 1,
    };
  };
  paper.addEventListener("pointerdown", (event) => {
    if (pointer !== null || event.button !== 0) return;
    pointer = event.pointerId;
    paper.setPointerCapture(pointer);
    sketch.end(); // of the keyboard's pen, where that was down
    begin(pointOf(event));
  });
  paper.addEventListener("pointermove", (event) => {
    if (event.pointerId !== pointer) return;
    const passed = event.getCoalescedEvents?.() ?? [];
    for (const each of passed.length ? passed : [event]) sketch.move(pointOf(each));
  });
  for (const kind of ["pointerup", "pointercancel"])
    paper.addEventListener(kind, (event) => {
      if (event.pointerId !== pointer) return;
      pointer = null;
      sketch.end();
    });

  const penPoint = () => ({ x: pen.x * paper.width, y: pen.y * paper.height, pressure: 1 });
  const showPen = () => {
    Object.assign($("pen").style, { left: `${100 * pen.x}%`, top: `${100 * pen.y}%` });
    $("pen").classList.toggle("down", sketch.drawing);
    const [x, y] = [pen.x, pen.y].map((share) => Math.round(100 * share));
    $("pen-says").textContent = `pen ${sketch.drawing ? "down" : "up"}, ${x} % from the left, ${y} % from the top`;
  };
  const keys = {
    " ": () => (sketch.drawing ? sketch.end() : begin(penPoint())),
    "[": () => $("width").stepDown(2),
    "]": () => $("width").stepUp(2),
  };
  paper.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const key = event.key.toLowerCase();
    if (event.key in ARROWS) {
      const step = event.shiftKey ? 4 * STEP : STEP;
      const [right, down] = ARROWS[event.key];
      pen.x = within(pen.x + right * step);
      pen.y = within(pen.y + down * step);
      sketch.move(penPoint());
    } else if (key in TOOLS) choose("tool", TOOLS[key]);
    else if (event.key in keys) keys[event.key]();
    else return;
    event.preventDefault();
    showPen();
  });
  paper.addEventListener("focus", () => {
    $("pen").hidden = !paper.matches(":focus-visible");
    showPen();
  });
  paper.addEventListener("blur", () => {
    $("pen").hidden = true;
    sketch.end();
  });
}

const within = (share) => Math.min(1, Math.max(0, share));
