"""Many clients at once against mlx_qwen35.serve on nano: each request ends once, nothing is lost, memory stays flat.

python examples/serve_load.py --minutes 10 --clients 32

Clients ask all three APIs, streamed and not, with images and tools. Some leave in the middle, some read slowly, some
send what is malformed. Some ask what was asked alone before, and must get the same text. In the end SIGTERM comes while
answers are streamed. The script prints a table, and ends with status 1 if anything was wrong.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from statistics import median
from typing import Any

import httpx
from serve import SECONDS, Served, served, stop
from serve_apis import APIS, Api, Chat

LONG = "Numbers: " + " ".join(str(number) for number in range(150)) + ". What is 34 + 58?"
ENDLESS = {"max_tokens": 2000, "logit_bias": {"991": -100, "993": -100}}  # nano's end tokens may not come
FLAT = 1.1  # the last third's memory over the first's


class Wrong(Exception):
    """The server did what it must not."""


# --- one request -----------------------------------------------------------------------------------------------------


class Client:
    """Asks a server, and finds what is wrong with its answers."""

    def __init__(self, url: str, seed: str):
        self.http = httpx.AsyncClient(base_url=url, timeout=SECONDS)
        self.random = random.Random(seed)

    async def whole(self, api: Api, **body: Any) -> str:
        answer = await self.http.post(api.path, json=body)
        await _check_status(answer)
        return api.text(answer.json())

    async def streamed(self, api: Api, pause: float = 0, leave_after: int | None = None, **body: Any) -> str:
        """The text; pause: seconds after each event. leave_after: events after which the client is gone."""
        text, ends, count = "", 0, 0
        async with self.http.stream("POST", api.path, json=body | {"stream": True}) as answer:
            await _check_status(answer)
            async for event in _events(answer):
                if leave_after is not None and count >= leave_after:
                    raise Gone
                count += 1
                if event is not None:
                    text += api.said(event)
                    ends += api.ends(event)
                await asyncio.sleep(pause)
        if ends != 1:
            raise Wrong(f"{ends} final events of {api.path} in place of one")
        return text

    async def any(self, api: Api, **body: Any) -> str:
        return await (self.streamed if self.random.random() < 0.6 else self.whole)(api, **body)


class Gone(Exception):
    """The client left."""


class Refused(Exception):
    """The server's well-formed error: its status."""


async def _events(answer: httpx.Response) -> AsyncIterator[Any]:
    """The events of a stream, None for a comment; [DONE] must be the last line of chat's."""
    done = False
    async for line in answer.aiter_lines():
        if done and line:
            raise Wrong(f"{line[:80]!r} came after [DONE]")
        if line.startswith(":"):
            yield None
        if line.startswith("data:"):
            done = line[5:].strip() == "[DONE]"
            if not done:
                yield json.loads(line[5:])


async def _check_status(answer: httpx.Response) -> None:
    """Raises Refused for a well-formed error, Wrong for another or one of the server's own."""
    if answer.status_code == 200:
        return
    await answer.aread()
    try:
        error = answer.json()["error"]
        right = isinstance(error["message"], str) and isinstance(error["type"], str)
    except (ValueError, KeyError, TypeError):
        right = False
    if not right or answer.status_code >= 500 or (answer.status_code == 429 and "retry-after" not in answer.headers):
        raise Wrong(f"{answer.status_code}: {answer.text[:300]}")
    raise Refused(answer.status_code)


# --- what clients do -------------------------------------------------------------------------------------------------

Does = Callable[[Client, Api], Awaitable[object]]
MALFORMED: tuple[dict[str, Any], ...] = (
    {}, {"messages": 5, "input": 5}, {"messages": [{"role": "nobody", "content": 1}], "input": [{"role": 1}]},
    {"temperature": "hot"}, {"max_tokens": -1, "max_output_tokens": -1}, {"tools": [{"type": "function"}]},
)  # fmt: skip


async def malformed(client: Client, api: Api) -> None:
    change = client.random.choice(MALFORMED)
    content = json.dumps(api.body("What is 2 + 2?") | change if change else {})
    content = content[: -client.random.randrange(1, 9)] if client.random.random() < 0.3 else content
    answer = await client.http.post(api.path, content=content, headers={"Content-Type": "application/json"})
    try:
        await _check_status(answer)
    except Refused as refused:
        if refused.args[0] not in (400, 422, 429):
            raise Wrong(f"{refused.args[0]} for {content[:100]}") from None
    else:
        raise Wrong(f"200 for {content[:200]}")


async def gone_at_once(client: Client, api: Api) -> None:
    async with asyncio.timeout(client.random.uniform(0.001, 0.05)):
        await client.streamed(api, **api.body(LONG))


def question(client: Client) -> str:
    return f"What is {client.random.randrange(10, 99)} + {client.random.randrange(10, 99)}?"


DOES: dict[str, tuple[int, Does]] = {  # name -> weight, what
    "question": (5, lambda client, api: client.any(api, **api.body(question(client)))),
    "long prompt": (1, lambda client, api: client.any(api, **api.body(f"{question(client)} {LONG}"))),
    "picture": (1, lambda client, api: client.any(api, **api.body("What do you see?", picture=True))),
    "tools": (1, lambda client, api: client.any(api, **api.body("What is the weather in Paris?", tools=True))),
    "slow reader": (1, lambda client, api: client.streamed(api, pause=0.1, **api.body(question(client)))),
    "gone at once": (1, gone_at_once),
    "gone while reading": (1, lambda client, api: client.streamed(api, leave_after=0, **api.body(LONG))),
    "gone while decoding": (1, lambda client, api: client.streamed(api, leave_after=4, **api.body(question(client)))),
    "malformed": (2, malformed),
}  # fmt: skip


# --- the run ---------------------------------------------------------------------------------------------------------


class Load:
    def __init__(self, server: Served, options: argparse.Namespace):
        self.server, self.options = server, options
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.wrong: list[str] = []
        self.memory: list[int] = []  # KB
        self.alone: dict[Api, str] = {}  # the answer to CONTROL

    async def run(self) -> None:
        control = Client(self.server.url, "control")
        for api in APIS:
            self.alone[api] = await control.whole(api, **api.body("What is 34 + 58?"), temperature=0)
        end = time.monotonic() + 60 * self.options.minutes
        watching = asyncio.create_task(self._watch())
        await asyncio.gather(*(self._client(f"{self.options.seed} {i}", end) for i in range(self.options.clients)))
        watching.cancel()
        await self._ended_by_sigterm(control)

    async def _client(self, seed: str, end: float) -> None:
        client = Client(self.server.url, seed)
        names = ["control", *DOES]
        weights = [2, *(weight for weight, _ in DOES.values())]
        async with client.http:
            while time.monotonic() < end:
                (name,), api = client.random.choices(names, weights), client.random.choice(APIS)
                does = self._control if name == "control" else DOES[name][1]
                self.outcomes[name, await self._outcome(name, does(client, api), api)] += 1

    async def _outcome(self, name: str, doing: Awaitable[object], api: Api) -> str:
        try:
            await doing
        except (Gone, TimeoutError):
            return "left"
        except Refused as refused:
            if refused.args[0] == 429:
                await asyncio.sleep(0.5)
                return "told to wait"
            self.wrong.append(f"{name}, {api.path}: refused with {refused.args[0]}")
        except Exception as error:  # whatever it is, it is counted
            self.wrong.append(f"{name}, {api.path}: {type(error).__name__}: {error}")
        else:
            return "right"
        return "wrong"

    async def _control(self, client: Client, api: Api) -> None:
        text = await client.any(api, **api.body("What is 34 + 58?"), temperature=0)
        if text != self.alone[api]:
            raise Wrong(f"{text!r} in place of {self.alone[api]!r}, which it is alone")

    async def _watch(self) -> None:
        """The server's memory, 60 times."""
        command = ["ps", "-o", "rss=", "-p", str(self.server.process.pid)]
        while True:
            await asyncio.sleep(self.options.minutes)
            self.memory.append(int((await asyncio.to_thread(subprocess.check_output, command)).split()[0]))

    async def _ended_by_sigterm(self, client: Client) -> None:
        """Streams that are under way when SIGTERM comes have their final event."""
        body = Chat.body("What is 34 + 58?") | ENDLESS
        asked = [asyncio.create_task(client.streamed(Chat, **body)) for _ in range(8)]
        await asyncio.sleep(1)
        if (status := await asyncio.to_thread(stop, self.server)) != 0:
            self.wrong.append(f"the server ended with status {status} on SIGTERM (None: it did not)")
            self.server.process.kill()
        for result in await asyncio.gather(*asked, return_exceptions=True):
            self.outcomes["SIGTERM", "right" if isinstance(result, str) else "wrong"] += 1
            if not isinstance(result, str):
                self.wrong.append(f"at SIGTERM: {type(result).__name__}: {result}")

    def report(self) -> None:
        kinds = ("right", "told to wait", "left", "wrong")
        print(f"{'':20}", *(f"{kind:>13}" for kind in kinds))
        for name in dict.fromkeys(name for name, _ in self.outcomes):
            print(f"{name:20}", *(f"{self.outcomes[name, kind]:13,}" for kind in kinds))
        print(f"{self.outcomes.total():,} requests, {self.options.clients} clients, {self.options.minutes:g} minutes")
        third = len(self.memory) // 3
        first, last = median(self.memory[third // 2 : third]), median(self.memory[-third:])
        if last > FLAT * first and self.options.minutes >= 5:  # before, the kept prefixes fill their share
            self.wrong.append(f"memory grew from {first / 1e3:.0f} to {last / 1e3:.0f} MB")
        print(f"memory of the server: {first / 1e3:.0f} MB in the first third, {last / 1e3:.0f} MB in the last")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--options", default="--memory-limit 1", help="more options of the server, in one text")
    options = parser.parse_args()

    async def bounded(load: Load) -> None:
        async with asyncio.timeout(60 * options.minutes + 2 * SECONDS):
            await load.run()

    with served("--model", "nano", *options.options.split()) as server:
        load = Load(server, options)
        asyncio.run(bounded(load))
    load.report()
    if load.wrong:
        print(*dict.fromkeys(load.wrong[:20]), sep="\n")
        sys.exit(f"{len(load.wrong)} were wrong")
    print("nothing was wrong")


if __name__ == "__main__":
    main()
