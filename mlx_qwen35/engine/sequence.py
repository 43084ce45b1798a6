"""One request: its prompt, options, sampler, drafts, tokens, text and statistics. Everything of a request is here."""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx

from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.cache.prefix import QUERY, READING, STEP, TURN, PrefixLibrary, Use
from mlx_qwen35.cache.prefix_tokens import Prefix
from mlx_qwen35.engine.constraints.loop import NOTHING
from mlx_qwen35.engine.drafts.follower import DraftFollower
from mlx_qwen35.engine.drafts.speculate import DraftPolicy, RowDrafts, attach, detach
from mlx_qwen35.engine.encode import prefix_of
from mlx_qwen35.engine.logprobs import LogprobScorer, TokenLogprob
from mlx_qwen35.engine.prefill import Chunk, PromptRow, chunks
from mlx_qwen35.engine.result import Result
from mlx_qwen35.engine.sampling import Sampler
from mlx_qwen35.errors import InputError
from mlx_qwen35.model.model import Model
from mlx_qwen35.prompt.answer import finish_reason
from mlx_qwen35.prompt.piece import CONTENT, REASONING, Piece
from mlx_qwen35.prompt.prompt import Prompt
from mlx_qwen35.prompt.stream import TextStream


@dataclass
class Clock:
    """Times of a sequence, in seconds."""

    began: float = 0.0  # its prefill, after its images were encoded
    vision: float = 0.0  # that encoding took
    first: float = 0.0  # its first token
    joined: float = 0.0  # it joined the running rows
    last: float = 0.0  # its last token


class Sequence:
    """One request, from its prompt to its answer.

    Args:
        prompt: its tokens, and what they show.
        sampler: how its tokens are sampled; its position is behind the prompt.
        limit, limited_by: most tokens of the answer, and what sets them, see `Result`.
        prefill_step_size: prompt tokens of a prefill chunk.
        stop_ids: token ids that end it.
        stream: turns its tokens into text; None for tokens alone.
        cache: a conversation of one row that it goes on with, from where that is when the prefill begins. When the
            sequence has ended it holds prompt and answer, except a last token at the limit; after an error it is as
            before. None: a cache of its own.
        drafts: whether to draft, and how deep.
        progress: called with the tokens of each chunk of the prompt that is prefilled.
        media_progress: called with the images and videos that are encoded, and all of them, before each.
        library: where the prefill begins, with the longest beginning of the prompt that it holds, and where the
            beginnings at the prompt's marks are stored, and what has been read when the prefill is cancelled. A cache
            beside it must be empty.
        loop_guard: whether an answer that repeats itself without end ends.
        scorer: gives the log-probabilities of its tokens: `logprobs` has them, one for each token so far.
        one_call: whether the answer ends behind its first whole call.
        adapter: the name of the loaded adapter that reads and answers, "" for none; a cache must be of the same.
    """

    def __init__(
        self,
        prompt: Prompt,
        sampler: Sampler,
        limit: int,
        limited_by: str = "max_tokens",
        *,
        prefill_step_size: int,
        stop_ids: Collection[int] = (),
        stream: TextStream | None = None,
        cache: Cache | None = None,
        drafts: DraftPolicy = DraftPolicy(0),  # noqa: B008 (frozen)
        progress: Callable[[int], None] = lambda tokens: None,
        media_progress: Callable[[int, int], object] = lambda done, total: None,
        library: PrefixLibrary | None = None,
        loop_guard: bool = False,
        scorer: LogprobScorer | None = None,
        one_call: bool = False,
        adapter: str = "",
    ):
        self.prompt, self.sampler, self.limit, self.stop_ids, self.stream = prompt, sampler, limit, stop_ids, stream
        self.prefill_step_size, self.progress, self.library = prefill_step_size, progress, library
        self.media_progress = media_progress
        self.cache, self.scorer, self.loop_guard, self.one_call = cache, scorer, loop_guard, one_call
        self.limited_by, self.adapter = limited_by, adapter
        self._recent = NOTHING
        self._held = 0  # tokens in it when its prefill began
        self._done = self._step = 0  # tokens of the prompt that are read, and most of its next chunk
        self.drafts = RowDrafts(drafts)
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: str | None = None  # None while it goes on
        self.error: Exception | None = None
        self.use: Use | None = None  # of the library, from its prefill on
        self.cached = 0  # tokens of the prompt that were in the library
        self.clock = Clock()
        self._said: list[Piece] = []
        self._new: deque[Piece] = deque()
        self.passed = False  # whether a shorter prompt went before it, or it before a longer one
        self._chunks: Iterator[Chunk] | None = None
        self.own: Cache | None = None  # its cache, until it is a running row
        self._started = False
        self._marks: dict[int, str] = {}  # where the library stores the prompt: tokens before, and the kind
        if not prompt.tokens:
            raise InputError("prompt_empty", "the prompt must not be empty")

    # --- what it has come to ---

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def left(self) -> int:
        """How many more tokens it may get."""
        return 0 if self.finished else self.limit - len(self.tokens)

    @property
    def last(self) -> int:
        return self.tokens[-1]

    @property
    def unread(self) -> int:
        """Tokens of the prompt that are not in the library, all of them until its prefill begins."""
        return len(self.prompt.tokens) - self.cached

    @property
    def read(self) -> int:
        """Tokens of the prompt that are read, those of the library included."""
        return max(self._done, self.cached)

    def pieces(self) -> Iterator[Piece]:
        """The pieces of text that came since they were asked for last."""
        while self._new:
            yield self._new.popleft()

    def take(self, token: int) -> None:
        """Go on with a token: it may end the sequence."""
        self.clock.last = time.perf_counter()
        self.clock.first = self.clock.first or self.clock.last
        self.tokens.append(token)
        self.sampler.accept(token)
        ended = token in self.stop_ids
        if self.stream and not ended:
            self._say(self.stream.add(token))
        if self.loop_guard:
            self._recent = self._recent.after(token)
        if ended or (self.stream and (self.stream.stopped or (self.one_call and self.stream.calls))):
            self.finish("stop")
        elif len(self.tokens) >= self.limit:
            self.finish("length")
        elif self._recent.loop and not (self.stream and self.stream.reasoning):
            self.finish("loop")

    def finish(self, reason: str) -> None:
        """End it. At a proper end the text that was held back is given out."""
        if self.finished:
            return
        self.finish_reason = reason
        if self.stream and reason in ("stop", "length", "loop"):
            self._say(self.stream.finish(cut=reason == "length"))
            self.finish_reason = finish_reason(reason, bool(self.stream.calls))

    def fail(self, error: Exception) -> None:
        """End it with an error."""
        if self.error is None:
            self.error, self.finish_reason = error, "error"

    def _say(self, pieces: list[Piece]) -> None:
        self._said += pieces
        self._new.extend(pieces)

    def result(self) -> Result:
        """What it has come to, at any time."""
        clock, tokens = self.clock, len(self.tokens)
        prefill_seconds, seconds = clock.first - clock.began, clock.last - max(clock.first, clock.joined)
        return Result(
            text="".join(piece.text for piece in self._said if piece.kind == CONTENT),
            reasoning="".join(piece.text for piece in self._said if piece.kind == REASONING).strip(),
            tokens=tuple(self.tokens),
            finish_reason=self.finish_reason or "interrupted",
            in_reasoning=bool(self.stream and self.stream.reasoning),
            prompt_tokens=len(self.prompt.tokens),
            generation_tokens=tokens,
            vision_seconds=clock.vision,
            prompt_tps=self.unread / prefill_seconds if tokens else 0.0,
            generation_tps=(tokens - 1) / seconds if seconds > 0 else 0.0,
            peak_memory=mx.get_peak_memory() / 1e9,
            seed=self.sampler.seed,
            mtp=self.drafts.statistics(),
            tool_calls=tuple(self.stream.calls) if self.stream else (),
            cut=self.stream.cut if self.stream else None,
            error=self.error,
            logprobs=tuple(self.logprobs) if self.scorer else None,
            cached_tokens=self.cached,
            limited_by=self.limited_by,
            reasoning_tokens=self.stream.thought if self.stream else 0,
            stop=self.stream.stopped if self.stream else "",
            adapter=self.adapter or None,
        )

    # --- its prefill ---

    def start(self) -> None:
        """An engine takes it in. InputError if one has before."""
        if self._started:
            raise InputError("generation_spent", "a sequence runs once; its result() remains. Make another")
        self._started = True

    @property
    def begun(self) -> bool:
        """Whether its prefill has begun."""
        return self.own is not None

    @property
    def rest(self) -> Prompt:
        """What is to be read of its prompt, when its prefill begins."""
        return self.prompt.after(self.cached)

    @property
    def reading(self) -> bool:
        """Whether a chunk of its prompt is read, or all."""
        return self._chunks is not None

    @cached_property
    def prefix(self) -> Prefix:
        """Its prompt, as the library compares it."""
        return prefix_of(self.prompt, self.adapter)

    def to_read(self) -> int:
        """Tokens of its prompt that the library does not hold now, before its prefill begins."""
        stored = self.library.entries(self.prefix) if self.library else []
        total = len(self.prompt.tokens)
        return total - max((len(own.prefix) for own in stored if len(own.prefix) < total), default=0)

    def begin(self, model: Model) -> None:
        """Begin its prefill: with what the library holds of the prompt, or in the caller's cache."""
        if self.library:
            self.own, self.use = self.library.begin(self.prefix)
            self.cached = self.use.reused
            self._marks = self._places(self.use)
        self.own = self.own or (self.cache.copy() if self.cache else model.make_cache(adapter=self.adapter))

    def prefill(self, model: Model, step: int, row: Callable[[], PromptRow]) -> Chunk:
        """Prefill one chunk of at most `step` tokens, and of the planned size.

        row: gives the `rest` of the prompt, whose images and videos are encoded. It is asked once.
        """
        self._step = min(step, self.prefill_step_size)
        if self._chunks is None:
            self._chunks = self._read(model, row())
        assert self.own
        chunk = next(self._chunks)
        self._done += chunk.tokens
        if self.use:
            self.use.read(self.own, chunk.tokens, self._marks.get(self._done))
        self.progress(chunk.tokens)
        if self.is_read:
            self._chunks = None
        return chunk

    def _read(self, model: Model, row: PromptRow) -> Iterator[Chunk]:
        assert self.own
        self.clock.began = time.perf_counter()
        self._held = self.own.length - self.cached
        self.sampler.position = self._held + len(self.prompt.tokens)
        self.drafts.policy = attach(model, self.own, self.drafts.policy, self)
        self._done = self.cached
        ends = [place - self.cached for place in sorted(self._marks)]
        return chunks(model, self.own, row, lambda: self._step, ends)

    @property
    def is_read(self) -> bool:
        """Whether its prompt is."""
        return self._done == len(self.prompt.tokens)

    def _places(self, use: Use) -> dict[int, str]:
        """Where the library stores this prompt, with the kind of each place.

        Just before its end where no mark says where it parts from the next.
        """
        total = len(self.prompt.tokens)
        marks = dict(self.prompt.marks)
        if not {QUERY, TURN} & {*marks.values()}:
            marks.setdefault(total - 1, TURN)
        places = dict.fromkeys(range(STEP, total, STEP), READING) | marks
        unread = ((place, kind) for place, kind in places.items() if self.cached < place < total)
        return {place: kind for place, kind in unread if use.prefix.whole(place)}

    def take_cache(self) -> Cache:
        """The cache with the prompt, which from now on is a running row."""
        assert self.own is not None, "the prompt is prefilled"
        self.clock.joined = time.perf_counter()
        cache, self.own = self.own, None
        return cache

    def arrays(self) -> list[mx.array]:
        """Every array that it holds before it is a running row."""
        return self.sampler.arrays() + (self.own.held() if self.own else [])

    # --- its end ---

    def end(self, model: Model, cache: Cache | None) -> None:
        """Let go of all arrays and pixels, but for `use`. cache: what its row held, if it was running.

        Brings the caller's cache to the last token; with an error or without a token that stays as it was. What was
        read of a prompt whose prefill is cancelled goes into the library.
        """
        cache, self.own, caller = cache or self.own, None, self.cache
        if self.use and cache and self._chunks and not self.error and cache.length > self.cached:
            self.use.read(cache, cache.length - self._done, READING)
        self._chunks = None
        detach(model, self)
        self.sampler.clear()
        self.progress = lambda tokens: None  # the caller's may hold whoever holds this sequence
        self.prompt = Prompt(self.prompt.tokens, self.prompt.thinking)
        if caller is None or cache is None or self.error or not self.tokens:
            return
        held = self._held + len(self.prompt.tokens) + len(self.tokens)
        if cache.length < held and self.finish_reason != "length":
            tokens = mx.array([[self.last]])
            hidden = model.hidden(tokens, cache)
            if isinstance(cache.follower, DraftFollower):
                cache.follower.follow(tokens, hidden, [1])
        if cache.follower:
            cache.compact()
        cache.evaluate()
        caller.assign(cache)

    def close(self) -> None:
        """It has ended, and nobody holds its cache: the library may let go of its prompt, unless a caller goes on."""
        if self.use and not self.cache:
            self.use.close()
            self.use = self.library = None  # who holds the result must not hold the model
