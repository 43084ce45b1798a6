"""One program in a process of its own: python worker.py PROGRAM FOLDER DTYPE OPTIONS, then one JSON request a line on
stdin. OPTIONS is a JSON object of the program's loader: of ours rope_scaling, adapter and adapter_scale as `load` takes
them, of mlx-lm adapter, a folder.

The first line of output says that the model is loaded; each further one answers a request. {"prompt", "decode", "step"}
runs the model once, {"products": passes} times the linear maps alone. With the option "train" the program trains, see
train_worker.py: {"tokens", "steps"} makes steps. A failure ends the process with its traceback.

The file is run as a script, not as a module, so that a program imports nothing of the others.

All MLX programs run in the same loop: prefill in chunks of `step` tokens, logits of the last token only, then greedy
decoding, where each step is queued while the one before is computed, as in mlx-lm and mlx-vlm.
"""

import itertools
import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NamedTuple, TextIO

Times = tuple[float, list[float]]  # seconds for the prompt, and for each token after the first


class Network(NamedTuple):
    """An MLX model, for the loop."""

    make_cache: Callable[[], Any]
    hidden: Callable[[Any, Any], Any]  # tokens (1, T), cache -> (1, T, D) after the final norm
    logits: Callable[[Any], Any]  # (1, 1, D) -> (1, 1, V)
    evaluate: Callable[[Any], None]  # a cache


def run_network(network: Network, prompt: list[int], decode: int, step: int) -> Times:
    import mlx.core as mx

    tokens, cache = mx.array([prompt]), network.make_cache()

    def next_token(tokens: mx.array) -> mx.array:
        return mx.argmax(network.logits(network.hidden(tokens, cache)[:, -1:]), axis=-1)

    start = time.perf_counter()
    last = (len(prompt) - 1) // step * step
    for begin in range(0, last, step):
        network.hidden(tokens[:, begin : begin + step], cache)
        network.evaluate(cache)
    token = next_token(tokens[:, last:])
    mx.eval(token)
    network.evaluate(cache)
    stamps = [time.perf_counter()]
    mx.async_eval(token := next_token(token))
    for _ in range(decode):
        following = next_token(token)
        mx.async_eval(following)
        token.item()
        stamps.append(time.perf_counter())
        token = following
    mx.synchronize()
    return stamps[0] - start, [after - before for before, after in itertools.pairwise(stamps)]


class MLXProgram:
    """A model that runs in MLX, with its weights cast to one dtype."""

    def __init__(self, network: Network, model: Any):
        self.network, self.model = network, model

    def run(self, prompt: list[int], decode: int, step: int) -> dict[str, Any]:
        import mlx.core as mx

        mx.clear_cache()
        mx.reset_peak_memory()
        prefill, tokens = run_network(self.network, prompt, decode, step)
        return {"prefill_s": prefill, "decode_s": tokens, "mlx_peak_bytes": mx.get_peak_memory()}

    def products(self, passes: int) -> dict[str, Any]:
        """Seconds of each pass of one row through all linear maps, the LM head too. For our model only."""
        import mlx.core as mx

        from mlx_qwen35.model.layers import Embedding, Linear

        tied = self.model.config.tie_word_embeddings
        maps = [m for _, m in self.model.named_modules() if isinstance(m, Linear)]
        maps = maps if tied else [m for m in maps if not isinstance(m, Embedding)]
        widths = [m.weight.shape[1] * 32 // m.quantization.bits if m.quantization else m.weight.shape[1] for m in maps]
        rows = {width: mx.random.normal((1, 1, width)).astype(self.model.dtype) for width in widths}
        mx.eval(rows)
        seconds = []
        for _ in range(passes):
            start = time.perf_counter()
            mx.eval([m(rows[width]) for m, width in zip(maps, widths, strict=True)])
            seconds.append(time.perf_counter() - start)
        return {"products_s": seconds}


def cast(model: Any, dtype: str) -> Any:
    """Cast a peer's floating-point weights; float32 ones stay float32 if the dtype is a 16-bit one."""
    import mlx.core as mx

    halves = (mx.float16, mx.bfloat16)
    model.set_dtype(getattr(mx, dtype), lambda d: d in halves or (dtype == "float32" and mx.issubdtype(d, mx.floating)))
    mx.eval(model.parameters())
    return model.eval()


def evaluate_states(cache: Any) -> None:
    """Evaluate a peer's cache, as its own generate does between chunks of a prompt."""
    import mlx.core as mx

    mx.eval([layer.state for layer in cache])


def load_mlx_qwen35(
    folder: Path, dtype: str, rope_scaling: str | None = None, adapter: Any = None, adapter_scale: float = 1.0
) -> MLXProgram:
    sys.path.append(str(Path(__file__).parents[2]))  # for a checkout that is not installed
    from mlx_qwen35.checkpoint.adapter_choice import choose
    from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
    from mlx_qwen35.checkpoint.dtypes import DTYPES
    from mlx_qwen35.load import load_model
    from mlx_qwen35.machine.chip import tune
    from mlx_qwen35.model.pace import Pace

    tune()  # as our commands do, and in this process alone
    checkpoint = open_checkpoint(folder, rope_scaling=rope_scaling)
    adapters = choose(adapter, adapter_scale, checkpoint)
    model = load_model(checkpoint, DTYPES[dtype], str(folder), adapters=adapters)
    active = model.adapters.active([model.adapters.default])

    def hidden(tokens: Any, cache: Any) -> Any:
        return model.hidden(tokens, cache, pace=Pace()) if tokens.shape[1] > 1 else model.hidden(tokens, cache)

    def logits(hidden: Any) -> Any:
        return model.logits(hidden, active)

    return MLXProgram(Network(model.make_cache, hidden, logits, lambda cache: cache.evaluate()), model)


def load_mlx_lm(folder: Path, dtype: str, adapter: str | None = None) -> MLXProgram:
    from mlx_lm.utils import load_adapters, load_model

    model = load_model(folder)[0]
    model = cast(load_adapters(model, adapter) if adapter else model, dtype)
    text = model.language_model
    head = text.model.embed_tokens.as_linear if text.args.tie_word_embeddings else text.lm_head
    return MLXProgram(Network(text.make_cache, text.model, head, evaluate_states), model)


def load_mlx_vlm(folder: Path, dtype: str) -> MLXProgram:
    from mlx_vlm.utils import load_model

    model = cast(load_model(folder), dtype)
    text = model.language_model
    head = text.model.embed_tokens.as_linear if text.args.tie_word_embeddings else text.lm_head

    def hidden(tokens: Any, cache: Any) -> Any:
        return text(tokens, cache=cache, skip_logits=True, return_hidden=True).hidden_states[-1]

    return MLXProgram(Network(text.make_cache, hidden, head, evaluate_states), model)


class Transformers:
    """The reference in PyTorch, on the CPU. It prefills a prompt in one piece, as its generate does."""

    def __init__(self, folder: Path, dtype: str):
        import torch
        from transformers import Qwen3_5ForConditionalGeneration

        self.model = Qwen3_5ForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def run(self, prompt: list[int], decode: int, step: int) -> dict[str, Any]:
        import torch

        stamps, cache, tokens = [time.perf_counter()], None, torch.tensor([prompt])
        with torch.inference_mode():
            for _ in range(decode + 1):
                out = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, tokens = out.past_key_values, out.logits[:, -1:].argmax(-1)
                tokens.item()
                stamps.append(time.perf_counter())
        seconds = [after - before for before, after in itertools.pairwise(stamps)]
        return {"prefill_s": seconds[0], "decode_s": seconds[1:], "mlx_peak_bytes": None}


LOADERS: dict[str, Callable[..., Any]] = {
    "mlx_qwen35": load_mlx_qwen35, "mlx-lm": load_mlx_lm, "mlx-vlm": load_mlx_vlm, "transformers": Transformers,
}  # fmt: skip


def blas(process: int | str = "self") -> dict[str, list[str]]:
    """On Linux the BLAS libraries in a process, and those of LD_PRELOAD that the loader could not find."""
    maps = Path(f"/proc/{process}/maps")
    files = {Path(line.split()[-1]) for line in maps.read_text().splitlines()} if maps.exists() else set()
    wanted = [Path(path) for path in os.environ.get("LD_PRELOAD", "").replace(":", " ").split()]
    return {
        "loaded": sorted({file.name for file in files if any(name in file.name for name in ("blas", "mkl", "blis"))}),
        "preloaded": [path.name for path in wanted if path.resolve() in files],
        "not_found": [path.name for path in wanted if path.resolve() not in files],
    }


def max_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def training() -> Any:
    """The module train_worker.py, without its package, which imports our program."""
    spec = spec_from_file_location("train_worker", Path(__file__).with_name("train_worker.py"))
    assert spec is not None and spec.loader is not None, "it stands beside this file"
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answer(program: Any, vocabulary: int, request: dict[str, Any]) -> dict[str, Any]:
    if "products" in request:
        return program.products(request["products"])
    if "steps" in request:
        rows = training().rows(request["tokens"], request["steps"], vocabulary)
        return program.train(rows) | {"max_rss_bytes": max_rss_bytes()}
    generator = random.Random(0)
    prompt = [generator.randrange(vocabulary // 2) for _ in range(request["prompt"])]  # special tokens come last
    return program.run(prompt, request["decode"], request["step"]) | {"max_rss_bytes": max_rss_bytes()}


def serve(name: str, folder: Path, dtype: str, options: dict[str, Any], replies: TextIO) -> None:
    """options: those of the program's loader."""
    config = json.loads((folder / "config.json").read_text())
    vocabulary = config.get("text_config", config)["vocab_size"]
    loaders = training().LOADERS if options.pop("train", False) else LOADERS
    program = loaders[name](folder, dtype, **options)
    torch = sys.modules.get("torch") if name == "transformers" else None
    print(json.dumps({"blas": blas(), "torch_threads": torch and torch.get_num_threads()}), file=replies)
    for line in sys.stdin:
        print(json.dumps(answer(program, vocabulary, json.loads(line))), file=replies)


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not come between the replies
    name, folder, dtype, options = sys.argv[1:]
    os.environ.setdefault("MLX_ENABLE_TF32", "0")  # for all programs alike: float32 is float32
    serve(name, Path(folder), dtype, json.loads(options), replies)


if __name__ == "__main__":
    main()
