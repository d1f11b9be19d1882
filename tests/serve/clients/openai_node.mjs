import fs from "node:fs";
import OpenAI, { toFile } from "openai";
import { mask, photo, refusalOf, report, size, url, version } from "./common.mjs";

const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
const decoded = (answer) => Buffer.from(answer.data[0].b64_json, "base64");
const upload = (path, type) => toFile(fs.createReadStream(path), path, { type });

const made = await client.images.generate({
  model: "gpt-image-1", prompt: "a red apple", size: "1024x1024", quality: "high",
  moderation: "low", background: "auto",
});
const linked = await client.images.generate({ model: "dall-e-3", prompt: "a cat", style: "vivid" });
size(await (await fetch(linked.data[0].url)).arrayBuffer());
const masked = await client.images.edit({
  model: "gpt-image-1", prompt: "a hat", image: await upload(photo, "image/jpeg"),
  mask: await upload(mask, "image/png"), input_fidelity: "high",
});
const edited = await client.images.edit({
  model: "gpt-image-1", prompt: "a hat", image: [await upload(photo, "image/jpeg")],
});
if (size(decoded(masked)) !== size(decoded(edited))) throw new Error("two shapes");
let events = 0;
const stream = await client.images.generate({
  model: "champion", prompt: "slow cat", stream: true, partial_images: 2,
});
for await (const event of stream) events += event.type.startsWith("image_generation.");
if (events !== 3) throw new Error(`${events} events`);
const refusal = await refusalOf(client.images.generate({ prompt: "a cat", size: "4096x4096" }));
report({
  version: version("openai"), generated: size(decoded(made)), edited: size(decoded(edited)), refusal,
});
