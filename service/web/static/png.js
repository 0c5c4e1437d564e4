// What a PNG says of how it was made: its text chunks, in the form that tools of the field write.

const SIGNATURE = "\x89PNG\r\n\x1a\n";
const KEYWORD = "parameters\0";

/** The `parameters` text of a PNG's bytes; null where there is none. */
export function parametersText(bytes) {
  const latin1 = (from, to) => String.fromCharCode(...bytes.subarray(from, to));
  if (latin1(0, 8) !== SIGNATURE) return null;
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  for (let at = 8; at + 12 <= bytes.length; ) {
    const end = at + 8 + view.getUint32(at);
    const kind = latin1(at + 4, at + 8);
    if (latin1(at + 8, at + 8 + KEYWORD.length) === KEYWORD) {
      const content = bytes.subarray(at + 8 + KEYWORD.length, end);
      if (kind === "tEXt") return new TextDecoder("latin1").decode(content);
      if (kind === "iTXt") return internationalText(content);
    }
    at = end + 4; // the checksum
  }
  return null;
}

/** PNG, 11.3.3.4: compression flag and method, language, translated keyword, text. */
function internationalText(bytes) {
  if (bytes[0]) return null;
  const language = bytes.indexOf(0, 2);
  return new TextDecoder().decode(bytes.subarray(bytes.indexOf(0, language + 1) + 1));
}

/** Values of a request, as far as the text has them. */
export function parseParameters(text) {
  const lines = text.split("\n");
  const settings = /^Steps: \d/.test(lines.at(-1)) ? lines.pop() : "";
  const at = lines.findLastIndex((line) => line.startsWith("Negative prompt: "));
  const negative = at < 0 ? [] : lines.splice(at);
  const pairs = settings.matchAll(/([A-Z][\w ]*): ("[^"]*"|[^,]*)/g);
  const found = Object.fromEntries([...pairs].map(([, name, value]) => [name, value.replaceAll('"', "")]));
  const values = {
    prompt: lines.join("\n"),
    negative_prompt: negative.join("\n").replace("Negative prompt: ", ""),
    num_inference_steps: found.Steps,
    guidance_scale: found["CFG scale"],
    seed: found.Seed,
    size: found.Size,
    sampler: found.Sampler,
    decoder: found.Decoder ?? "full",
    loras: found.LoRAs?.split(", ").map((each) => {
      const [, name, weight] = each.match(/^(.*): (.*)$/);
      return { name, weight: Number(weight) };
    }) ?? [],
  };
  return Object.fromEntries(Object.entries(values).filter(([, value]) => value !== undefined));
}
