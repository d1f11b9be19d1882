import { DallEAPIWrapper } from "@langchain/openai";
import { refusalOf, report, size, url, version } from "./common.mjs";

const settings = { apiKey: "none", baseUrl: url, maxRetries: 0 };
const link = await new DallEAPIWrapper(settings).invoke("a red apple");
const made = await (await fetch(link)).arrayBuffer();
const refusal = await refusalOf(
  new DallEAPIWrapper({ ...settings, size: "4096x4096" }).invoke("a red apple"),
);
report({ version: version("@langchain/openai"), generated: size(made), edited: null, refusal });
