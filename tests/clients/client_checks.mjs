// What each client in JavaScript is asked to do: see client_checks.py.
import assert from "node:assert";
import { readFileSync } from "node:fs";
import { z } from "zod";

export const URL = `${process.env.LORAFX_SERVER}/v1`, MODEL = "tiny:a1";
export const say = (text) => `Say «${text}»`;
export const GREETING = "Good morning", GREET = say(GREETING), RECALL = say("recall");
const called = JSON.stringify({ name: "weather", arguments: { city: "Oslo" } });
export const CALL = say(`<tool_call>\n${called}\n</tool_call>`), SUNNY = "sunny and 21 degrees";
const parameters = {
  type: "object",
  properties: { city: { type: "string", enum: ["Oslo", "Lima"] } },
  required: ["city"],
  additionalProperties: false,
};
export const FUNCTION = { name: "weather", description: "The weather in a city", parameters };
export const TOOL = { type: "function", function: FUNCTION };
export const Report = z.object({ city: z.enum(["Oslo", "Lima"]), warm: z.boolean() });

export const same = (found, wanted) => assert.deepStrictEqual(found, wanted);
export const city = (found) => assert(["Oslo", "Lima"].includes(found.city), JSON.stringify(found));

export function recalls(text) {
  for (const part of [`user: ${GREET}`, `assistant: ${GREETING}`]) assert(text.includes(part), text);
}

export function streamed(pieces) {
  same(pieces.join(""), GREETING);
  assert(pieces.filter(Boolean).length > 1);
}

export async function report(client, name, checks) {
  const file = `node_modules/${name}/package.json`;
  const row = { client, version: JSON.parse(readFileSync(file)).version };
  for (const [check, made] of Object.entries(checks)) {
    try {
      await made();
      row[check] = "yes";
    } catch (error) {
      row[check] = `${error.name}: ${error.message}`.slice(0, 600);
    }
  }
  console.log(JSON.stringify(row));
}
