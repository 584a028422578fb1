// OpenAI's SDK for JavaScript: chats and responses.
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import * as checks from "./client_checks.mjs";

const { CALL, FUNCTION, GREET, GREETING, MODEL, RECALL, Report, SUNNY, TOOL, URL, same } = checks;
const client = new OpenAI({ baseURL: URL, apiKey: "none" });
const FLAT = { type: "function", ...FUNCTION };
const user = (content) => ({ role: "user", content });
const chat = (fields) => client.chat.completions.create({ model: MODEL, ...fields });
const respond = (fields) => client.responses.create({ model: MODEL, ...fields });

await checks.report("openai (JavaScript), chat", "openai", {
  async text() {
    same((await chat({ messages: [user(GREET)] })).choices[0].message.content, GREETING);
  },
  async stream() {
    const pieces = [];
    for await (const chunk of await chat({ messages: [user(GREET)], stream: true }))
      pieces.push(chunk.choices[0].delta.content ?? "");
    checks.streamed(pieces);
    const asked = { model: MODEL, messages: [user(CALL)], tools: [TOOL] };
    const made = await client.chat.completions.stream(asked).finalChatCompletion();
    same(JSON.parse(made.choices[0].message.tool_calls[0].function.arguments), { city: "Oslo" });
  },
  async tools() {
    const made = await chat({ messages: [user(CALL)], tools: [TOOL] });
    same(JSON.parse(made.choices[0].message.tool_calls[0].function.arguments), { city: "Oslo" });
    const run = { ...TOOL.function, parse: JSON.parse, function: () => SUNNY };
    const tools = [{ type: "function", function: run }];
    const runner = client.chat.completions.runTools({ model: MODEL, messages: [user(CALL)], tools });
    same(await runner.finalContent(), `It says: ${SUNNY}`);
  },
  async forced() {
    for (const tool_choice of ["required", { type: "function", function: { name: "weather" } }]) {
      const made = await chat({ messages: [user(GREET)], tools: [TOOL], tool_choice });
      checks.city(JSON.parse(made.choices[0].message.tool_calls[0].function.arguments));
    }
  },
  async structured() {
    const response_format = zodResponseFormat(Report, "report");
    const asked = { model: MODEL, messages: [user(GREET)], response_format };
    checks.city((await client.chat.completions.parse(asked)).choices[0].message.parsed);
  },
  async second() {
    const first = (await chat({ messages: [user(GREET)] })).choices[0].message;
    const again = await chat({ messages: [user(GREET), first, user(RECALL)] });
    checks.recalls(again.choices[0].message.content);
    const called = (await chat({ messages: [user(CALL)], tools: [TOOL] })).choices[0].message;
    const result = { role: "tool", tool_call_id: called.tool_calls[0].id, content: SUNNY };
    const made = await chat({ messages: [user(CALL), called, result], tools: [TOOL] });
    same(made.choices[0].message.content, `It says: ${SUNNY}`);
  },
});

await checks.report("openai (JavaScript), responses", "openai", {
  async text() {
    same((await respond({ input: GREET })).output_text, GREETING);
  },
  async stream() {
    const pieces = [];
    for await (const event of await respond({ input: GREET, stream: true }))
      if (event.type === "response.output_text.delta") pieces.push(event.delta);
    checks.streamed(pieces);
    const stream = client.responses.stream({ model: MODEL, input: CALL, tools: [FLAT] });
    same(JSON.parse((await stream.finalResponse()).output[0].arguments), { city: "Oslo" });
  },
  async tools() {
    const [call] = (await respond({ input: CALL, tools: [FLAT] })).output;
    same([call.name, JSON.parse(call.arguments)], ["weather", { city: "Oslo" }]);
  },
  async forced() {
    for (const tool_choice of ["required", { type: "function", name: "weather" }]) {
      const [call] = (await respond({ input: GREET, tools: [FLAT], tool_choice })).output;
      checks.city(JSON.parse(call.arguments));
    }
  },
  async structured() {
    const text = { format: zodTextFormat(Report, "report") };
    checks.city((await client.responses.parse({ model: MODEL, input: GREET, text })).output_parsed);
  },
  async second() {
    const first = await respond({ input: GREET });
    const again = await respond({ input: [user(GREET), ...first.output, user(RECALL)] });
    checks.recalls(again.output_text);
    const [call] = (await respond({ input: CALL, tools: [FLAT] })).output;
    const result = { type: "function_call_output", call_id: call.call_id, output: SUNNY };
    const made = await respond({ input: [user(CALL), call, result], tools: [FLAT] });
    same(made.output_text, `It says: ${SUNNY}`);
  },
});
