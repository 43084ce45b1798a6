"""What the grammars of one processor share. It is made when the first of them is asked for."""

import threading
from collections import OrderedDict
from functools import cached_property
from weakref import WeakKeyDictionary

from mlx_qwen35.engine.constraints.guidance import Grammar
from mlx_qwen35.engine.constraints.raw import RawTexts
from mlx_qwen35.engine.constraints.vocabulary import Vocabulary
from mlx_qwen35.prompt.processor import Processor

_KEPT = 256  # grammars: those of the tools of an agent, which come again with each of its turns


class Compiler:
    """Makes grammars for one vocabulary, and keeps the newest."""

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self._grammars: OrderedDict[str, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    @cached_property
    def raw(self) -> RawTexts:
        return RawTexts(self.vocabulary)

    def grammar(self, rules: str, what: str) -> Grammar:
        """See Grammar."""
        with self._lock:
            if rules not in self._grammars:
                self._grammars[rules] = Grammar(self.vocabulary, rules, what)
            self._grammars.move_to_end(rules)
            if len(self._grammars) > _KEPT:
                self._grammars.popitem(last=False)
            return self._grammars[rules]


_COMPILERS: WeakKeyDictionary[Processor, Compiler] = WeakKeyDictionary()
_LOCK = threading.Lock()


def compiler_of(processor: Processor) -> Compiler:
    """The compiler of a processor, made at the first call."""
    with _LOCK:
        if processor not in _COMPILERS:
            vocabulary = Vocabulary(processor.tokenizer.backend, processor.vocabulary, processor.stop_ids)
            _COMPILERS[processor] = Compiler(vocabulary)
        return _COMPILERS[processor]
