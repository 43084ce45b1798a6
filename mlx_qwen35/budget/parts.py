"""What a memory plan is made of, for pictures: parts that add up to its peak."""

from mlx_qwen35.budget.plan import MemoryPlan

WEIGHTS, VISION_ENCODER, DRAFT_HEAD = "weights", "vision encoder", "draft head"
KEYS_AND_VALUES, STATE, WORKING = "keys and values", "state", "working memory"
LABELS = (WEIGHTS, VISION_ENCODER, DRAFT_HEAD, KEYS_AND_VALUES, STATE, WORKING)


def parts(plan: MemoryPlan) -> list[tuple[str, int]]:
    """Label and bytes of each part, in the order of LABELS. Their sum is `peak`.

    The vision encoder is unloaded before keys and values are allocated. Its part is what a first turn with an image
    takes beyond a turn of text: 0 where a long text takes more.
    """
    sizes = (
        plan.weights, peak(plan) - plan.text, plan.drafts, plan.kv, plan.state, plan.working + plan.buffers,
    )  # fmt: skip
    return list(zip(LABELS, sizes, strict=True))


def peak(plan: MemoryPlan) -> int:
    """Bytes that a conversation takes at most, with an image in its first turn where one was planned for."""
    return plan.image
