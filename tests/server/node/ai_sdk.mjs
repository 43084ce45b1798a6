// The AI SDK against the server at argv[2]: prints what it got as JSON. argv[3]: {model, sum, weather, tools, seed}.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";

const [base, given] = process.argv.slice(2);
const { model: name, sum, weather, tools: offered, seed } = JSON.parse(given);
const model = createOpenAICompatible({ name: "here", baseURL: `${base}/v1`, includeUsage: true })(name);
const errors = [];
const asked = [];
const tools = Object.fromEntries(offered.map(({ function: { name, description, parameters } }) => [name, tool({
  description,
  inputSchema: jsonSchema(parameters),
  execute: (argument) => { asked.push([name, argument]); return "21 degrees, sunny"; },
})]));
const onError = ({ error }) => errors.push(String(error));

const whole = await generateText({ model, prompt: sum, seed });
const text = streamText({ model, prompt: sum, seed, onError });
const streamed = {
  text: await text.text, reasoning: await text.reasoningText, finish: await text.finishReason, usage: await text.usage,
};
const loop = streamText({ model, prompt: weather, temperature: 0, tools, stopWhen: stepCountIs(3), onError });
const report = await loop.text;
const finishes = (await loop.steps).map((step) => step.finishReason);

console.log(JSON.stringify({
  whole: { text: whole.text, reasoning: whole.reasoningText, finish: whole.finishReason },
  streamed, report, asked, finishes, errors,
}));
