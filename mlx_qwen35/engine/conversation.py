"""A conversation of several turns, each part of which is prefilled once."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, NamedTuple, Unpack, cast

from mlx_qwen35.cache.cache import Snapshot
from mlx_qwen35.cache.prefix import Entry, Use
from mlx_qwen35.cache.prefix_tokens import Prefix
from mlx_qwen35.engine.constraints.rules import Rules
from mlx_qwen35.engine.encode import template_options
from mlx_qwen35.engine.engine import Engine
from mlx_qwen35.engine.generation import check_library, check_loaded, make_request, plan_rows
from mlx_qwen35.engine.options import Options, check_options, vision_options
from mlx_qwen35.engine.plan import SequencePlan, check_window
from mlx_qwen35.engine.result import Result
from mlx_qwen35.engine.sequence import Sequence as Request
from mlx_qwen35.engine.tool_turns import Message, Results, result_messages
from mlx_qwen35.errors import InputError
from mlx_qwen35.machine.process import LOCK, refuse_fork
from mlx_qwen35.media.options import VISION_OPTIONS
from mlx_qwen35.model.model import Model
from mlx_qwen35.options import listed
from mlx_qwen35.prompt.messages import Plain, check_template_options
from mlx_qwen35.prompt.piece import Piece
from mlx_qwen35.prompt.processor import Processor
from mlx_qwen35.prompt.prompt import Prompt

_OF_ONE_PROMPT = {
    "cache", "ignore_chat_template", "progress", "images", "videos", "constraint", "continue_final_message",
}  # fmt: skip
_QUESTION = {"role": "user", "content": "?"}


class Conversation:
    """Messages so far, and a library that remembers what of them was read.

    Most chat templates remove the reasoning from earlier turns, and a DeltaNet state cannot be trimmed. So snapshots
    are stored where prompts part: behind the system prompt and the tools, before the answer to each message of the
    user, and before the newest answer. The next turn goes on from the longest that begins it. Images and videos of
    earlier turns are not read or encoded again.

    `messages` may be edited, shortened or replaced between turns: what stands before the first change is not read again
    from the nearest snapshot on.

    Any thread may send, and go on with a turn. One turn runs at a time: the start of one ends another where it is.

    Args:
        options: of every turn, see `Options`; not cache, ignore_chat_template, continue_final_message, progress,
            constraint, images or videos. library: one that other conversations share; by default one of its own.
    """

    def __init__(self, model: Model, processor: Processor, **options: Unpack[Options]):
        if refused := sorted(name for name in _OF_ONE_PROMPT if options.get(name) is not None):
            raise TypeError(f"a conversation takes no {', '.join(refused)}")
        check_loaded(model, processor)
        given = check_options(options)
        self.model, self.processor = model, processor
        self._template = template_options(given)
        check_template_options(self._template, Plain())
        self.system = given.pop("system_prompt", None)  # what a reset keeps
        idle = [name for name in VISION_OPTIONS if given.get(name)]
        if idle and not processor.sees:
            raise InputError(
                "vision_missing", f"{listed(idle)} must not be given: this checkpoint has no vision encoder"
            )
        self.vision = vision_options(given)  # for the images and videos of coming messages
        self._options = cast(Options, {name: value for name, value in given.items() if name not in VISION_OPTIONS})
        self.library = check_library(given, model) or model.make_library()
        self._options["library"] = self.library
        self._rules = Rules(processor, self._options)
        self._plan(processor.encode_messages([_QUESTION], self.vision, **self._template))  # refuses a bad option
        self._turn: Turn | None = None  # that runs
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt. A turn that runs is cancelled."""
        with LOCK:
            self.cancel()
            self.messages: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
            self.cache = self.model.make_cache()  # the last prompt and its answer
            self._use: Use | None = None  # keeps that prompt in the library
            self.library.trim()

    def fork(self) -> "Conversation":
        """Another conversation that goes on from here, with the same library. A turn that runs is not part of it."""
        with LOCK:
            other = copy(self)
            other.messages = [dict(message) for message in self.messages]
            other._turn, other.cache = None, self.model.make_cache()
            return other

    def resume(self, messages: Sequence[Message], places: Sequence[tuple[Prefix, str, Snapshot]]) -> None:
        """Go on with messages of another process, and with what was read of them.

        places: the beginnings of its last prompt that were stored, the shortest first, with kind and snapshot.
        """
        with LOCK:
            self.reset()
            self.messages = list(messages)
            for prefix, kind, snapshot in places:
                self.library.store(prefix, snapshot, kind, compact=False)
            self._use = self.library.keep(places[-1][0]) if places else None

    def cancel(self) -> None:
        """End the turn that runs, if one does, with its answer as far as it came."""
        with LOCK:
            if self._turn:
                self._turn.cancel()

    @property
    def running(self) -> bool:
        """Whether a turn has started and not ended."""
        return self._turn is not None

    @property
    def entries(self) -> list[Entry]:
        """What the library holds of the last prompt, the shortest first."""
        return self.library.entries(self._use.prefix) if self._use else []

    def send(
        self, content: str | Sequence[Any], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> "Turn":
        """A turn with this message: iterate over it for the answer in pieces, or ask for its text.

        content: text, or a list of parts with images and videos, see Processor.encode_messages. They are read now.
        progress: called with the tokens that were prefilled, and all that must be.

        Raises InputError for a message that is empty or whose media cannot be read.
        """
        refuse_fork()
        if not isinstance(content, str):
            content = self.processor.read_parts(content, self.vision)
        if not (content.strip() if isinstance(content, str) else content):
            raise InputError("message_empty", "the message must not be empty")
        return Turn(self, [{"role": "user", "content": content}], progress)

    def send_results(
        self, results: Results, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> "Turn":
        """A turn with the results of the calls in the last answer, one for each.

        results: call id -> content, or messages {"role": "tool", "tool_call_id": ..., "content": ...}, in any order. A
            content is text, or a list of parts as for `send`.

        Raises InputError for an id that no call of the last answer has, and for calls without a result. To leave calls
        unanswered, `send` a further message.
        """
        refuse_fork()
        messages = result_messages(self.messages, results)
        for message in messages:
            if not isinstance(message["content"], str):
                message["content"] = self.processor.read_parts(message["content"], self.vision)
        return Turn(self, messages, progress)

    def regenerate(
        self, seed: int | None = None, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> "Turn":
        """A turn with another answer in place of the last one.

        seed: in place of the options'. Raises InputError where the last message is no answer, now or when it starts.
        """
        refuse_fork()
        self._check_answer()
        return Turn(self, [], progress, replaces=1, seed=seed)

    # --- for a turn ---

    def begin(self, turn: "Turn") -> "Begun":
        """Prepare the answer to a turn's messages, behind the turns so far."""
        self.cancel()
        if turn.replaces:
            self._check_answer()
        messages = [*self.messages[: len(self.messages) - turn.replaces], *turn.messages]
        prompt = self.processor.encode_messages(messages, self.vision, **self._template)
        remedy = "Send less, begin anew (reset(), in chat /reset)"
        check_window(self.model.config, len(prompt.tokens), prompt, "the conversation with this message", remedy)
        read = self._use and self._use.prefix
        self.cache, self._use = self.model.make_cache(), None  # the library goes on in the memory of the last turn
        try:
            planned = self._plan(prompt)
            if turn.seed is not None:
                planned = replace(planned, seed=turn.seed)
            request = make_request(
                self.processor, prompt, planned, self.cache, self._options, self._rules, progress=turn.count
            )
        except BaseException:
            self._use = self.library.keep(read) if read else None
            raise
        self._turn = turn
        return Begun(request, messages)

    def end(self, turn: "Turn", begun: "Begun") -> None:
        """Take in what has come of a turn: its messages and its answer, if that has a token."""
        if self._turn is turn:
            self._turn = None
        request = begun.request
        self._use, request.use = request.use, None  # a turn that is kept must not keep its prompt in the library
        if request.tokens:
            self.messages = [*begun.messages, request.result().message]

    def _check_answer(self) -> None:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise InputError("messages_invalid", "regenerate needs an answer as the last message; there is none")

    def _plan(self, prompt: Prompt) -> SequencePlan:
        return plan_rows(self.model, self.processor, [prompt], [0], self._options, self._rules, self.library)[0]


class Begun(NamedTuple):
    """A turn that has started."""

    request: Request
    messages: list[Message]  # of its prompt


class Turn:
    """A message, or results of calls, and the answer, from `Conversation.send` and `send_results`.

    Nothing happens before the first piece, the text or the end is asked for: then the turn starts, and takes its place
    behind the turns that started before. A turn that never starts leaves no trace. The start of a turn ends another
    one that runs. A turn that is left early, cancelled or ended so keeps the answer as far as it came; if that has no
    token, the conversation is as before. After an error it is as before, too, or has the answer up to the error.

    Any thread may go on with a turn.
    """

    def __init__(
        self,
        conversation: Conversation,
        messages: list[Message],
        progress: Callable[[int, int], None],
        replaces: int = 0,
        seed: int | None = None,
    ):
        """replaces: how many of the conversation's last messages these take the place of. seed: None: the options'."""
        self.messages, self.replaces, self.seed = messages, replaces, seed
        self._conversation, self.progress = conversation, progress
        self._engine = Engine(conversation.model)
        self._begun: Begun | None = None
        self._ended = False
        self._prefilled = 0
        self._waiting: deque[Piece] = deque()
        self.pieces: list[Piece] = []  # that were given out

    def __iter__(self) -> Iterator[Piece]:
        """The pieces of the answer that are still to come. Leaving the iteration early cancels the turn."""
        try:
            while (piece := self._next()) is not None:
                yield piece
        finally:
            self.cancel()

    def __next__(self) -> Piece:
        piece = self._next()
        if piece is None:
            raise StopIteration
        return piece

    @property
    def text(self) -> str:
        """The answer, generated to its end first. Of a turn that was cancelled, left early or ended by the start of
        another it is what had come by then: `result.finish_reason` tells.
        """
        for _ in self:
            pass
        return self.result.text if self.result is not None else ""

    @property
    def result(self) -> Result | None:
        """What it has come to, at any time; None before it starts."""
        return self._begun.request.result() if self._begun else None

    @property
    def reused(self) -> int:
        """Tokens of its prompt that were in the library already; 0 before it starts."""
        return self._begun.request.cached if self._begun else 0

    @property
    def total(self) -> int:
        """Tokens of its prompt; 0 before it starts."""
        return len(self._begun.request.prompt.tokens) if self._begun else 0

    @property
    def limit(self) -> int:
        """Most tokens of its answer; 0 before it starts."""
        return self._begun.request.limit if self._begun else 0

    @property
    def prefill_seconds(self) -> float:
        """Seconds to the first token; 0 before it."""
        clock = self._begun.request.clock if self._begun else None
        return clock.vision + clock.first - clock.began if clock and clock.first else 0.0

    def cancel(self) -> None:
        """End it with the answer as far as it came. A turn that has not started never will."""
        with LOCK:
            if self._ended:
                return
            self._ended = True
            if self._begun:
                self._engine.cancel(self._begun.request)
                self._conversation.end(self, self._begun)

    def count(self, tokens: int) -> None:
        """So many more tokens of its prompt are prefilled."""
        self._prefilled += tokens
        self.progress(self._prefilled, self.total - self.reused)

    def _next(self) -> Piece | None:
        """The next piece; None behind the last."""
        with LOCK:
            return self._step()

    def _step(self) -> Piece | None:
        while not self._waiting:
            if self._ended:
                return None
            if self._begun is None:
                begun = self._conversation.begin(self)
                self._engine.add(begun.request)
                self._begun = begun
            request = self._begun.request
            try:
                self._engine.step()
            except BaseException:
                self.cancel()
                raise
            self._waiting.extend(request.pieces())
            if request.finished:
                self.cancel()
                if request.error:
                    raise request.error
        self.pieces.append(self._waiting.popleft())
        return self.pieces[-1]
