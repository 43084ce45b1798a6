"""A conversation of several turns, each part of which is prefilled once."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, Unpack, cast

from mlx_qwen35.cache.cache import Snapshot
from mlx_qwen35.cache.prefix import Entry, Use
from mlx_qwen35.cache.prefix_tokens import Prefix
from mlx_qwen35.engine.constraints.rules import Rules
from mlx_qwen35.engine.encode import prefix_of, template_options
from mlx_qwen35.engine.generation import adapters_of, check_library, check_loaded, make_request, plan_rows
from mlx_qwen35.engine.options import GROUPS, Options, check_options, vision_options
from mlx_qwen35.engine.plan import check_window
from mlx_qwen35.engine.tool_turns import Message, Results, result_messages
from mlx_qwen35.engine.turn import Begun, Turn
from mlx_qwen35.errors import InputError
from mlx_qwen35.machine.process import LOCK, refuse_fork
from mlx_qwen35.media.options import VISION_OPTIONS
from mlx_qwen35.model.model import Model
from mlx_qwen35.options import check_keywords, listed
from mlx_qwen35.prompt.messages import Plain, check_template_options
from mlx_qwen35.prompt.processor import Processor
from mlx_qwen35.prompt.prompt import Prompt

OF_ONE_PROMPT = {
    "cache", "ignore_chat_template", "progress", "media_progress", "images", "videos", "pdfs", "pages", "constraint",
    "continue_final_message",
}  # fmt: skip
_QUESTION = {"role": "user", "content": "?"}


class Conversation:
    """Messages so far, and a library that remembers what of them was read.

    adapter: the name of the one that reads and answers, "" for none.

    Most chat templates remove the reasoning from earlier turns, and a DeltaNet state cannot be trimmed. So snapshots
    are stored where prompts part: behind the system prompt and the tools, before the answer to each message of the
    user, and before the newest answer. The next turn goes on from the longest that begins it. Images and videos of
    earlier turns are not read or encoded again.

    `messages` may be edited, shortened or replaced between turns: what stands before the first change is not read again
    from the nearest snapshot on.

    Any thread may send, and go on with a turn. One turn runs at a time: the start of one ends another where it is.

    Args:
        options: of every turn, see `Options`; not cache, ignore_chat_template, continue_final_message, progress,
            media_progress, constraint, images, videos, pdfs or pages. library: one that other conversations share; by
            default one of its own.
    """

    def __init__(self, model: Model, processor: Processor, **options: Unpack[Options]):
        _refuse(options)
        check_loaded(model, processor)
        self.model, self.processor = model, processor
        given = check_options(options)
        self.library = check_library(given, model) or model.make_library()
        given.pop("library", None)
        self._take(given)
        self._turn: Turn | None = None  # that runs
        self.messages: list[Message] = []
        self.reset()

    def change(self, **options: Any) -> None:
        """Take other options from the next turn on; None: as if an option had not been given. A turn that runs is
        cancelled. Messages, and what was read of them, stay.

        Raises InputError as the constructor does. Then no option is changed.
        """
        _refuse(options, "library")
        with LOCK:
            before, adapter = self.system, self.adapter
            self._take(check_options({**self.options, **check_keywords(options, GROUPS, none=True)}))
            self.cancel()
            if self.adapter != adapter:
                self._let_go()
            if self.system != before:
                told = bool(self.messages) and self.messages[0]["role"] == "system"
                self.messages = [*self._beginning(), *self.messages[told:]]

    def _take(self, given: Options) -> None:
        """Take checked options: all of them, or none where one is bad."""
        template = template_options(given)
        check_template_options(template, Plain())
        idle = [name for name in VISION_OPTIONS if given.get(name)]
        if idle and not self.processor.sees:
            raise InputError(
                "vision_missing", f"{listed(idle)} must not be given: this checkpoint has no vision encoder"
            )
        vision, apart = vision_options(given), {*VISION_OPTIONS, "system_prompt"}
        options = cast(Options, {name: value for name, value in given.items() if name not in apart})
        options["library"] = self.library
        (adapter,) = adapters_of(given, self.model, 1)
        rules = Rules(self.processor, options)
        prompt = self.processor.encode_messages([_QUESTION], vision, **template)
        (plan,) = plan_rows(self.model, self.processor, [prompt], [adapter], [0], options, rules, self.library)
        self.options = given  # as they were given
        self.sampling = plan.sampling  # with every default filled in
        self.system = given.get("system_prompt")  # what a reset keeps
        self.vision = vision  # for the images and videos of coming messages
        self.adapter = adapter  # the name of the one that answers, "" for none
        self._template, self._options, self._rules = template, options, rules

    def reset(self) -> None:
        """Forget everything but the system prompt. A turn that runs is cancelled."""
        with LOCK:
            self.cancel()
            self.messages = self._beginning()
            self._let_go()

    def _let_go(self) -> None:
        """Of what was read: another adapter has no use for it."""
        self.cache = self.model.make_cache(adapter=self.adapter)  # the last prompt and its answer
        self._use: Use | None = None  # keeps that prompt in the library
        self.library.trim()

    def _beginning(self) -> list[Message]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def fork(self) -> "Conversation":
        """Another conversation that goes on from here, with the same library. A turn that runs is not part of it."""
        with LOCK:
            other = copy(self)
            other.messages = [dict(message) for message in self.messages]
            other._turn, other.cache = None, self.model.make_cache(adapter=self.adapter)
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

    def encode(self, messages: Sequence[Message]) -> Prompt:
        """Messages as the prompt of a turn has them."""
        return self.processor.encode_messages(messages, self.vision, **self._template)

    def send(
        self, content: str | Sequence[Any], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Turn:
        """A turn with this message: iterate over it for the answer in pieces, or ask for its text.

        content: text, or a list of parts with images and videos, see Processor.encode_messages. They are read now.
        progress: called with the tokens that were prefilled, and all that must be.

        Raises InputError for a message that is empty or whose media cannot be read.
        """
        return Turn(self, [self._question(content)], progress)

    def edit(
        self, content: str | Sequence[Any], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Turn:
        """A turn with this message in place of the last one of the user, and of what came behind that.

        Raises InputError as `send` does, and where there is no such message, now or when it starts.
        """
        self._before("user")
        return Turn(self, [self._question(content)], progress, replaces="user")

    def undo(self) -> list[Message]:
        """Take back the last message of the user, and what came behind it; these messages. A turn that runs is
        cancelled. What was read of them is kept no longer, so that a session that is saved then does not hold it.

        Raises InputError where there is no message of the user.
        """
        with LOCK:
            self.cancel()
            rest = self._before("user")
            taken, self.messages = self.messages[len(rest) :], rest
            if self._use:
                self._use = self.library.keep(prefix_of(self.encode([*rest, _QUESTION]), self.adapter))
            return taken

    def send_results(
        self, results: Results, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Turn:
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
    ) -> Turn:
        """A turn with another answer in place of the last one.

        seed: in place of the options'. Raises InputError where the last message is no answer, now or when it starts.
        """
        refuse_fork()
        self._before("assistant")
        return Turn(self, [], progress, replaces="assistant", seed=seed)

    # --- for a turn ---

    def begin(self, turn: Turn) -> Begun:
        """Prepare the answer to a turn's messages, behind the turns so far."""
        self.cancel()
        messages = [*(self._before(turn.replaces) if turn.replaces else self.messages), *turn.messages]
        prompt = self.encode(messages)
        remedy = "Send less, begin anew (reset(), in chat /reset)"
        check_window(self.model.config, len(prompt.tokens), prompt, "the conversation with this message", remedy)
        read = self._use and self._use.prefix
        # The library goes on in the memory of the last turn.
        self.cache, self._use = self.model.make_cache(adapter=self.adapter), None
        try:
            (planned,) = plan_rows(
                self.model, self.processor, [prompt], [self.adapter], [0], self._options, self._rules, self.library
            )
            if turn.seed is not None:
                planned = replace(planned, seed=turn.seed)
            request = make_request(
                self.processor, prompt, self.adapter, planned, self.cache, self._options, self._rules,
                progress=turn.count, media_progress=lambda done, total: turn.media_progress(done, total),
            )
        except BaseException:
            self._use = self.library.keep(read) if read else None
            raise
        self._turn = turn
        return Begun(request, messages)

    def end(self, turn: Turn, begun: Begun) -> None:
        """Take in what has come of a turn: its messages and its answer, if that has a token."""
        if self._turn is turn:
            self._turn = None
        request = begun.request
        self._use, request.use = request.use, None  # a turn that is kept must not keep its prompt in the library
        if request.tokens:
            self.messages = [*begun.messages, request.result().message]

    def _question(self, content: str | Sequence[Any]) -> Message:
        """A message of the user, its images and videos read."""
        refuse_fork()
        if not isinstance(content, str):
            content = self.processor.read_parts(content, self.vision)
        if not (content.strip() if isinstance(content, str) else content):
            raise InputError("message_empty", "the message must not be empty")
        return {"role": "user", "content": content}

    def _before(self, role: str) -> list[Message]:
        """The messages before the last one of the user, or before the answer that is the last."""
        roles = [message["role"] for message in self.messages]
        if role == "assistant" and roles[-1:] != [role]:
            raise InputError("messages_invalid", "regenerate needs an answer as the last message; there is none")
        if role not in roles:
            raise InputError("messages_invalid", "there must be a message of the user; there is none")
        return self.messages[: len(roles) - 1 - roles[::-1].index(role)]


def _refuse(options: Mapping[str, Any], *more: str) -> None:
    if refused := sorted(name for name in {*OF_ONE_PROMPT, *more} if options.get(name) is not None):
        raise TypeError(f"a conversation takes no {', '.join(refused)}")
