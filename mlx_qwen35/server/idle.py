"""What a server does beside its answers: it gives memory back, keeps the Mac awake, and keeps prefixes in a folder."""

import gc
import logging
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_qwen35.cache.prefix import PrefixLibrary
from mlx_qwen35.cache.prefix_files import PrefixFiles
from mlx_qwen35.engine.encode import prefix_of
from mlx_qwen35.engine.session_record import identity, template_digest
from mlx_qwen35.errors import InputError
from mlx_qwen35.machine.awake import Awake
from mlx_qwen35.machine.pressure import CRITICAL, WARNING, pressure
from mlx_qwen35.model.model import Model
from mlx_qwen35.prompt.processor import Processor
from mlx_qwen35.prompt.prompt import Prompt
from mlx_qwen35.server.errors import ApiError
from mlx_qwen35.server.options import ServerOptions
from mlx_qwen35.server.report import Parted, parted

LOG = logging.getLogger("mlx_qwen35.server")
EVERY = 1.0  # seconds between two looks at the machine
RETRY = 10  # seconds after which a client may try again


class Upkeep:
    """Of one service. Its engine thread calls `tick` and `wake`; any thread may call the others.

    Args:
        reload: loads the model again. None: it is never unloaded.
        clock: seconds. level: the machine's memory pressure. awake: whether the machine may sleep.
    """

    def __init__(
        self,
        model: Model,
        processor: Processor,
        library: PrefixLibrary,
        options: ServerOptions,
        reload: Callable[[], Model] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        level: Callable[[], int | None] = pressure,
        awake: Awake | None = None,
    ):
        self.model, self.processor, self.library, self.options = model, processor, library, options
        self.loaded, self.critical = True, False
        self._reload, self._clock, self._level, self._awake = reload, clock, level, awake or Awake()
        self._used = self._looked = clock()
        self._unloads = options.idle_unload is not None and reload is not None
        self._fingerprint = model.fingerprint() if self._unloads or options.session_dir else ""
        self.files: PrefixFiles | None = None
        if options.session_dir:
            own = identity(model, processor) | {"template": template_digest(processor)}
            self.files = PrefixFiles(options.session_dir, library, own, tell=LOG.warning)

    @property
    def every(self) -> float | None:
        """Seconds after which `tick` wants to be called, also where there is no work; None: it need not be."""
        return EVERY if self._unloads or self._level() is not None else None

    def prepared(self, prompt: Prompt, given: Any, tools: Any) -> Parted | None:
        """A request was made ready: have what the folder keeps of it in memory, and tell where it parts from others."""
        self.library.recall(prefix_of(prompt))
        found = parted(self.library, self.processor, prompt, given, tools)
        if found:
            own, other = found.texts
            LOG.info("%s%s", found, f"; {own} where {other} was" if self.options.log_text else "")
        return found

    def check(self) -> None:
        """A request has come. ApiError where the machine has no memory left."""
        self._used = self._clock()
        if self.critical:
            raise ApiError(
                503, "memory_pressure", "the machine is out of memory; try again when other programs have let go of it",
                headers={"Retry-After": str(RETRY)},
            )  # fmt: skip

    def tick(self, working: bool) -> None:
        """Look at the machine, once in EVERY seconds. working: whether an answer is generated."""
        now = self._clock()
        if working:
            self._used = now
        if now - self._looked < EVERY:
            return
        self._looked = now
        self._awake.set(working)
        level = self._level()
        self.critical = level == CRITICAL
        if level in (WARNING, CRITICAL):
            self.library.clear()
            mx.clear_cache()
        minutes = (now - self._used) / 60
        if self._unloads and self.loaded and not working and minutes >= (self.options.idle_unload or 0):
            self._unload()

    def wake(self) -> None:
        """There is work: load the model, if that is not in memory. ApiError where it cannot be, or is another one."""
        if self.loaded:
            return
        assert self._reload
        began = self._clock()
        try:
            fresh = self._reload()
        except InputError as error:
            raise ApiError(503, "model_unavailable", f"the model cannot be loaded again: {error}") from error
        if fresh.fingerprint() != self._fingerprint:
            raise ApiError(
                503, "model_changed", "the model's files are not those that the server was started with. Start it again"
            )
        _fill(self.model, fresh)
        self.loaded = True
        LOG.info("the model was loaded again in %.1f s", self._clock() - began)

    def close(self) -> None:
        """Write what is not in the folder yet, and let the machine sleep."""
        self._awake.set(False)
        if self.files:
            self.files.close()

    def _unload(self) -> None:
        if self.files:
            self.files.take_all()
        self.library.clear()
        _empty(self.model)
        self.loaded = False
        LOG.info("the model was unloaded, after %g minutes without a request", self.options.idle_unload)


def _empty(model: Model) -> None:
    """Let go of a model's arrays. The object stays, for all that know it."""
    for part in (model.vision, model.mtp):
        if part:
            part.keep = False
            part.unload()
    model.clear()
    gc.collect()
    mx.clear_cache()


def _fill(model: Model, fresh: Model) -> None:
    """Give an empty model the arrays of another of the same checkpoint."""
    dict.update(model, fresh)
    vars(model).update(vars(fresh))
