import fs from "node:fs";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateImage } from "ai";
import { photo, refusalOf, report, size, url, version } from "./common.mjs";

const provider = createOpenAICompatible({ name: "tessera", baseURL: url, apiKey: "none" });
const model = provider.imageModel("champion");

const made = await generateImage({ model, prompt: "a red apple", n: 2, size: "1024x1024" });
if (made.images.length !== 2) throw new Error(`${made.images.length} images`);
const edited = await generateImage({
  model, prompt: { text: "a hat", images: [fs.readFileSync(photo)] },
});
const refusal = await refusalOf(
  generateImage({ model, prompt: "a cat", size: "4096x4096", maxRetries: 0 }),
);
report({
  version: version("@ai-sdk/openai-compatible"), generated: size(made.image.uint8Array),
  edited: size(edited.image.uint8Array), refusal,
});
