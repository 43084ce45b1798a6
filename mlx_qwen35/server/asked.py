"""Fields of a request -> options of `generate`. What OpenAI's, Anthropic's and other servers' clients call them."""

from collections.abc import Collection, Mapping
from typing import Any

from mlx_qwen35.engine.options import GenerationOptions, PromptOptions
from mlx_qwen35.engine.presets import Sampling
from mlx_qwen35.prompt.messages import MOST_TOOLS
from mlx_qwen35.server.errors import ApiError
from mlx_qwen35.server.fields import Fields
from mlx_qwen35.server.service import Service

MOST_ANSWERS, MOST_STOPS, MOST_BIASES, MOST_TOP, MOST_MESSAGES = 8, 16, 1024, 20, 4096
EFFORTS = {name: name for name in ("none", "minimal", "low", "medium", "high")} | {"xhigh": "high", "max": "high"}
BUDGETS = ("thinking_budget", "thinking_token_budget", "thinking_budget_tokens")
# Fields of other servers -> the form's option.
FORMS = {"json_schema": "json_schema", "regex": "regex", "choice": "choice",
         "guided_json": "json_schema", "guided_regex": "regex", "guided_choice": "choice"}  # fmt: skip

# Fields that have an effect at one endpoint or another.
_FIELDS = (
    "messages", "system", "prompt", "input", "instructions", "n", "stop", "stop_sequences", "max_tokens",
    "max_completion_tokens", "max_output_tokens", "logprobs", "top_logprobs", "stream_options", "loop_guard", "tools",
    "tool_choice", "parallel_tool_calls", "enable_thinking", "chat_template_kwargs", "reasoning_effort", "reasoning",
    "thinking", *BUDGETS, "continue_final_message", "add_generation_prompt", "output_config", "output_format", "text",
    "response_format", "structured_outputs", *FORMS,
)  # fmt: skip
# Fields that other servers have, by why they are not here, and the values that ask for nothing.
_DECLINED: Mapping[str, tuple[str, Collection[Any]]] = {
    "audio": ("this model neither hears nor speaks", ()),
    "functions": ("it is outdated. Use tools", ([],)),
    "function_call": ("it is outdated. Use tool_choice", ("none", "auto")),
    "prediction": ("the model's own head drafts its tokens", ()),
    "web_search_options": ("this server searches nothing. Offer a tool", ()),
    "verbosity": ("tell the model in a message", ("medium",)),
    "best_of": ("take n", (1,)),
    "use_beam_search": ("answers are sampled", (False,)),
    "length_penalty": ("answers are sampled", (1,)),
    "min_tokens": ("an answer ends where the model ends it", (0,)),
    "ignore_eos": ("an answer ends where the model ends it", (False,)),
    "stop_token_ids": ("use stop", ([],)),
    "include_stop_str_in_output": ("the answer ends before it", (False,)),
    "prompt_logprobs": ("only generated tokens have log-probabilities", (0,)),
    "echo": ("the answer is what is new", (False,)),
    "guided_grammar": ("use json_schema, regex or choice", ()),
    "grammar": ("use json_schema, regex or choice", ("",)),
    "chat_template": ("the checkpoint's is used", ()),
    "documents": ("put them into a message", ([],)),
    "mm_processor_kwargs": ("a part of a message may have fps and num_frames, min_pixels and max_pixels", ({},)),
    "typical_p": ("use top_p, top_k and min_p", (1,)),
    "mirostat": ("use top_p, top_k and min_p", (0,)),
}
# Fields that change nothing of an answer.
_IDLE = ("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "cache_prompt",
         "prompt_cache_retention", "priority", "request_id", "skip_special_tokens", "add_special_tokens")  # fmt: skip


def model(body: Fields, service: Service) -> str:
    """The id of the model that is asked for, with its adapter. Any name is served by the model alone, unless the server
    is strict or the name is that of an adapter.
    """
    name = body.text("model", None)
    if name is None or name in service.models:
        return name or service.default
    if service.options.strict_model or _names_adapter(name, service):
        raise unknown_model(service)
    return service.default


def _names_adapter(name: str, service: Service) -> bool:
    """Whether a name that is not served means an adapter, which no answer of the model alone may stand for."""
    ids = [f":{adapter}" for adapter in service.models.values() if adapter]
    return name.startswith(f"{service.name}:") or f":{name}".endswith(tuple(ids))


def unknown_model(service: Service) -> ApiError:
    served = ", ".join(service.models)
    told = f"this one is {served}" if len(service.models) == 1 else f"there are {served}"
    return ApiError(404, "model_not_found", f"there is no model of that name; {told}", "model")


def streaming(body: Fields) -> tuple[bool, bool]:
    """Whether an answer is streamed, and whether the stream tells its usage."""
    stream, options = body.flag("stream", False), body.object("stream_options", None)
    if not options:
        return stream, False
    if not stream:
        raise body.error("stream_options", "must be given with stream", code="option_no_effect")
    usage = options.flag("include_usage", False)
    options.refuse("continuous_usage_stats", "usage is told in the end")
    options.ignore("include_obfuscation")
    options.done()
    return True, usage


def settle(body: Fields) -> None:
    """Refuse what has no effect here, and what has none anywhere. The last look at a body."""
    for name in body.unread(_FIELDS):
        body.refuse(name, "it has no effect at this endpoint", idle=("", [], {}))
    for name, (why, idle) in _DECLINED.items():
        body.refuse(name, why, idle)
    modalities = body.items("modalities", [])
    if any(kind != "text" for kind in modalities):
        raise body.error("modalities", "must be text alone", modalities, "unsupported_field")
    body.ignore(*_IDLE)
    body.done()


# --- how tokens are chosen, and how many ------------------------------------------------------------------------------


def sampling(body: Fields, service: Service) -> dict[str, Any]:
    body.number("temperature", None, least=0, most=2)
    options = body.option("temperature", Sampling, "temp") | body.option("seed", GenerationOptions)
    if isinstance(body.any("seed", None), list):
        raise body.error("seed", "must be a number")
    for name in ("top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "xtc_probability"):
        options |= body.option(name, Sampling)
    for name, other in (("min_tokens_to_keep", "min_p"), ("xtc_threshold", "xtc_probability")):
        given = body.option(name, Sampling)
        if given and other not in options:
            raise body.error(name, f"must be given with {other}", code="option_no_effect")
        options |= given if options.get(other) else {}  # a client that sends every default sends 0, which is off
    if options.get("temp") == 0 and options.get("xtc_probability"):
        raise body.error("xtc_probability", "must be 0 where temperature is 0", code="option_conflict")
    options |= {"top_k": 0} if body.any("top_k", None) == -1 else body.option("top_k", Sampling)
    return options | _biases(body, service.processor.vocabulary)


def _biases(body: Fields, vocabulary: int) -> dict[str, Any]:
    """JSON has no numbers for keys: token ids come as text."""
    given = body.any("logit_bias", {})
    rule = f"must map at most {MOST_BIASES:,} token ids, from 0 to {vocabulary - 1}, to numbers from -100 to 100"
    if not isinstance(given, Mapping) or len(given) > MOST_BIASES:
        raise body.error("logit_bias", rule)
    biases = {}
    for key, bias in given.items():
        token = int(key) if key.isascii() and key.isdecimal() and len(key) < 10 else vocabulary
        number = isinstance(bias, int | float) and not isinstance(bias, bool) and -100 <= bias <= 100
        if token >= vocabulary or not number:
            raise body.error("logit_bias", rule, {key: bias})
        biases[token] = float(bias)
    return {"logit_bias": biases} if biases else {}


def most_tokens(body: Fields, *names: str) -> dict[str, Any]:
    """The most tokens of an answer, by the first of the names that is given."""
    found = [(name, most) for name in names if (most := body.whole(name, None, least=1)) is not None]
    if not found:
        return {}
    body.about["memory_exceeded"] = body.place(found[0][0])
    return {"max_tokens": found[0][1]}


def stops(body: Fields, name: str = "stop") -> dict[str, Any]:
    given = body.any(name, [])
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or len(texts) > MOST_STOPS or not all(isinstance(t, str) and t for t in texts):
        raise body.error(name, f"must be a text or at most {MOST_STOPS} of them, none empty", given)
    return {"stop": texts} if texts else {}


# --- thinking ---------------------------------------------------------------------------------------------------------


def thinking(body: Fields) -> dict[str, Any]:
    """The switch, under the names that clients have for it, and a budget. A number goes before an effort."""
    meant = {body.place("enable_thinking"): body.flag("enable_thinking", None)}
    if switches := body.object("chat_template_kwargs", None):
        meant[switches.place("enable_thinking")] = switches.flag("enable_thinking", None)
        switches.only("only enable_thinking is")
    effort = EFFORTS.get(body.choice("reasoning_effort", EFFORTS, ""))
    meant[body.place("reasoning_effort")] = None if effort is None else effort != "none"
    budgets = {body.place(name): body.whole(name, None, least=0) for name in BUDGETS}
    if mode := body.object("thinking", None):
        kind = mode.choice("type", ("enabled", "disabled", "adaptive"))
        meant[mode.place("type")] = {"enabled": True, "disabled": False}.get(kind)
        budgets[mode.place("budget_tokens")] = mode.whole("budget_tokens", None, least=0)
        mode.done()
    given = {place: budget for place, budget in budgets.items() if budget is not None}
    _agree(body, given)
    on = _agree(body, {place: on for place, on in meant.items() if on is not None} | dict.fromkeys(given, True))
    body.about |= dict.fromkeys(["thinking_budget_exceeded"] * bool(given), next(iter(given), ""))
    if given:
        return {"thinking_budget": next(iter(given.values()))}
    if on and effort:
        return {"reasoning_effort": effort}
    return {} if on is None else {"enable_thinking": on}


def _agree(body: Fields, said: Mapping[str, Any]) -> Any:
    """What all these fields say."""
    if len(set(said.values())) > 1:
        *_, last = said
        raise ApiError(400, "option_conflict", f"{', '.join(said)} must not contradict each other", last)
    return next(iter(said.values()), None)


# --- calls and forms --------------------------------------------------------------------------------------------------


def tools(body: Fields) -> dict[str, Any]:
    """Tools in OpenAI's form, and how they may be called."""
    parallel, names = body.flag("parallel_tool_calls", True), []
    for tool in body.objects("tools", [], most=MOST_TOOLS):
        tool.choice("type", ("function",))
        function = tool.object("function")
        names.append(function.text("name"))
        if names[-1] in ("none", "auto", "required"):
            raise function.error("name", "must be another one: tool_choice means something else by it", names[-1])
    choice = _choice(body, names)
    if not names:
        return {}
    body.about |= dict.fromkeys(("grammar_invalid", "package_missing"), body.place("tools"))
    return body.option("tools", PromptOptions) | {"parallel_tool_calls": parallel} | choice


def _choice(body: Fields, names: Collection[str]) -> dict[str, Any]:
    given = body.any("tool_choice", "auto")
    if not isinstance(given, str):
        choice = body.object("tool_choice")
        choice.choice("type", ("function",))
        given = choice.object("function").text("name")
    elif given in ("none", "auto"):
        return {"tool_choice": given}
    if given not in names and not (names and given == "required"):
        raise body.error("tool_choice", "must be none, auto, required or one of the tools", given)
    return {"tool_choice": given}


def form(body: Fields) -> dict[str, Any]:
    """The form of the answer, by one of the fields that ask for one."""
    found = {name: asked for name, own in FORMS.items() if (asked := body.option(name, GenerationOptions, own))}
    if outputs := body.object("structured_outputs", None):
        for name, own in {"json": "json_schema", "regex": "regex", "choice": "choice"}.items():
            if asked := outputs.option(name, GenerationOptions, own):
                found[outputs.place(name)] = asked
        outputs.only("json, regex and choice are")
    if wanted := _response_format(body):
        found["response_format"] = wanted
    if len(found) > 1:
        raise ApiError(400, "option_conflict", f"{', '.join(found)}: an answer has one form", list(found)[-1])
    for name, asked in found.items():
        body.about |= dict.fromkeys(("grammar_invalid", "package_missing", "option_conflict"), name)
        return asked
    return {}


def _response_format(body: Fields) -> dict[str, Any]:
    wanted = body.object("response_format", None)
    if not wanted or wanted.choice("type", ("text", "json_object", "json_schema")) == "text":
        return {}
    if wanted.text("type") == "json_schema":
        wanted.object("json_schema").object("schema")
    return body.option("response_format", GenerationOptions)
