// What the scripts of the JavaScript clients share. Arguments: as of openai_python.py.
import fs from "node:fs";

export const [url, photo, mask] = process.argv.slice(2);

// of an installed package
export const version = (name) =>
  JSON.parse(fs.readFileSync(new URL(`node_modules/${name}/package.json`, import.meta.url))).version;

// WIDTHxHEIGHT of a PNG
export function size(bytes) {
  const png = Buffer.from(bytes);
  if (png.toString("latin1", 1, 4) !== "PNG") throw new Error("it is no PNG");
  return `${png.readUInt32BE(16)}x${png.readUInt32BE(20)}`;
}

export async function refusalOf(promise) {
  try {
    await promise;
  } catch (error) {
    return error.message;
  }
  throw new Error("it was not refused");
}

export const report = (found) => console.log(JSON.stringify(found));
