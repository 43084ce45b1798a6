"""An agent in a loop: the model calls two Python functions, reads their results and answers."""

import sys

from mlx_qwen35 import Conversation, load


def get_weather(city: str) -> str:
    return {"Paris": "21 degrees, sunny", "Oslo": "4 degrees, rainy"}.get(city, "12 degrees, cloudy")


def get_time(city: str) -> str:
    return {"Paris": "12:30", "Tokyo": "20:30"}.get(city, "09:00")


def tool(name: str, description: str) -> dict:
    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": city}}


FUNCTIONS = {"get_weather": get_weather, "get_time": get_time}
TOOLS = [tool("get_weather", "Get the weather in a city"), tool("get_time", "Get the time in a city")]

model, processor = load(sys.argv[1] if len(sys.argv) > 1 else "nano")
conversation = Conversation(model, processor, tools=TOOLS, temp=0)
for question in ("What is the weather in Paris?", "What time is it in Tokyo?"):
    print(">>", question)
    turn = conversation.send(question)
    for _ in range(8):  # steps at most
        text, results = turn.text, {}
        for call in turn.result.tool_calls:
            try:
                results[call.id] = FUNCTIONS[call.name](**call.arguments)
            except (KeyError, TypeError) as error:  # no such function, or not these arguments: the model is told
                results[call.id] = f"this call failed: {error}"
            print(f"   {call.name}({dict(call.arguments)}) -> {results[call.id]}")
        if not results:
            break
        turn = conversation.send_results(results)
    print(f"{text}   (prompt {turn.total} tokens, {turn.reused} of them reused)")
