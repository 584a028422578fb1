// The AI SDK, with its providers for OpenAI (chats, responses) and for servers of OpenAI's kind.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import * as checks from "./client_checks.mjs";

const { CALL, GREET, GREETING, MODEL, RECALL, Report, SUNNY, URL, same } = checks;
const openai = createOpenAI({ baseURL: URL, apiKey: "none" });
const settings = { name: "lorafx", baseURL: URL, supportsStructuredOutputs: true };
const inputSchema = z.object({ city: z.enum(["Oslo", "Lima"]) });
const description = "The weather in a city";
const tools = { weather: tool({ description, inputSchema }) };
const run = { weather: tool({ description, inputSchema, execute: async () => SUNNY }) };

// Without `store: false` the next turn of a response refers to what OpenAI would have stored.
const generate = (asked) =>
  generateText({ ...asked, providerOptions: { openai: { store: false } } });

const checksOf = (model) => ({
  async text() {
    same((await generate({ model, prompt: GREET })).text, GREETING);
  },
  async stream() {
    const pieces = [];
    for await (const piece of streamText({ model, prompt: GREET }).textStream) pieces.push(piece);
    checks.streamed(pieces);
    const [call] = await streamText({ model, prompt: CALL, tools }).toolCalls;
    same(call.input, { city: "Oslo" });
  },
  async tools() {
    const [call] = (await generate({ model, prompt: CALL, tools })).toolCalls;
    same([call.toolName, call.input], ["weather", { city: "Oslo" }]);
  },
  async forced() {
    for (const toolChoice of ["required", { type: "tool", toolName: "weather" }]) {
      const made = await generate({ model, prompt: GREET, tools, toolChoice });
      checks.city(made.toolCalls[0].input);
    }
  },
  async structured() {
    const output = Output.object({ schema: Report });
    checks.city((await generate({ model, prompt: GREET, output })).output);
  },
  async second() {
    const before = [{ role: "user", content: GREET }];
    const first = await generate({ model, messages: before });
    const turns = [...before, ...first.response.messages, { role: "user", content: RECALL }];
    checks.recalls((await generate({ model, messages: turns })).text);
    const stopWhen = stepCountIs(3);
    const made = await generate({ model, prompt: CALL, tools: run, stopWhen });
    same(made.text, `It says: ${SUNNY}`);
  },
});

const compatible = createOpenAICompatible(settings)(MODEL);
await checks.report("AI SDK, openai-compatible", "ai", checksOf(compatible));
await checks.report("AI SDK, openai, chat", "ai", checksOf(openai.chat(MODEL)));
await checks.report("AI SDK, openai, responses", "ai", checksOf(openai(MODEL)));
