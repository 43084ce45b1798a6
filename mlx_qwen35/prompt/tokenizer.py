"""A checkpoint's tokenizer, put together from its files with the library `tokenizers`. No code of the folder is run.

Ids and texts are those of transformers 5.23. It uses its class Qwen3_5Tokenizer for every checkpoint of this family,
for `tokenizer_class` in their folders is often wrong. That class takes vocabulary, merges, added tokens and
post-processor from the files. Normalizer, pre-tokenizer and decoder are its own, whatever tokenizer.json has; so here.
Truncation and padding of tokenizer.json are left out: a prompt is never cut.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_qwen35.errors import InputError
from mlx_qwen35.fields import JSON_BYTES, read_json
from mlx_qwen35.values import shown

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

END_TOKENS = ("<|im_end|>", "<|endoftext|>")  # the checkpoint's files name one each; both end a generation
TOKENIZER_BYTES = 128 << 20  # of tokenizer.json; the published one has 13 MB
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TEMPLATE = "chat_template.jinja"
_SPLIT = (  # contractions, words with their combining marks, single digits, symbols, line ends, blanks
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_NAMED_ANYWAY = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")  # unless the files say null
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

# Characters that stand for bytes in the vocabulary: printable Latin-1 for itself, the others from U+0100 on.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_BYTES = {chr(byte): byte for byte in _PRINTABLE}
_BYTES |= {chr(0x100 + i): byte for i, byte in enumerate(sorted({*range(0x100)} - {*_PRINTABLE}))}

Values = Mapping[str, Any]  # of a JSON file


class Tokenizer:
    """Text <-> token ids, as the checkpoint's tokenizer of transformers has them.

    Args:
        backend: what does the work.
        special_tokens: those that have a name, as eos_token; a chat template may use them.
        chat_template: its text; several texts by name; None for a checkpoint that completes raw text alone.
    """

    def __init__(self, backend: "Backend", special_tokens: Mapping[str, str], chat_template: Any = None):
        self.backend, self.special_tokens, self.chat_template = backend, special_tokens, chat_template

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with tokenizer.json and with the chat template."""
        return hashlib.sha256(f"{self.backend.to_str()}\0{self.chat_template!r}".encode()).hexdigest()[:16]

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The id of the end token that the files name, if they name one; Processor.stop_ids are all."""
        number = self.backend.token_to_id(self.special_tokens.get("eos_token", ""))
        return frozenset() if number is None else frozenset({number})

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text. The string of an added token, as <|im_end|>, becomes that token.

        add_special_tokens: whether tokenizer.json's post-processor adds its own; the published one has none to add.
        """
        return encode(self.backend, text, add_special_tokens)

    def decode(self, tokens: int | Sequence[int], skip_special_tokens: bool = False) -> str:
        tokens = [tokens] if isinstance(tokens, int) else list(tokens)
        return self.backend.decode(tokens, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; none where an id has no token."""
        text = self.backend.id_to_token(token)
        if text is None:
            return b""
        return text.encode() if token in self._added else bytes_of(text)

    def text_bytes(self, token: int) -> bytes:
        """The bytes that a token adds to a decoded text without special tokens."""
        return b"" if token in self._special else self.token_bytes(token)

    @cached_property
    def _special(self) -> frozenset[int]:
        added = self.backend.get_added_tokens_decoder()
        return frozenset(number for number, token in added.items() if token.special)

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self.backend.get_added_tokens_decoder())

    def get_vocab(self) -> dict[str, int]:
        """Each token and its id, added tokens among them; bytes stand as characters, a space as Ġ."""
        return self.backend.get_vocab(with_added_tokens=True)


def encode(backend: "Backend", text: str, add_special_tokens: bool = False) -> list[int]:
    """The ids of a text. Other threads go on meanwhile: the library's `encode` would keep Python's lock."""
    return backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids


def bytes_of(text: str) -> bytes:
    """The bytes that a token of the vocabulary stands for; of one that is not byte-level its text in UTF-8."""
    try:
        return bytes(map(_BYTES.__getitem__, text))
    except KeyError:
        return text.encode()


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder. InputError names a file that is absent, empty, too large or not text."""
    files = _read_files(folder)
    template = _read_template(folder, files["tokenizer_config.json"])
    try:
        backend, special_tokens = _assembled(*files.values())
    except BaseException as error:  # tokenizers raises Exception itself, and a panic of Rust, which is none
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(
            "tokenizer_invalid",
            f"the tokenizer files of {folder} could not be read ({type(error).__name__}: {str(error)[:200]}). "
            "Download them again",
        ) from error
    return Tokenizer(backend, special_tokens, template)


# --- files ---------------------------------------------------------------------------------------------------------


def _read_files(folder: Path) -> dict[str, Values]:
    """The JSON files by name; {} for one that is absent and need not be there."""
    if not (folder / "tokenizer.json").is_file():
        raise InputError(
            "tokenizer_missing",
            f"a checkpoint folder must hold tokenizer.json; {folder} does not. Download it again, whole",
        )
    files: dict[str, Values] = {}
    for file in (folder / name for name in _FILES):
        files[file.name] = read_json(file, TOKENIZER_BYTES) if file.is_file() else {}
        if file.is_file() and not files[file.name] and file.name in _FILES[:2]:
            raise InputError("tokenizer_invalid", f"{file} must describe a tokenizer; it is empty. Download it again")
    return files


def _read_template(folder: Path, settings: Values) -> Any:
    """The chat template, or several by name: of files of their own, else of tokenizer_config.json.

    chat_template.json comes last: transformers' tokenizers pass it by, and its processors read it.
    """
    files = {"default": folder / _TEMPLATE}
    files |= {file.stem: file for file in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    found: Any = {name: _read_text(file) for name, file in files.items() if file.is_file()}
    if found:
        return found["default"] if set(found) == {"default"} else found
    found, older = settings.get("chat_template"), folder / "chat_template.json"
    if found is None and older.is_file():
        found = read_json(older).get("chat_template")
    if not isinstance(found, list):
        return found
    try:
        return {template["name"]: template["template"] for template in found}
    except (KeyError, TypeError) as error:
        raise InputError(
            "tokenizer_invalid",
            f"the chat templates of {folder} must each have a name and a template. Download it again",
        ) from error


def _read_text(file: Path) -> str:
    with file.open("rb") as stream:
        data = stream.read(JSON_BYTES + 1)
    if len(data) > JSON_BYTES:
        raise InputError("tokenizer_invalid", f"{file} must have at most {JSON_BYTES:,} bytes; it has more")
    try:
        return io.StringIO(data.decode("utf-8-sig"), newline=None).read()  # its line ends as \n
    except UnicodeDecodeError as error:
        raise InputError("tokenizer_invalid", f"{file} must be UTF-8: {error}. Download it again") from error


# --- their values, which may be anything: all that is raised here becomes one InputError ----------------------------


def _assembled(
    description: Values, settings: Values, special_map: Values, added: Values
) -> tuple["Backend", dict[str, str]]:
    """The values of _FILES -> the tokenizer, and its special tokens by name."""
    listed = settings.get("added_tokens_decoder")
    if listed is not None:  # the whole list then, which replaces the three of older files
        named, unnamed = _special_tokens(settings)
        tokens = {int(number): _added_token(token) for number, token in listed.items()}
    else:
        named, unnamed = _special_tokens({**settings, **special_map})
        special = {token.content for token in (*named.values(), *unnamed)}
        tokens = {n: _added_token({"content": text, "special": text in special}) for text, n in added.items()}
        tokens |= {token["id"]: _added_token(token) for token in description.get("added_tokens", ())}
    names = {token.content for token in named.values()}
    for token in tokens.values():
        token.special = token.special or token.content in names
    known = {token.content for token in tokens.values()}
    unlisted = [token for token in (*named.values(), *unnamed) if token.content not in known]

    backend = _backend(description, settings.get("add_prefix_space") or False)
    backend.encode_special_tokens = settings.get("split_special_tokens") or False
    backend.add_tokens([*(tokens[number] for number in sorted(tokens)), *unlisted])
    return backend, {name: token.content for name, token in named.items()}


def _special_tokens(settings: Values) -> tuple[dict[str, "AddedToken"], list["AddedToken"]]:
    """The special tokens by name, and those without one."""
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    by_name, unnamed = (extra, []) if isinstance(extra, dict) else ({}, extra)
    own = {name: value for name, value in settings.items() if name.endswith("_token")}
    values = dict.fromkeys(_NAMES) | _NAMED_ANYWAY | own | by_name
    named = {
        name: _special_token(value)
        for name, value in values.items()
        if value is not None and (name in _NAMES or isinstance(value, str | dict))  # not the switch add_bos_token
    }
    return named, [_special_token(value) for value in unnamed]


def _special_token(value: Any) -> "AddedToken":
    return _added_token({"content": value, "special": True} if isinstance(value, str) else {**value, "special": True})


def _added_token(value: Values) -> "AddedToken":
    from tokenizers import AddedToken

    return AddedToken(value["content"], **{flag: value[flag] for flag in _FLAGS if flag in value})


def _backend(description: Values, prefix_space: bool) -> "Backend":
    """The tokenizer without added tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    model = description["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"its model must be of type BPE, got {shown(model['type'])}")
    bare = {**model, "type": "BPE", "vocab": {}, "merges": []}
    rest = Tokenizer.from_str(json.dumps({**description, "model": bare, "added_tokens": []}))  # checks the other parts
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model.get("merges") or ()]
    backend = Tokenizer(models.BPE(model["vocab"], merges))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    if rest.post_processor is not None:
        backend.post_processor = rest.post_processor
    return backend
