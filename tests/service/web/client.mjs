// The `openai` package for Node against the service at argv[2]: prints what it got, as JSON.
import OpenAI, { toFile } from "openai";

const client = new OpenAI({ apiKey: "none", baseURL: `${process.argv[2]}/v1`, maxRetries: 0 });
const prompt = "a red star";
const image = () => toFile(Buffer.from(process.argv[3], "base64"), "in.png", { type: "image/png" });
const streamed = async (stream) => {
  const events = [];
  for await (const event of stream) events.push(event);
  return events;
};

const url = await client.images.generate({ prompt, seed: 7, response_format: "url" });
const fetched = await fetch(url.data[0].url);
const refused = await client.images
  .generate({ prompt, size: "60x64" })
  .catch((error) => ({ name: error.constructor.name, status: error.status, param: error.param }));
console.log(
  JSON.stringify({
    generated: await client.images.generate({ prompt, n: 2, seed: 7 }),
    url: {
      address: url.data[0].url,
      type: fetched.headers.get("content-type"),
      data: Buffer.from(await fetched.arrayBuffer()).toString("base64"),
    },
    edited: await client.images.edit({ image: await image(), prompt, seed: 3, strength: 0.5 }),
    edited_list: await client.images.edit({ image: [await image()], prompt, seed: 3, strength: 0.5 }),
    streamed: await streamed(
      await client.images.generate({ prompt, seed: 7, stream: true, partial_images: 1 }),
    ),
    edit_streamed: await streamed(
      await client.images.edit({ image: await image(), prompt, seed: 3, strength: 0.5, stream: true }),
    ),
    models: (await client.models.list()).data.map((model) => model.id),
    refused,
  }),
);
