// The canvas as data: a ground, paint over it and a mask over both, with undo. Knows no pointer.

const UNDO_STEPS = 30;
const FINE_PX = 512; // strokes are kept at least this fine, and scaled down when they are sent
const PAPER = "#ffffff";
const MASK = "#ff2d87";
const HALF = 128; // of an alpha of 255: the service takes what is below for transparent
const LAYERS = ["ground", "paint", "mask"];

/** Tells of every change by a `change` event, and by `undoable` when undo or redo come or go. */
export class Sketch extends EventTarget {
  #view;
  #layers = {};
  #done = [];
  #undone = [];
  #stroke = null;
  touched = false; // whether there is anything on it

  constructor(view) {
    super();
    this.#view = view;
  }

  /** Width and height in pixels of what is sent; what is drawn is scaled to them. */
  resize(width, height) {
    if (width === this.width && height === this.height) return;
    const scale = Math.max(1, Math.ceil(FINE_PX / Math.max(width, height)));
    const before = this.#layers;
    for (const name of LAYERS) {
      const fine = name === "ground" ? 1 : scale; // a picture of that size is sent as it came
      const layer = newCanvas(width * fine, height * fine);
      const context = layer.getContext("2d", { willReadFrequently: true });
      if (name === "ground") fill(context, PAPER);
      if (before[name]) cover(context, before[name]);
      this.#layers[name] = layer;
    }
    Object.assign(this, { width, height });
    setSize(this.#view, width * scale, height * scale);
    this.#done = [];
    this.#undone = [];
    this.#changed();
  }

  /** Put the pen down. `tool` is brush, eraser or mask; places and `width` in pixels of the view. */
  begin(tool, colour, width, point) {
    this.#remember(tool === "brush" ? ["paint"] : tool === "mask" ? ["mask"] : ["paint", "mask"]);
    this.touched = true;
    const layers = this.#done.at(-1).layers.map(({ name }) => this.#context(name));
    for (const context of layers) {
      context.globalCompositeOperation = tool === "eraser" ? "destination-out" : "source-over";
      context.strokeStyle = tool === "mask" ? MASK : colour;
      context.lineCap = context.lineJoin = "round";
    }
    this.#stroke = { layers, width, last: point };
    this.move(point);
  }

  /** Draw on to a point `{x, y, pressure}`; a pressure of 1 is the full width. */
  move(point) {
    if (!this.#stroke) return;
    const { layers, width, last } = this.#stroke;
    for (const context of layers) {
      context.lineWidth = width * point.pressure;
      context.beginPath();
      context.moveTo(last.x, last.y);
      context.lineTo(point.x, point.y);
      context.stroke();
    }
    this.#stroke.last = point;
    this.#changed();
  }

  end() {
    this.#stroke = null;
  }

  get drawing() {
    return this.#stroke !== null;
  }

  /** A picture as the ground, its centre where its shape is another. A webcam's is not undone. */
  lay(picture, { undoable = true } = {}) {
    if (undoable) {
      this.#remember(LAYERS);
      for (const name of ["paint", "mask"]) this.#wipe(name);
    }
    this.touched = true;
    cover(this.#context("ground"), picture);
    this.#changed();
  }

  /** One colour all over. */
  fill(colour) {
    this.#remember(["ground", "paint"]);
    this.touched = true;
    fill(this.#context("ground"), colour);
    this.#wipe("paint");
    this.#changed();
  }

  clear() {
    this.#remember(LAYERS);
    this.touched = false;
    fill(this.#context("ground"), PAPER);
    for (const name of ["paint", "mask"]) this.#wipe(name);
    this.#changed();
  }

  undo() {
    this.#swap(this.#done, this.#undone);
  }

  redo() {
    this.#swap(this.#undone, this.#done);
  }

  get steps() {
    return { undo: this.#done.length, redo: this.#undone.length };
  }

  /** What is drawn, as a `data:` URL of the size that is sent. */
  image(type) {
    const context = this.#sheet();
    for (const name of ["ground", "paint"]) cover(context, this.#layers[name]);
    return context.canvas.toDataURL(type, 0.92);
  }

  /** A `data:` URL whose transparency marks what is to be drawn anew; null where nothing is. */
  mask() {
    const context = this.#sheet();
    fill(context, "#000000");
    context.globalCompositeOperation = "destination-out";
    cover(context, this.#layers.mask);
    const { data } = context.getImageData(0, 0, this.width, this.height);
    const isMarked = (value, index) => index % 4 === 3 && value < HALF;
    return data.some(isMarked) ? context.canvas.toDataURL("image/png") : null;
  }

  #sheet() {
    return newCanvas(this.width, this.height).getContext("2d", { willReadFrequently: true });
  }

  #context(name) {
    return this.#layers[name].getContext("2d");
  }

  #wipe(name) {
    const { width, height } = this.#layers[name];
    this.#context(name).clearRect(0, 0, width, height);
  }

  #copy(names) {
    const layers = names.map((name) => {
      const { width, height } = this.#layers[name];
      return { name, pixels: this.#context(name).getImageData(0, 0, width, height) };
    });
    return { touched: this.touched, layers };
  }

  #remember(names) {
    this.#done.push(this.#copy(names));
    this.#done.splice(0, this.#done.length - UNDO_STEPS);
    this.#undone = [];
    this.dispatchEvent(new Event("undoable"));
  }

  #swap(from, to) {
    if (this.drawing || !from.length) return;
    const before = from.pop();
    to.push(this.#copy(before.layers.map(({ name }) => name)));
    this.touched = before.touched;
    for (const { name, pixels } of before.layers) this.#context(name).putImageData(pixels, 0, 0);
    this.#changed();
  }

  #changed() {
    const context = this.#view.getContext("2d");
    context.globalAlpha = 1;
    for (const name of ["ground", "paint"]) cover(context, this.#layers[name]);
    context.globalAlpha = 0.5;
    cover(context, this.#layers.mask);
    this.dispatchEvent(new Event("change"));
    this.dispatchEvent(new Event("undoable"));
  }
}

const newCanvas = (width, height) => Object.assign(document.createElement("canvas"), { width, height });

function fill(context, colour) {
  context.fillStyle = colour;
  context.fillRect(0, 0, context.canvas.width, context.canvas.height);
}

/** Give a canvas that is shown another size; its sheet keeps that shape. */
export function setSize(canvas, width, height) {
  Object.assign(canvas, { width, height });
  canvas.parentElement.style.setProperty("--ratio", width / height);
}

/** Draw a picture over all of a canvas, its centre where its shape is another. */
export function cover(context, picture) {
  const { width, height } = context.canvas;
  const [ownWidth, ownHeight] = [picture.videoWidth ?? picture.width, picture.videoHeight ?? picture.height];
  const scale = Math.max(width / ownWidth, height / ownHeight);
  const [across, down] = [ownWidth * scale, ownHeight * scale];
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, (width - across) / 2, (height - down) / 2, across, down);
}
