// openai-node against the server at argv[2]: prints what it got as JSON. argv[3]: {model, sum, weather, tools, seed}.
import OpenAI from "openai";

const [base, given] = process.argv.slice(2);
const { model, sum, weather, tools, seed } = JSON.parse(given);
const client = new OpenAI({ baseURL: `${base}/v1`, apiKey: "none", maxRetries: 0 });
const asking = (content) => [{ role: "user", content }];

const whole = await client.chat.completions.create({ model, messages: asking(sum), seed });
const text = await client.chat.completions.stream({ model, messages: asking(sum), seed }).finalChatCompletion();
const call = await client.chat.completions.stream({ model, messages: asking(weather), temperature: 0, tools }).finalChatCompletion();
const refused = await client.chat.completions.create({ model, messages: asking(sum), n: 9 }).catch((error) => error);

// A loop of calls, as the SDK runs it.
const asked = [];
const functions = tools.map(({ function: { name, description, parameters } }) => ({
  type: "function",
  function: {
    name, description, parameters, parse: JSON.parse,
    function: (argument) => { asked.push([name, argument]); return "21 degrees, sunny"; },
  },
}));
const loop = client.chat.completions.runTools({ model, messages: asking(weather), temperature: 0, tools: functions, stream: true });
const report = await loop.finalContent();

console.log(JSON.stringify({
  whole: whole.choices[0], text: text.choices[0], call: call.choices[0], asked, report,
  refused: { status: refused.status, param: refused.param, code: refused.code, type: refused.type },
}));
