"""What a server does beside its answers: it gives memory back, keeps the Mac awake, and keeps prefixes in a folder."""

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
from mlx_qwen35.options import spelled
from mlx_qwen35.prompt.processor import Processor
from mlx_qwen35.prompt.prompt import Prompt
from mlx_qwen35.server.errors import ApiError
from mlx_qwen35.server.options import ServerOptions
from mlx_qwen35.server.report import Parted, parted

LOG = logging.getLogger("mlx_qwen35.server")
EVERY = 1.0  # seconds between two looks at the machine
RETRY = 10  # seconds after which a client may try again


class Upkeep:
    """Of one service. Any thread may call `prepared` and `check`, its engine thread the others.

    Args:
        model: whose files `loaded` expects to find again.
        clock: seconds. level: the machine's memory pressure. awake: whether the machine may sleep.
    """

    def __init__(
        self,
        model: Model,
        processor: Processor,
        options: ServerOptions,
        clock: Callable[[], float] = time.monotonic,
        level: Callable[[], int | None] = pressure,
        awake: Awake | None = None,
    ):
        self.processor, self.options, self.critical = processor, options, False
        self._clock, self._level, self._awake = clock, level, awake or Awake()
        self._used = self._looked = clock()
        # Seconds after which `tick` wants to be called where there is no work, too; None: it need not be.
        self.every = EVERY if options.idle_unload or level() is not None else None
        self._identity = _fingerprints(model) if options.session_dir or options.idle_unload else None
        self.files: PrefixFiles | None = None
        if options.session_dir:
            own = identity(model, processor) | {"template": template_digest(processor)}
            folder = options.session_dir.expanduser()
            try:
                self.files = PrefixFiles(folder, own, tell=LOG.warning)
            except InputError as error:
                if error.code != "session_busy":
                    raise
                rule = f"{spelled('session_dir')} {folder} is in use by another server; give another folder"
                raise InputError("session_busy", rule) from None

    def attach(self, library: PrefixLibrary) -> None:
        """A model was loaded, with a library of its own."""
        if self.files:
            self.files.attach(library)

    def detach(self) -> None:
        """The model is being unloaded."""
        LOG.info("the model is unloaded")
        if self.files:
            self.files.detach()

    def loaded(self, load: Callable[[], tuple[Model, Processor]]) -> Model:
        """The model, loaded again. ApiError where it cannot be, or its files are of another one."""
        began = self._clock()
        try:
            model = load()[0]
        except InputError as error:
            raise ApiError(503, "model_unavailable", f"the model cannot be loaded again: {error}") from error
        if self._identity and _fingerprints(model) != self._identity:
            files = "the model's files, or its adapters'," if model.adapters else "the model's files"
            message = f"{files} are not those that the server was started with; start it again"
            raise ApiError(503, "model_changed", message)
        LOG.info("the model was loaded again in %.1f s", self._clock() - began)
        return model

    def prepared(
        self, library: PrefixLibrary | None, prompt: Prompt, given: Any, tools: Any, adapter: str = ""
    ) -> Parted | None:
        """A request was made ready: have what the folder keeps of it in memory, and tell where it parts from others."""
        if library is None:
            return None
        try:
            library.recall(prefix_of(prompt, adapter))
            found = parted(library, self.processor, prompt, given, tools, adapter)
        except Exception:  # without it the prompt is read anew, which is right, too
            LOG.exception("what is stored of a prompt could not be looked up")
            return None
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

    def tick(self, working: bool, library: PrefixLibrary | None) -> bool:
        """Look at the machine, at most once in EVERY seconds; whether the model is to be unloaded.

        working: whether there are requests. library: None: the model is unloaded.
        """
        now = self._clock()
        if working:
            self._used = now
        if now - self._looked < EVERY:
            return False
        self._looked = now
        self._awake.set(working)
        level = self._level()
        self.critical = level == CRITICAL
        if library and level in (WARNING, CRITICAL):
            library.clear()
            mx.clear_cache()
        unused = (now - self._used) / 60
        return bool(library and self.options.idle_unload and unused >= self.options.idle_unload)

    def close(self) -> None:
        """Write what is not in the folder yet, and let the machine sleep."""
        self._awake.set(False)
        if self.files:
            self.files.close()
            LOG.info("what was read of prompts is kept in %s", self.options.session_dir)


def _fingerprints(model: Model) -> tuple[str, dict[str, str]]:
    """Of the model, and of each of its adapters by name."""
    return model.fingerprint(), {name: model.adapters.fingerprint(name) for name in model.adapters.names}
