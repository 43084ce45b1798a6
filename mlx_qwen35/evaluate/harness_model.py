"""A model as lm-eval sees it. Imports lm-eval, so it is itself imported where a task of lm-eval runs, nowhere else."""

from lm_eval.api.model import LM

from mlx_qwen35.evaluate.harness_requests import Answers


class Harness(Answers, LM):
    """Answers in the log of a run, as a model of lm-eval."""

    MULTIMODAL = True
