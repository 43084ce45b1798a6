// openai-node against the server at argv[2]: prints what it got as JSON. argv[3]: {model, question, tools, seed}.
import OpenAI from "openai";

const [base, given] = process.argv.slice(2);
const { model, question, tools, seed } = JSON.parse(given);
const client = new OpenAI({ baseURL: `${base}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: question }];

const whole = await client.chat.completions.create({ model, messages, seed });
const text = await client.chat.completions.stream({ model, messages, seed }).finalChatCompletion();
const call = await client.chat.completions.stream({ model, messages, seed, tools }).finalChatCompletion();
const refused = await client.chat.completions.create({ model, messages, n: 9 }).catch((error) => error);

// A loop of calls, as the SDK runs it.
const asked = [];
const functions = tools.map(({ function: { name, description, parameters } }) => ({
  type: "function",
  function: {
    name, description, parameters, parse: JSON.parse,
    function: (argument) => { asked.push([name, argument]); return "21 degrees, sunny"; },
  },
}));
const loop = client.chat.completions.runTools({ model, messages, seed, tools: functions, stream: true });
const report = await loop.finalContent();

console.log(JSON.stringify({
  whole: whole.choices[0], text: text.choices[0], call: call.choices[0], asked, report,
  refused: { status: refused.status, param: refused.param, code: refused.code, type: refused.type },
}));
