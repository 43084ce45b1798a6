"""The one exception for input that breaks a rule: its message says the rule, what came and what to do.

Programs and tests tell errors apart by `code`. Codes are stable; messages are not.
"""

CODES = {
    # models and where they come from
    "model_not_found": "there is no such folder, and no such repository on the hub",
    "hub_failed": "the hub could not be reached, or did not deliver",
    "repository_invalid": "the id to publish under is none",
    "upload_failed": "a folder could not be published",
    # files of a checkpoint
    "file_unreadable": "a file or folder of a checkpoint cannot be opened, or is not what its name says",
    "config_missing": "there is no config.json",
    "config_field_missing": "a field is absent for which no default would be right",
    "config_field_invalid": "a field of a JSON file is of the wrong type, out of range, or contradicts another",
    "config_field_unsupported": "a field asks for something that is not implemented",
    "json_invalid": "a file holds no JSON object",
    "model_type_unsupported": "the checkpoint is of another family",
    "weights_missing": "there is no safetensors file, or one that the index names is absent",
    "index_invalid": "the index of the safetensors files is damaged",
    "adapter_not_found": "there is no such adapter's folder, or it has no tensors",
    "adapter_invalid": "an adapter's files are damaged, or contradict each other",
    "adapter_unsupported": "an adapter is of a kind that is not run, or not beside the weights",
    "adapter_mismatch": "an adapter is for another model: unknown names or shapes that do not fit",
    "adapter_unknown": "no adapter of this name is loaded",
    "adapter_unmerged": "a folder holds an adapter, and was given as a model",
    "path_outside_folder": "a file that a checkpoint names lies outside of its folder",
    "safetensors_truncated": "a safetensors file is shorter than its header says",
    "safetensors_too_long": "a safetensors file is longer than its header says",
    "safetensors_invalid": "the header of a safetensors file is damaged",
    "tensor_duplicate": "a tensor is there twice",
    "tensors_mismatch": "tensors are missing, unexpected or misshapen",
    "layout_mixed": "the folder mixes the layouts of two programs",
    "layout_tag_unsupported": "a newer version of this program wrote the folder",
    "layout_tag_contradicted": "another program has rewritten the folder",
    "quantization_invalid": "a mode, a number of bits or a group size that MLX does not offer",
    "quantization_unsupported": "the weights are packed in a way that is not read here",
    "fp8_not_runnable": "FP8 weights can be converted and not run",
    "dtype_unsupported": "weights are stored in a dtype that is not read here",
    "weights_not_finite": "weights hold NaN or infinity",
    "tokenizer_missing": "there is no tokenizer.json",
    "tokenizer_invalid": "the tokenizer's files cannot be read",
    "chat_template_missing": "the checkpoint completes raw text alone",
    "chat_template_refused": "the chat template refuses the messages",
    "preprocessor_missing": "a settings file of images or videos is absent",
    "vision_missing": "the checkpoint has no vision encoder",
    "draft_head_missing": "the checkpoint has no draft head, or the named file is absent",
    "draft_head_unusable": "the draft head is damaged",
    "draft_head_contradicted": "config.json says of the draft head's norms what they cannot be",
    # options
    "option_invalid": "a value is of the wrong type or out of range",
    "option_missing": "something must be given",
    "option_unknown": "there is no option of this name",
    "option_conflict": "two options exclude each other",
    "thinking_budget_exceeded": "a thinking budget leaves no room for an answer",
    "option_no_effect": "an option would have no effect",
    "option_removed": "an option of an earlier version; the message says where it went",
    "grammar_invalid": "no answer can be held to a schema, a regular expression or a tool's parameters",
    "grammar_failed": "a grammar outgrew its limits while an answer was generated",
    "package_missing": "an optional package is not installed",
    # prompts
    "prompt_empty": "the prompt has no tokens",
    "prompt_invalid": "a prompt is neither text nor tokens nor messages",
    "message_empty": "a conversation's message has no content",
    "messages_invalid": "messages are not of the usual form",
    "message_part_invalid": "a part of a message is not of a known form",
    "placeholders_mismatch": "a text has more or fewer placeholders than images or videos",
    "text_invalid": "a text is not valid Unicode",
    "text_unreadable": "a text file or standard input cannot be read as UTF-8",
    "text_too_short": "a text has too few tokens",
    "tokens_invalid": "token ids are of the wrong shape or type, out of range, or stand for images",
    "context_length_exceeded": "prompt and answer do not fit into the model's context",
    "memory_exceeded": "something does not fit into memory",
    "generation_spent": "a generation was started that has run already",
    # the process
    "mlx_unusable": "MLX cannot be loaded: it has no backend, or its backend finds no driver",
    "process_forked": "the process was forked after MLX had started, whose threads it does not have",
    "address_unusable": "the server cannot listen on an address or a port",
    "current_folder_missing": "the current folder was removed, or must not be looked at",
    # the model
    "logits_not_finite": "activations left the range of the dtype, or the checkpoint is damaged",
    "lengths_invalid": "lengths of rows are out of range",
    "cache_batch_mismatch": "a cache is for another number of rows",
    "snapshot_foreign": "a snapshot is of another model, or of other rows",
    "embeddings_mismatch": "there are more or fewer embeddings than placeholders",
    # sessions
    "session_invalid": "a file is no session, or a damaged one",
    "session_foreign": "a session was made with another model, another adapter or other settings",
    "session_busy": "another process uses the session",
    "session_closed": "a session was given up, and can be saved no more",
    "turn_running": "a session cannot be saved while a turn runs",
    # images and videos
    "media_not_found": "there is no such file",
    "media_unreadable": "a file or folder cannot be opened",
    "media_source_invalid": "an image or video is given in a way that is not known",
    "media_empty": "there are no bytes, or no pixels",
    "media_not_opened": "a file is of no known kind, or damaged at its beginning",
    "media_damaged": "a file is cut short or damaged",
    "media_type_wrong": "a web page, an image in the place of a video, or the like",
    "media_too_large": "there are more pixels or bytes than allowed",
    "document_locked": "a PDF is encrypted with a password",
    "document_too_slow": "a page of a PDF takes too long to draw",
    "pages_invalid": "pages are chosen that a PDF does not have",
    "image_unsupported": "colours or sample formats that do not turn into RGB",
    "array_invalid": "an array is of the wrong shape, dtype or range",
    "aspect_ratio_exceeded": "an image is too long or too wide",
    "video_unsupported": "a video that FFmpeg does not decode, or whose frames have no times",
    "video_stream_missing": "a file has no video stream",
    "video_too_short": "a video has fewer than two frames",
    "video_too_long": "a video's frames do not fit into its budget of pixels",
    "video_sizes_differ": "the frames of a video have several sizes",
    "data_uri_invalid": "a data: URI is not whole",
    "url_refused": "an address that must not be followed",
    "fetch_failed": "a server could not be reached, or did not deliver",
    "fetch_timeout": "a server took too long",
    # training
    "data_missing": "a folder of training data has no rows to train on",
    "data_invalid": "a row of training data breaks a rule",
    "loss_not_finite": "a loss or a gradient is not finite",
    "run_invalid": "what a training run or an evaluation has saved is damaged, or is of another run",
    # evaluation
    "task_unknown": "there is no evaluation task of this name",
    "task_invalid": "the file of a task, or of its questions, does not hold what one must",
    # several machines
    "peer_unreachable": "another machine, or another rank, cannot be reached or lacks what it needs",
    "ranks_unsupported": "a command, or an option, is for one process alone, and several ranks were started",
    "split_unfit": "a model's heads, widths or layers cannot be divided so over machines",
    "ring_failed": "MLX cannot join the machines",
    "control_failed": "the other machines cannot reach rank 0 beside MLX's collectives",
    "ranks_differ": "machines that hold one model have different versions, checkpoints or settings",
    # conversion and measurement
    "target_refused": "the folder to write is a file, is not empty, or holds something else than a checkpoint",
    "target_overlaps_source": "what is read and what is written or removed are not apart",
    "target_busy": "another process writes the same folder",
    "disk_full": "the disk has too little room",
    "output_unwritable": "a file, a folder or standard output cannot be written",
    "output_differs": "what was written does not read back the same",
    "resume_differs": "the conversion, the training run or the evaluation to go on with was another one",
    "journal_damaged": "what a killed conversion had noted was changed since",
    "source_changed": "a file changed while it was read",
    "source_unreadable": "a file of the source cannot be read",
    "source_quantized": "a measurement, or a conversion that is kept, needs an unquantized checkpoint",
    "recipe_not_found": "there is no recipe of that name, and no such file",
    "recipe_invalid": "a recipe file does not hold what one must",
    "quantization_unfit": "a group size does not divide a matrix",
    "weights_overflow": "weights or scales do not fit the dtype that they are to be stored in",
    "models_differ": "two checkpoints to compare are not of one model",
    "bench_failed": "a program could not be measured",
}


class EmptyAnswer(RuntimeWarning):
    """An answer has no text, since thinking took all of its tokens."""


class InputError(ValueError):
    """Something the caller can mend: a path, a file, an option, a prompt. The commands print it without a traceback.

    code: one of CODES, which says what each means. fault: the message without its advice, where that was given apart.
    str() is all of the message.
    """

    def __init__(self, code: str, fault: str, advice: str = ""):
        assert code in CODES, f"{code} is not among the codes of {__name__}"
        super().__init__(*filter(None, (code, fault, advice)))
        self.code, self.fault = code, fault

    def __str__(self) -> str:
        return ". ".join(self.args[1:])
