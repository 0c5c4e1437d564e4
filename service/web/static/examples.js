// What to ask of a model for a start. The demo models know one small drawn world and no other words.

const WORLD = {
  sizes: ["large", "small"],
  colours: ["red", "orange", "brown", "teal", "navy", "purple", "black", "silver"],
  shapes: ["circle", "square", "triangle", "star", "heart", "moon", "house", "tree"],
  places: ["center", "left", "right", "top", "bottom"],
  backgrounds: ["white", "yellow", "green", "blue", "pink"],
};
/** sRGB of the demo world's objects and backgrounds, as its painter has them. */
const INKS = [
  "#d72328", "#f58214", "#73411e", "#007d7d", "#232d87", "#872daf", "#28282d", "#a5a8b2",
  "#f4f3ee", "#fadc5a", "#6ec369", "#6eb9f0", "#faa5be",
];

const DEMO = {
  about: `This demo model knows one small world: a ${WORLD.sizes.join(" or ")} ${listed(WORLD.shapes)}; ` +
    `in ${listed(WORLD.colours)}; on ${listed(WORLD.backgrounds)}; by day or at night, flat or outlined.`,
  prompts: [
    "a large red house at the center on a green background, outlined",
    "a large purple heart at the center on a yellow background",
    "a large orange moon on a blue background, at night",
    "a large teal star on a pink background",
    "a large navy tree on a white background, outlined",
  ],
  surprise: () =>
    `a large ${any(WORLD.colours)} ${any(WORLD.shapes)} at the ${any(WORLD.places)} on a ` +
    `${any(WORLD.backgrounds)} background${any(["", ", at night"])}${any(["", ", outlined"])}`,
  inks: INKS,
};
const MOVING = { ...DEMO, about: `${DEMO.about} What it draws moves to the right.` };
const ANY = {
  about: "",
  prompts: [
    "a lighthouse on a cliff at dusk, watercolour",
    "portrait of an old sailor, soft window light, 35 mm photograph",
    "a bowl of ramen, studio photograph, steam",
    "a paper-cut fox in a snowy forest",
    "a small greenhouse full of ferns, morning light, isometric",
  ],
  surprise: null,
  inks: [
    "#1d1d22", "#ffffff", "#8a8f99", "#c2452d", "#e99a3c", "#f2d16b",
    "#4f8f5b", "#3f7fbf", "#5a4ba8", "#d98aa6", "#7a5236", "#bfe3ee",
  ],
};

/** For a model of `GET /v1/models`: words about it, prompts, one by chance (or none), colours. */
export function examplesFor({ id, details }) {
  if (!id.startsWith("demo-")) return ANY;
  return details.frames_per_second ? MOVING : DEMO;
}

function listed(words) {
  return `${words.slice(0, -1).join(", ")} or ${words.at(-1)}`;
}

function any(words) {
  return words[Math.floor(Math.random() * words.length)];
}
